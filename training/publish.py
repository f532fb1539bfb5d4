"""
Send a run, or one folder of weights, to the Hub.

    python -m training.publish DIR --repo_id org/name [--which student] [--evaluation FILE ...] [--private] [--no_panel] [--dry_run]

DIR is a run, or one of the folders encoder/, model/, readout/ or detector/. If DIR is a run, its encoder/ goes to org/name, and its model/
goes to org/name-sdm if it has a decoder or dilation. If DIR is a run of train_flow.py, its model/ goes to org/name. Only these files are
sent: safetensors, configs, the card with its picture, and the code if the architecture is PooDLe's own.
"""

import argparse
import concurrent.futures
import json
import logging
import shutil
import tempfile
import threading
from pathlib import Path

from huggingface_hub import get_token
from safetensors import SafetensorError, safe_open

from modeling_poodle.folders import sha256_of
from modeling_poodle.recipe_files import run_script
from modeling_poodle.remote_code import add_code
from training import cards
from training.checkpoints import export_network
from training.hub import PANEL, belongs, check_repo_id, push
from training.resnet_names import add_timm, timm_architecture

logger = logging.getLogger("poodle")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("training.publish", description="Send a run or a folder of weights to the Hub.")
    parser.add_argument(
        "folder", metavar="DIR", type=Path, help="A run, or one of its encoder/, model/, or readout/, detector/."
    )
    parser.add_argument("--repo_id", required=True, help="Name on the Hub: org/name.")
    parser.add_argument(
        "--which",
        choices=("teacher", "student"),
        default="teacher",
        help="Network of the run; the teacher is evaluated.",
    )
    parser.add_argument(
        "--evaluation", nargs="+", type=Path, default=[], help="evaluation.json files of these weights, for the card."
    )
    parser.add_argument("--private", action="store_true", help="Make the repository private where it is new.")
    parser.add_argument(
        "--no_panel",
        action="store_true",
        help="Send no picture: a run's last panel shows frames of its videos. One that was sent is deleted, but earlier commits keep it.",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="Write the folder, show what would be sent, send nothing."
    )
    options = parser.parse_args(arguments)
    check_repo_id(options.repo_id, "--repo_id")
    if options.folder.name in ("", ".."):  # resolve it, because the folder's name decides how it is published
        options.folder = options.folder.resolve()
    with tempfile.TemporaryDirectory(prefix="poodle-publish-") as scratch:
        folder = options.folder
        if options.which == "student":
            folder = student_of(folder, Path(scratch, "student"))
        parts = parts_of(folder, options.repo_id)
        for _, repo_id in parts:  # the suffix "-sdm" may make a name too long; check before anything is sent
            check_repo_id(repo_id, "--repo_id")
        results = read_evaluations(options.evaluation, [source for source, _ in parts])
        for source, repo_id in parts:
            target = folder_for_dry_run(options.folder, source) if options.dry_run else Path(scratch, source.name)
            stage(source, target, repo_id, results[source], panel=not options.no_panel)
            files = sorted(target.iterdir())
            for file in files:
                print(f"  {file.stat().st_size:>12,} bytes  {file.name}")
            if options.dry_run:
                print(f"{target}: would be sent to {repo_id}")
                continue
            done = push(target, repo_id, "Publish", private=options.private or None)
            print(f"{repo_id}: {done.commit_url}")


def folder_for_dry_run(given: Path, source: Path) -> Path:
    is_a_run = any((given / part).is_dir() for part in ("encoder", "model"))
    return (given if is_a_run else given.parent) / "hub" / source.name


def is_run(folder: Path) -> bool:
    return (folder / "encoder" / "config.json").is_file() and (folder / "config.yaml").is_file()


def parts_of(folder: Path, repo_id: str) -> list[tuple[Path, str]]:
    """
    List the folders to send, each with its name on the Hub: (folder, repo_id).

    Raises:
        ValueError: `folder` is neither a run nor a folder of weights, or a folder to send lacks its config or its weights.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give a run or one of its folders encoder/ and model/")
    if (folder / "state.json").is_file():
        raise ValueError(
            f"{folder} is a checkpoint with its optimizer: publish the run, or with --which student its student"
        )
    if (folder / "encoder").is_dir():
        if not (folder / "model" / "config.json").is_file():
            raise ValueError(
                f"{folder} has encoder/ but no model/config.json, as a run has: give {folder / 'encoder'} to send the encoder alone"
            )
        model = [] if _is_plain(folder) else [(folder / "model", f"{repo_id}-sdm")]
        parts = [(folder / "encoder", repo_id), *model]
    elif (folder / "model" / "config.json").is_file() and (folder / "config.yaml").is_file():  # a run of train_flow.py
        parts = [(folder / "model", repo_id)]
    else:
        parts = [(folder, repo_id)]
    for part, _ in parts:
        _need_weights(part)
    return parts


def _need_weights(folder: Path) -> None:
    """Raise ValueError if the folder's weights or config are missing or damaged, so that nobody could load them."""
    if not list(folder.glob("*.safetensors")) or not (folder / "config.json").is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        fitted = [name for name in ("readout", "detector") if (folder / name).is_dir()]
        hint = f": give {folder / fitted[0]}" if fitted else ""
        raise ValueError(
            f"{folder} is no run and holds no weights (*.safetensors with config.json); it holds {found}{hint}"
        )
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, "np"):  # reads the header and checks that the file is complete
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged: {error}") from None
    config = _mapping(folder / "config.json")
    for name, kind in (("model_type", str), ("architectures", list)) if "detector" not in config else ():
        if not isinstance(config.get(name), kind) or not config[name]:
            raise ValueError(f"{folder}/config.json has no {name}: nobody could load what would be sent")


