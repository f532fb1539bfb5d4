import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from evaluation.data import street_folder
from modeling_poodle.recipe_files import cache_root
from training import street_files
from training.street import CLASS, FIRST_ITEM, STREET_CLASSES, Street
from training.street_cameras import CAMERAS, street_camera
from training.street_files import (
    DEFAULTS,
    HELD_OUT_SEED,
    SEQUENCE_SEED,
    main,
    street_videos,
    write_folder,
    write_sequences,
    write_videos,
)

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
    # Means over 32x32 pixels and pixels of road, sky and car, from before there were other cameras; not bytes, since another numpy may
    # round the last bit of a sine otherwise.
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
        # Each class of surface by itself, roofs and gables (ids 4 to 15) too: a wrong one would hide in the median of all.
        for first, last in ((1, 1), (2, 3), (4, 15)):
            chosen = (surface_0[visible] >= first) & (surface_0[visible] <= last)
            if chosen.sum() > 20:
                assert np.median(np.abs(there[:, row, column] - here[:, y, x]).max(0)[chosen]) < 0.2
        items = surface_0[visible] >= FIRST_ITEM
        assert items.sum() > 50
        assert np.median(np.abs(there[:, row, column] - here[:, y, x]).max(0)[items]) < 0.2


@pytest.mark.parametrize("camera", CAMERAS)
def test_what_is_visible_is_the_same_thing(camera):
    """The flow's end shows the same class and instance; what is not visible is hidden by something nearer, or left the frame."""
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
    assert (
        same_class.mean() > 0.985
    )  # a pixel's neighbour may lie over the edge of road and pavement, of rider and bicycle
    assert 0.3 < visible.mean() < 1


def test_cameras_move_as_they_should():
    times = np.arange(0, 20, 0.05)
    poses = {name: [Street(3, 64, 128, camera=name).pose(t) for t in times] for name in CAMERAS}
    x, y, z = np.stack([pose.position for pose in poses["walking"]]).T
    assert (np.abs(x - 8.1) < 1.1).all()  # on the pavement, which runs from 7 to 9.2 m
    assert (np.abs(y - 1.6) < 0.05).all()
    assert (np.diff(z) > 0).all() and 1.1 < (z[-1] - z[0]) / times[-1] < 1.7
    spectrum = np.abs(np.fft.rfft(y - y.mean()))
    assert 1.75 < spectrum.argmax() / 20 < 2.25  # steps a second
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
            assert np.linalg.det(pose.rotation) == pytest.approx(-1)  # the world's y points up, the camera's down


@pytest.mark.parametrize(("camera", "height", "sway"), [("driving", 0.1, 10), ("aerial", 2.0, 1)])
def test_a_low_camera_that_sways_stays_above_the_ground(camera, height, sway):
    """Below it the ground had a negative depth, and hid everything, also the sky."""
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
    (tmp_path / "drive-0000.mp4").unlink()
    write_videos(tmp_path, num_videos=1, duration=1.0, fps=5, height=64, width=128, seed=4, num_processes=1)
    assert open(paths[0], "rb").read() == before  # the same bytes when rendered anew


def test_drives_are_never_rendered_over_other_files_and_leave_nothing_of_another_street(tmp_path, monkeypatch):
    size = {"duration": 0.5, "fps": 4, "height": 32, "width": 64, "num_processes": 1}
    own = tmp_path / "own"
    own.mkdir()
    for name, text in {
        "drive-0000.mp4": "mine",
        "drive-0000.json": '{"gps": []}',
        "drive-home.mp4": "mine too",
    }.items():
        (own / name).write_text(text)
    for name in ("drive-0000.json", "drive-0000.mp4"):  # without a sidecar, too, it is nobody's but theirs
        with pytest.raises(
            ValueError, match="drive-0000.mp4 is no drive of the street, and rendering could replace it"
        ):
            write_videos(own, num_videos=1, **size)
        assert (own / "drive-0000.mp4").read_text() == "mine"
        (own / name).unlink()
        if name == "drive-0000.mp4":
            write_videos(own, num_videos=1, **size)
    assert (own / "drive-home.mp4").read_text() == "mine too"

    folder = tmp_path / "street"
    kept = write_videos(folder, num_videos=3, **size)
    write_videos(folder, num_videos=1, **size)  # the same street: nothing is rendered, and nothing goes
    assert sorted(map(str, folder.glob("*.mp4"))) == kept
    write_videos(folder, num_videos=1, seed=5, **size)
    assert sorted(path.name for path in folder.iterdir()) == ["drive-0000.json", "drive-0000.mp4"]

    def killed(path, sidecar):
        Path(path).write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(street_files, "write_video", killed)
        write_videos(folder, num_videos=1, seed=6, **size)
    assert not (folder / "drive-0000.json").exists()
    (path,) = write_videos(folder, num_videos=1, seed=6, **size)
    with av.open(path) as container:
        assert sum(1 for _ in container.decode(video=0)) == 2


