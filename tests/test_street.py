from pathlib import Path

import numpy as np
import pytest

from training.street import CLASS, FIRST_ITEM, STREET_CLASSES, Street
from training.street_cameras import CAMERAS

REPOSITORY = Path(__file__).resolve().parent.parent
PINNED = (
    (0, [[108.312, 146.469, 121.412, 63.236], [51.138, 62.648, 65.904, 55.597]], (2409, 1769, 1474)),
    (3, [[60.93, 78.922, 77.837, 52.036], [36.755, 34.294, 32.543, 25.083]], (2768, 2011, 710)),
)


def test_frames_depend_on_seed_and_time_alone():
    a, b = Street(5, 64, 128), Street(5, 64, 128)
    first = a.frame(2.0).copy()
    b.frame(7.0), b.flow(1.0, 3.0)
    assert np.array_equal(first, b.frame(2.0)) and first.dtype == np.uint8
    assert not np.array_equal(first, Street(6, 64, 128).frame(2.0))


def test_a_driving_camera_shows_what_it_always_did():
    # Means over 32x32 pixels and counts of road, sky and car, taken before there were other cameras. They are not compared byte by byte,
    # since another numpy may round the last bit of a sine differently.
    for seed, means, counts in PINNED:
        street = Street(seed, 64, 128)
        np.testing.assert_allclose(street.frame(2.3).reshape(2, 32, 4, 32, 3).mean((1, 3, 4)), means, atol=0.05)
        labels = street.labels(2.3)
        assert np.abs([(labels == CLASS[name]).sum() for name in ("road", "sky", "car")] - np.array(counts)).max() <= 2


@pytest.mark.parametrize("camera", CAMERAS)
def test_flow_leads_to_the_same_surface_point(camera):
    for seed in range(3 if camera == "driving" else 2):
        street = Street(seed, 96, 192, camera=camera)
        flow, visible = street.flow(1.0, 1.4)
        (here, surface_0), (there, surface_1) = street.surface(1.0), street.surface(1.4)
        y, x = np.nonzero(visible)
        column, row = (
            np.floor(x + 0.5 + flow[0][visible]).astype(int),
            np.floor(y + 0.5 + flow[1][visible]).astype(int),
        )
        assert (surface_1[row, column] == surface_0[visible]).all()
        assert np.median(np.abs(there[:, row, column] - here[:, y, x]).max(0)) < 0.1  # metres
        # Each class of surface alone, also roofs and gables (ids 4 to 15): the median of all would hide a wrong class.
        for first, last in ((1, 1), (2, 3), (4, 15)):
            chosen = (surface_0[visible] >= first) & (surface_0[visible] <= last)
            if chosen.sum() > 20:
                assert np.median(np.abs(there[:, row, column] - here[:, y, x]).max(0)[chosen]) < 0.2
        items = surface_0[visible] >= FIRST_ITEM
        assert items.sum() > 50
        assert np.median(np.abs(there[:, row, column] - here[:, y, x]).max(0)[items]) < 0.2


@pytest.mark.parametrize("camera", CAMERAS)
def test_what_is_visible_is_the_same_thing(camera):
    """A visible point shows the same class and instance at the end of its flow; a point whose flow leaves the frame is not visible."""
    street = Street(4, 96, 192, camera=camera)
    flow, visible = street.flow(2.0, 2.5)
    y, x = np.nonzero(np.ones_like(visible))
    column, row = np.floor(x + 0.5 + flow[0].ravel()).astype(int), np.floor(y + 0.5 + flow[1].ravel()).astype(int)
    inside = (column >= 0) & (column < 192) & (row >= 0) & (row < 96)
    assert not visible.ravel()[~inside].any()
    seen = visible.ravel()
    before, after = street.instances(2.0), street.instances(2.5)
    assert np.array_equal(before.ravel()[seen], after[row[seen], column[seen]])
    same_class = street.labels(2.0).ravel()[seen] == street.labels(2.5)[row[seen], column[seen]]
    # Rounding may cross the edge between road and pavement, or between rider and bicycle.
    assert same_class.mean() > 0.985
    assert 0.3 < visible.mean() < 1


