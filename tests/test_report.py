"""Pictures of a report."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from evaluation.report import bars, curve, palette, picture


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        ((60, 90), (60, 90)),
        ((200, 3200), (100, 1600)),
        ((1, 16_000), (1, 1600)),  # images of one row side by side
        ((70_000, 8), (65_500, 7)),
    ],
)
def test_pictures_of_any_shape_are_shown(size, shown):
    data = re.fullmatch(r'<img src="data:image/jpeg;base64,(.*)">', picture(np.full((*size, 3), 90, np.uint8)))[1]
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.size == shown[::-1] and np.asarray(image).mean() == pytest.approx(90, abs=2)


def test_classes_have_the_colours_that_the_pictures_have_and_names_are_escaped():
    rows = re.findall(r"<tr>.*?</tr>", bars({"road": 0.5, "<b>": None}, coloured=True))
    for row, colour, name in zip(rows, palette(2), ("road", "&lt;b&gt;")):
        assert f'<i style="background:#{colour[0]:02x}{colour[1]:02x}{colour[2]:02x}"></i> {name}<' in row
    assert "width:150px" in rows[0] and "width" not in rows[1]
    assert "<i" not in bars({"road": 0.5})


def test_a_fit_of_one_point_shows_its_loss():
    assert curve([]) == "<p>Nothing was fitted.</p>"
    assert ">0.25<" in curve([{"step": 1, "loss": 0.25}])
    assert curve([{"step": 1, "loss": 2.0}, {"step": 9, "loss": 1.0}]).count(",") == 2
