"""
Open a page that shows features: principal components in colour, similarity to a clicked point, two models side by side.

    python -m evaluation.explore --model ID_OR_DIR [--model ...] --images DIR|video.mp4 [--readout DIR] [--features stage3] [--port 7860]

The page can be opened only on this machine. `--space DIR` writes a Space of the Hub instead: this file is copied there as app.py and reads
its flags from the explore.yaml beside it.
"""

import dataclasses
import importlib.metadata
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

import evaluation
import modeling_poodle
from evaluation.explore_features import list_media
from evaluation.explore_views import Explorer
from evaluation.recipe import models, read_with_models
from modeling_poodle.recipe_files import CheckedRecipe, described, run_script

SETTINGS = "explore.yaml"


@dataclass
class ExploreRecipe(CheckedRecipe):
    """Settings of the page."""

    model: list[str] = models("Two of several are compared.")
    images: str | None = described(None, "Picture, video, or folder of them to pick from; unset: uploads alone.")
    readout: str | None = described(
        None, "Folder of a fitted readout (readout/ of evaluation/segment.py), or a Hub id."
    )
    features: str | None = described(
        None,
        "Map to look at: decoder, or a stage (stage1 to stage4; of ViTs one a layer); unset: the SDM's, else the last stage's.",
    )
    max_side: int = described(512, "Pixels of the longer side; larger pictures are shrunk.")
    port: int | None = described(None, "Port on this machine; unset: a free one from 7860.")
    space: str | None = described(None, "Write a Space of the Hub into this folder instead of opening the page.")

    def __post_init__(self):
        self.need_declared()
        self.need_models()
        trained = not any(name.startswith("random:") for name in self.model)
        self.need(trained or self.images is not None, "images", "given for random:MODEL: its BatchNorm needs them")
        self.need(32 <= self.max_side <= 2048, "max_side", "from 32 to 2048 pixels")
        self.need(self.port is None or 0 < self.port < 65536, "port", "from 1 to 65535")


def parse_explore(arguments: list[str] | None = None) -> ExploreRecipe:
    beside = Path(__file__).with_name(SETTINGS)
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments and beside.is_file():  # a Space starts its app without flags
        arguments = ["--config", str(beside)]
    return read_with_models(ExploreRecipe, arguments, "A page to look at features.")


def main(arguments: list[str] | None = None) -> None:
    recipe = parse_explore(arguments)
    if recipe.space is not None:
        write_space(recipe)
        return
    try:
        from evaluation.explore_page import open_page
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ValueError("the page needs gradio: pip install 'modeling-poodle[explore]'") from None
    open_page(Explorer(recipe.model, recipe.images, recipe.readout, recipe.features, recipe.max_side), recipe.port)


# --- Space ---


def write_space(recipe: ExploreRecipe) -> None:
    """
    Write a Space of the Hub: this file as app.py, the two packages it needs, the requirements, the flags, the images and the Hub's README.

    Raises:
        ValueError: the folder is not empty, gradio is not installed, a model or readout lies on this machine, where a Space cannot see it,
            or an image is a link.
    """
    folder = Path(recipe.space)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"space {folder} must be a new or an empty folder")
    try:
        gradio = importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError("a Space names its version of gradio: pip install 'modeling-poodle[explore]'") from None
    for name in (*recipe.model, *([recipe.readout] if recipe.readout else [])):
        if Path(name.removeprefix("random:")).exists():
            raise ValueError(
                f"space: {name} lies on this machine, where a Space cannot see it; publish it (python -m training.publish) and give "
                "its Hub id"
            )
    media = list_media(recipe.images)
    for _, path in media:
        if Path(path).is_symlink():
            raise ValueError(f"space: {path} is a link to {Path(path).resolve()}; put the file itself there")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(__file__, folder / "app.py")
    for package in (evaluation, modeling_poodle):
        source = Path(package.__file__).parent
        shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, path in media:
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / "images" / name)
    values = dataclasses.asdict(dataclasses.replace(recipe, images="images" if media else None, port=None, space=None))
    given = {name: value for name, value in values.items() if value is not None}
    (folder / SETTINGS).write_text(yaml.safe_dump(given, sort_keys=False), encoding="utf-8")
    needed = [r for r in importlib.metadata.requires("modeling-poodle") if "extra ==" not in r]
    (folder / "requirements.txt").write_text("\n".join(needed) + "\n", encoding="utf-8")
    models = [name for name in recipe.model if not name.startswith("random:")]
    head = {
        "title": "Look at features",
        "emoji": "🐩",
        "colorFrom": "green",
        "colorTo": "indigo",
        "sdk": "gradio",
        "sdk_version": gradio,
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
        "app_file": "app.py",
        "license": "apache-2.0",
        "models": models + ([recipe.readout] if recipe.readout else []),
    }
    text = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    (folder / "README.md").write_text(
        f"---\n{text}---\n\nFeatures of {', '.join(recipe.model)}, to be looked at.\n", encoding="utf-8"
    )
    print(f"{folder}: a Space; send it with\n  hf upload USER/NAME {folder} --repo-type space")


if __name__ == "__main__":
    run_script(main)
