"""The recipe of an evaluation: one dataclass, read from YAML, overridden by flags."""

from dataclasses import dataclass
from pathlib import Path

from evaluation.data import DATASETS
from modeling_poodle.recipe_files import (
    CheckedRecipe,
    described,
    did_you_mean,
    is_finite,
    read_command_line,
)

RECIPES = Path(__file__).parent / "recipes"
READOUTS = ("linear", "knn", "upernet")


def models(about: str):
    """Return the field of the models, given as `--model A --model B` or `--model A B`."""
    return described(
        [], f"Models: run or model folders, Hub ids, timm/NAME, random:MODEL (untrained). {about}", action="extend"
    )


@dataclass
class FitRecipe(CheckedRecipe):
    """Fields common to all evaluations that fit something. Those that transformers' `TrainingArguments` also has are named as there."""

    model: list[str] = models("Several give one table.")
    dataset: str = "street"
    data_dir: str | None = described(None, "Folder of the data set.")
    output_dir: str = "runs/evaluation"
    max_train_images: int | None = described(None, "Use at most this many training images, evenly spread.")
    max_test_images: int | None = described(None, "Use at most this many test images, evenly spread.")
    num_train_epochs: float = described(30, "Passes over the training images.")
    max_steps: int = described(-1, "Optimizer steps; above 0 it overrides num_train_epochs.")
    per_device_train_batch_size: int = described(8, "Images a process and step.")
    learning_rate: float = described(
        1e-2, "Peak learning rate of AdamW; warm-up over a twentieth of the steps, then a cosine to 0."
    )
    weight_decay: float = described(1e-4, "AdamW weight decay, of all that is trained.")
    seed: int = described(0, "Seed of new weights, of the order of images, and of random crops and pixels.")
    logging_steps: int = described(20, "Steps between points of the loss curve.")
    save_steps: int = described(200, "Steps between checkpoints of the fit.")
    resume_from_checkpoint: str | None = described(None, "'latest': go on with an interrupted evaluation.")

    def __post_init__(self):
        self.need_declared()
        self.need_models()
        self.need_output_dir()
        self.need_integers("per_device_train_batch_size", "logging_steps", "save_steps")
        self.need_integers(*(n for n in ("max_train_images", "max_test_images") if getattr(self, n) is not None))
        self.need_integers("seed", low=0)
        for name in ("num_train_epochs", "learning_rate"):
            self.need(is_finite(getattr(self, name)) and getattr(self, name) > 0, name, "a finite number above 0")
        self.need(
            is_finite(self.weight_decay) and self.weight_decay >= 0, "weight_decay", "a finite number of at least 0"
        )
        known = self.max_steps == -1 or self.max_steps >= 1
        self.need(known, "max_steps", "at least 1, or -1 to go by num_train_epochs")
        self.need(self.resume_from_checkpoint in (None, "latest"), "resume_from_checkpoint", "'latest'")

    def protocol(self, *names: str) -> dict:
        """Return the settings of a fit that its figures depend on, with those in `names`, for evaluation.json."""
        fit = ("num_train_epochs", "max_steps", "per_device_train_batch_size", "learning_rate", "weight_decay")
        return {name: getattr(self, name) for name in (*fit, *names)}


@dataclass
class EvaluationRecipe(FitRecipe):
    """Recipe of a semantic segmentation readout."""

    dataset: str = described("street", f"One of {', '.join(DATASETS)}, or the id of a labelled data set on the Hub.")
    readout: str = described("linear", f"One of {', '.join(READOUTS)}.")
    features: str | None = described(
        None,
        "Map to read: decoder, or a stage (stage1 to stage4; of ViTs one a layer); unset: the SDM's, else the last stage's.",
    )
    output_dir: str = described("runs/evaluation", "Folder for evaluation.json, report.html and readout/.")
    crop_size: list[int] = described([256, 512], "UperNet: training crop, height and width.")
    feature_cache_gb: float = described(
        16.0, "Linear: GB of features that each process caches on disk; the others are computed anew in each epoch."
    )
    num_neighbours: int = described(20, "k-NN: cells that vote.")
    max_reference_cells: int = described(50_000, "k-NN: cells of the training images to compare with, evenly spread.")

    def __post_init__(self):
        super().__post_init__()
        self.need(
            self.readout in READOUTS, "readout", f"one of {', '.join(READOUTS)}{did_you_mean(self.readout, READOUTS)}"
        )
        known = f"one of {', '.join(DATASETS)}, or a Hub id (org/name){did_you_mean(self.dataset, DATASETS)}"
        self.need(self.dataset in DATASETS or "/" in self.dataset, "dataset", known)
        self.need_integers("num_neighbours", "max_reference_cells")
        self.need(
            is_finite(self.feature_cache_gb) and self.feature_cache_gb >= 0,
            "feature_cache_gb",
            "a finite number of at least 0",
        )
        good = len(self.crop_size) == 2 and min(self.crop_size) >= 32
        self.need(good, "crop_size", "height and width of at least 32 pixels")
        if self.readout == "upernet":
            # UperNet pools each image to a single cell, whose BatchNorm cannot normalise a batch of one image.
            enough = self.per_device_train_batch_size > 1
            self.need(enough, "per_device_train_batch_size", "at least 2 with readout upernet")
        if self.readout == "upernet" and self.features is not None:
            raise ValueError("features does not go with readout upernet, which reads all stages of the encoder")


def parse_recipe(arguments: list[str] | None = None) -> EvaluationRecipe:
    """
    Read the recipe from the command line. Flags override the file of `--config`, by default the package's recipe of the readout, if any.

    Raises:
        ValueError: a field is unknown (the message suggests the nearest name), or a value is out of range.
    """
    return read_with_models(
        EvaluationRecipe, arguments, "Measure encoders by a readout.", lambda given: given.get("readout", "linear")
    )


def read_with_models(kind: type, arguments: list[str] | None, about: str, recipe_name=lambda given: None):
    """Read a recipe of `kind` from the command line. Without `--config`, use the package's recipe named `recipe_name(flags)`, if any."""

    def default_config(given: dict) -> Path | None:
        file = RECIPES / f"{recipe_name(given)}.yaml"
        return file if file.is_file() else None

    values, given = read_command_line(kind, arguments, about, RECIPES, default_config)
    return kind(**{**values, **given})