def student_of(folder: Path, target: Path) -> Path:
    """
    Export the student of the run's last checkpoint to `target`, and return the folder to send instead of `folder`.

    Args:
        folder: a run, or a run's encoder/ or model/.
    """
    run = folder if is_run(folder) else folder.parent
    if not is_run(run) or (run != folder and folder.name not in ("encoder", "model")):
        raise ValueError(f"--which student needs a run (or its encoder/ or model/), and {folder} is none")
    export_network(run, target, "student")
    if (run / "panels").is_dir():
        shutil.copytree(run / "panels", target / "panels")
    return target if run == folder else target / folder.name


def read_evaluations(files: list[Path], sources: list[Path]) -> dict[Path, list[dict]]:
    """
    Group evaluation results by the folder that they belong to.

    A result belongs to the folder that it was measured on, or to one with the same weights. A readout or detector also gets the results of
    the evaluation.json beside it.

    Args:
        files: evaluation.json files.
        sources: the folders to send.

    Raises:
        ValueError: a file is not an evaluation.json, or it belongs to another model or other weights.
    """
    results: dict[Path, list[dict]] = {source: [] for source in sources}
    for source in sources:
        beside = source.parent / "evaluation.json"
        if source.name in ("readout", "detector") and beside.is_file():
            results[source] += _results_in(beside)
    twins = [(source, twin) for source in sources for twin in _twins(source)] if files else []
    digests = {twin: sha256_of(sorted(twin.glob("*.safetensors"))) for _, twin in twins}  # read once for all files
    for file in files:
        entries = _results_in(file)
        fits = False
        for source, twin in twins:
            fitting = [
                entry
                for entry in entries
                if _measured_on(entry["model"]) == twin.resolve() or entry.get("weights_sha256") == digests[twin]
            ]
            if fitting:
                _refuse_other_weights(file, {entry.get("weights_sha256") for entry in fitting}, twin, digests[twin])
            results[source] += fitting
            fits = fits or bool(fitting)
        if not fits:
            raise ValueError(
                f"{file} is of {', '.join(entry['model'] for entry in entries)}, not of {' or '.join(map(str, sources))}: "
                "give the evaluation of what is published"
            )
    return results


def _twins(source: Path) -> list[Path]:
    """
    List the folders whose results count for `source`: always `source` itself.

    Evaluating a run measures its model/. So model/ also counts if `source` is the run's encoder/ and model/ has no decoder or dilation.
    """
    run = source.parent
    alone = source.name == "encoder" and is_run(run) and (run / "model" / "config.json").is_file() and _is_plain(run)
    return [source, run / "model"] if alone else [source]


def _is_plain(run: Path) -> bool:
    """Return whether the run's model/ has neither a decoder nor dilation."""
    config = _mapping(run / "model" / "config.json")
    return config.get("num_decoder_blocks") == 0 and config.get("output_stride") is None


