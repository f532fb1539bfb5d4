"""The rules of the subcrop study against loops over pixels, and its numbers where they are known."""

import json

import numpy as np
import pytest
from PIL import Image

from evaluation.studies.study import read_results
from training import subcrop_study
from training.subcrop_study import Tally, find_objects, hits, main, same_instance

# A road (0) that a car (1, instance 7) parts in two, a car (instance 9) that touches the first, a speck of a sign (2), and void.
LABELS = np.zeros((12, 20), np.uint8)
LABELS[:, 6:12] = 1
LABELS[0, 18], LABELS[11, :3] = 2, 255
INSTANCES = np.zeros((12, 20), np.int32)
INSTANCES[:, 6:9], INSTANCES[:, 9:12], INSTANCES[0, 18] = 7, 9, 5


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
    hit = hits(objects, boxes)
    for row, (x0, y0, x1, y1) in enumerate(boxes):
        for number in range(1, 5):
            inside = sum(
                x0 <= x + 0.5 < x1 and y0 <= y + 0.5 < y1
                for y in range(12) for x in range(20) if objects.index[y, x] == number
            )  # fmt: skip
            assert hit[row, number] == (inside / objects.sizes[number] >= 0.1)
    assert not hit[:, 0].any() and 0.2 < hit[:, 1:].mean() < 0.8
    # 4 of 36 pixels are more than a tenth of the car, 3 are not.
    assert hits(objects, np.array([[6.0, 0, 8, 2], [6.0, 0, 9, 1]]))[:, 3].tolist() == [True, False]


def test_the_same_instance_by_hand():
    objects = find_objects(LABELS, INSTANCES)
    later = find_objects(
        np.roll(LABELS, 5, axis=1), np.where(np.roll(INSTANCES, 5, axis=1) == 9, 0, np.roll(INSTANCES, 5, axis=1))
    )
    boxes = np.array([[6.0, 0, 12, 12]] * 2)  # both cars, instances 7 and 9
    teacher = np.array([[11.0, 0, 14, 12], [0.0, 0, 6, 12]])  # on instance 7 where it went; on the road
    both = same_instance(hits(objects, boxes), objects, hits(later, teacher), later)
    assert both.tolist() == [[False, False, False, True, False], [False] * 5]  # 9 is gone; the road has no identity
    assert same_instance(hits(objects, boxes), objects, hits(objects, boxes), objects).sum(1).tolist() == [2, 2]


def test_tally_counts_single_objects_and_pixels():
    objects = find_objects(LABELS, INSTANCES)
    tally = Tally(("road", "car", "sign"), ("car", "sign"), num_subcrops=2)
    # A set of two: one car and road, both cars; a second set: road alone, one car alone.
    boxes = np.array([[0.0, 0, 9, 12], [6.0, 0, 12, 12], [0.0, 0, 6, 12], [6.0, 0, 9, 12]])
    hit = hits(objects, boxes)
    tally.add_frame(LABELS, objects, hit, np.random.default_rng(0))
    tally.add_pairs(
        "exact", "0.5", objects, hit, same_instance(hit[[0, 3, 2, 3]], objects, hit[[0, 3, 2, 3]], objects)
    )
    result = tally.result()
    assert result["subcrops_with_things"] == {"none": 0.25, "one": 0.5, "several": 0.25}
    road, car = result["classes"]["road"], result["classes"]["car"]
    assert road["pixel_share"] == round((240 - 72 - 3 - 1) / 240, 5) and car["pixel_share"] == 0.3
    assert (road["hit"], road["hit_in_frame"], road["single_object"], road["same_instance"]) == (0.5, 1, None, None)
    assert (car["hit"], car["hit_in_frame"], car["single_object"]) == (0.75, 1, round(2 / 3, 5))
    assert (
        car["same_instance"] == {"exact": {"0.5": 0.75}} and car["instances_hit"] == 4
    )  # 3 of the 4 cars that were hit
    assert result["classes"]["sign"]["hit"] == 0  # a speck is no object, but has its share of pixels


def test_the_random_pixel_is_as_frequent_as_the_class():
    tally = Tally(("road", "car", "sign"), ("car",), num_subcrops=4)
    tally.add_frame(LABELS, find_objects(LABELS), np.zeros((40_000, 4), bool), np.random.default_rng(0))
    for values in tally.result()["classes"].values():
        assert values["random_pixel"] == pytest.approx(values["pixel_share"], abs=0.01)
        assert values["random_pixel_in_frame"] == pytest.approx(1 - (1 - values["pixel_share"]) ** 4, abs=0.015)


def test_on_the_street(tmp_path, capsys):
    recipe = tmp_path / "small.yaml"
    recipe.write_text("crop_size: [64, 128]\nnum_subcrops: 6\n")
    flags = ["--config", str(recipe), "--dataset", "street", "--frames", "3", "--draws", "10", "--gaps", "0.25", "1"]
    result = main([*flags, "--json", str(tmp_path / "out" / "a.json")])
    assert json.loads((tmp_path / "out" / "a.json").read_text()) == result
    assert result["num_subcrops"] == 3 * 2 * 2 * 10 * 6  # drives, gaps, frames of a pair, sets, subcrops
    assert sum(result["subcrops_with_things"].values()) == pytest.approx(1, abs=1e-4)
    assert sum(values["pixel_share"] for values in result["classes"].values()) == pytest.approx(1, abs=1e-3)
    for name in (
        "car",
        "person",
        "pole",
    ):  # the paper's argument: small things are hit far more often than their share of pixels
        assert result["classes"][name]["hit"] > 3 * result["classes"][name]["random_pixel"]
    same = result["same_instance"]
    assert set(same) == {"exact", "dis", "none"} and set(same["exact"]) == {"0.25", "1.0"}
    assert same["exact"]["1.0"] > same["none"]["1.0"] + 0.02 and same["exact"]["0.25"] > same["exact"]["1.0"]
    car = next(line for line in result["table"] if line[0] == "car")
    assert result["table"][0][4:6] == ["single", "exact 0.25 s"] and len(car) == 11
    assert car[5] == round(100 * result["classes"]["car"]["same_instance"]["exact"]["0.25"], 2)
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
    assert result["num_subcrops"] == 2 * 5 * 4 and result["same_instance"] is None
    assert "neither instances" in result["same_instance_note"]
    assert result["classes"]["car"]["pixel_share"] == round(400 / 4800, 5)
    assert result["classes"]["road"]["pixel_share"] == round((4800 - 400 - 600) / 4800, 5)  # void is of no class
    assert result["classes"]["car"]["single_object"] == 1 and set(result["classes"]) == {"car", "road"}


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
        small = [
            v for v in result["classes"].values() if 0 < v["pixel_share"] < 0.01 and v["single_object"] is not None
        ]
        assert small and all(values["hit"] > values["random_pixel"] for values in small)
