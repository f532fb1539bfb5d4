"""Pictures of a report."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from evaluation.report import picture


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        ((60, 90), (60, 90)),
        ((200, 3200), (100, 1600)),
        ((1, 16_000), (1, 1600)),  # four images of one row
        ((70_000, 8), (65_500, 7)),
    ],
)
def test_pictures_of_any_shape_are_shown(size, shown):
    data = re.fullmatch(r'<img src="data:image/jpeg;base64,(.*)">', picture(np.full((*size, 3), 90, np.uint8)))[1]
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.size == shown[::-1] and np.asarray(image).mean() == pytest.approx(90, abs=2)
