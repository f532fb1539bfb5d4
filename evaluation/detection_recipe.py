"""What a detection readout depends on: one dataclass, read from YAML, overridden by flags."""

import dataclasses
from dataclasses import dataclass

import yaml

from evaluation.boxes import BOX_DATASETS
from evaluation.recipe import RECIPES
from modeling_poodle.recipe_files import described, is_finite, is_int, nearest, parse_flags, read_recipe_file

DETECTORS = ("c4", "fpn")


@dataclass
class DetectionRecipe:
    """An object detection readout. Fields that transformers' `TrainingArguments` has are called as there."""

    model: list[str] = described(
        [], "Models: run or model folders, Hub ids, timm/NAME, random:MODEL (untrained). Several give one table."
    )
    detector: str = described("fpn", f"Faster R-CNN, one of {', '.join(DETECTORS)}.")
    dataset: str = described("street", f"One of {', '.join(BOX_DATASETS)}.")
    data_dir: str | None = described(None, "Folder of the data set.")
    output_dir: str = described("runs/detection", "Folder for evaluation.json, report.html and detector/.")
    max_train_images: int | None = described(None, "Use so many training images, evenly spread.")
    max_test_images: int | None = described(None, "Use so many test images, evenly spread.")
    image_size: list[int] | None = described(
        None, "Resize images to this shorter side, but to no more than this longer side; unset: their own size."
    )
    num_train_epochs: float = described(12, "Passes over the training images.")
    max_steps: int = described(-1, "Optimizer steps; above 0 it overrides num_train_epochs.")
    per_device_train_batch_size: int = described(2, "Images a process and step.")
    learning_rate: float = described(
        1e-4, "Peak learning rate of AdamW; warm-up over 5 % of the steps, then a cosine to 0."
    )
    weight_decay: float = described(0.05, "AdamW weight decay.")
    boxes_per_image: int = described(512, "Proposals of an image that the loss of the boxes' head is taken at.")
    seed: int = described(
        0, "Of the new layers' weights, the order of images and the boxes that the loss is taken at."
    )
    logging_steps: int = described(20, "Steps between points of the loss curve.")
    save_steps: int = described(500, "Steps between checkpoints of the fit.")
    resume_from_checkpoint: str | None = described(None, "'latest': go on with an interrupted evaluation.")

    def __post_init__(self):
        def need(condition: bool, name: str, expected: str) -> None:
            if not condition:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")

        need(bool(self.model) and all(isinstance(m, str) and m for m in self.model), "model", "at least one model")
        need(
            self.detector in DETECTORS, "detector", f"one of {', '.join(DETECTORS)}{nearest(self.detector, DETECTORS)}"
        )
        known = f"one of {', '.join(BOX_DATASETS)}, which have boxes{nearest(self.dataset, BOX_DATASETS)}"
        need(self.dataset in BOX_DATASETS, "dataset", known)
        for name in ("per_device_train_batch_size", "boxes_per_image", "logging_steps", "save_steps"):
            need(is_int(getattr(self, name)) and getattr(self, name) >= 1, name, "an integer of at least 1")
        for name in ("max_train_images", "max_test_images"):
            value = getattr(self, name)
            need(value is None or (is_int(value) and value >= 1), name, "an integer of at least 1")
        for name in ("num_train_epochs", "learning_rate"):
            need(is_finite(getattr(self, name)) and getattr(self, name) > 0, name, "above 0")
        need(is_finite(self.weight_decay) and self.weight_decay >= 0, "weight_decay", "not negative")
        need(self.max_steps == -1 or self.max_steps >= 1, "max_steps", "at least 1, or -1 to go by num_train_epochs")
        need(is_int(self.seed) and self.seed >= 0, "seed", "an integer of at least 0")
        size = self.image_size
        good = size is None or (len(size) == 2 and all(is_int(v) for v in size) and 32 <= size[0] <= size[1])
        need(good, "image_size", "a shorter and a longer side of at least 32 pixels")
        need(self.resume_from_checkpoint in (None, "latest"), "resume_from_checkpoint", "'latest'")

    def to_yaml(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


def parse_detection_recipe(arguments: list[str] | None = None) -> DetectionRecipe:
    """
    Recipe from the command line: `--config FILE` first, then flags. Without `--config` the package's recipe of the detector.

    Raises:
        ValueError: an unknown field (the nearest name is suggested), or a value out of range.
    """
    given = parse_flags(DetectionRecipe, arguments, "Measure encoders by object detection.", repeatable=("model",))
    config = given.pop("config", None)
    detector = given.get("detector", DetectionRecipe.detector)
    if config is None and detector in DETECTORS:
        config = RECIPES / f"{detector}.yaml"
    values = {} if config is None else read_recipe_file(DetectionRecipe, config, RECIPES)
    return DetectionRecipe(**{**values, **given})
