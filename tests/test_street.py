import json

import av
import numpy as np
import pytest

from training.street import CLASS, STREET_CLASSES, Street
from training.street_files import main, write_folder, write_videos


def test_frames_depend_on_seed_and_time_alone():
    a, b = Street(5, 64, 128), Street(5, 64, 128)
    first = a.frame(2.0).copy()
    b.frame(7.0), b.flow(1.0, 3.0)
    assert np.array_equal(first, b.frame(2.0)) and first.dtype == np.uint8
    assert not np.array_equal(first, Street(6, 64, 128).frame(2.0))


def test_flow_leads_to_the_same_surface_point():
    for seed in range(3):
        street = Street(seed, 96, 192)
        flow, visible = street.flow(1.0, 1.4)
        (here, surface_0), (there, surface_1) = street.surface(1.0), street.surface(1.4)
        y, x = np.nonzero(visible)
        column, row = (
            np.floor(x + 0.5 + flow[0][visible]).astype(int),
            np.floor(y + 0.5 + flow[1][visible]).astype(int),
        )
        assert (surface_1[row, column] == surface_0[visible]).all()
        assert np.median(np.abs(there[:, row, column] - here[:, y, x]).max(0)) < 0.1  # metres
        items = surface_0[visible] >= 16
        assert items.sum() > 50
        assert np.median(np.abs(there[:, row, column] - here[:, y, x]).max(0)[items]) < 0.2


def test_no_time_no_flow():
    flow, visible = Street(1, 64, 128).flow(3.0, 3.0)
    assert np.abs(flow).max() < 1e-3 and visible.all()


def test_labels_and_instances_agree():
    things = [
        CLASS[name]
        for name in ("person", "rider", "car", "truck", "bus", "bicycle", "pole", "traffic sign", "traffic light")
    ]
    for seed in range(3):
        street = Street(seed, 96, 192)
        labels, instances = street.labels(2.0), street.instances(2.0)
        assert (instances[np.isin(labels, things)] > 0).all()
        assert (instances[np.isin(labels, [CLASS[n] for n in ("road", "sky", "building", "terrain")])] == 0).all()
        assert len(np.intersect1d(instances, street.instances(2.2))) > 0.5 * len(np.unique(instances))


def test_class_shares_are_as_imbalanced_as_bdd100k():
    counts = np.zeros(len(STREET_CLASSES))
    for seed in range(8):
        for time in (0.0, 3.0, 6.0):
            counts += np.bincount(Street(seed, 64, 128).labels(time).ravel(), minlength=len(STREET_CLASSES))
    share = dict(zip(STREET_CLASSES, 100 * counts / counts.sum()))
    for name, published in {"road": 21.3, "sky": 17.3, "building": 13.2, "vegetation": 13.2, "car": 8.1}.items():
        assert published / 2 < share[name] < published * 2, (name, share[name])
    for name, published in {
        "sidewalk": 2.0,
        "pole": 0.94,
        "traffic sign": 0.34,
        "traffic light": 0.18,
        "person": 0.25,
    }.items():
        assert published / 4 < share[name] < published * 4, (name, share[name])


def test_files_hold_the_frames_and_are_made_once(tmp_path):
    paths = write_videos(tmp_path, num_videos=1, duration=1.0, fps=5, height=64, width=128, seed=4, num_processes=1)
    sidecar = json.loads((tmp_path / "drive-0000.json").read_text())
    street = Street.from_json(sidecar["street"])
    with av.open(paths[0]) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 5 == sidecar["num_frames"]
    for number, frame in enumerate(frames):
        error = np.square(frame.astype(float) - street.frame(number / 5)).mean()
        assert 10 * np.log10(255**2 / error) > 28
    before = open(paths[0], "rb").read()
    write_videos(tmp_path, num_videos=1, duration=1.0, fps=5, height=64, width=128, seed=4, num_processes=1)
    assert open(paths[0], "rb").read() == before
    (tmp_path / "drive-0000.json").unlink()
    write_videos(tmp_path, num_videos=1, duration=1.0, fps=5, height=64, width=128, seed=4, num_processes=1)
    assert open(paths[0], "rb").read() == before  # the same bytes when rendered anew


def test_labelled_folder(tmp_path):
    from PIL import Image

    write_folder(tmp_path, 2, 64, 128)
    classes = json.loads((tmp_path / "classes.json").read_text())
    made_of = classes.pop("street")  # by which a second call knows that the folder is whole
    assert classes == {"classes": list(STREET_CLASSES), "ignore_index": 255}
    assert (made_of["num_images"], made_of["height"], made_of["width"], made_of["seed"]) == (2, 64, 128, 0)
    labels = np.array(Image.open(tmp_path / "labels" / "00001.png"))
    assert labels.shape == (64, 128) and labels.max() < len(STREET_CLASSES)


def test_wrong_parameters(tmp_path, capsys):
    with pytest.raises(ValueError, match="Street.height must be an integer of at least 16"):
        Street(height=4)
    with pytest.raises(SystemExit):
        main(["--output_dir", str(tmp_path), "--height", "63"])
    assert "must be even" in capsys.readouterr().err