def test_cameras_move_as_they_should():
    times = np.arange(0, 20, 0.05)
    poses = {name: [Street(3, 64, 128, camera=name).pose(t) for t in times] for name in CAMERAS}
    x, y, z = np.stack([pose.position for pose in poses["walking"]]).T
    assert (np.abs(x - 8.1) < 1.1).all()  # on the pavement, from 7 to 9.2 m
    assert (np.abs(y - 1.6) < 0.05).all()
    assert (np.diff(z) > 0).all() and 1.1 < (z[-1] - z[0]) / times[-1] < 1.7
    spectrum = np.abs(np.fft.rfft(y - y.mean()))
    assert 1.75 < spectrum.argmax() / 20 < 2.25  # steps per second
    first = poses["static"][0]
    assert first.position[1] == 5
    assert all(
        np.array_equal(p.position, first.position) and np.array_equal(p.rotation, first.rotation)
        for p in poses["static"]
    )
    for name, low, high in (("static", 10, 20), ("aerial", 40, 56)):
        down = [np.degrees(np.arcsin(-pose.rotation[1, 2])) for pose in poses[name]]
        assert low < min(down) <= max(down) < high
    for seed in range(10):
        assert 20 <= Street(seed, 64, 128, camera="aerial").pose(5.0).position[1] <= 30
    for name in CAMERAS:
        for pose in poses[name][::50]:
            np.testing.assert_allclose(pose.rotation.T @ pose.rotation, np.eye(3), atol=1e-12)
            assert np.linalg.det(pose.rotation) == pytest.approx(-1)  # y points up in the world and down in the camera


@pytest.mark.parametrize(("camera", "height", "sway"), [("driving", 0.1, 10), ("aerial", 2.0, 1)])
def test_a_low_camera_that_sways_stays_above_the_ground(camera, height, sway):
    """From below, the ground would have a negative depth and hide everything, even the sky."""
    for seed in range(6):
        for t in (0.0, 2.0, 4.0):
            street = Street(seed, 32, 64, camera=camera, camera_height=height, sway=sway)
            flow, _ = street.flow(t, t + 0.01)
            assert street.pose(t).position[1] > 0 and street._scene(t).depth.min() > 0 and np.isfinite(flow).all()


def test_only_things_move_under_a_static_camera():
    street = Street(1, 96, 192, camera="static")
    flow, _ = street.flow(2.0, 2.5)
    instances, length = street.instances(2.0), np.hypot(*flow)
    assert length[instances == 0].max() < 1e-3
    moving = np.isin(street.labels(2.0), [CLASS[name] for name in ("person", "rider", "car")]) & (length > 1)
    assert moving.sum() > 100


def test_each_camera_sees_its_classes():
    for camera, names in {
        "walking": ("road", "sidewalk", "building", "vegetation", "sky", "person", "car", "pole"),
        "static": ("road", "sidewalk", "building", "vegetation", "sky", "person", "car", "pole"),
        "aerial": ("road", "sidewalk", "building", "vegetation", "terrain", "person", "car", "pole"),
    }.items():
        labels = np.concatenate([Street(seed, 64, 128, camera=camera).labels(3.0) for seed in range(6)])
        share = {name: (labels == CLASS[name]).mean() for name in names}
        assert min(share.values()) > 5e-4 and max(share.values()) < 0.5, (camera, share)


@pytest.mark.parametrize("camera", CAMERAS)
def test_no_time_no_flow(camera):
    flow, visible = Street(1, 64, 128, camera=camera).flow(3.0, 3.0)
    assert np.abs(flow).max() < 1e-3 and visible.all()


def test_labels_and_instances_agree():
    things = [
        CLASS[name]
        for name in ("person", "rider", "car", "truck", "bus", "bicycle", "pole", "traffic sign", "traffic light")
    ]
    for seed in range(6):
        street = Street(seed, 96, 192, camera=("driving", *CAMERAS)[seed % 5])
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
