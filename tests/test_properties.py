"""Properties that hold for any input: grids and boxes against loops in double precision, recipes from any mapping, and the metric."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from evaluation.detection_recipe import DetectionRecipe
from evaluation.explore import ExploreRecipe
from evaluation.metrics import confusion_matrix, scores
from evaluation.propagate import PropagationRecipe
from evaluation.recipe import EvaluationRecipe
from modeling_poodle import PoodleConfig, PoodleFlowConfig
from modeling_poodle.geometry_poodle import (
    affine_view,
    alignment_grids,
    apply_affine,
    crop_boxes,
    flow_valid_mask,
    invert_affine,
)
from modeling_poodle.recipe_files import read_recipe_file
from training.flow_recipe import FlowRecipe
from training.recipe import Recipe
from training.run_recipe import RunRecipe
from training.views import draw_subcrops


def examples(count: int):
    """Settings that draw the same examples in every run, so that a failure is always reproducible."""
    return settings(
        max_examples=count, derandomize=True, deadline=None, database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )  # fmt: skip


# --- geometry ---

sides = st.integers(1, 40)
view_values = st.tuples(st.floats(-math.pi, math.pi), st.floats(0.25, 4), st.booleans())


def view_of(values, height: int, width: int) -> torch.Tensor:
    angle, scale, flip = values
    numbers = (torch.tensor([value], dtype=torch.float64) for value in (angle, scale))
    return affine_view(*numbers, torch.tensor([flip]), height, width)


def matrix_of(values, height: int, width: int) -> np.ndarray:
    """The view's matrix in normalised coordinates, composed of its parts: mirror, shrink and turn, all in pixels."""
    angle, scale, flip = values
    pixels = np.diag([width / 2, height / 2, 1])
    turn = np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
    shrink, mirror = np.diag([1 / scale, 1 / scale, 1]), np.diag([-1.0 if flip else 1.0, 1, 1])
    return np.linalg.inv(pixels) @ turn @ shrink @ mirror @ pixels


def read(image: np.ndarray, x: float, y: float) -> np.ndarray:
    """Read a (C, H, W) image at pixel (x, y), with edges at integers and the border replicated."""
    _, height, width = image.shape
    x, y = min(max(x - 0.5, 0), width - 1), min(max(y - 0.5, 0), height - 1)
    j, i = int(x), int(y)
    right, below = min(j + 1, width - 1), min(i + 1, height - 1)
    top = (1 - (x - j)) * image[:, i, j] + (x - j) * image[:, i, right]
    return (1 - (y - i)) * top + (y - i) * ((1 - (x - j)) * image[:, below, j] + (x - j) * image[:, below, right])


@examples(40)
@given(first=view_values, second=view_values, height=sides, width=sides)
def test_views_compose_and_invert_as_their_matrices_do(first, second, height, width):
    one, two = (view_of(values, height, width) for values in (first, second))
    a, b = (matrix_of(values, height, width) for values in (first, second))
    np.testing.assert_allclose(one[0], a[:2], atol=1e-9)
    np.testing.assert_allclose(invert_affine(one)[0], np.linalg.inv(a)[:2], atol=1e-9)
    points = torch.tensor([[[-1.0, -1], [0.3, -0.7], [1, 1]]], dtype=torch.float64)
    expected = np.concatenate([points[0], np.ones((3, 1))], axis=1) @ (a @ b).T
    np.testing.assert_allclose(apply_affine(one, apply_affine(two, points))[0], expected[:, :2], atol=1e-8)
    back = apply_affine(invert_affine(two), apply_affine(two, points))
    np.testing.assert_allclose(back, points, atol=1e-9)


