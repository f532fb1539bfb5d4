"""The recipe of a detection readout: one dataclass, read from YAML, overridden by flags."""

from dataclasses import dataclass

from evaluation.boxes import BOX_DATASETS
from evaluation.recipe import FitRecipe, read_with_models
from modeling_poodle.recipe_files import described, did_you_mean

DETECTORS = ("c4", "fpn")


@dataclass
class DetectionRecipe(FitRecipe):
    """Recipe of an object detection readout."""

    dataset: str = described("street", f"One of {', '.join(BOX_DATASETS)}.")
    detector: str = described("fpn", f"Faster R-CNN, one of {', '.join(DETECTORS)}.")
    output_dir: str = described("runs/detection", "Folder for evaluation.json, report.html and detector/.")
    image_size: list[int] | None = described(
        None, "Resize images to this shorter side, but to no more than this longer side; unset: their own size."
    )
    num_train_epochs: float = described(12, "Passes over the training images.")
    per_device_train_batch_size: int = described(2, "Images a process and step.")
    learning_rate: float = described(
        1e-4, "Peak learning rate of AdamW; warm-up over a twentieth of the steps, then a cosine to 0."
    )
    weight_decay: float = described(0.05, "AdamW weight decay, of all that is trained.")
    boxes_per_image: int = described(512, "Proposals of each image that train the box head.")
    save_steps: int = described(500, "Steps between checkpoints of the fit.")

    def __post_init__(self):
        super().__post_init__()
        known = f"one of {', '.join(DETECTORS)}{did_you_mean(self.detector, DETECTORS)}"
        self.need(self.detector in DETECTORS, "detector", known)
        known = f"one of {', '.join(BOX_DATASETS)}, which have boxes{did_you_mean(self.dataset, BOX_DATASETS)}"
        self.need(self.dataset in BOX_DATASETS, "dataset", known)
        self.need_integers("boxes_per_image")
        size = self.image_size
        good = size is None or (len(size) == 2 and 32 <= size[0] <= size[1])
        self.need(good, "image_size", "a shorter and a longer side of at least 32 pixels")


def parse_detection_recipe(arguments: list[str] | None = None) -> DetectionRecipe:
    """
    Read the recipe from the command line. Flags override the file of `--config`, by default the package's recipe of the detector.

    Raises:
        ValueError: a field is unknown (the message suggests the nearest name), or a value is out of range.
    """
    about = "Measure encoders by object detection."
    return read_with_models(
        DetectionRecipe, arguments, about, lambda given: given.get("detector", DetectionRecipe.detector)
    )
