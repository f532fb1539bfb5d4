"""
The reference: one training step as the released research code performs it, plain and slow. benchmarks/step.py --reference compares it with
ours.

It is written from a description of what that code does, not from the code. It differs from training/pretrain.py in these points:

- RAFT runs once for each order of a pair, encodes each image twice, and upsamples the flow of every iteration.
- Photometric augmentation runs on the CPU, image by image, with a blur kernel of 10 % of the side.
- The projected maps of both networks are upsampled to the image's resolution and resampled there in successive passes. The student's view
  is undone. The teacher's map is first warped by the flow, then its view is undone. The masks take the same steps. (The description
  counts four such passes without naming them. Here the fourth is that of the masks, which have one channel: the cheapest reading.)
- Warp coordinates are computed for align_corners=True and sampled with False.
- Python loops over images and subcrops handle views, subcrops and masked means, and the host waits for the device in them.
- float32 in the default memory layout, AdamW at its defaults, the teacher moved parameter by parameter.

With identity views, one coordinate convention, and dense_stride 1 on our side, both compute the same loss (tests/test_reference.py).
"""

import copy
import dataclasses
import math
import random

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import resized_crop

from benchmarks.common import Clock, moving_frames
from modeling_poodle import PoodleForPreTraining
from modeling_poodle.decoder_poodle import MOST_NUMBERS
from modeling_poodle.modeling_poodle_pretraining import PointwiseConv
from training.assembly import build_model, make_accelerator
from training.flow import build_flow
from training.recipe import Recipe
from training.views import IMAGENET_MEAN, IMAGENET_STD

MOST_SAMPLED = 2**16 - 1  # most images that cuDNN's grid_sample takes: https://github.com/pytorch/pytorch/issues/88380


