"""The recipe of training/train_flow.py."""

from dataclasses import dataclass

from modeling_poodle import PoodleFlowConfig
from modeling_poodle.recipe_files import described, is_finite
from training.recipe import RECIPES
from training.run_recipe import RunRecipe, parse

FLOW_RECIPES = RECIPES / "flow"
_WEIGHTS = ("coarse_weight", "smoothness_weight", "self_supervision_weight")
_SHARES = ("known_motion_share", "half_size_share", "occlusion_start", "self_supervision_start")


@dataclass
class FlowRecipe(RunRecipe):
    """Everything that a run of train_flow.py depends on. Weights are relative to 1 for the photometric loss at full size."""

    config_class = PoodleFlowConfig

    output_dir: str = described("runs/flow", "Folder of the run: config, metrics, panels, checkpoints and model/.")

    # Objective
    coarse_weight: float = described(0.0, "Weight of the photometric loss of each level coarser than the finest.")
    smoothness_weight: float = described(2.0, "Weight of the second-order smoothness.")
    self_supervision_weight: float = described(0.6, "Weight of the self-supervision by cropping.")
    self_supervision_start: float = described(0.8, "Share of the steps after which self-supervision begins.")
    crop_border: int = described(64, "Pixels that the student's crop is smaller by at each side.")
    occlusion_start: float = described(0.3, "Share of the steps after which hidden pixels no longer count.")
    known_motion_share: float = described(
        0.0, "First share of the steps, on single frames that are moved by known maps."
    )
    half_size_share: float = described(0.0, "First share of the steps, with frames of half size.")

    def _check(self) -> None:
        super()._check()
        for name in _WEIGHTS:
            value = getattr(self, name)
            self.need(is_finite(value) and value >= 0, name, "a finite number of at least 0")
        for name in _SHARES:
            value = getattr(self, name)
            self.need(is_finite(value) and 0 <= value <= 1, name, "a share between 0 and 1")
        self.need_integers("crop_border")
        stride = self.model_config().stride  # raises for each field that does not fit
        whole = stride * (2 if self.half_size_share > 0 else 1)
        why = (
            ", twice the network's stride for frames of half size"
            if self.half_size_share > 0
            else ", the network's stride"
        )
        self.need(all(side % whole == 0 for side in self.crop_size), "crop_size", f"multiples of {whole}{why}")
        smallest = min(self.crop_size) // (2 if self.half_size_share > self.self_supervision_start else 1)
        fits = self.crop_border * 2 % stride == 0 and self.crop_border % 4 == 0 and self.crop_border * 2 < smallest
        self.need(
            fits or self.self_supervision_weight == 0,
            "crop_border",
            f"a multiple of 4 and of {stride // 2}, half the network's stride, and less than half of the frame",
        )


def parse_flow_recipe(arguments: list[str] | None = None) -> FlowRecipe:
    """
    Read the recipe from the command line: `--config FILE` first, then flags.

    Without `--config` the recipe is `flow_street`, or `flow_videos` if `--videos` names something other than the street.

    Raises:
        ValueError: a field is unknown (the nearest name is suggested), or a value is out of range.
    """
    about = "Learn optical flow from video without labels."
    return parse(FlowRecipe, arguments, about, FLOW_RECIPES, ("flow_street", "flow_videos"))
