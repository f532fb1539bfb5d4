import json
import re
import warnings

import datasets
import evaluate
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix as sklearn_confusion
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from evaluation.metrics import BDD100K_GROUPS, MeanIoU, class_groups, confusion_matrix, scores

CLASSES = [f"class {k}" for k in range(7)]


def maps(seed, shape=(31, 47), classes=7, ignored=0.2, dtype=np.uint8, absent=()):
    rng = np.random.default_rng(seed)
    truth, prediction = (rng.integers(0, classes, shape) for _ in range(2))
    for index in absent:
        truth[truth == index], prediction[prediction == index] = 0, 1
    truth[rng.random(shape) < ignored] = 255
    return prediction.astype(dtype), truth.astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
@pytest.mark.parametrize("absent", [(), (3,), (3, 5)])
def test_equals_scikit_learn_and_torchmetrics(dtype, absent):
    pairs = [maps(seed, shape, dtype=dtype, absent=absent) for seed, shape in enumerate([(31, 47), (8, 9), (64, 33)])]
    metric = MeanIoU(CLASSES)
    metric.add_batch(predictions=[p for p, _ in pairs[:2]], references=[t for _, t in pairs[:2]])
    metric.add(prediction=pairs[2][0], reference=pairs[2][1])
    prediction, truth = (np.concatenate([pair[k].ravel() for pair in pairs]) for k in (0, 1))
    kept = truth != 255
    expected = sklearn_confusion(truth[kept], prediction[kept], labels=range(7))
    np.testing.assert_array_equal(metric.confusion, expected)
    result = metric.compute()
    p, t = torch.from_numpy(prediction.astype(np.int64)), torch.from_numpy(truth.astype(np.int64))
    iou = MulticlassJaccardIndex(7, average=None, ignore_index=255)(p, t).numpy()
    present = [k for k in range(7) if k not in absent]
    for k in range(7):
        value = result["per_class"][CLASSES[k]]
        assert (value is None) if k in absent else value == pytest.approx(iou[k], abs=1e-6)
    assert result["miou"] == pytest.approx(iou[present].mean(), abs=1e-6)
    accuracy = MulticlassAccuracy(7, average="micro", ignore_index=255)(p, t).item()
    assert result["accuracy"] == pytest.approx(accuracy, abs=1e-6)
    recall = MulticlassAccuracy(7, average=None, ignore_index=255)(p, t).numpy()
    assert result["mean_accuracy"] == pytest.approx(recall[present].mean(), abs=1e-6)
    assert metric.confusion.sum() == 0  # compute() starts anew


def test_a_metric_starts_anew_and_counts_with_its_own_ignored_id():
    metric = MeanIoU(["nothing", "road", "sky"], ignore_index=0, groups={"both": ["road", "sky"], "sky": ["sky"]})
    for _ in range(2):
        result = metric.compute(predictions=[np.uint8([[1, 1, 2]])], references=[np.uint8([[0, 1, 1]])])
        assert result["per_class"] == {"nothing": None, "road": 0.5, "sky": 0.0} and result["accuracy"] == 0.5
    metric.add(prediction=np.uint8([[1]]), reference=np.uint8([[1]]))
    assert metric.confusion.dtype == np.int64 and metric.confusion.tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert metric.compute()["groups"] == {"both": 1.0, "sky": None}  # means leave out a class that does not occur
    with pytest.raises(ValueError, match="shorter"):
        metric.add_batch(predictions=[np.uint8([[1]])] * 2, references=[np.uint8([[1]])])
    assert metric.features == datasets.Features(
        {name: datasets.Sequence(datasets.Sequence(datasets.Value("int64"))) for name in ("predictions", "references")}
    )


def test_a_metric_makes_no_folder_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "cache")
    metric = MeanIoU(CLASSES)
    metric.add(prediction=np.zeros((2, 2), np.uint8), reference=np.zeros((2, 2), np.uint8))
    assert metric.compute()["accuracy"] == 1 and not list(tmp_path.iterdir())


def test_known_answers():
    truth = np.repeat(np.arange(4, dtype=np.uint8), 10).reshape(4, 10)
    perfect = scores(confusion_matrix(truth, truth, 4))
    assert perfect["miou"] == perfect["accuracy"] == perfect["mean_accuracy"] == 1.0
    constant = scores(confusion_matrix(np.zeros_like(truth), truth, 4))
    assert constant["miou"] == pytest.approx((1 / 4 + 0 + 0 + 0) / 4)  # the IoU of the predicted class is its share
    assert constant["accuracy"] == constant["mean_accuracy"] == 0.25
    with warnings.catch_warnings(action="error"):  # a division by zero would warn
        empty = scores(confusion_matrix(truth, np.full_like(truth, 255), 4))
    assert empty["miou"] is None and empty["accuracy"] is None
    json.dumps(empty)


