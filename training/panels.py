"""Pictures of what a run sees and learns: one PNG per panel step, with a block of rows for each of the first pairs of the batch."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from modeling_poodle.geometry_poodle import crop_boxes, see_through
from training.flow import flow_to_rgb
from training.views import IMAGENET_MEAN, IMAGENET_STD

COLOURS = (
    (230, 57, 70),
    (29, 161, 242),
    (255, 183, 3),
    (46, 196, 110),
    (171, 71, 188),
    (255, 112, 67),
    (0, 172, 193),
    (141, 110, 99),
)
TILE_HEIGHT, GAP, TITLE = 128, 8, 18
DASH = 4  # pixels of a dash, and between two
BACKGROUND, INK = (250, 250, 248), (40, 40, 40)


def pca_rgb(features: Tensor) -> Tensor:
    """
    Show the first three principal components of feature maps as colours.

    Args:
        features: (N, C, h, w); the components are computed over all N maps together.

    Returns:
        (N, 3, h, w) uint8, each component stretched between its 2nd and 98th percentile. The sign of a component is fixed by its
        largest loading, so that colours do not flip between panels for no reason.
    """
    n, c, h, w = features.shape
    samples = features.float().permute(0, 2, 3, 1).reshape(-1, c)
    samples = samples.nan_to_num(0, 0, 0)  # the run itself reports features that are not finite
    samples = samples - samples.mean(dim=0)
    _, axes = torch.linalg.eigh(samples.T @ samples)
    axes = axes[:, -3:].flip(1)  # largest variance first
    if axes.shape[1] < 3:
        axes = F.pad(axes, (0, 3 - axes.shape[1]))
    axes = axes * torch.sign(axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)))
    values = samples @ axes
    low, high = torch.quantile(values[:: max(len(values) // 100_000, 1)], torch.tensor([0.02, 0.98]), dim=0)
    spread = high - low
    scaled = torch.where(spread > 1e-8, (values - low) / spread.clamp(min=1e-8), 0.5).clamp(0, 1)
    return (scaled * 255).round().to(torch.uint8).view(n, h, w, 3).permute(0, 3, 1, 2)


def denormalise(images: Tensor) -> Tensor:
    """Undo the normalisation by ImageNet's mean and deviation: images (..., 3, H, W) -> uint8."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return ((images.float() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)


def _picture(image: Tensor, height: int = TILE_HEIGHT, smooth: bool = True) -> Image.Image:
    picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    width = round(picture.width * height / picture.height)
    return picture.resize((width, height), Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST)


def _frame_with_boxes(image: Tensor, inputs: dict[str, Tensor], pair: int, frame: int, colours) -> Image.Image:
    """A frame with the boxes that are cut from it: the student's, and dashed, in the colour of its subcrop pair, the teacher's."""
    picture = _picture(image)
    scale = picture.height / image.shape[-2]
    draw = ImageDraw.Draw(picture)
    cut_here = (inputs["teacher_box_frames"][pair] == frame).flatten()
    for box, colour, here in zip(inputs["teacher_boxes"][pair].flatten(0, 1).tolist(), colours, cut_here):
        if here:
            _dashed_rectangle(draw, [side * scale for side in box], colour)
    k = inputs["student_boxes"].shape[2]
    for box, colour in zip(inputs["student_boxes"][pair, frame].tolist(), colours[frame * k :]):
        x0, y0, x1, y1 = (side * scale for side in box)
        # Boxes smaller than a pixel are drawn as one pixel, because PIL draws no box that ends before it begins.
        draw.rectangle((x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)), outline=colour, width=2)
    return picture


def _dashed_rectangle(draw: ImageDraw.ImageDraw, box: list[float], colour) -> None:
    x0, y0, x1, y1 = (round(side) for side in box)
    for x in range(x0, x1, 2 * DASH):
        for y in (y0, y1 - 1):
            draw.line((x, y, min(x + DASH, x1) - 1, y), fill=colour)
    for y in range(y0, y1, 2 * DASH):
        for x in (x0, x1 - 1):
            draw.line((x, y, x, min(y + DASH, y1) - 1), fill=colour)


def _row(tiles: list[tuple[str, Image.Image]]) -> Image.Image:
    width = sum(tile.width for _, tile in tiles) + GAP * (len(tiles) + 1)
    row = Image.new("RGB", (width, tiles[0][1].height + TITLE + GAP), BACKGROUND)
    draw, font, x = ImageDraw.Draw(row), ImageFont.load_default(size=12), GAP
    for title, tile in tiles:
        draw.text((x, 2), title, fill=INK, font=font)
        row.paste(tile, (x, TITLE))
        x += tile.width + GAP
    return row


