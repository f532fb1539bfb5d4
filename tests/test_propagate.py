"""DAVIS measures against closed forms and a slow twin, propagation against known answers, and the script as a user runs it."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from forked_scripts import forked
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import distance_transform_edt
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetModel

from evaluation.encoders import build
from evaluation.propagate import (
    PropagationRecipe,
    full_range,
    grid_features,
    main,
    measure,
    measure_sequence,
    parse_propagation,
    propagate,
    propagated,
)
from evaluation.video_masks import Sequence, contour, contour_accuracy, load_sequences, region_similarity, statistics
from training.street import Street
from training.street_labels import HELD_OUT_SEED, SEQUENCE_SEED, write_sequences

REPOSITORY = Path(__file__).resolve().parent.parent
COLOURS = np.array([[40, 160, 40], [220, 30, 30], [30, 30, 220], [230, 220, 40]], np.uint8)


def square(top: int, left: int, side: int, size=(100, 160)) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[top : top + side, left : left + side] = True
    return mask


def write_video(folder: Path, name: str, masks, images=None) -> None:
    """Write a sequence in the layout of DAVIS, with its palette masks; by default the objects differ in colour."""
    for number, mask in enumerate(masks):
        for kind, array, end in (
            ("JPEGImages", COLOURS[mask % 4] if images is None else images[number], "jpg"),
            ("Annotations", mask, "png"),
        ):
            path = folder / kind / "480p" / name / f"{number:05d}.{end}"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(np.asarray(array, np.uint8))
            if end == "png":
                # With fewer colours Pillow packs the pixels.
                picture.putpalette(np.resize(COLOURS, (256, 3)).flatten().tolist())
            picture.save(path, **({"quality": 95, "subsampling": 0} if end == "jpg" else {}))
    listed = folder / "ImageSets" / "2017" / "val.txt"
    listed.parent.mkdir(parents=True, exist_ok=True)
    with open(listed, "a") as file:
        file.write(f"{name}\n")


def two_squares(shift: int, size=(96, 160)) -> np.ndarray:
    mask = np.zeros(size, np.uint8)
    mask[16:48, 16 + shift : 48 + shift] = 1
    mask[56:80, 96 - shift : 128 - shift] = 2
    return mask


def colours(image: np.ndarray) -> torch.Tensor:
    """An encoder that sees only colours; returns unit features at stride 8."""
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1).float() - 110
    return F.normalize(F.adaptive_avg_pool2d(pixels, [side // 8 for side in image.shape[:2]]), dim=0)


def textures(image: np.ndarray) -> torch.Tensor:
    """An encoder whose features are all pixels of each cell of 8 by 8; returns unit features."""
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1).float() - 127
    return F.normalize(F.pixel_unshuffle(pixels, 8), dim=0)


# --- measures ---


def test_region_similarity_closed_forms():
    a = square(20, 30, 40)
    assert region_similarity(a, a) == 1
    assert region_similarity(a, square(20, 90, 40)) == 0
    # A shift by 10 of 40 pixels leaves an intersection of 30 * 40 and a union of 50 * 40.
    assert region_similarity(a, square(20, 40, 40)) == pytest.approx(30 / 50)
    empty = np.zeros_like(a)
    assert region_similarity(empty, empty) == 1  # the toolkit's convention
    assert region_similarity(a, empty) == region_similarity(empty, a) == 0


def test_contour_is_one_pixel_wide_and_not_at_the_border():
    found = np.argwhere(contour(square(3, 4, 3, (10, 12)))).tolist()
    ring = [[y, x] for y in range(2, 6) for x in range(3, 7) if y in (2, 5) or x in (3, 6)]
    assert found == ring
    assert contour(np.ones((5, 7), bool)).sum() == 0
    half = np.zeros((6, 8), bool)
    half[:, 4:] = True
    assert np.argwhere(contour(half)).tolist() == [[y, 3] for y in range(6)]


def test_contour_accuracy_closed_forms():
    size = (100, 160)  # diagonal 188.7: the reach is ceil(1.51) = 2 pixels
    a = square(20, 30, 40, size)
    assert contour_accuracy(a, a) == 1
    assert contour_accuracy(a, square(20, 100, 40, size)) == 0
    assert contour_accuracy(a, square(20, 32, 40, size)) == 1  # within reach
    # After a shift by 3, these of the contour's 160 pixels (a ring of 41 by 41) are within reach: 40 of the 41 on each horizontal
    # side, and the 2 pixels next to either end of the right side.
    assert np.count_nonzero(contour(a)) == 160
    assert contour_accuracy(a, square(20, 33, 40, size)) == pytest.approx((2 * 40 + 2 * 2) / 160)
    empty, full = np.zeros(size, bool), np.ones(size, bool)
    assert contour_accuracy(empty, empty) == contour_accuracy(full, empty) == 1  # neither has a contour
    assert contour_accuracy(a, empty) == contour_accuracy(empty, a) == 0


def naive_contour_accuracy(prediction: np.ndarray, truth: np.ndarray) -> float:
    """The definition in loops, with scipy's exact distances instead of the dilation."""

    def edge(mask):
        height, width = mask.shape
        result = np.zeros(mask.shape, bool)
        for y in range(height):
            for x in range(width):
                below, right = min(y + 1, height - 1), min(x + 1, width - 1)
                result[y, x] = len({mask[y, x], mask[below, x], mask[y, right], mask[below, right]}) > 1
        return result

    reach = math.ceil(0.008 * math.sqrt(truth.shape[0] ** 2 + truth.shape[1] ** 2))
    ours, theirs = edge(prediction), edge(truth)
    if not ours.any() or not theirs.any():
        return float(ours.any() == theirs.any())
    precision = (distance_transform_edt(~theirs)[ours] <= reach).mean()
    recall = (distance_transform_edt(~ours)[theirs] <= reach).mean()
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