def test_a_class_that_is_only_predicted():
    truth = np.repeat(np.arange(3, dtype=np.uint8), 10)[None]
    prediction = truth.copy()
    prediction[0, :5] = 3  # five pixels of road are predicted as a class that does not occur
    classes, groups = ["road", "car", "sky", "train"], {"large": ["car", "train"]}
    usual = MeanIoU(classes, groups=groups).compute(predictions=[prediction], references=[truth])
    assert usual["per_class"]["train"] == 0 and usual["miou"] == pytest.approx((0.5 + 1 + 1 + 0) / 4)
    assert usual["groups"] == {"large": 0.5}
    fixed = MeanIoU(classes, groups=groups, of_truth=True).compute(predictions=[prediction], references=[truth])
    assert fixed["per_class"] == {"road": 0.5, "car": 1, "sky": 1, "train": None}
    assert fixed["miou"] == pytest.approx(2.5 / 3) and fixed["groups"] == {"large": 1}
    assert fixed["accuracy"] == usual["accuracy"] == pytest.approx(25 / 30)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), height=st.integers(1, 20), width=st.integers(1, 20), classes=st.integers(1, 254))
def test_properties(seed, height, width, classes):
    prediction, truth = maps(seed, (height, width), classes)
    whole = confusion_matrix(prediction, truth, classes)
    wide = confusion_matrix(prediction.astype(np.int32), truth.astype(np.int64), classes)
    np.testing.assert_array_equal(whole, wide)  # both ways of counting
    parts = sum(confusion_matrix(prediction[r : r + 1], truth[r : r + 1], classes) for r in range(height))
    np.testing.assert_array_equal(whole, parts)
    assert whole.sum() == (truth != 255).sum()
    result = scores(whole)
    assert result["miou"] is None or 0 <= result["miou"] <= 1


def test_large_maps_are_counted_in_parts(monkeypatch):
    prediction, truth = maps(3, (40, 50))
    whole = confusion_matrix(prediction, truth, 7)
    monkeypatch.setattr("evaluation.metrics.CHUNK", 300)  # 6 full parts and a remainder
    np.testing.assert_array_equal(confusion_matrix(prediction, truth, 7), whole)
    np.testing.assert_array_equal(confusion_matrix(prediction.T, truth.T, 7), whole)  # not contiguous
    kept = truth != 255
    np.testing.assert_array_equal(whole, sklearn_confusion(truth[kept], prediction[kept], labels=range(7)))


@pytest.mark.parametrize("ignored", [-100, 256, 65_535])
def test_an_ignored_id_beyond_a_byte(ignored):
    prediction, truth = maps(4, dtype=np.int64)
    whole = confusion_matrix(prediction, truth, 7)
    truth[truth == 255] = ignored
    np.testing.assert_array_equal(confusion_matrix(prediction, truth, 7, ignored), whole)
    with pytest.raises(ValueError, match=f"truth has the id {ignored}, which is outside the 7 classes"):
        confusion_matrix(prediction, truth, 7)


@pytest.mark.parametrize("dtype", [np.float32, bool, np.int8])
def test_maps_of_other_kinds_count_as_their_numbers(dtype):
    prediction, truth = maps(6, classes=2, ignored=0, dtype=dtype)
    expected = confusion_matrix(prediction.astype(np.uint8), truth.astype(np.uint8), 2)
    np.testing.assert_array_equal(confusion_matrix(prediction, truth, 2), expected)


@pytest.mark.parametrize("classes", [255, 256, 257, 300])
def test_about_as_many_classes_as_a_byte_has_values(classes):
    rng = np.random.default_rng(classes)
    truth, prediction = rng.integers(0, classes, (2, 40, 50))
    expected = sklearn_confusion(truth.ravel(), prediction.ravel(), labels=range(classes))
    np.testing.assert_array_equal(confusion_matrix(prediction, truth, classes, ignore_index=-1), expected)
    small = np.uint8(truth % 250), np.uint8(prediction % 250)
    expected = sklearn_confusion(small[0].ravel(), small[1].ravel(), labels=range(classes))
    for ignored in (254, 256):  # neither id occurs
        np.testing.assert_array_equal(confusion_matrix(small[1], small[0], classes, ignored), expected)


