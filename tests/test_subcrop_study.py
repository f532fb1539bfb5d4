"""The rules of the subcrop study against loops over pixels, and its numbers in known cases."""

import json

import numpy as np
import pytest
from PIL import Image

from evaluation.studies.study import read_results
from training import subcrop_study
from training.subcrop_objects import alone, covered, find_objects, hits, same_instance
from training.subcrop_study import NO_JITTER, OTHERS, Tally, main

# A road (0) is split in two by a car (1, instance 7), which touches another car (instance 9); there are a speck of a sign (2) and void.
LABELS = np.zeros((12, 20), np.uint8)
LABELS[:, 6:12] = 1
LABELS[0, 18], LABELS[11, :3] = 2, 255
INSTANCES = np.zeros((12, 20), np.int32)
INSTANCES[:, 6:9], INSTANCES[:, 9:12], INSTANCES[0, 18] = 7, 9, 5


def hit_by(objects, boxes):
    return hits(objects, covered(objects, np.array(boxes, dtype=float)))


def test_objects_are_instances_and_components():
    objects = find_objects(LABELS, INSTANCES)
    assert list(zip(objects.classes, objects.sizes, objects.keys)) == [
        (-1, 0, -1), (0, 6 * 12 - 3, -1), (0, 8 * 12 - 1, -1), (1, 36, 7 * 256 + 1), (1, 36, 9 * 256 + 1),
    ]  # fmt: skip
    assert objects.index[0, 18] == 0 and objects.index[11, 0] == 0  # too small; void
    assert objects.index[5, 7] != objects.index[5, 10]
    assert list(find_objects(LABELS).sizes) == [0, 69, 95, 72]  # without instances the two cars are one component


def test_hits_equal_a_loop_over_pixels():
    objects = find_objects(LABELS, INSTANCES)
    low = np.random.default_rng(0).uniform((-1, -1), (19, 11), (60, 2))
    boxes = np.concatenate([low, low + np.random.default_rng(1).uniform(0, 9, (60, 2))], axis=1)
    hit = hit_by(objects, boxes)
    for row, (x0, y0, x1, y1) in enumerate(boxes):
        for number in range(1, 5):
            inside = sum(
                x0 <= x + 0.5 < x1 and y0 <= y + 0.5 < y1
                for y in range(12) for x in range(20) if objects.index[y, x] == number
            )  # fmt: skip
            assert hit[row, number] == (inside / objects.sizes[number] >= 0.1)
    assert not hit[:, 0].any() and 0.2 < hit[:, 1:].mean() < 0.8
    # 4 of 36 pixels are more than a tenth of the car, 3 are not.
    assert hit_by(objects, [[6.0, 0, 8, 2], [6.0, 0, 9, 1]])[:, 3].tolist() == [True, False]


def test_the_same_instance_by_hand():
    objects = find_objects(LABELS, INSTANCES)
    later = find_objects(
        np.roll(LABELS, 5, axis=1), np.where(np.roll(INSTANCES, 5, axis=1) == 9, 0, np.roll(INSTANCES, 5, axis=1))
    )
    hit = hit_by(objects, [[6.0, 0, 12, 12]] * 2)  # hits both cars, instances 7 and 9
    teacher = hit_by(later, [[11.0, 0, 14, 12], [0.0, 0, 6, 12]])  # on the moved instance 7, and on the road
    shown, held = same_instance(hit, objects, teacher, later)
    assert shown.tolist() == [[False, False, False, True, False]] * 2  # car 9 is gone; the road has no identity
    assert held.tolist() == [[False, False, False, True, False], [False] * 5]
    assert [part.sum(1).tolist() for part in same_instance(hit, objects, hit, objects)] == [[2, 2], [2, 2]]