@settings(max_examples=40, derandomize=True, deadline=None, database=None)
@given(seed=st.integers(0, 10**6), height=st.integers(2, 40), width=st.integers(2, 60), share=st.floats(0, 0.2))
def test_contour_accuracy_equals_its_slow_twin(seed, height, width, share):
    rng = np.random.default_rng(seed)
    a = rng.random((height, width)) < share
    b = a ^ (rng.random((height, width)) < 0.05)
    assert contour_accuracy(a, b) == pytest.approx(naive_contour_accuracy(a, b), abs=1e-12)
    assert contour_accuracy(a, b) == pytest.approx(contour_accuracy(b, a), abs=1e-12)


def test_statistics_closed_forms():
    # The quarters of 9 frames have 3 frames each and share their ends: 1-3, 3-5, 5-7, 7-9.
    values = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    found = statistics(values)
    assert found["mean"] == pytest.approx(0.5)
    assert found["recall"] == pytest.approx(4 / 9)  # counts values above 0.5, not 0.5 itself
    assert found["decay"] == pytest.approx(0.8 - 0.2)
    assert statistics(np.full(20, 0.7)) == pytest.approx({"mean": 0.7, "recall": 1, "decay": 0})
    assert statistics(np.array([0.2])) == pytest.approx({"mean": 0.2, "recall": 0, "decay": 0})
    # With 10 frames, the ends are at 1, 3.25, 5.5, 7.75, 10, rounded to 1, 3, 6 (half up), 8, 10.
    assert statistics(np.arange(10) / 10)["decay"] == pytest.approx(0.1 - 0.8)
    # 300 frames are more than the 256 that the toolkit's 8-bit frame numbers can hold.
    assert statistics(np.arange(300) / 300)["decay"] == pytest.approx(-(262 - 37.5) / 300, abs=0.01)


# --- propagation ---


def naive_propagate(target, context, labels, top_k, radius, temperature):
    """Propagate the labels cell by cell, with lists."""
    _, height, width = target.shape
    result = torch.zeros(labels.shape[1:])
    for y in range(height):
        for x in range(width):
            found = []
            for feature, label in zip(context, labels):
                for row in range(max(y - radius, 0), min(y + radius + 1, height)):
                    for column in range(max(x - radius, 0), min(x + radius + 1, width)):
                        found.append((float(feature[:, row, column] @ target[:, y, x]), label[:, row, column]))
            found = sorted(found, key=lambda pair: -pair[0])[:top_k]
            weights = [math.exp(value / temperature) for value, _ in found]
            result[:, y, x] = sum(w * label for w, (_, label) in zip(weights, found)) / sum(weights)
    return result