@examples(25)
@given(
    seed=st.integers(0, 10**6), height=st.integers(1, 7), width=st.integers(1, 9), speed=st.sampled_from([0, 0.5, 3, 1e4])
)  # fmt: skip
def test_occlusion_equals_a_loop_in_double_precision(seed, height, width, speed):
    rng = np.random.default_rng(seed)
    forward = rng.normal(0, 1, (2, height, width)) * speed
    backward = -forward + rng.normal(0, 0.5, forward.shape)
    forward[:, rng.random((height, width)) < 0.05] = rng.choice([math.nan, math.inf])
    valid = flow_valid_mask(*(torch.from_numpy(flow).float()[None] for flow in (forward, backward)))[0].numpy()
    for i in range(height):
        for j in range(width):
            f = forward[:, i, j]
            x, y = j + 0.5 + f[0], i + 0.5 + f[1]
            if not np.isfinite(f).all():
                assert not valid[i, j]
                continue
            b = read(backward, x, y)
            excess = np.square(f + b).sum() - 0.1 * (np.square(f).sum() + np.square(b).sum()) - 0.5
            margin = min(x, y, width - x, height - y)
            if abs(excess) > 1e-3 * (1 + speed**2) and abs(margin) > 1e-3 * (1 + speed):
                assert valid[i, j] == (excess < 0 and margin > 0)


@examples(15)
@given(
    seed=st.integers(0, 10**6), height=st.integers(2, 12), width=st.integers(2, 12), cells=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    views=st.tuples(view_values, view_values),
)  # fmt: skip
def test_alignment_equals_a_loop_in_double_precision(seed, height, width, cells, views):
    rng = np.random.default_rng(seed)
    h, w = min(cells[0], height), min(cells[1], width)
    flow, mask = rng.normal(0, 2, (2, height, width)), rng.random((height, width)) < 0.8
    student, teacher = (view_of(values, height, width).float() for values in views)
    points = alignment_grids(torch.from_numpy(flow)[None], torch.from_numpy(mask)[None], student, teacher, (h, w))
    student_points, teacher_points, valid = (found[0].numpy() for found in points)
    inverses = [np.linalg.inv(matrix_of(values, height, width)) for values in views]
    for i in range(h):
        for j in range(w):
            x, y = (j + 0.5) * width / w, (i + 0.5) * height / h
            moved = read(flow, x, y) + (x, y)
            a, b = (
                (inverse @ (2 * px / width - 1, 2 * py / height - 1, 1))[:2]
                for inverse, (px, py) in zip(inverses, ((x, y), moved))
            )
            np.testing.assert_allclose(student_points[i, j], a, atol=1e-3)
            np.testing.assert_allclose(teacher_points[i, j], b, atol=1e-3)
            usable = read(mask[None].astype(float), x, y)[0]
            margin = 1 - max(np.abs(a).max(), np.abs(b).max())
            if abs(margin) > 1e-3 and not 0.998 < usable < 0.9995:
                assert valid[i, j] == (margin > 0 and usable > 0.999)


@examples(15)
@given(
    seed=st.integers(0, 10**6), height=st.integers(2, 15), width=st.integers(2, 15), size=st.integers(1, 5), count=st.integers(1, 4)
)  # fmt: skip
def test_crops_equal_the_library_s_resize_and_stay_within_the_box(seed, height, width, size, count):
    rng = np.random.default_rng(seed)
    frames, index = (
        torch.from_numpy(rng.random((1, 2, 3, height, width))),
        torch.from_numpy(rng.integers(0, 2, (1, count))),
    )
    low = np.stack([rng.integers(0, width, count), rng.integers(0, height, count)], axis=-1)
    high = low + 1 + (rng.random((count, 2)) * ((width, height) - low - 1)).round().astype(int)
    whole = torch.from_numpy(np.concatenate([low, high], axis=-1))[None]
    crops = crop_boxes(frames, whole.double(), index, size)
    between = whole + torch.from_numpy(rng.random((1, count, 4)) * 0.4) * torch.tensor([1, 1, -1, -1])
    inner = crop_boxes(frames, between, index, size)
    for m, (x0, y0, x1, y1) in enumerate(whole[0].tolist()):
        cut = frames[:, index[0, m], :, y0:y1, x0:x1]
        expected = F.interpolate(cut, size=(size, size), mode="bilinear", antialias=True)[0]
        torch.testing.assert_close(crops[0, m], expected, atol=1e-9, rtol=0)
        # Any box within this one reads weighted means of these pixels.
        least, most = cut[0].amin(dim=(1, 2))[:, None, None], cut[0].amax(dim=(1, 2))[:, None, None]
        assert ((inner[0, m] >= least - 1e-9) & (inner[0, m] <= most + 1e-9)).all()