def _mapping(file: Path) -> dict:
    """Read a JSON mapping. Raises ValueError if the file is missing or holds anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON mapping, got {type(content).__name__}")
    return content


def _refuse_other_weights(file: Path, measured: set[str | None], source: Path, digest: str) -> None:
    weights = sorted(source.glob("*.safetensors"))
    # Evaluations written by earlier versions have no digest; compare modification times instead.
    if None in measured and file.stat().st_mtime < max(path.stat().st_mtime for path in weights):
        raise ValueError(f"{file} was measured before the weights in {source} were written: evaluate them again")
    if measured - {None, digest}:
        raise ValueError(f"{file} was measured on other weights than those in {source}: evaluate these")


def _results_in(file: Path) -> list[dict]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        entries = content["results"] if "results" in content else [content]
        for entry in entries:
            if "num_sequences" in entry:
                raise ValueError(f"{file} is of evaluation.propagate, whose figures a card has no place for")
            for name in ("model", "dataset", "num_test_images", "seed"):
                entry[name]
            if not isinstance(entry["model"], str):
                raise TypeError("its model is no name")
        return entries
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no evaluation.json of this project: {type(error).__name__} {error}") from None


def _measured_on(name: str) -> Path:
    """Return the folder that an evaluation measured: the folder `name`, or its model/ if it is a run."""
    path = Path(name)
    return (path / "model" if (path / "model" / "config.json").is_file() else path).resolve()


def stage(source: Path, target: Path, repo_id: str, results: list[dict], panel: bool = True) -> None:
    """
    Write exactly the files to send for the folder `source` to `target`. The picture is included only if `panel` is True.

    Raises:
        ValueError: a card or config is invalid or missing, a file is a link, or a file contains the Hub token.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    sent = (path for path in source.iterdir() if path.is_file() and belongs(path.name))
    for path in (path for path in sent if panel or path.name != PANEL):
        _refuse_link(path)
        shutil.copyfile(path, target / path.name)
        if path.suffix == ".json":
            content = without_local_paths(_mapping(path))
            (target / path.name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    config_file = target / "config.json"
    config = add_code(target, source)
    if timm_architecture(config) is not None and (target / "model.safetensors").exists():
        processor = _mapping(source / "preprocessor_config.json")
        if not {"image_mean", "image_std"} <= processor.keys():
            raise ValueError(f"{source}/preprocessor_config.json must hold image_mean and image_std, which timm needs")
        config_file.write_text(json.dumps(add_timm(target, config, processor), indent=2) + "\n", encoding="utf-8")
    if panel and source.name in ("encoder", "model"):
        panels = (source.parent / "panels").glob("step-*.png")
        last = max(panels, key=lambda path: (len(path.name), path.name), default=None)
        if last is not None:
            _refuse_link(last)
            shutil.copyfile(last, target / PANEL)
    readme = source / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else cards.folder_card(config, results)
    (target / "README.md").write_text(
        cards.publishable_card(text, repo_id, results, (target / PANEL).exists()), encoding="utf-8"
    )
    _refuse_token(target)


def _refuse_link(path: Path) -> None:
    """Raise ValueError if a file to send is a symbolic link, which could point to any file on this machine."""
    if path.is_symlink():
        raise ValueError(f"{path} is a link to {path.resolve()}: put the file itself there if it is to be sent")


def without_local_paths(value):
    """Return a config without `_name_or_path` and `auto_map` at any depth, because these may hold local paths."""
    if isinstance(value, dict):
        return {
            key: without_local_paths(item) for key, item in value.items() if key not in ("_name_or_path", "auto_map")
        }
    return [without_local_paths(item) for item in value] if isinstance(value, list) else value


def _refuse_token(folder: Path) -> None:
    token = get_token()
    for path in folder.iterdir():
        if token and path.suffix != ".safetensors" and token.encode() in path.read_bytes():
            raise ValueError(
                f"{path.name} holds your Hub token: take it out (and revoke it where others may have seen it)"
            )


class BackgroundPublisher:
    """
    Send a run's folders in the background, one upload at a time.

    At most one step waits for the current upload. A newer step replaces it. A failed upload is logged as a warning.

    Args:
        output_dir: folder of the run.
        repo_id: name on the Hub, as `--repo_id`.
        private: whether new repositories are private.
        panel: whether to send the last panel.
    """

    def __init__(self, output_dir: Path, repo_id: str, private: bool, panel: bool = True):
        self.output_dir, self.repo_id, self.private, self.panel = output_dir, repo_id, private, panel
        if get_token() is None:
            logger.warning(
                "push_to_hub: there is no Hub token here, so uploads will fail: log in with `hf auth login`, or set HF_TOKEN"
            )
        self.scratch = output_dir / ".publish"
        shutil.rmtree(self.scratch, ignore_errors=True)  # left by a run that was killed
        self.scratch.mkdir(parents=True)
        self.executor = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="publish")
        self.lock, self.waiting = threading.Lock(), None

    def submit(self, step: int) -> None:
        """Copy the exported folders (1 to 2 s for a ResNet-50), and send the copy in the background after the current upload."""
        scratch = self.scratch / f"step-{step}"
        try:
            parts = []
            for source, repo_id in parts_of(self.output_dir, self.repo_id):
                stage(source, scratch / source.name, repo_id, [], self.panel)
                parts.append((scratch / source.name, repo_id))
        except Exception as error:  # no failure here may stop training
            shutil.rmtree(scratch, ignore_errors=True)
            logger.warning("step %d was not sent to the Hub: %s", step, error)
            return
        with self.lock:
            replaced, self.waiting = self.waiting, (step, scratch, parts)
        if replaced is None:
            self.executor.submit(self._send)
        else:  # the job that is already queued will send this step
            shutil.rmtree(replaced[1], ignore_errors=True)

    def _send(self) -> None:
        with self.lock:
            (step, scratch, parts), self.waiting = self.waiting, None
        for folder, repo_id in parts:
            try:
                push(folder, repo_id, f"Step {step}", private=self.private or None)
                logger.info("step %d was sent to %s", step, repo_id)
            except Exception as error:  # no failure here may stop training
                logger.warning("step %d was not sent to the Hub (training goes on): %s", step, error)
        shutil.rmtree(scratch, ignore_errors=True)

    def close(self) -> None:
        """Wait for the last upload."""
        self.executor.shutdown(wait=True)
        shutil.rmtree(self.scratch, ignore_errors=True)


if __name__ == "__main__":
    run_script(main)