def _subcrops(inputs: dict[str, Tensor], pair: int, colours) -> Image.Image:
    """Draw each subcrop pair of both frames: the student's tile above the teacher's, framed in the colour of its box."""
    side, width = 64, 4
    frames = denormalise(inputs["pixel_values"][pair]).float()[None]
    own = torch.arange(2)[:, None].expand(inputs["student_boxes"].shape[1:3]).reshape(1, -1)
    sources = inputs["teacher_box_frames"][pair].reshape(1, -1)
    tiles = []
    for who, index in (("student", own), ("teacher", sources)):
        boxes = inputs[f"{who}_boxes"][pair].reshape(1, -1, 4)
        tiles.append(crop_boxes(frames, boxes, index, side)[0].round().clamp(0, 255).to(torch.uint8))
    count = own.shape[1]
    strip = Image.new("RGB", (count * (side + 2 * width + 4), 2 * (side + 2 * width) + 12), BACKGROUND)
    draw = ImageDraw.Draw(strip)
    for number in range(count):
        x, colour = number * (side + 2 * width + 4), colours[number]
        height = 2 * (side + 2 * width)
        draw.rectangle((x, 0, x + side + 2 * width - 1, height - 1), fill=colour)
        for line, images in enumerate(tiles):
            strip.paste(_picture(images[number], side), (x + width, width + line * (side + 2 * width)))
        if sources[0, number] == own[0, number]:
            draw.text((x, height), "same frame", fill=INK, font=ImageFont.load_default(size=10))
    return strip


def make_panel(
    frames: Tensor, inputs: dict[str, Tensor], dense_features: Tensor | None = None, pairs: int = 2
) -> Image.Image:
    """
    Draw the panel of the first pairs of a batch.

    Args:
        frames: (B, 2, 3, H, W) uint8, before augmentation.
        inputs: the model's inputs ([`PoodleForPreTraining.forward`]), on the CPU.
        dense_features: (2B, C, h, w) of the student's views, or `None`.
        pairs: how many pairs to draw at most.
    """
    rows = []
    for pair in range(min(pairs, len(frames))):
        k = inputs["student_boxes"].shape[2]
        colours = [COLOURS[i % len(COLOURS)] for i in range(2 * k)]
        pixel_values = inputs["pixel_values"][pair]
        views = [
            denormalise(see_through(pixel_values, inputs[f"{who}_views"][pair])) for who in ("student", "teacher")
        ]
        mask = inputs["valid_mask"][pair][:, None].expand(2, 3, *frames.shape[-2:]).to(torch.uint8) * 255
        rows.append(
            _row(
                [
                    *(
                        (
                            f"{name} frame; teacher's boxes dashed",
                            _frame_with_boxes(frames[pair, frame], inputs, pair, frame, colours),
                        )
                        for frame, name in enumerate(("earlier", "later"))
                    ),
                    ("flow, earlier to later", _picture(flow_to_rgb(inputs["flow"][pair, 0]))),
                    ("valid", _picture(mask[0], smooth=False)),
                ]
            )
        )
        rows.append(
            _row(
                [
                    (f"{who}'s view, {name}", _picture(views[i][j]))
                    for i, who in enumerate(("student", "teacher"))
                    for j, name in enumerate(("earlier", "later"))
                ]
            )
        )
        tiles = [("subcrop pairs: student's above, teacher's below", _subcrops(inputs, pair, colours))]
        if dense_features is not None:
            features = pca_rgb(dense_features[2 * pair : 2 * pair + 2])[0]
            tiles.append(("student's earlier view: features (PCA)", _picture(features, smooth=False)))
        rows.append(_row(tiles))
    panel = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows) + GAP), BACKGROUND)
    y = 0
    for row in rows:
        panel.paste(row, (0, y))
        y += row.height
    return panel


def save_panel(path: str | Path, frames: Tensor, inputs: dict[str, Tensor], output, pairs: int = 2) -> None:
    """Write the panel of a training step as PNG. Tensors may be on any device; only those of the first pairs are copied."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    inputs = {
        name: value[:pairs].detach().float().cpu() if value.is_floating_point() else value[:pairs].cpu()
        for name, value in inputs.items()
    }
    features = None if output.dense_features is None else output.dense_features[: 2 * pairs].float().cpu()
    # Without optimize=True, which takes six times as long and makes the file only 3 % smaller.
    make_panel(frames[:pairs].cpu(), inputs, features, pairs).save(path)