# --- boxes ---


@examples(40)
@given(
    seed=st.integers(0, 10**6), height=st.integers(8, 300), width=st.integers(8, 300), count=st.integers(1, 9),
    area=st.tuples(st.floats(0.005, 1), st.floats(0.005, 1)).map(sorted), jitter=st.floats(0, 1),
    motion=st.tuples(st.floats(-1.5, 1.5), st.floats(-1.5, 1.5)),
)  # fmt: skip
def test_boxes_lie_inside_have_their_size_and_follow_the_flow(seed, height, width, count, area, jitter, motion):
    frame = torch.tensor([width, height])
    shift = torch.tensor(motion)[None, :] * frame * torch.tensor([[1], [-1]])  # pixels, in both directions
    flow = shift[None, :, :, None, None].expand(2, 2, 2, height, width)
    drawn = draw_subcrops(flow, count, torch.Generator().manual_seed(seed), area, jitter)
    own = torch.arange(2)[None, :, None].expand(2, 2, count)
    assert torch.equal(drawn["teacher_box_frames"], torch.where(drawn["matched"], 1 - own, own))
    sizes, centres, free = {}, {}, {}
    for who in ("student", "teacher"):
        low, high = drawn[f"{who}_boxes"].split(2, dim=-1)
        assert (low >= 0).all() and (high <= frame + 1e-3).all() and (high > low).all()
        size = high - low
        share, aspect = size.prod(dim=-1) / (height * width), size[..., 0] / size[..., 1]
        cut = (size >= frame - 1e-3).any(dim=-1)  # as wide or as high as the frame
        assert (share <= area[1] * 1.001).all() and (cut | (share >= area[0] * 0.999)).all()
        assert (cut | ((aspect > 0.7499) & (aspect < 1.3334))).all()
        sizes[who], centres[who] = share, (low + high) / 2
        free[who] = ((low > 1e-2) & (high < frame - 1e-2)).all(dim=-1)  # not moved to lie inside
        free["uncut"] = free.get("uncut", True) & ~cut
    assert (~free["uncut"] | (sizes["teacher"] >= sizes["student"] * 0.999)).all()
    followed = centres["student"] + torch.where(drawn["matched"][..., None], shift[None, :, None], 0.0)
    away = (centres["teacher"] - followed).abs()
    seen = free["student"] & free["teacher"]
    assert (~seen[..., None] | (away <= jitter * frame + 0.01)).all()
    # A subcrop cannot be matched if its flow leaves the frame by more than the jitter.
    target = centres["student"] + shift[None, :, None]
    outside = ((target < -jitter * frame - 0.01) | (target > frame * (1 + jitter) + 0.01)).any(dim=-1)
    assert not (drawn["matched"] & outside & free["student"]).any()


# --- recipes ---

texts = st.text(max_size=8) | st.sampled_from(
    ["dis", "street", "none", "latest", "a/b", "1e-4", "ja\nnein", "é\x85\x00", "folder:x"]
)
numbers = st.integers(-3, 40) | st.sampled_from([10**10, -(10**30), 10**400, 2**31]) | st.floats()
plain = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=6,
)
pairs = st.lists(st.integers(0, 512), min_size=2, max_size=2) | st.lists(st.floats(0, 2), min_size=2, max_size=2)


def fields_of(config):
    names = {*config.__dataclass_fields__, "dtype", "id2label", "num_labels", "out_features", "out_indices"}
    return st.dictionaries(st.sampled_from(sorted(names)), plain, max_size=2)


networks = fields_of(PoodleConfig) | st.builds(
    lambda kind, inner: {"backbone_config": {"model_type": kind, **inner}},
    st.sampled_from(["resnet", "vit", "convnext", "dinov2", "timm_backbone", "bert", "none"]) | plain,
    st.dictionaries(st.sampled_from(["depths", "hidden_sizes", "num_hidden_layers", "out_features", "layer_type", "self"]), plain, max_size=2),
)  # fmt: skip


