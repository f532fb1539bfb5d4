"""Labelled images whose classes differ in colour, and the little ResNet that the evaluation tests use on them."""

from pathlib import Path

import numpy as np
from PIL import Image

RESNET = {"layer_type": "basic", "depths": [1, 1, 1, 1], "hidden_sizes": [16, 16, 32, 32], "embedding_size": 16}


def squares(folder: Path, count: int, seed: int, size=(64, 96)) -> None:
    """Write `count` images whose classes differ in colour: a red or blue square on green."""
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        label = np.zeros(size, np.uint8)
        top, left = rng.integers(0, size[0] - 32), rng.integers(0, size[1] - 32)
        label[top : top + 32, left : left + 32] = 1 + number % 2
        image = np.array([[40, 160, 40], [200, 30, 30], [30, 30, 200]], np.float32)[label] + rng.normal(
            0, 8, (*size, 3)
        )
        label[:2] = 255
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{number}.png")
        Image.fromarray(label).save(folder / "labels" / f"{number}.png")