class ReferenceModel(nn.Module):
    """
    Both networks with the weights of a `PoodleForPreTraining`, and the released definition of the losses.

    Args:
        model: the model whose modules are copied.
        align_corners_mistake: compute the warp's coordinates for align_corners=True, as in the released code. False serves only to compare
            the losses with ours.
    """

    def __init__(self, model: PoodleForPreTraining, align_corners_mistake: bool = True):
        super().__init__()
        if model.config.dense_weight == 0 or model.config.pooled_weight == 0:
            raise ValueError("the reference has both objectives: dense_weight and pooled_weight must be above 0")
        for name, module in model.named_children():
            setattr(self, name, copy.deepcopy(module).to(memory_format=torch.contiguous_format))
        for module in self.modules():
            # Plain convolutions, as released: on a GPU these are cuDNN's, which PyTorch allows to compute in TF32.
            if isinstance(module, PointwiseConv):
                module.__class__ = nn.Conv2d
        self.weights = model.config.dense_weight, model.config.pooled_weight
        self.align_corners_mistake = align_corners_mistake

    def forward(
        self,
        pixel_values: Tensor,
        flow: Tensor,
        valid_mask: Tensor,
        student_views: Tensor,
        teacher_views: Tensor,
        student_boxes: Tensor,
        teacher_boxes: Tensor,
        teacher_box_frames: Tensor,
        subcrop_size: int = 192,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the loss, the dense loss and the pooled loss from the inputs of `PoodleForPreTraining.forward`."""
        dense = self.dense_objective(pixel_values, flow, valid_mask, student_views, teacher_views)
        pooled = self.pooled_objective(pixel_values, student_boxes, teacher_boxes, teacher_box_frames, subcrop_size)
        return self.weights[0] * dense + self.weights[1] * pooled, dense, pooled

    def dense_objective(self, pixel_values, flow, valid_mask, student_views, teacher_views) -> Tensor:
        height, width = pixel_values.shape[-2:]
        sources = torch.cat([pixel_values[:, 0], pixel_values[:, 1]])  # (2B, 3, H, W), for the student
        targets = torch.cat([pixel_values[:, 1], pixel_values[:, 0]])  # the same, for the teacher
        flow, valid = torch.cat([flow[:, 0], flow[:, 1]]), torch.cat([valid_mask[:, 0], valid_mask[:, 1]])
        student_views = torch.cat([student_views[:, 0], student_views[:, 1]])
        teacher_views = torch.cat([teacher_views[:, 1], teacher_views[:, 0]])

        student = self.student.decode(self.student.encode(warp_affine(sources, student_views)))
        student = self.dense_predictor(self.dense_projector(student))
        with torch.no_grad():
            teacher = self.teacher.decode(self.teacher.encode(warp_affine(targets, teacher_views)))
            teacher = self.teacher_dense_projector(teacher)
        # All images at once if possible. From 8 pairs of 512x1024 on they are split: (2B, 256, H, W) would exceed MOST_NUMBERS elements,
        # the limit of PyTorch's CUDA interpolation.
        parts = -(-student.shape[:2].numel() * height * width // MOST_NUMBERS)
        pieces = (piece.chunk(parts) for piece in (student, teacher, flow, valid, student_views, teacher_views))
        return torch.stack([loss for piece in zip(*pieces) for loss in self.dense_losses(*piece)]).mean()

    def dense_losses(self, student, teacher, flow, valid, student_views, teacher_views) -> list[Tensor]:
        """Compute the loss of each image from the maps (N, 256, h, w) of the heads."""
        height, width = flow.shape[-2:]
        student = F.interpolate(student, (height, width), mode="bilinear", align_corners=False)  # (N, 256, H, W)
        student = warp_affine(student, invert(student_views))
        with torch.no_grad():
            teacher = F.interpolate(teacher, (height, width), mode="bilinear", align_corners=False)
            teacher = warp_affine(self.warp_flow(teacher, flow), invert(teacher_views))
            seen = torch.ones_like(valid[:, None], dtype=student.dtype)
            in_student = warp_affine(seen, invert(student_views))[:, 0] > 0.5
            in_teacher = warp_affine(self.warp_flow(seen, flow), invert(teacher_views))[:, 0] > 0.5
        distance = 2 - 2 * (F.normalize(student, dim=1) * F.normalize(teacher, dim=1)).sum(dim=1)
        losses = []
        for image in range(len(distance)):
            mask = valid[image] & in_student[image] & in_teacher[image]
            losses.append(distance[image][mask].mean() if mask.any() else distance[image].sum() * 0)
        return losses

    def warp_flow(self, maps: Tensor, flow: Tensor) -> Tensor:
        height, width = maps.shape[-2:]
        y, x = torch.meshgrid(
            torch.arange(height, device=maps.device), torch.arange(width, device=maps.device), indexing="ij"
        )
        x, y = x + flow[:, 0], y + flow[:, 1]
        if self.align_corners_mistake:
            grid = torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], dim=-1)
        else:
            grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
        return F.grid_sample(maps, grid, align_corners=False)

    def pooled_objective(self, pixel_values, student_boxes, teacher_boxes, teacher_box_frames, subcrop_size) -> Tensor:
        student_crops, teacher_crops = [], []
        for pair in range(len(pixel_values)):
            for frame in range(2):
                for k in range(student_boxes.shape[2]):
                    student_crops.append(cut(pixel_values[pair, frame], student_boxes[pair, frame, k], subcrop_size))
                    other = int(teacher_box_frames[pair, frame, k])
                    teacher_crops.append(cut(pixel_values[pair, other], teacher_boxes[pair, frame, k], subcrop_size))
        student = self.student.pool(self.student.encode(torch.stack(student_crops)))
        student = self.pooled_predictor(self.pooled_projector(student[:, :, None, None])).flatten(1)
        with torch.no_grad():
            teacher = self.teacher.pool(self.teacher.encode(torch.stack(teacher_crops)))
            teacher = self.teacher_pooled_projector(teacher[:, :, None, None]).flatten(1)
        return (2 - 2 * (F.normalize(student, dim=1) * F.normalize(teacher, dim=1)).sum(dim=1)).mean()

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        pairs = (
            (self.student, self.teacher),
            (self.dense_projector, self.teacher_dense_projector),
            (self.pooled_projector, self.teacher_pooled_projector),
        )
        for student, teacher in pairs:
            for new, old in zip(student.parameters(), teacher.parameters()):
                old.data = momentum * old.data + (1 - momentum) * new.data


@torch.no_grad()
def torchvision_twice(raft: nn.Module, frames: Tensor, updates: int) -> Tensor:
    """
    Estimate flow (B, 2, 2, H, W) of frames (B, 2, 3, H, W) uint8 with torchvision's RAFT, run on both orders of each pair.

    All pairs run at once if possible. From 8 pairs of 512x1024 on they are split: RAFT samples the correlations of each cell as an image
    of its own, and cuDNN takes at most MOST_SAMPLED images.
    """
    cells = frames.shape[-2] // 8 * (frames.shape[-1] // 8)
    parts = -(-len(frames) // max(1, MOST_SAMPLED // cells))
    flows = []
    for piece in frames.chunk(parts):
        earlier, later = (piece[:, index].float() / 127.5 - 1 for index in (0, 1))
        both = [raft(a, b, num_flow_updates=updates)[-1] for a, b in ((earlier, later), (later, earlier))]
        flows.append(torch.stack(both, dim=1))
    return torch.cat(flows)


def warp_affine(images: Tensor, views: Tensor) -> Tensor:
    return F.grid_sample(images, F.affine_grid(views, list(images.shape), align_corners=False), align_corners=False)


def invert(views: Tensor) -> Tensor:
    last = torch.tensor([0.0, 0.0, 1.0], device=views.device).expand(len(views), 1, 3)
    return torch.linalg.inv(torch.cat([views, last], dim=1))[:, :2]


def cut(image: Tensor, box: Tensor, size: int) -> Tensor:
    """Cut a subcrop at whole pixels and resize it with torchvision's defaults: bilinear, antialiased."""
    x0, y0, x1, y1 = map(round, box.tolist())
    return resized_crop(image, y0, x0, y1 - y0, x1 - x0, [size, size], antialias=True)


def flow_is_valid(forward: Tensor, backward: Tensor) -> Tensor:
    """Forward-backward check of the flow of one direction (N, 2, H, W). Returns (N, H, W) bool."""
    height, width = forward.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(height, device=forward.device), torch.arange(width, device=forward.device), indexing="ij"
    )
    x, y = x + forward[:, 0], y + forward[:, 1]
    grid = torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], dim=-1)
    returned = F.grid_sample(backward, grid, align_corners=False)
    limit = 0.1 * (forward.square().sum(1) + returned.square().sum(1)) + 0.5
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    return inside & ((forward + returned).square().sum(1) <= limit)