@pytest.mark.parametrize("size, radius, top_k", [((11, 19), 3, 5), ((3, 5), 12, 4), ((9, 8), 1, 40)])
def test_propagate_equals_its_slow_twin(size, radius, top_k):
    generator = torch.Generator().manual_seed(0)
    target = F.normalize(torch.randn(6, *size, generator=generator), dim=0)
    context = F.normalize(torch.randn(3, 6, *size, generator=generator), dim=1)
    labels = torch.rand(3, 4, *size, generator=generator)
    found = propagate(target, context, labels, top_k, radius, 0.1)
    torch.testing.assert_close(found, naive_propagate(target, context, labels, top_k, radius, 0.1))
    torch.testing.assert_close(found, propagate(target, context, labels, top_k, radius, 0.1), rtol=0, atol=0)


def test_full_range():
    scores = torch.tensor([[[0.2, 0.4, 0.3]], [[0.0, 0.0, 0.0]], [[0.5, 0.5, 0.5]]])
    torch.testing.assert_close(full_range(scores)[:, 0], torch.tensor([[0.0, 1.0, 0.5], [0.0] * 3, [0.0] * 3]))


def sequence_of(folder: Path, masks, images=None) -> Sequence:
    write_video(folder, "video", masks, images)
    return load_sequences("davis", str(folder))[0]


def test_a_static_video_keeps_its_masks(tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (96, 160, 3), dtype=np.uint8)  # every cell looks different, and nothing moves
    sequence = sequence_of(tmp_path, [two_squares(0)] * 6, [noise] * 6)
    recipe = PropagationRecipe(model=["-"])
    measures, strip = measure_sequence(sequence, textures, recipe)
    assert sorted(measures) == ["1", "2"]
    for values in measures.values():  # both objects fill whole cells, so only the corners are rounded
        assert values["j_mean"] > 0.95 and values["f_mean"] > 0.97 and values["j_recall"] == 1
        assert values["j_decay"] == pytest.approx(0, abs=0.01)
        assert values["j_and_f"] == pytest.approx((values["j_mean"] + values["f_mean"]) / 2)
    assert strip.shape == (96, 4 * 160, 3)