@pytest.mark.parametrize("ignored", [255, -100])  # counted by OpenCV and by NumPy
@pytest.mark.parametrize(("ids", "named"), [((7, 0), 7), ((7, 9), 7), ((256, 0), 256), ((-1, 0), -1)])
def test_the_first_id_outside_the_classes_is_named(ignored, ids, named):
    inside, outside = np.zeros((2, 3), dtype=np.uint8), np.zeros((2, 3), dtype=np.int64)
    outside[0, 1], outside[1, 2] = ids
    said = f"has the id {named}, which is outside the 7 classes (0 to 6)"
    with pytest.raises(ValueError, match=re.escape(f"prediction {said}")):
        confusion_matrix(outside, inside, 7, ignored)
    with pytest.raises(ValueError, match=re.escape(f"truth {said}")):
        confusion_matrix(inside, outside, 7, ignored)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_ids_outside_the_classes_are_named(dtype):
    prediction, truth = maps(0, dtype=dtype)
    truth[3, 4] = 9
    with pytest.raises(ValueError, match=r"truth has the id 9, which is outside the 7 classes"):
        confusion_matrix(prediction, truth, 7)
    truth[3, 4], prediction[0, 0] = 1, 8
    truth[0, 0] = 1
    with pytest.raises(ValueError, match="prediction has the id 8"):
        confusion_matrix(prediction, truth, 7)
    with pytest.raises(ValueError, match="must have one shape"):
        confusion_matrix(prediction[:5], truth, 7)
    with pytest.raises(ValueError, match="'large' has members that are no classes: sky, sea$"):
        MeanIoU(CLASSES, groups={"large": ["sky", "class 1", "sea"]})
    with pytest.raises(ValueError, match="^MeanIoU needs at least one class, got none$"):
        MeanIoU([])


def test_groups_of_bdd100k_fit_the_published_means():
    """The published group means give the published mean of 19 classes only with 7 small and 12 large, 6 rare and 13 common classes."""
    sizes = {name: len(members) for name, members in BDD100K_GROUPS.items()}
    assert sizes == {"small": 7, "large": 12, "rare": 6, "common": 13}
    published = {
        "FlowE": (12.2, 49.3, 10.7, 47.2, 35.7),
        "PooDLe": (18.3, 51.4, 12.0, 51.8, 39.2),
        "ImageNet": (27.2, 42.2, 16.1, 46.2, 36.7),
    }
    for small, large, rare, common, miou in published.values():
        assert (7 * small + 12 * large) / 19 == pytest.approx(miou, abs=0.11)
        assert (6 * rare + 13 * common) / 19 == pytest.approx(miou, abs=0.11)
    assert set(BDD100K_GROUPS["small"]) | set(BDD100K_GROUPS["large"]) == set(BDD100K_GROUPS["rare"]) | set(
        BDD100K_GROUPS["common"]
    )


def test_groups_from_statistics():
    pixels = np.array([9000, 980, 20, 0])
    groups = class_groups(
        pixels, np.array([1, 100, 1, 0]), np.array([0.5, 0.1, 0.02, 0]), ["road", "pole", "bus", "train"]
    )
    assert groups == {"small": ["pole"], "large": ["road", "bus"], "rare": ["bus"], "common": ["road", "pole"]}
    # A share of exactly 0.3 % is common, and a mean size of exactly 0.5 % is large; for a single region the mean is its own size.
    edges = class_groups(np.array([994, 3, 3]), np.array([2, 4, 1]), np.array([0.01, 0.016, 0.006]), ["a", "b", "c"])
    assert edges == {"small": ["b"], "large": ["a", "c"], "rare": [], "common": ["a", "b", "c"]}
    metric = MeanIoU(["road", "pole", "bus", "train"], groups=groups)
    truth = np.uint8([[0, 0, 1, 2]])
    result = metric.compute(predictions=[np.uint8([[0, 0, 1, 1]])], references=[truth])
    assert result["groups"] == {"small": 0.5, "large": 0.5, "rare": 0.0, "common": 0.75}


def test_rare_is_a_share_of_all_labelled_pixels():
    groups = class_groups(np.array([5000, 5000, 29]), np.ones(3), np.full(3, 0.5), ("a", "b", "c"))
    assert groups["rare"] == ["c"] and groups["common"] == ["a", "b"]