def test_a_street_whose_rendering_was_stopped_is_not_taken_for_the_one_before(tmp_path, monkeypatch):
    size = {"num_images": 2, "height": 32, "width": 64, "num_processes": 1}
    before = write_folder(tmp_path / "images", **size)
    whole = {path.relative_to(before): path.read_bytes() for path in before.rglob("*.*") if path.is_file()}
    original = street_files._write_labelled

    def stopped(output_dir, number, street):
        if number == 1:
            raise KeyboardInterrupt
        return original(output_dir, number, street)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(street_files, "_write_labelled", stopped)
        write_folder(tmp_path / "images", **size, camera="walking")
    write_folder(tmp_path / "images", **size)
    assert {path.relative_to(before): path.read_bytes() for path in before.rglob("*.*") if path.is_file()} == whole


def test_sidecars_carry_the_camera(tmp_path):
    size = {"num_videos": 1, "duration": 0.5, "fps": 4, "height": 32, "width": 64, "num_processes": 1}
    (path,) = write_videos(tmp_path, **size)
    sidecar = tmp_path / "drive-0000.json"
    stored = json.loads(sidecar.read_text())
    assert stored["street"]["camera"] == "driving"
    del stored["street"]["camera"]  # as written before there were others: not rendered again
    sidecar.write_text(json.dumps(stored))
    assert Street.from_json(stored["street"]) == Street(0, 32, 64)
    made = (tmp_path / "drive-0000.mp4").stat().st_mtime_ns
    write_videos(tmp_path, **size)
    assert (tmp_path / "drive-0000.mp4").stat().st_mtime_ns == made
    write_videos(tmp_path, **size, camera="aerial")
    assert Street.from_json(json.loads(sidecar.read_text())["street"]) == Street(0, 32, 64, camera="aerial")
    assert (tmp_path / "drive-0000.mp4").stat().st_mtime_ns > made


def test_a_camera_is_a_source_of_videos_with_a_cache_of_its_own(tmp_path, monkeypatch):
    from accelerate import Accelerator

    from training.recipe import parse_recipe
    from training.video_loader import resolve_videos

    monkeypatch.setenv("POODLE_CACHE", str(tmp_path))
    for name, value in {"num_videos": 1, "duration": 2.0, "height": 64, "width": 128}.items():
        monkeypatch.setitem(DEFAULTS, name, value)
    recipe = parse_recipe(["--videos", "street:walking", "street", "--output_dir", str(tmp_path / "run")])
    assert recipe.crop_size == [128, 256]  # the recipe of the street, not that of own videos
    paths = resolve_videos(Accelerator(cpu=True), recipe)
    assert [path.removeprefix(str(tmp_path)) for path in paths] == [
        "/poodle-street-2-1-2.0-8-64-128-0/drive-0000.mp4",
        "/poodle-street-2-1-2.0-8-64-128-0-walking/drive-0000.mp4",
    ]
    sidecars = [json.loads(open(path.replace(".mp4", ".json")).read()) for path in paths]
    assert [sidecar["street"]["camera"] for sidecar in sidecars] == ["driving", "walking"]
    with pytest.raises(
        ValueError, match="camera in 'street:boat' must be one of driving, walking, static, aerial, got 'boat'"
    ):
        parse_recipe(["--videos", "street:boat"])
    assert street_camera("streets/a.mp4") is None and street_camera("street:driving") == street_camera("street")


