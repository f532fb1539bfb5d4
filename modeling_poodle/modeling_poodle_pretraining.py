"""PyTorch PooDLe model for pretraining: student, momentum teacher, and the two objectives (arXiv 2408.11208, section 3)."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers.utils import ModelOutput, can_return_tuple, logging

from .configuration_poodle import PoodleConfig
from .cpu import linear
from .geometry_poodle import alignment_grids, crop_boxes, sample, see_through
from .modeling_poodle import PoodleModel, PoodlePreTrainedModel
from .objectives_poodle import dense_loss, pooled_loss

logger = logging.get_logger(__name__)


@dataclass
class PoodleForPreTrainingOutput(ModelOutput):
    """
    Args:
        loss: scalar, `dense_weight * dense_loss + pooled_weight * pooled_loss`.
        dense_loss, pooled_loss: scalars, each 0 to 4; `None` if the objective's weight is 0.
        valid_fraction: scalar, the share of the dense points that are valid; `None` if `dense_weight` is 0.
        dense_features: (2B, C, h, w), the student's dense features before the projector, detached. The two frames of a pair are adjacent.
        pooled_features: (2B * K, C), the student's pooled features before the projector, detached.
    """

    loss: Tensor | None = None
    dense_loss: Tensor | None = None
    pooled_loss: Tensor | None = None
    valid_fraction: Tensor | None = None
    dense_features: Tensor | None = None
    pooled_features: Tensor | None = None


class PointwiseConv(nn.Conv2d):
    """
    A 1x1 convolution computed as a matrix product. Maps in channels_last layout are not copied.

    Used in the heads, it makes a step of a ResNet-50 on 2 cores of an Intel Xeon 1.05 times as fast in float32 and 1.2 times in bfloat16
    (AMX). In the decoder and in the encoder's bottlenecks it makes no difference.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True):
        super().__init__(in_channels, out_channels, kernel_size=1, bias=bias)

    def forward(self, hidden_state: Tensor) -> Tensor:
        n, _, height, width = hidden_state.shape
        # Flattened in its own layout (channels_last in training): DistributedDataParallel warns if gradients have another layout.
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)
        points = linear(hidden_state.permute(0, 2, 3, 1).flatten(0, 2), weight, self.bias)
        return points.unflatten(0, (n, height, width)).permute(0, 3, 1, 2)


def make_head(in_channels: int, hidden_channels: int, out_channels: int) -> nn.Sequential:
    """Make a projector or predictor: 1x1 convolution, BN, ReLU, 1x1 convolution (arXiv 2408.11208, section 3)."""
    return nn.Sequential(
        PointwiseConv(in_channels, hidden_channels),
        nn.BatchNorm2d(hidden_channels),
        nn.ReLU(inplace=True),
        PointwiseConv(hidden_channels, out_channels),
    )