def any_mapping(kind):
    names = sorted(kind.__dataclass_fields__)
    keys = st.sampled_from(names) | st.sampled_from(names) | texts
    mappings = st.dictionaries(keys, plain | numbers | pairs, max_size=3)
    if not issubclass(kind, RunRecipe):
        return mappings.map(lambda values: {"model": ["org/x"], **values})
    models = networks
    if kind is FlowRecipe:  # its default border leaves nothing of the default crop
        models = fields_of(PoodleFlowConfig)
        mappings = mappings.map(lambda values: {"crop_border": 16, **values})
    return mappings | st.builds(lambda values, model: {**values, "model": model}, mappings, models)


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        (Recipe, 150),
        (FlowRecipe, 100),
        (EvaluationRecipe, 60),
        (DetectionRecipe, 40),
        (PropagationRecipe, 40),
        (ExploreRecipe, 40),
    ],
)
def test_any_mapping_is_a_recipe_or_an_error_that_names_the_field(kind, count, tmp_path):
    outcomes = {"recipe": 0, "error": 0}
    configs = ("PoodleConfig", "PoodleFlowConfig", "out_features", "out_indices")
    names = re.compile("|".join((*map(re.escape, kind.__dataclass_fields__), *configs)))

    @examples(count)
    @given(any_mapping(kind))
    @example({"model": {"id2label": [1, 0]}})
    @example({"model": {"id2label": {"Âï": {}}}})
    def check(values):
        unknown = [name for name in values if name not in kind.__dataclass_fields__]
        try:
            recipe = kind(**{name: value for name, value in values.items() if name not in unknown})
        except ValueError as error:
            assert names.search(str(error)), error
            outcomes["error"] += 1
            return
        path = tmp_path / "recipe.yaml"
        path.write_text(recipe.to_yaml(), encoding="utf-8")
        again = kind(**read_recipe_file(kind, path, tmp_path))
        assert again == recipe and again.to_yaml() == recipe.to_yaml()
        outcomes["recipe"] += 1
        if unknown:
            path.write_text("\n".join(f"{name!r}: 1" for name in [*unknown, "seeed"]), encoding="utf-8")
            with pytest.raises(ValueError, match="unknown recipe field|is not valid YAML|must hold a mapping"):
                read_recipe_file(kind, path, tmp_path)

    check()
    assert min(outcomes.values()) >= count // 10, outcomes


# --- the metric ---


@examples(40)
@given(
    seed=st.integers(0, 10**6), height=st.integers(1, 9), width=st.integers(1, 9), classes=st.integers(1, 12),
    ignored=st.sampled_from([255, 300, -1]), parts=st.integers(1, 4),
)  # fmt: skip
def test_confusion_matrix_equals_a_loop_over_the_pixels(seed, height, width, classes, ignored, parts):
    rng = np.random.default_rng(seed)
    truth, prediction = rng.integers(0, classes, (2, height, width))
    truth[rng.random(truth.shape) < 0.2] = ignored
    naive = np.zeros((classes, classes), int)
    for t, p in zip(truth.flat, prediction.flat):
        if t != ignored:
            naive[t, p] += 1
    counts = confusion_matrix(prediction, truth, classes, ignored)
    np.testing.assert_array_equal(counts, naive)
    assert counts.sum() == (truth != ignored).sum()
    split = zip(np.array_split(prediction, parts), np.array_split(truth, parts))
    np.testing.assert_array_equal(sum(confusion_matrix(p, t, classes, ignored) for p, t in split), naive)
    # Renumbering the classes moves the counts and leaves the means as they are.
    order = rng.permutation(classes)
    renamed = np.where(truth == ignored, ignored, order[np.clip(truth, 0, classes - 1)])
    permuted = confusion_matrix(order[prediction], renamed, classes, ignored)
    np.testing.assert_array_equal(permuted[np.ix_(order, order)], naive)
    first, second = scores(counts), scores(permuted)
    for key in ("miou", "accuracy", "mean_accuracy"):
        assert first[key] == second[key] or first[key] == pytest.approx(second[key], abs=1e-12)
    kept = truth != ignored
    for k in range(classes):
        ours, theirs = (prediction == k) & kept, truth == k
        union = (ours | theirs).sum()
        assert first["per_class"][str(k)] == (None if union == 0 else pytest.approx((ours & theirs).sum() / union))