def draw_view(height: int, width: int) -> list[list[float]]:
    """Draw one view: rotation, scale, and a flip with probability 0.5."""
    angle, scale = math.radians(random.uniform(-10, 10)), random.uniform(0.9, 1.1)
    cos, sin, flip = math.cos(angle) / scale, math.sin(angle) / scale, random.choice((-1, 1))
    return [[cos * flip, -sin * height / width, 0.0], [sin * width / height * flip, cos, 0.0]]


def draw_box(x: float, y: float, area: float, height: int, width: int) -> tuple[float, float, float, float]:
    aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
    w, h = math.sqrt(area * height * width * aspect), math.sqrt(area * height * width / aspect)
    # Clamped to the image.
    return max(x - w / 2, 0), max(y - h / 2, 0), min(x + w / 2, width), min(y + h / 2, height)


def draw_subcrops(flow: Tensor, recipe: Recipe) -> dict[str, Tensor]:
    """Draw the subcrops of a batch one by one (arXiv 2408.11208, section 3). The host reads the flow at each centre."""
    b, _, _, height, width = flow.shape
    low, high = recipe.subcrop_area
    cell = max(round(math.sqrt((low + high) / 2) * min(height, width)), 1)
    rows, columns = max(height // cell, 1), max(width // cell, 1)
    boxes = {"student_boxes": [], "teacher_boxes": [], "teacher_box_frames": []}
    for pair in range(b):
        for frame in range(2):
            cells = list(range(rows * columns)) * -(-recipe.num_subcrops // (rows * columns))
            for number in random.sample(cells, recipe.num_subcrops):
                x = (number % columns + random.random()) * width / columns
                y = (number // columns + random.random()) * height / rows
                area = random.uniform(low, high)
                u, v = flow[pair, frame, :, min(int(y), height - 1), min(int(x), width - 1)].tolist()
                to, target_x, target_y = frame, x, y
                for _ in range(5):
                    shift_x = random.uniform(-recipe.subcrop_jitter, recipe.subcrop_jitter) * width
                    shift_y = random.uniform(-recipe.subcrop_jitter, recipe.subcrop_jitter) * height
                    if 0 <= x + u + shift_x <= width and 0 <= y + v + shift_y <= height:
                        to, target_x, target_y = 1 - frame, x + u + shift_x, y + v + shift_y
                        break
                boxes["student_boxes"].append(draw_box(x, y, area, height, width))
                boxes["teacher_boxes"].append(draw_box(target_x, target_y, random.uniform(area, high), height, width))
                boxes["teacher_box_frames"].append(to)
    shaped = {name: torch.tensor(values, device=flow.device) for name, values in boxes.items()}
    return {name: values.view(b, 2, recipe.num_subcrops, *values.shape[1:]) for name, values in shaped.items()}


class Blur(nn.Module):
    """
    Gaussian blur of an image (3, H, W) uint8 with a kernel of 10 % of the side.

    It uses OpenCV's separable blur, which takes 13 ms at 512x1024 on one core. torchvision's takes 537 ms and would flatter our step.
    """

    def __init__(self, height: int, width: int):
        super().__init__()
        self.size = max(3, round(0.1 * min(height, width)) | 1)

    def forward(self, image: Tensor) -> Tensor:
        array = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
        blurred = cv2.GaussianBlur(array, (self.size, self.size), random.uniform(0.1, 2.0))
        return torch.from_numpy(blurred).permute(2, 0, 1)


def photometric(height: int, width: int, torchvision_blur: bool = False) -> nn.Module:
    """
    Photometric augmentation of one image (3, H, W) uint8 (arXiv 2408.11208, section 3), with torchvision's transforms.

    Args:
        torchvision_blur: use torchvision's GaussianBlur, the usual choice, instead of the faster `Blur` that our step is compared with.
    """
    blur = Blur(height, width)
    if torchvision_blur:
        blur = v2.GaussianBlur(blur.size, sigma=(0.1, 2.0))
    return v2.Compose(
        [
            v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            v2.RandomApply([blur], p=0.5),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


class ReferenceStep:
    """
    One step of the reference, split into parts, for comparison with `OurStep`.

    On a GPU the step leaves out the augmentation, which the released code does in the loader's workers (benchmarks/loader.py measures it).
    """

    def __init__(self, recipe: Recipe):
        self.recipe = dataclasses.replace(recipe, bf16=False, torch_compile=False, gradient_checkpointing=False)
        accelerator = make_accelerator(self.recipe)
        torch.set_float32_matmul_precision("highest")  # PyTorch's default, which the released code does not change
        self.device = accelerator.device
        self.pair_flow, flow_module = build_flow(recipe.flow, recipe.flow_weights, recipe.flow_updates)
        self.raft = None
        if flow_module is not None:
            self.raft = flow_module.raft.to(self.device, memory_format=torch.contiguous_format)
        self.model = ReferenceModel(build_model(accelerator, self.recipe)).train()
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
                {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=recipe.learning_rate,
            eps=recipe.adam_epsilon,
        )
        self.frames = moving_frames(recipe.per_device_train_batch_size, *recipe.crop_size, self.device)
        self.augmentation = photometric(*recipe.crop_size)
        self.clock = Clock(self.device)
        random.seed(0)

    @torch.no_grad()
    def estimate_flow(self) -> Tensor:
        if self.raft is None:
            return self.pair_flow.batch(self.frames)
        return torchvision_twice(self.raft, self.frames, self.recipe.flow_updates)

    def augment(self) -> Tensor:
        if self.device.type == "cuda":
            return v2.functional.normalize(self.frames.float() / 255, list(IMAGENET_MEAN), list(IMAGENET_STD))
        return torch.stack([self.augmentation(image) for image in self.frames.flatten(0, 1)]).unflatten(0, (-1, 2))

    @torch.no_grad()
    def draw(self, flow: Tensor) -> dict[str, Tensor]:
        """Compute the masks and draw the views and subcrops of a batch."""
        b, _, _, height, width = flow.shape
        masks = [flow_is_valid(flow[:, k], flow[:, 1 - k]) for k in (0, 1)]
        inputs = {"flow": flow, "valid_mask": torch.stack(masks, dim=1), **draw_subcrops(flow, self.recipe)}
        identity = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
        for who in ("student_views", "teacher_views"):
            views = [draw_view(height, width) if self.recipe.affine_views else identity for _ in range(2 * b)]
            inputs[who] = torch.tensor(views, device=self.device).view(b, 2, 2, 3)
        return inputs

    def __call__(self, batch: dict | None = None) -> None:
        """Run a step on the synthetic frames. The flow is estimated, unless `batch` holds it."""
        clock = self.clock
        with clock.part("flow"):
            flow = self.estimate_flow() if batch is None else batch["flow"]
        with clock.part("augmentation"):
            pixel_values = self.augment()
        with clock.part("draws"):
            inputs = self.draw(flow)
        with clock.part("forward"):
            loss, _, _ = self.model(pixel_values, **inputs, subcrop_size=self.recipe.subcrop_size)
        with clock.part("backward"):
            loss.backward()
        with clock.part("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        with clock.part("ema"):
            self.model.update_teacher(0.996)
