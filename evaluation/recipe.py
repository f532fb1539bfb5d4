"""What an evaluation depends on: one dataclass, read from YAML, overridden by flags."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import yaml

from evaluation.data import DATASETS
from modeling_poodle.recipe_files import described, is_finite, is_int, nearest, parse_flags, read_recipe_file

RECIPES = Path(__file__).parent / "recipes"
READOUTS = ("linear", "knn", "upernet")


@dataclass
class EvaluationRecipe:
    """A semantic segmentation readout. Fields that transformers' `TrainingArguments` has are called as there."""

    model: list[str] = described(
        [], "Models: run or model folders, Hub ids, timm/NAME, random:MODEL (untrained). Several give one table."
    )
    dataset: str = described("street", f"One of {', '.join(DATASETS)}, or the id of a labelled data set on the Hub.")
    data_dir: str | None = described(None, "Folder of the data set.")
    readout: str = described("linear", f"One of {', '.join(READOUTS)}.")
    features: str | None = described(
        None, "Map to read: decoder, stage1 to stage4; unset: the SDM's, else the last stage's."
    )
    output_dir: str = described("runs/evaluation", "Folder for evaluation.json, report.html and readout/.")
    max_train_images: int | None = described(None, "Use so many training images, evenly spread.")
    max_test_images: int | None = described(None, "Use so many test images, evenly spread.")

    # Fitting (linear and upernet)
    num_train_epochs: float = described(30, "Passes over the training images.")
    max_steps: int = described(-1, "Optimizer steps; above 0 it overrides num_train_epochs.")
    per_device_train_batch_size: int = described(8, "Images a process and step.")
    learning_rate: float = described(
        1e-2, "Peak learning rate of AdamW; warm-up over 5 % of the steps, then a cosine to 0."
    )
    weight_decay: float = described(1e-4, "AdamW weight decay.")
    crop_size: list[int] = described([256, 512], "UperNet: training crop, height and width.")
    seed: int = described(0, "Of the readout's weights and the order of images.")
    feature_cache_gb: float = described(
        16.0, "Keep frozen features on disk up to so many GB; above, compute them anew."
    )

    # k-NN
    num_neighbours: int = described(20, "Cells that vote.")
    max_reference_cells: int = described(50_000, "Cells of the training images that are compared with, evenly spread.")

    # Running
    logging_steps: int = described(20, "Steps between points of the loss curve.")
    save_steps: int = described(200, "Steps between checkpoints of the fit.")
    resume_from_checkpoint: str | None = described(None, "'latest': go on with an interrupted evaluation.")

    def __post_init__(self):
        def need(condition: bool, name: str, expected: str) -> None:
            if not condition:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")

        need(bool(self.model) and all(isinstance(m, str) and m for m in self.model), "model", "at least one model")
        need(self.readout in READOUTS, "readout", f"one of {', '.join(READOUTS)}{nearest(self.readout, READOUTS)}")
        known = self.dataset in DATASETS or "/" in self.dataset
        need(
            known, "dataset", f"one of {', '.join(DATASETS)}, or a Hub id (org/name){nearest(self.dataset, DATASETS)}"
        )
        for name in (
            "per_device_train_batch_size",
            "logging_steps",
            "save_steps",
            "num_neighbours",
            "max_reference_cells",
        ):
            need(is_int(getattr(self, name)) and getattr(self, name) >= 1, name, "an integer of at least 1")
        for name in ("max_train_images", "max_test_images"):
            value = getattr(self, name)
            need(value is None or (is_int(value) and value >= 1), name, "an integer of at least 1")
        for name in ("num_train_epochs", "learning_rate"):
            need(is_finite(getattr(self, name)) and getattr(self, name) > 0, name, "above 0")
        for name in ("weight_decay", "feature_cache_gb"):
            need(is_finite(getattr(self, name)) and getattr(self, name) >= 0, name, "not negative")
        need(self.max_steps == -1 or self.max_steps >= 1, "max_steps", "at least 1, or -1 to go by num_train_epochs")
        need(is_int(self.seed) and self.seed >= 0, "seed", "an integer of at least 0")
        good = len(self.crop_size) == 2 and all(is_int(v) and v >= 32 for v in self.crop_size)
        need(good, "crop_size", "height and width of at least 32 pixels")
        need(self.resume_from_checkpoint in (None, "latest"), "resume_from_checkpoint", "'latest'")
        if self.readout == "upernet" and self.features is not None:
            raise ValueError("features does not go with readout upernet, which reads all stages of the encoder")

    def to_yaml(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


def parse_recipe(arguments: list[str] | None = None) -> EvaluationRecipe:
    """
    Recipe from the command line: `--config FILE` first, then flags. Without `--config` the package's recipe of the readout, if any.

    Raises:
        ValueError: an unknown field (the nearest name is suggested), or a value out of range.
    """
    given = parse_flags(EvaluationRecipe, arguments, "Measure encoders by a readout.", repeatable=("model",))
    config = given.pop("config", None)
    if config is None and (RECIPES / f"{given.get('readout', 'linear')}.yaml").is_file():
        config = RECIPES / f"{given.get('readout', 'linear')}.yaml"
    values = {} if config is None else read_recipe_file(EvaluationRecipe, config, RECIPES)
    return EvaluationRecipe(**{**values, **given})