def test_moving_objects_are_followed_by_their_features(tmp_path):
    masks = [two_squares(8 * number) for number in range(6)]
    measures, _ = measure_sequence(sequence_of(tmp_path, masks), colours, PropagationRecipe(model=["-"], top_k=1))
    assert all(values["j_mean"] > 0.95 for values in measures.values())
    # With features that carry no information, the labels stay in place or vanish.
    blind, _ = measure_sequence(
        load_sequences("davis", str(tmp_path))[0],
        lambda image: torch.full((4, image.shape[0] // 8, image.shape[1] // 8), 0.5),
        PropagationRecipe(model=["-"]),
    )
    assert all(values["j_mean"] < 0.6 for values in blind.values())


def test_an_object_out_of_the_window_is_lost(tmp_path):
    """An object two cells wide jumps by 6 cells: a radius of 6 finds all of it, and a radius of 4 finds nothing."""
    masks = [np.zeros((64, 160), np.uint8) for _ in range(3)]
    for mask, left in zip(masks, (8, 56, 56)):
        mask[24:40, left : left + 16] = 1
    sequence = sequence_of(tmp_path, masks)
    for radius, found in ((6, True), (4, False)):
        recipe = PropagationRecipe(model=["-"], top_k=1, radius=radius)
        prediction = list(propagated(sequence, [1], colours, recipe))[1][1]
        hit = region_similarity(prediction == 1, masks[1] == 1)
        assert (hit > 0.9) == found and (hit == 0) != found


def test_an_oracle_on_the_street_keeps_the_instances(tmp_path):
    write_sequences(tmp_path, 1, height=96, width=192, num_processes=1)
    (sequence,) = load_sequences("davis", str(tmp_path))
    street, frames = Street(SEQUENCE_SEED, 96, 192), iter(range(12))
    first = street.instances(1.0)
    codes = {0: np.random.default_rng(0).normal(size=32)}

    def oracle(image):
        instances = street.instances(1.0 + next(frames) / 8)
        code = np.zeros((32, *instances.shape))
        for key in np.unique(instances):
            vector = codes.setdefault(int(key), np.random.default_rng(int(key)).normal(size=32))
            code[:, instances == key] = (vector / np.linalg.norm(vector))[:, None]
        return F.normalize(F.adaptive_avg_pool2d(torch.from_numpy(code).float(), (24, 48)), dim=0)

    measures, _ = measure_sequence(sequence, oracle, PropagationRecipe(model=["-"], stride=4))
    given = sequence.mask(0)
    largest = next(
        k for k in sequence.objects() if (given == k).sum() == max((given == i).sum() for i in sequence.objects())
    )
    assert np.unique(first[given == largest]).size == 1  # an object is one instance
    assert np.mean([values["j_mean"] for values in measures.values()]) > 0.75
    assert np.mean([values["f_mean"] for values in measures.values()]) > 0.85


# --- data ---


def test_street_sequences_are_held_out_and_written_once(tmp_path):
    folder = write_sequences(tmp_path / "a", 2, height=64, width=128, num_processes=2)
    again = write_sequences(tmp_path / "b", 2, height=64, width=128, num_processes=1)
    files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    assert len(files) == 2 * 12 * 2 + 2
    assert all((folder / name).read_bytes() == (again / name).read_bytes() for name in files)
    before = (folder / "street.json").stat().st_mtime_ns
    write_sequences(tmp_path / "a", 2, height=64, width=128)
    assert (folder / "street.json").stat().st_mtime_ns == before
    sequences = load_sequences("davis", str(folder))
    assert [s.name for s in sequences] == ["drive-0000", "drive-0001"] and SEQUENCE_SEED >= HELD_OUT_SEED + 100_000
    for number, sequence in enumerate(sequences):
        instances = Street(SEQUENCE_SEED + number, 64, 128).instances(1.0)
        sizes = []
        for index in sequence.objects():
            keys = np.unique(instances[sequence.mask(0) == index])
            assert len(keys) == 1 and keys[0] > 0
            sizes.append((instances == keys[0]).sum())
            assert sizes[-1] == (sequence.mask(0) == index).sum() >= 64 * 128 / 400
            assert (sequence.mask(11) == index).any()
        assert sizes == sorted(sizes, reverse=True) and 1 <= len(sizes) <= 8
    assert [s.name for s in load_sequences("davis", str(folder), 1)] == ["drive-0000"]


def test_void_and_late_objects_are_background(tmp_path):
    masks = [two_squares(0) for _ in range(3)]
    masks[0][:4] = 255
    masks[1][56:80, 10:20] = 3  # appears in the second frame
    sequence = sequence_of(tmp_path, masks)
    assert sequence.objects() == [1, 2] and sequence.mask(0).max() == 2
    assert set(measure_sequence(sequence, colours, PropagationRecipe(model=["-"]))[0]) == {"1", "2"}


def test_wrong_folders_are_explained(tmp_path):
    with pytest.raises(ValueError, match=r"needs --data_dir.*Expected: ImageSets/2017/val.txt"):
        load_sequences("davis")
    with pytest.raises(ValueError, match=r"there is no .*val.txt"):
        load_sequences("davis", str(tmp_path))
    write_video(tmp_path, "a", [two_squares(0)] * 4)
    (tmp_path / "Annotations/480p/a/00002.png").unlink()
    with pytest.raises(ValueError, match=r"a: 1 of 4 frames have no mask in .*, the first is 00002.jpg"):
        load_sequences("davis", str(tmp_path))
    write_video(tmp_path / "late", "a", [two_squares(0)] * 5)
    (tmp_path / "late" / "JPEGImages/480p/a/00000.jpg").unlink()
    with pytest.raises(
        ValueError, match=r"a: 1 masks have no frame in .*, the first is 00000.png; the first mask is what is given"
    ):
        load_sequences("davis", str(tmp_path / "late"))
    write_video(tmp_path / "one", "b", [two_squares(0)])
    with pytest.raises(ValueError, match="sequence b has 1 frames .* at least 3 are needed"):
        load_sequences("davis", str(tmp_path / "one"))
    write_video(tmp_path / "none", "c", [np.zeros((32, 32), np.uint8)] * 3)
    with pytest.raises(ValueError, match="has no object to propagate"):
        load_sequences("davis", str(tmp_path / "none"))
    write_video(tmp_path / "size", "d", [two_squares(0), two_squares(0), two_squares(0, (96, 168))])
    with pytest.raises(ValueError, match="00002.jpg is 168x96, its first frame 160x96"):
        load_sequences("davis", str(tmp_path / "size"))
    (tmp_path / "size/ImageSets/2017/val.txt").write_text("gone\n")
    with pytest.raises(ValueError, match="sequence gone: there is no folder"):
        load_sequences("davis", str(tmp_path / "size"))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--dataset", "street"], "model must be a list of one or more models"),
        (["--model", "a", "--model", "a"], "a list that names each model once"),
        (
            ["--model", "a", "--dataset", "davies"],
            r"dataset must be one of davis, street, street:walking, street:static, street:aerial \(did you mean 'davis'\?\)",
        ),
        (["--model", "a", "--top_k", "0"], "top_k must be an integer of at least 1, got 0"),
        (["--model", "a", "--temperature", "-1"], "temperature must be a finite number above 0"),
        (["--model", "a", "--topk", "5"], r"unknown recipe field 'topk' \(did you mean 'top_k'\?\)"),
    ],
)
def test_wrong_flags(flags, message):
    with pytest.raises(ValueError, match=message):
        parse_propagation(flags)