def test_a_cache_that_cannot_be_made_is_an_error_that_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.delenv("POODLE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(
        OSError, match=r"file/poodle, where .* cannot be made \(Not a directory\): .* variable POODLE_CACHE$"
    ):
        street_videos()
    monkeypatch.setenv("POODLE_CACHE", str(tmp_path / "own" / "cache"))
    assert cache_root() == tmp_path / "own" / "cache" and cache_root().is_dir()


def test_sequences_of_a_camera(tmp_path, monkeypatch):
    from evaluation.video_masks import load_sequences

    monkeypatch.setenv("POODLE_CACHE", str(tmp_path))
    (sequence,) = load_sequences("street:aerial", max_sequences=1)
    assert sequence.frames[0].is_relative_to(tmp_path / "street-sequences-1-aerial")
    drawn = Street(SEQUENCE_SEED, 192, 384, camera="aerial").instances(1.0)
    for index in sequence.objects():
        keys = np.unique(drawn[sequence.mask(0) == index])
        assert len(keys) == 1 and keys[0] > 0


def test_labelled_frames_of_a_camera(tmp_path, monkeypatch):
    from PIL import Image

    from evaluation import data
    from evaluation.boxes import load_boxes
    from evaluation.probe import Probe
    from evaluation.recipe import EvaluationRecipe

    assert ("driving", *data.STREET_CAMERAS) == tuple(CAMERAS)
    monkeypatch.setenv("POODLE_CACHE", str(tmp_path))
    monkeypatch.setattr(data, "STREET_SPLITS", {"train": (1, 0), "val": (1, 10_000)})
    found = data.load_dataset("street:static")
    assert found.name == "street:static" and found.test[0].image.parts[-4:-2] == ("street-labelled-static", "val")
    street = Street(HELD_OUT_SEED + 10_000, 192, 384, camera="static")
    assert np.array_equal(found.image(found.test[0]), street.frame(1.0))
    assert np.array_equal(found.label(found.test[0]), street.labels(1.0))
    made = json.loads((tmp_path / "street-labelled-static" / "val" / "classes.json").read_text())["street"]
    assert made["camera"] == "static"
    boxes = load_boxes("street:static")
    assert boxes.name == "street:static" and boxes.test[0].image.samefile(found.test[0].image)
    assert Probe("street:static").data.name == "street:static"
    with pytest.raises(
        ValueError, match="dataset must be one of street, street:walking, .*did you mean 'street:walking'"
    ):
        EvaluationRecipe(model=["a"], dataset="street:walkin")
    # A folder from before there were other cameras is whole as it is.
    listed = write_folder(tmp_path / "old", 1, 32, 64, num_processes=1) / "classes.json"
    classes = json.loads(listed.read_text())
    del classes["street"]["camera"]
    listed.write_text(json.dumps(classes))
    Image.new("RGB", (64, 32)).save(tmp_path / "old" / "images" / "00000.png")
    write_folder(tmp_path / "old", 1, 32, 64, num_processes=1)
    assert np.asarray(Image.open(tmp_path / "old" / "images" / "00000.png")).max() == 0
    write_folder(tmp_path / "old", 1, 32, 64, num_processes=1, camera="aerial")
    assert np.asarray(Image.open(tmp_path / "old" / "images" / "00000.png")).max() > 0


