"""The street on disk: videos, labelled folders and sequences are made once, and never over other files."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from forks import wait_for

from evaluation.street_data import street_folder
from modeling_poodle.recipe_files import cache_root
from training import street_files, street_labels
from training.street import STREET_CLASSES, Street
from training.street_cameras import CAMERAS, street_camera
from training.street_files import DEFAULTS, main, street_videos, write_videos
from training.street_labels import HELD_OUT_SEED, SEQUENCE_SEED, write_folder, write_sequences

REPOSITORY = Path(__file__).resolve().parent.parent


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
    assert open(paths[0], "rb").read() == before  # rendering again gives the same bytes


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
    for name in ("drive-0000.json", "drive-0000.mp4"):  # it is the user's own file, with or without a sidecar
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
    write_videos(folder, num_videos=1, **size)  # the same street: nothing is rendered or deleted
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
    original = street_labels._write_labelled

    def stopped(output_dir, number, street):
        if number == 1:
            raise KeyboardInterrupt
        return original(output_dir, number, street)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(street_labels, "_write_labelled", stopped)
        write_folder(tmp_path / "images", **size, camera="walking")
    write_folder(tmp_path / "images", **size)
    assert {path.relative_to(before): path.read_bytes() for path in before.rglob("*.*") if path.is_file()} == whole


def test_sidecars_carry_the_camera(tmp_path):
    size = {"num_videos": 1, "duration": 0.5, "fps": 4, "height": 32, "width": 64, "num_processes": 1}
    (path,) = write_videos(tmp_path, **size)
    sidecar = tmp_path / "drive-0000.json"
    stored = json.loads(sidecar.read_text())
    assert stored["street"]["camera"] == "driving"
    del stored["street"]["camera"]  # as written before there were other cameras; it is not rendered again
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
    assert recipe.crop_size == [128, 256]  # from the recipe of the street, not of own videos
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

    from evaluation import street_data
    from evaluation.boxes import load_boxes
    from evaluation.data import load_dataset
    from evaluation.probe import Probe
    from evaluation.recipe import EvaluationRecipe

    assert ("driving", *street_data.STREET_CAMERAS) == tuple(CAMERAS)
    monkeypatch.setenv("POODLE_CACHE", str(tmp_path))
    monkeypatch.setattr(street_data, "STREET_SPLITS", {"train": (1, 0), "val": (1, 10_000)})
    found = load_dataset("street:static")
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
    # A folder from before there were other cameras counts as complete.
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
    with pytest.raises(ValueError, match=r"val holds files that are not the street's.*dataset names data of your own"):
        write_folder(own / "val", 1, 32, 64, num_processes=1)
    with pytest.raises(ValueError, match="own holds files that are not the street's"):
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
        patched.setattr(street_labels, "_write_labelled", stop)
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


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells whose children live")
def test_who_renders_for_a_process_that_was_killed_ends_with_it(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--num_videos", "2", "--duration", "30", "--fps", "8", "--height", "192", "--width", "384"]  # fmt: skip
    script = f"from training.street_files import main; main({flags})"
    code = f"import os; os.sched_getaffinity = lambda _: {{0, 1}}\nif __name__ == '__main__':\n    {script}"
    (tmp_path.parent / "render.py").write_text(code)
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path.parent / "render.py")], env={**os.environ, "PYTHONPATH": str(REPOSITORY)}
    )
    wait_for(lambda: len(list(tmp_path.glob("drive-*.partial"))) == 2, seconds=120)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    assert len(children) >= 2
    parent.kill()
    parent.wait()
    wait_for(lambda: not any(map(alive, children)), seconds=30)
    # Their unfinished files are in nobody's way.
    write_videos(tmp_path, 2, 0.5, 8, 32, 64, num_processes=1)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".json", ".mp4", ".mp4"]


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_labelled_folder(tmp_path):
    from PIL import Image

    write_folder(tmp_path, 2, 64, 128, num_processes=1)
    classes = json.loads((tmp_path / "classes.json").read_text())
    made_of = classes.pop("street")  # tells a second call that the folder is complete
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
        (["--labelled", "1", "--sequences", "1"], "--labelled and --sequences write a folder each: give one of them"),
    ):
        with pytest.raises(SystemExit):
            main(["--output_dir", str(tmp_path / "none"), *flags])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_who_renders_needs_neither_torch_nor_transformers(tmp_path):
    """Both take seconds to import, in the command and in each of its rendering processes."""
    words = ["--labelled", "2", "--height", "32", "--width", "64", "--output_dir", str(tmp_path / "out")]
    code = f"""
import sys
from training.street_files import main
if __name__ == "__main__":
    main({words})
    print([name for name in ("torch", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and (tmp_path / "out" / "images" / "00001.png").is_file()


def test_a_script_without_a_main_guard_ends(tmp_path):
    """Its worker processes import the script and call it again: they would wait for their parent's lock on the folder, and it for them."""
    script = tmp_path / "render.py"
    script.write_text(
        f"from training.street_files import write_videos\nwrite_videos({str(tmp_path / 'out')!r}, 2, 0.5, 4, 64, 128, num_processes=2)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=120
    )  # fmt: skip
    assert done.returncode == 1 and 'put what it does under `if __name__ == "__main__":`' in done.stderr