# A rider (1) with a bicycle (2) is one instance of 100 + 60 pixels; there are persons (3) of 12 and of 40 pixels.
CYCLIST = np.zeros((40, 40), np.uint8)
CYCLIST[:10, :10], CYCLIST[10:16, :10], CYCLIST[20:23, :4], CYCLIST[20:30, 30:34] = 1, 2, 3, 3
CYCLIST_INSTANCES = np.where(np.isin(CYCLIST, (1, 2)), 4, np.where(CYCLIST == 3, 5 + np.arange(40) // 20, 0))


def test_alone_counts_by_instance_and_by_the_size_of_the_others():
    objects = find_objects(CYCLIST, CYCLIST_INSTANCES)
    assert objects.classes.tolist() == [-1, 0, 1, 2, 3, 3]
    assert len(set(objects.groups)) == 5 and objects.groups[2] == objects.groups[3]
    boxes = np.array([[0, 0, 20, 20], [0, 0, 20, 40], [0, 0, 40, 40], [20, 0, 40, 40]], dtype=float)
    inside = covered(objects, boxes)
    hit = hits(objects, inside) & (objects.classes > 0)
    shares = [[0, 0, 160, 160, 0, 0], [0, 0, 160, 160, 12, 0], [0, 0, 160, 160, 12, 40], [0, 0, 0, 0, 0, 40]]
    area = np.array([400, 800, 1600, 800])
    for least in (0, 12 / 800, 0.0151, 40 / 1600, 0.0251, 0.2):
        expected = [
            [bool(pixels) and not any(p and p >= least * whole and p != pixels for p in row) for pixels in row]
            for row, whole in zip(shares, area)
        ]  # instances are told apart by their sizes
        assert alone(objects, hit, inside, least).tolist() == expected, least
    without = find_objects(CYCLIST)  # without instances, the rider and the bicycle are two objects
    inside = covered(without, boxes[:1])
    assert not alone(without, hits(without, inside) & (without.classes > 0), inside, 0).any()


def test_tally_counts_single_objects_and_pixels():
    objects = find_objects(LABELS, INSTANCES)
    tally = Tally(("road", "car", "sign"), ("car", "sign"), num_subcrops=2)
    # Two sets of two subcrops: one car with road, then both cars; and only road, then only one car.
    boxes = np.array([[0.0, 0, 9, 12], [6.0, 0, 12, 12], [0.0, 0, 6, 12], [6.0, 0, 9, 12]])
    inside = covered(objects, boxes)
    tally.add_frame(LABELS, objects, inside)
    result = tally.result()
    assert result["subcrops_with_things"] == {"none": 0.25, "one": 0.5, "several": 0.25}
    road, car = result["classes"]["road"], result["classes"]["car"]
    assert road["pixel_share"] == round((240 - 72 - 3 - 1) / 240, 5) and car["pixel_share"] == 0.3
    assert (road["hit"], road["hit_in_frame"], road["single"], road["held_of_shown"]) == (0.5, 1, None, None)
    assert (car["hit"], car["hit_in_frame"], car["lift"]) == (0.75, 1, 2.5)
    assert car["single"] == [round(2 / 3, 5)] * len(OTHERS)  # the other car fills half of the subcrop that hits both
    # The chance of a random pixel is computed exactly, without draws.
    assert car["random_pixel_in_frame"] == 1 - 0.7**2 and result["all_things"] is None
    # A speck is too small to be an object, but counts in the share of pixels.
    assert result["classes"]["sign"]["hit"] == 0


def test_pairs_within_a_frame_are_left_out():
    objects = find_objects(LABELS, INSTANCES)
    gone = find_objects(LABELS, np.where(INSTANCES == 9, 0, INSTANCES))
    tally = Tally(("road", "car", "sign"), ("car", "sign"), num_subcrops=1)
    boxes = [[6.0, 0, 12, 12]] * 4
    hit = hit_by(objects, boxes)  # four boxes that each hit both cars
    teacher = hit_by(gone, [[6.0, 0, 9, 12], [0.0, 0, 5, 12], [6.0, 0, 9, 12], [6.0, 0, 9, 12]])
    tally.add_frame(LABELS, objects, covered(objects, np.array(boxes)))
    across, same = np.array([True, True, True, False]), np.array([True, True, False, False])
    tally.add_pairs("dis", "0.5", objects, hit, *same_instance(hit, objects, teacher, gone), across, same)
    result = tally.result()
    # In the three pairs across frames, car 7 is shown in all and held in two, and in one of the two "same" pairs. Both cars make six hits,
    # of which two are held, because car 9 is gone.
    assert result["all_things"]["dis"]["0.5"] == {
        "held_of_shown": round(2 / 3, 5), "held_of_shown_same_pairs": 0.5, "held_of_hit": round(2 / 6, 5), "own_frame": 0.25,
    }  # fmt: skip
    car = result["classes"]["car"]
    assert car["held_of_shown"] == {"dis": {"0.5": round(2 / 3, 5)}} and car["instances_counted"] == 3


def test_on_the_street(tmp_path, capsys):
    recipe = tmp_path / "small.yaml"
    recipe.write_text("crop_size: [64, 128]\nnum_subcrops: 6\n")
    flags = ["--config", str(recipe), "--dataset", "street", "--frames", "3", "--draws", "10", "--gaps", "0.25", "1"]
    result = main([*flags, "--json", str(tmp_path / "out" / "a.json")])
    assert json.loads((tmp_path / "out" / "a.json").read_text()) == result
    assert result["num_subcrops"] == 3 * 2 * 2 * 10 * 6  # drives, gaps, frames of a pair, sets, subcrops
    assert sum(result["subcrops_with_things"].values()) == pytest.approx(1, abs=1e-4)
    assert sum(values["pixel_share"] for values in result["classes"].values()) == pytest.approx(1, abs=1e-3)
    # The paper's argument: small things are hit far more often than their pixel share suggests.
    for name in (
        "car",
        "person",
        "pole",
    ):
        assert result["classes"][name]["hit"] > 3 * result["classes"][name]["pixel_share"]
        assert result["classes"][name]["lift"] > 3 and sorted(result["classes"][name]["single"])[0] > 0
    pairs = result["all_things"]
    assert list(pairs) == ["exact", "dis", "none", NO_JITTER] and list(pairs[NO_JITTER]) == ["1.0"]
    assert set(pairs["exact"]) == {"0.25", "1.0"}
    held = {flow: by_gap["1.0"]["held_of_shown_same_pairs"] for flow, by_gap in pairs.items()}
    assert held[NO_JITTER] > held["exact"] > held["none"] + 0.02
    for by_gap in pairs.values():
        for shares in by_gap.values():
            assert shares["held_of_hit"] <= shares["held_of_shown"]
    assert pairs["exact"]["1.0"]["own_frame"] > pairs["none"]["1.0"]["own_frame"]
    head, *lines = result["table"]
    assert head[4:11] == [
        "hit in 6",
        "in 6 pixels",
        "single, others of 10 px",
        "single, others of 0.1 %",
        "single, others of 0.5 %",
        "instances",
        "held of shown: exact, 0.25 s",
    ]
    assert {len(line) for line in result["table"]} == {17}
    rows = {line[0]: line for line in lines}
    assert rows["car"][10] == round(100 * result["classes"]["car"]["held_of_shown"]["exact"]["0.25"], 2)
    assert rows["car"][6] <= rows["car"][7] <= rows["car"][8]
    assert rows["car"][5] < rows["car"][4]
    assert rows["pairs within one frame, left out above"][16] == round(100 * pairs[NO_JITTER]["1.0"]["own_frame"], 2)
    assert "traffic light" in capsys.readouterr().out
    assert main([*flags, "--json", str(tmp_path / "b.json")])["classes"] == result["classes"]


def test_on_labels_alone(tmp_path):
    for split, number in (("train", 0), ("val", 1)):
        (tmp_path / split / "labels").mkdir(parents=True)
        label = np.full((60, 80), 3, np.uint8)
        label[20:40, 10:30], label[:, 70:] = 8, 11
        Image.fromarray(label).save(tmp_path / split / "labels" / f"{number}.png")
    flags = ["--dataset", "camvid", "--draws", "5", "--json", str(tmp_path / "out.json")]
    result = main([*flags, "--data_dir", str(tmp_path)])
    assert result["num_subcrops"] == 2 * 5 * 4 and result["all_things"] is None
    assert "no instances" in result["held_note"] and result["notes"][0].startswith(
        "40 subcrops in 2 frames of 60x80. Of all"
    )
    # The car is the only thing, so a subcrop hits one thing or none.
    one, none = (100 * result["subcrops_with_things"][name] for name in ("one", "none"))
    assert f"{one:.1f} % hit one thing alone, 0.0 % several, {none:.1f} % none" in result["notes"][0]
    scatter = result["scatter"]
    car = scatter["names"].index("car")
    assert scatter["series"]["a random pixel"][car] == scatter["x"][car] == round(100 * 400 / 4800, 2)
    assert scatter["series"]["a subcrop"][car] == round(100 * result["classes"]["car"]["hit"], 2)
    assert result["classes"]["car"]["pixel_share"] == round(400 / 4800, 5)
    assert result["classes"]["road"]["pixel_share"] == round((4800 - 400 - 600) / 4800, 5)  # void belongs to no class
    assert result["classes"]["car"]["single"] == [1, 1, 1] and [len(line) for line in result["table"]] == [10, 10, 10]
    assert set(result["classes"]) == {"car", "road"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset", "camvid"], "needs --data_dir, the folder that holds it. Expected: train/ and val/"),
        (["--dataset", "camvid", "--data_dir", "nowhere"], "no label images found. Expected"),
        (["--dataset", "kitti"], "--dataset must be street, street:CAMERA or camvid, got 'kitti'"),
        (["--dataset", "street:boat"], "must be one of driving, walking, static, aerial, got 'boat'"),
        (["--dataset", "street", "--data_dir", "x"], "--data_dir goes with --dataset camvid alone"),
        (["--dataset", "street", "--gaps", "0"], "--gaps must be different numbers of seconds above 0"),
        (["--dataset", "street", "--draws", "0"], "--draws must be at least 1, got 0"),
        (["--dataset", "street", "--config", "stret"], "no such recipe file"),
    ],
)
def test_wrong_flags(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        main([*flags, "--json", str(tmp_path / "a.json")])
    assert not (tmp_path / "a.json").exists()


def test_the_kept_results_are_of_this_study():
    results = read_results()
    for name in ("street", "CamVid"):
        result = results[f"subcrops/{name}"]["result"]
        assert result["measures"] == subcrop_study.MEASURES and result["table"] == subcrop_study.table(result)
        small = [v for v in result["classes"].values() if 0 < v["pixel_share"] < 0.01 and v["single"] is not None]
        assert small and all(values["lift"] > 1 for values in small)