def test_a_folder_of_other_files_is_not_rendered_into(tmp_path):
    own = tmp_path / "own"
    (own / "val" / "images").mkdir(parents=True)
    (own / "val" / "annotations.json").write_text("[1]")
    (own / "val" / "classes.json").write_text('["a", "b"]')
    with pytest.raises(
        ValueError, match=r"val holds files that the street is not made of.*dataset names data of your own"
    ):
        write_folder(own / "val", 1, 32, 64, num_processes=1)
    with pytest.raises(ValueError, match="own holds files that the street is not made of"):
        write_sequences(own, 1, 96, 192, num_processes=1)
    for text in ('["a", "street"]', '{"classes": ["street"], "street": 1}', "{"):
        (own / "classes.json").write_text(text)
        with pytest.raises(ValueError, match=r"classes.json is not the street's: .*--dataset folder"):
            street_folder("street", str(own))
        assert (own / "classes.json").read_text() == text
    assert sorted(path.name for path in own.rglob("*")) == [
        "annotations.json",
        "classes.json",
        "classes.json",
        "images",
        "val",
    ]
    assert (own / "val" / "annotations.json").read_text() == "[1]"


def test_an_interrupted_folder_is_gone_on_with_and_a_larger_one_leaves_nothing(tmp_path, monkeypatch):
    class Stopped(BaseException):
        pass

    def stop(*_):
        (tmp_path / "images" / "00000.png").touch()
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(street_files, "_write_labelled", stop)
        with pytest.raises(Stopped):
            write_folder(tmp_path, 1, 32, 64, num_processes=1)
    write_folder(tmp_path, 3, 32, 64, num_processes=1)
    write_folder(tmp_path, 2, 32, 64, num_processes=1)
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == ["00000.png"] * 2 + ["00001.png"] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["annotations.json", "classes.json", "images", "labels"]


def test_who_wants_what_is_being_rendered_waits_for_it(tmp_path):
    def render() -> None:
        write_videos(tmp_path / "drives", 2, 0.5, 4, 32, 64, num_processes=1)
        write_folder(tmp_path / "labelled", 2, 32, 64, num_processes=1)

    fork = multiprocessing.get_context("fork")
    running = [fork.Process(target=render) for _ in range(3)]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
    assert [process.exitcode for process in running] == [0, 0, 0]
    assert sorted(path.name for path in (tmp_path / "drives").iterdir()) == [
        "drive-0000.json", "drive-0000.mp4", "drive-0001.json", "drive-0001.mp4",
    ]  # fmt: skip
    assert len(list((tmp_path / "labelled" / "images").iterdir())) == 2


def test_labelled_folder(tmp_path):
    from PIL import Image

    write_folder(tmp_path, 2, 64, 128, num_processes=1)
    classes = json.loads((tmp_path / "classes.json").read_text())
    made_of = classes.pop("street")  # by which a second call knows that the folder is whole
    assert classes == {"classes": list(STREET_CLASSES), "ignore_index": 255}
    assert (made_of["num_images"], made_of["height"], made_of["width"], made_of["seed"]) == (2, 64, 128, 0)
    labels = np.array(Image.open(tmp_path / "labels" / "00001.png"))
    assert labels.shape == (64, 128) and labels.max() < len(STREET_CLASSES)


def test_wrong_parameters(tmp_path, capsys):
    with pytest.raises(ValueError, match="Street.height must be an integer of at least 16"):
        Street(height=4)
    with pytest.raises(ValueError, match="Street.camera must be one of driving, walking, static, aerial, got 'drone'"):
        Street(camera="drone")
    for flags, message in (
        (["--height", "63"], "must be even"),
        (["--duration", "0.05"], "duration 0.05 holds no frame at 8 frames a second: give at least 0.125"),
        (["--camera", "drone"], "camera must be one of driving, walking, static, aerial, got 'drone'"),
        (["--camera", "drone", "--labelled", "1"], "camera must be one of driving"),
        (
            ["--num_videos", "1", "--duration", "2", "--labelled", "1", "--output_dir", "x"],
            "leave out --num_videos, --duration",
        ),
        (["--camera", "drone", "--sequences", "1"], "camera must be one of driving"),
    ):
        with pytest.raises(SystemExit):
            main(["--output_dir", str(tmp_path / "none"), *flags])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_who_renders_needs_neither_torch_nor_transformers():
    """They take seconds to import, in the command and in each process that it renders with."""
    code = "import sys, training.street_files; print([n for n in ('torch', 'transformers') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
