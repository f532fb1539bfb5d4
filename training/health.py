"""
Check whether a run still learns: losses, gradients and weights that are not finite, collapsed features, and steps without a valid pixel.

The policy is in docs/reliability.md. A gradient that is not finite changes no weight: the update is skipped and counted. The run stops
after a loss that is not finite, after many skipped updates in a row, and if features stay collapsed or frames stay without a valid pixel.
"""

import logging

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from training.addresses import printable

logger = logging.getLogger("poodle")
SKIPS_ALLOWED = 10  # skipped updates in a row
LINES_ALLOWED = 20  # lines of metrics.jsonl in a row
GO_ON_LOWER = "go on with --resume_from_checkpoint latest --resume_inexact true and a lower --learning_rate"
COLLAPSED = 0.01  # feature_std; evenly spread directions have 1, the studies' networks 0.38 to 0.82


class Health:
    """
    Counts problems on the device at each step, without making the host wait. Judges them when a line is logged and before a checkpoint.

    If a run must stop, a FloatingPointError is raised, the same on all ranks. Earlier checkpoints are kept.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.first_bad_step = torch.full((), -1.0, device=accelerator.device)
        self.skipped_updates = torch.zeros((), device=accelerator.device)
        self.skipped_running = torch.zeros((), device=accelerator.device)
        self.videos: list[tuple[int, list[str]]] = []  # (step, names) since the last line
        self.streaks = {"feature_std": 0, "valid_fraction": 0}

    @property
    def doubtful(self) -> bool:
        """Whether the features look collapsed now, so that earlier checkpoints should not be rotated away."""
        return self.streaks["feature_std"] > 0

    def watch(self, loss: Tensor, step: int, videos: list[str]) -> None:
        bad = ~torch.isfinite(loss) & (self.first_bad_step < 0)
        self.first_bad_step = torch.where(bad, float(step), self.first_bad_step)
        self.videos.append((step, videos))

    @torch.no_grad()
    def guard(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        """
        Make the next step of the fused AdamW change nothing if the gradient is not finite. Must be called on all ranks.

        Returns:
            The gradient's norm, a scalar on the device.
        """
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        # GradScaler's flag: the fused kernel reads it on the device and, if it is set, leaves weights, moments and step counts alone.
        optimizer.found_inf = (~torch.isfinite(norm)).float()
        self.skipped_updates = self.skipped_updates + optimizer.found_inf
        self.skipped_running = (self.skipped_running + 1) * optimizer.found_inf
        return norm

    def stop_if_not_finite(self) -> None:
        """
        Stop the run if a loss or many gradients were not finite.

        Raises:
            FloatingPointError: a loss was not finite, or the last SKIPS_ALLOWED updates were skipped.
        """
        seen = self.accelerator.gather(torch.stack([self.first_bad_step, self.skipped_running])[None])
        steps, skipped = seen[:, 0], int(seen[:, 1].max())
        if (steps >= 0).any():
            bad = int(steps[steps >= 0].min())
            # Name only videos of ranks whose own loss it was; those of other ranks are not the cause.
            own = [name for step, names in self.videos if step == bad == int(self.first_bad_step) for name in names]
            videos = sorted(set(gather_object(own)))
            raise FloatingPointError(
                f"the loss is not finite at step {bad}; videos of that batch on the ranks that had it: {', '.join(map(printable, videos)) or '-'}. "
                f"The checkpoints up to the last save are kept. Look at these videos, or {GO_ON_LOWER}"
            )
        if skipped >= SKIPS_ALLOWED:
            raise FloatingPointError(
                f"the gradient was not finite in the last {skipped} steps, so nothing was learnt in them. "
                f"The checkpoints up to the last save are kept. To mend it, {GO_ON_LOWER}, or --bf16 false"
            )

    @torch.no_grad()
    def refuse_bad_weights(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """
        Check before a checkpoint is written that weights, buffers and moments are finite.

        Raises:
            FloatingPointError: names the first that is not.
        """
        named = [(name, value) for name, value in model.state_dict().items() if value.is_floating_point()]
        names = {parameter: name for name, parameter in model.named_parameters()}
        named += [
            (f"{key} of {names[p]}", value) for p, state in optimizer.state.items() for key, value in state.items()
        ]
        named = [
            (name, value) for name, value in named if value.numel()
        ]  # a DINOv3 without registers has an empty parameter
        norms = torch.stack([value.abs().amax().float().to(self.accelerator.device) for _, value in named])
        finite = torch.isfinite(norms).tolist()
        if not all(finite):
            name = named[finite.index(False)][0]
            raise FloatingPointError(
                f"{name} is not finite, so no checkpoint is written over the good ones. To mend it, {GO_ON_LOWER}"
            )

    def judge(self, metrics: dict) -> None:
        """
        Judge a line of metrics, which is the same on all ranks.

        Raises:
            FloatingPointError: features collapsed, or no pixel was valid, in LINES_ALLOWED lines in a row.
        """
        self.videos.clear()
        std, valid = metrics.get("feature_std", 1.0), metrics["valid_fraction"]  # no features in the training of flow
        self._judge(
            "feature_std", std < COLLAPSED, f"the features have collapsed to one direction (feature_std {std:.4f})",
            "Go back to a checkpoint from before (--resume_from_checkpoint RUN/checkpoints/step-N --resume_inexact true) and lower learning_rate or raise teacher_momentum",
        )  # fmt: skip
        self._judge(
            "valid_fraction", valid == 0, "no pixel has flow that may be used (valid_fraction 0)",
            "Look at panels/: lower frame_gap_seconds" + (", or take another --flow" if "feature_std" in metrics else ""),
        )  # fmt: skip

    def _judge(self, name: str, ill: bool, what: str, advice: str) -> None:
        self.streaks[name] = self.streaks[name] + 1 if ill else 0
        if self.streaks[name] == 1:
            logger.warning("%s; the run stops when it stays so for %d lines of metrics", what, LINES_ALLOWED)
        if self.streaks[name] >= LINES_ALLOWED:
            raise FloatingPointError(
                f"{what} in the last {LINES_ALLOWED} lines of metrics. Checkpoints are kept. {advice}"
            )

    def state_dict(self) -> dict:
        return {"skipped_updates": self.skipped_updates, "streaks": self.streaks}

    def load_state_dict(self, state: dict) -> None:
        self.skipped_updates.copy_(state["skipped_updates"])
        self.streaks = dict(state["streaks"])
