"""The recipe of a pretraining run: a dataclass that is read from YAML and overridden by flags."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling_poodle import PoodleConfig
from modeling_poodle.config_checks import is_int
from modeling_poodle.recipe_files import (
    described,
    did_you_mean,
    is_finite,
    read_recipe_file,
)
from training.run_recipe import RunRecipe, parse
from training.street_cameras import street_camera

RECIPES = Path(__file__).parent / "recipes"
FLOWS = ("dis", "raft_large", "raft_small", "unflow", "exact", "precomputed")
# Minimum length of a frame's shorter side, by estimator, in pixels. OpenCV's DIS crashes if this side has 12 to 15 pixels (seen from 12x40
# to 15x256, never from 16 on). Below 128 pixels, RAFT's coarsest correlation has no cells to look up.
LEAST_SIDES = {"dis": 16, "raft_large": 128, "raft_small": 128}


@dataclass
class Recipe(RunRecipe):
    """The recipe of a PooDLe run."""

    config_class = PoodleConfig

    # Flow
    flow: str = described("dis", f"Estimator: {', '.join(FLOWS)}.")
    flow_updates: int = described(24, "Iterations of RAFT.")
    flow_max_error: float | None = described(
        None,
        "Forward-backward error above which a pixel's flow is not used, pixels; unset: PooDLe's bound, which grows with the flow. Not with flow "
        "exact, which knows what is hidden.",
    )
    flow_weights: str | None = described(None, "RAFT weights: a .pth or .safetensors file; unset: torchvision's.")
    flow_dir: str | None = described(
        None,
        "Folder that `python -m training.flow` wrote, for precomputed flow; unset: flow/ in the one folder that videos names.",
    )
    flow_epochs: int | None = described(
        None, "With precomputed flow: number of epochs whose pairs the run repeats; unset: each epoch has new pairs."
    )
    flow_model: str | None = described(None, "With flow unflow: a run of train_flow.py, its model/, or a Hub id.")

    # Views and subcrops
    affine_views: bool = described(True, "Rotate, scale and flip each network's view of each frame.")
    num_subcrops: int = described(6, "Subcrop pairs a frame (K).")
    subcrop_area: list[float] = described([0.05, 0.3], "Range of a subcrop's share of the frame.")
    subcrop_size: int = described(64, "Side to which subcrops are resized, pixels.")
    subcrops_follow_flow: bool = described(
        True, "The teacher's subcrop follows the flow; false: it lies anywhere in the other frame (for comparison)."
    )
    subcrop_jitter: float = described(0.1, "Jitter of the teacher's subcrop, share of the frame, both ways.")

    # Model
    init_encoder: str | None = described(
        None, "Hub id, folder or timm/NAME of an encoder to start from, or of a PooDLe model with its SDM."
    )
    teacher_momentum: float = described(0.996, "The teacher's momentum at the start; it rises to 1 on a cosine.")
    gradient_checkpointing: bool = described(False, "Recompute activations in the backward pass.")

    # Running
    probe: str | None = described(
        None,
        "Log a k-NN readout of the teacher on labelled images: street, street:CAMERA or folder:PATH (images/, labels/, classes.json).",
    )
    probe_steps: int = described(500, "Steps between probes.")

    def _check(self) -> None:
        super()._check()
        off = """ (--model '{"pooled_weight": 0}' leaves the pooled objective out)"""
        self.need(
            is_int(self.num_subcrops) and self.num_subcrops >= 1, "num_subcrops", f"an integer of at least 1{off}"
        )
        self.need_integers("flow_updates", "subcrop_size", "probe_steps")
        self._need_range("subcrop_area", "0.05 0.3", above_zero=True)
        self.need(self.subcrop_area[1] <= 1, "subcrop_area", "shares of the frame, at most 1")
        self.need(self.flow in FLOWS, "flow", f"one of {', '.join(FLOWS)}{did_you_mean(self.flow, FLOWS)}")
        bound = self.flow_max_error
        self.need(bound is None or (is_finite(bound) and bound > 0), "flow_max_error", "a number above 0, or unset")
        self.need(
            bound is None or self.flow != "exact",
            "flow_max_error",
            "unset with flow exact, which knows what is hidden",
        )
        precomputed = self.flow == "precomputed"
        self.need(
            self.flow_folder is not None if precomputed else self.flow_dir is None,
            "flow_dir",
            "the folder that `python -m training.flow` wrote where flow is precomputed (it may be unset where videos is one folder, and "
            "that flow lies in its flow/), and unset elsewhere",
        )
        good = self.flow_epochs is None or (precomputed and self.flow_epochs >= 1)
        self.need(good, "flow_epochs", "an integer of at least 1 where flow is precomputed, and unset elsewhere")
        trained = (self.flow == "unflow") == (self.flow_model is not None)
        self.need(
            trained, "flow_model", f"a folder or Hub id with flow unflow, and unset with others (flow is {self.flow})"
        )
        unused = self.flow_weights is not None and not self.flow.startswith("raft")
        self.need(not unused, "flow_weights", f"unset with flow {self.flow}: the weights are RAFT's")
        if self.probe is not None and street_camera(self.probe) is None:
            named = self.probe.startswith("folder:") and self.probe != "folder:"
            self.need(named, "probe", "street, street:CAMERA or folder:PATH")
        self.need(0 <= self.teacher_momentum <= 1, "teacher_momentum", "between 0 and 1")
        self.need(
            is_finite(self.subcrop_jitter) and 0 <= self.subcrop_jitter <= 1, "subcrop_jitter", "between 0 and 1"
        )
        config = self.model_config()  # raises if a field is unknown or has a wrong value
        # Otherwise build_model checks the crop size, once it has read the encoder's config.
        if self.init_encoder is None or "backbone_config" in self.model:
            check_crop_size(config, self.crop_size)
        least = LEAST_SIDES.get(self.flow, 1)
        smaller = " (--flow dis takes smaller ones)" if self.flow.startswith("raft") else ""
        self.need(
            min(self.crop_size) >= least, "crop_size", f"at least {least}x{least} with flow {self.flow}{smaller}"
        )

    @property
    def flow_folder(self) -> str | None:
        """Folder of precomputed flow: `flow_dir`, or else the default of [`flow_beside`]; `None` if flow is not precomputed."""
        return self.flow_dir or (flow_beside(self.videos) if self.flow == "precomputed" else None)


def check_crop_size(config: PoodleConfig, crop_size: list[int]) -> None:
    """
    Check that both sides of the crop are multiples of the encoder's stride.

    Raises:
        ValueError: they are not. A patch embedding or a stage would cut off the crop's edge, and its map would not cover the whole crop.
    """
    encoder = config.backbone_config
    patch = getattr(encoder, "patch_size", None)
    if encoder.model_type == "resnet":  # it halves the size twice before its first stage
        patch = 8 if encoder.downsample_in_first_stage else 4
    if not isinstance(patch, int):
        return
    stride = patch * 2 ** (len(encoder.depths) - 1) if hasattr(encoder, "depths") else patch
    if any(side % stride for side in crop_size):
        raise ValueError(
            f"crop_size must be multiples of the {encoder.model_type} encoder's {stride}, got {crop_size}"
        )


def flow_beside(videos: list[str]) -> str | None:
    """Return the default folder of precomputed flow: flow/ inside the videos' folder. `None` unless `videos` is one local folder."""
    alone = videos[0] if len(videos) == 1 and street_camera(videos[0]) is None else ""
    return str(Path(alone, "flow")) if alone and Path(alone).is_dir() else None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a recipe file as a mapping. A name without a folder is looked up among the package's recipes."""
    return read_recipe_file(Recipe, path, RECIPES)


def parse_recipe(arguments: list[str] | None = None) -> Recipe:
    """
    Make a recipe from the command line: the file of `--config`, overridden by the other flags.

    Without `--config` the recipe file is `street`, or `own_videos` if `--videos` names other videos. `--init_encoder` discards the recipe
    file's `backbone_config`; a `backbone_config` in `--model` is used, and must fit the encoder. `--num_train_epochs` without `--max_steps`
    discards the recipe file's `max_steps`.

    Raises:
        ValueError: a field is unknown (the message suggests the nearest name), or a value is out of range.
    """
    return parse(Recipe, arguments, "Pretrain PooDLe on video.", RECIPES, ("street", "own_videos"))