class PoodleForPreTraining(PoodlePreTrainedModel):
    """
    Student and teacher with both objectives.

    `forward` takes flow, views and subcrops as inputs: it draws nothing at random and does not estimate flow. An objective of weight 0 has
    no heads. Only the dense objective trains the decoder, so with `dense_weight` 0 there is no decoder, and the model's config has
    `num_decoder_blocks` 0.

    The teacher is a frozen copy of the student. Call [`~PoodleForPreTraining.update_teacher`] once after each optimizer step to move it.
    Its BatchNorm follows `train()` like the student's. `from_pretrained` reads a checkpoint of this class, or one of [`PoodleModel`], which
    becomes the student. Teacher weights that the checkpoint lacks are copied from the student.

    With transformers' Trainer, update the teacher in a callback (`on_step_end`); `label_names=["pixel_values"]` lets `evaluate()` report a
    loss.
    """

    base_model_prefix = "student"  # checkpoints of PoodleModel have no such prefix; they load into the student
    _PAIRS = (
        ("student", "teacher"),
        ("dense_projector", "teacher_dense_projector"),
        ("pooled_projector", "teacher_pooled_projector"),
    )

    def __init__(self, config: PoodleConfig):
        if config.dense_weight == 0 and config.num_decoder_blocks:
            logger.warning("dense_weight is 0, nothing would train a decoder: the model has none")
            config = copy.deepcopy(config)  # not to_dict(), which omits the attention implementation
            if config.readout_stage == "decoder":
                config.readout_stage = None
            config.num_decoder_blocks = 0
        super().__init__(config)
        self.student = PoodleModel(config)
        self.teacher = PoodleModel(config)
        hidden, size = config.projection_hidden_size, config.projection_size
        for name, weight in (("dense", config.dense_weight), ("pooled", config.pooled_weight)):
            if weight > 0:
                setattr(self, f"{name}_projector", make_head(self.student.num_features, hidden, size))
                setattr(self, f"{name}_predictor", make_head(size, hidden, size))
                setattr(self, f"teacher_{name}_projector", make_head(self.student.num_features, hidden, size))
        self.post_init()
        self.reset_teacher()

    def train(self, mode: bool = True):
        """Set the mode. In the teacher only BatchNorm trains: dropout and stochastic depth would make its targets noisy."""
        super().train(mode)
        for _, teacher in self._student_and_teacher():
            for module in teacher.modules():
                module.training = mode and isinstance(module, nn.modules.batchnorm._BatchNorm)
        return self

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        lacking = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
        model._fill_teacher(lacking)
        if any(key.startswith("teacher") for key in lacking):  # transformers has just listed them as newly initialised
            logger.warning("the teacher's weights that the checkpoint lacks were copied from the student")
        model.freeze_teacher()  # from_pretrained sets requires_grad=True for every floating point parameter
        return (model, info) if output_loading_info else model

    @torch.no_grad()
    def _fill_teacher(self, names: set[str]) -> None:
        """Copy the teacher's parameters and statistics in `names` from the student: those that a checkpoint lacks would stay random."""
        for student, teacher in self._PAIRS:
            if hasattr(self, teacher):
                source = getattr(self, student).state_dict()
                for key, value in getattr(self, teacher).state_dict().items():
                    if f"{teacher}.{key}" in names:
                        value.copy_(source[key])

    def _student_and_teacher(self):
        for student, teacher in self._PAIRS:
            if hasattr(self, teacher):
                yield getattr(self, student), getattr(self, teacher)

    @torch.no_grad()
    def reset_teacher(self) -> None:
        """Make the teacher a frozen copy of the student, including BatchNorm statistics."""
        for student, teacher in self._student_and_teacher():
            if next(student.parameters()).device.type != "meta":
                teacher.load_state_dict(student.state_dict())
        self.freeze_teacher()

    def freeze_teacher(self) -> None:
        for _, teacher in self._student_and_teacher():
            teacher.requires_grad_(False)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """
        teacher <- momentum * teacher + (1 - momentum) * student, all parameters in one fused call.

        Raises:
            ValueError: momentum is not from 0 to 1.
        """
        if not (isinstance(momentum, (int, float)) and 0 <= momentum <= 1):
            raise ValueError(f"momentum must be a number from 0 to 1, got {momentum!r}")
        pairs = list(self._student_and_teacher())
        get_ema_multi_avg_fn(momentum)(
            [parameter for _, teacher in pairs for parameter in teacher.parameters()],
            [parameter for student, _ in pairs for parameter in student.parameters()],
            None,  # the number of updates, which the function does not use
        )

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        flow: Tensor | None = None,
        valid_mask: Tensor | None = None,
        student_views: Tensor | None = None,
        teacher_views: Tensor | None = None,
        student_boxes: Tensor | None = None,
        teacher_boxes: Tensor | None = None,
        teacher_box_frames: Tensor | None = None,
        subcrop_size: int = 192,
    ) -> PoodleForPreTrainingOutput:
        """
        Compute both losses of a batch of frame pairs.

        Args:
            pixel_values: (B, 2, 3, H, W) frame pair, augmented and normalised; index 0 earlier, 1 later.
            flow: (B, 2, 2, H, W) pixels, x then y; index 0 earlier to later, 1 later to earlier.
            valid_mask: (B, 2, H, W) bool, True where the flow may be used.
            student_views, teacher_views: (B, 2, 2, 3) view of each frame, from view to frame coordinates, normalised.
                The student's view of frame 0 is matched with the teacher's view of frame 1, and the other way round.
            student_boxes, teacher_boxes: (B, 2, K, 4) subcrops, xyxy in pixels of the frames, without the affine views. The
                student's [:, f] are cut from frame f. The values are not checked: see `crop_boxes`.
            teacher_box_frames: (B, 2, K) integer, the frame, 0 or 1, that each of the teacher's subcrops is cut from. Not checked either.
            subcrop_size: side to which the subcrops are resized, pixels.

        Raises:
            ValueError: inputs of an objective of positive weight are missing, or shapes or dtypes do not fit.
        """
        self._check_inputs(
            pixel_values,
            flow=flow,
            valid_mask=valid_mask,
            student_views=student_views,
            teacher_views=teacher_views,
            student_boxes=student_boxes,
            teacher_boxes=teacher_boxes,
            teacher_box_frames=teacher_box_frames,
        )
        loss = pixel_values.new_zeros((), dtype=torch.float32)
        dense, valid_fraction, dense_features, pooled, pooled_features = (None,) * 5
        if self.config.dense_weight > 0:
            dense, valid_fraction, dense_features = self.dense_objective(
                pixel_values, flow, valid_mask, student_views, teacher_views
            )
            loss = loss + self.config.dense_weight * dense
        if self.config.pooled_weight > 0:
            pooled, pooled_features = self.pooled_objective(
                pixel_values, student_boxes, teacher_boxes, teacher_box_frames, subcrop_size
            )
            loss = loss + self.config.pooled_weight * pooled
        dense_features, pooled_features = (
            None if f is None else f.detach() for f in (dense_features, pooled_features)
        )
        # Set in one call, because to_tuple() returns the fields in the order in which they were set.
        return PoodleForPreTrainingOutput(loss, dense, pooled, valid_fraction, dense_features, pooled_features)

    def dense_objective(
        self, pixel_values: Tensor, flow: Tensor, valid_mask: Tensor, student_views: Tensor, teacher_views: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        Compute the dense loss at matched points, from views, encoder, SDM and dense heads (arXiv 2408.11208, section 3).

        Returns:
            The loss, the share of valid points, and the student's dense features (2B, C, h, w), through which gradients flow.
        """
        b, _, _, height, width = pixel_values.shape
        frames = pixel_values.flatten(0, 1)  # (2B, 3, H, W), earlier and later alternating
        student_images = see_through(frames, student_views.flatten(0, 1))
        student_features = self.student.decode(self.student.encode(student_images))  # (2B, C, h, w)
        prediction = self.dense_predictor(self.dense_projector(student_features))
        with torch.no_grad():
            teacher_images = see_through(frames, teacher_views.flatten(0, 1))
            teacher_features = self.teacher.decode(self.teacher.encode(teacher_images))
            target = self.teacher_dense_projector(teacher_features)
            # Frame 0 is matched with frame 1, and the other way round.
            target = target.unflatten(0, (b, 2)).flip(1).flatten(0, 1)
            target_views = teacher_views.flip(1).flatten(0, 1)
            stride = self.config.dense_stride
            size = tuple(prediction.shape[-2:]) if stride is None else (-(-height // stride), -(-width // stride))
            student_points, teacher_points, mask = alignment_grids(
                flow.flatten(0, 1), valid_mask.flatten(0, 1), student_views.flatten(0, 1), target_views, size
            )
        # Border padding, because a point inside the view but beyond the outermost cell centre must not be mixed with zeros.
        loss = dense_loss(
            # A singular view gives NaN points, at which the gradient would be written out of bounds (torch 2.14, CPU).
            sample(prediction, student_points.nan_to_num(), padding_mode="border"),
            sample(target, teacher_points, padding_mode="border"),
            mask,
        )
        return loss, mask.float().mean(), student_features

    def pooled_objective(
        self,
        pixel_values: Tensor,
        student_boxes: Tensor,
        teacher_boxes: Tensor,
        teacher_box_frames: Tensor,
        subcrop_size: int,
    ) -> tuple[Tensor, Tensor]:
        """
        Compute the pooled loss of the subcrops, from encoder and pooled heads (arXiv 2408.11208, section 3).

        Returns:
            The loss, and the student's pooled features (2B * K, C), through which gradients flow.
        """
        # Each student box is cut from its own frame; a teacher box may be cut from either frame of the pair.
        frames, boxes = pixel_values.flatten(0, 1)[:, None], student_boxes.flatten(0, 1)
        own = torch.zeros(boxes.shape[:2], dtype=torch.long, device=boxes.device)
        student_crops = crop_boxes(frames, boxes, own, subcrop_size)
        student_pooled = self.student.pool(self.student.encode(student_crops.flatten(0, 1)))  # (2BK, C)
        prediction = self.pooled_predictor(self.pooled_projector(student_pooled[:, :, None, None])).flatten(1)
        with torch.no_grad():
            teacher_crops = crop_boxes(
                pixel_values, teacher_boxes.flatten(1, 2), teacher_box_frames.flatten(1, 2), subcrop_size
            )
            teacher_pooled = self.teacher.pool(self.teacher.encode(teacher_crops.flatten(0, 1)))
            target = self.teacher_pooled_projector(teacher_pooled[:, :, None, None]).flatten(1)
        return pooled_loss(prediction, target), student_pooled

    def _check_inputs(self, pixel_values: Tensor, **others: Tensor | None) -> None:
        """Check shapes and dtypes, which are known without waiting for the device."""
        channels = self.config.num_channels
        shape = _shape(pixel_values)
        if shape is None or len(shape) != 5 or shape[1:3] != (2, channels):
            raise ValueError(f"pixel_values must be frame pairs (B, 2, {channels}, H, W), got {shape}")
        b, _, _, height, width = shape
        expected = {}
        if self.config.dense_weight > 0:
            expected["flow"] = (b, 2, 2, height, width)
            expected["valid_mask"] = (b, 2, height, width)
            expected["student_views"] = expected["teacher_views"] = (b, 2, 2, 3)
        if self.config.pooled_weight > 0:
            boxes = _shape(others["student_boxes"])
            k = "K" if boxes is None or len(boxes) != 4 or boxes[2] < 1 else boxes[2]
            expected["student_boxes"] = expected["teacher_boxes"] = (b, 2, k, 4)
            expected["teacher_box_frames"] = (b, 2, k)
        for name, size in expected.items():
            shape = _shape(others[name])
            if shape != size:
                raise ValueError(f"{name} must be ({', '.join(map(str, size))}) to fit pixel_values, got {shape}")
            kind = others[name].dtype
            if name == "valid_mask" and kind != torch.bool:
                raise ValueError(f"valid_mask must be of torch.bool, got {kind}")
            if name == "teacher_box_frames" and (kind.is_floating_point or kind == torch.bool):
                raise ValueError(f"teacher_box_frames must be of integers, got {kind}")


def _shape(value: Tensor | None) -> tuple[int, ...] | None:
    return None if value is None else tuple(value.shape)


__all__ = ["PoodleForPreTraining", "PoodleForPreTrainingOutput"]