# --- the script ---


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "resnet"
    config = ResNetConfig(layer_type="basic", depths=[1, 1, 1, 1], hidden_sizes=[16, 16, 32, 32], embedding_size=16)
    ResNetModel(config).save_pretrained(folder)
    return folder


def test_grid_features_have_unit_length_at_any_stride(encoder):
    image = np.random.default_rng(0).integers(0, 255, (60, 100, 3), dtype=np.uint8)
    for features, stride, size in (("stage4", 8, (8, 12)), ("stage1", 16, (4, 6)), ("stage2", 4, (15, 25))):
        cells = grid_features(build(str(encoder), 1, features=features), image, stride)
        assert tuple(cells.shape[1:]) == size
        torch.testing.assert_close(cells.norm(dim=0), torch.ones(size))


def test_script_on_the_street(tmp_path, encoder):
    flags = ["--max_sequences", 2, "--features", "stage1", "--dataset", "street"]
    models = ["--model", encoder, "--model", f"random:{encoder}"]
    script = REPOSITORY / "evaluation" / "propagate.py"
    done = forked(script, *models, *flags, "--output_dir", tmp_path / "run", POODLE_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert re.search(r"^model +J&F +J mean +recall +decay +F mean", done.stdout, re.M)
    found = json.loads((tmp_path / "run/evaluation.json").read_text())["results"]
    assert [r["model"] for r in found] == [str(encoder), f"random:{encoder}"]
    for result in found:
        assert result["num_sequences"] == 2 and list(result["sequences"]) == ["drive-0000", "drive-0001"]
        objects = [v for by_object in result["sequences"].values() for v in by_object.values()]
        assert result["num_objects"] == len(objects)
        for key in ("j_and_f", "j_mean", "f_recall", "j_decay"):
            assert result[key] == pytest.approx(np.mean([v[key] for v in objects]))
        assert 0.1 < result["j_mean"] < 1 and result["command"].startswith("python -m evaluation.propagate --model ")
        assert result["protocol"] == {"stride": 8, "top_k": 5, "context_frames": 7, "radius": 12, "temperature": 0.1}
    report = (tmp_path / "run/report.html").read_text()
    assert report.count("<img") == 6 and "drive-0001" in report and "<script" not in report
    # Existing renderings give the same figures, bit for bit; with one model the file holds its result without a list.
    alone = ["--model", str(encoder), "--dataset", "davis", "--data_dir", str(tmp_path / "street-sequences-2")]
    with pytest.raises(ValueError, match=r"holds a finished evaluation of other values \(model, dataset, "):
        main([*alone, "--features", "stage1", "--output_dir", str(tmp_path / "run")])
    for _ in range(2):
        again = main([*alone, "--features", "stage1", "--output_dir", str(tmp_path / "alone")])
        assert again[0]["sequences"] == found[0]["sequences"]
    assert json.loads((tmp_path / "alone/evaluation.json").read_text())["model"] == str(encoder)


def test_what_was_measured_is_kept_though_the_next_model_fails(tmp_path, encoder, monkeypatch):
    original, calls = measure, []

    def fail_at_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr("evaluation.propagate.measure", fail_at_the_second)
    flags = ["--max_sequences", "1", "--data_dir", str(tmp_path / "street"), "--output_dir", str(tmp_path / "run")]
    with pytest.raises(KeyboardInterrupt):
        main(["--model", str(encoder), "--model", f"random:{encoder}", *flags])
    (found,) = json.loads((tmp_path / "run" / "evaluation.json").read_text())["results"]
    assert found["model"] == str(encoder) and 0 < found["j_and_f"] < 1


def test_script_ends_with_a_sentence(tmp_path, encoder, as_script):
    flags = ["--model", encoder, "--dataset", "davis", "--data_dir", tmp_path, "--output_dir", tmp_path / "run"]
    assert as_script("evaluation/propagate.py", *flags).startswith("error: davis: there is no")
    assert not (tmp_path / "run").exists()
