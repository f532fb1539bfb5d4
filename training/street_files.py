"""The street as files: H.264 videos with sidecars, and the command that renders these or labelled data (street_labels.py)."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
from tqdm import tqdm

from training.street import FORMAT, Street
from training.street_cameras import CAMERAS, check_camera
from training.street_labels import write_folder, write_sequences
from training.street_processes import alone, over_processes

# Rendering the default videos takes about 80 s on two cores.
DEFAULTS = {"num_videos": 16, "duration": 10.0, "fps": 8, "height": 192, "width": 384, "seed": 0, "camera": "driving"}


def street_videos(cache_dir: str | Path | None = None, **parameters) -> list[str]:
    """
    Return the paths of the street's videos. Missing videos are rendered first, so the second call is instant.

    Args:
        cache_dir: folder of the videos. By default, a folder in [`cache_root`] that is named after the parameters.
        parameters: arguments of [`write_videos`] that override `DEFAULTS`.
    """
    parameters = {**DEFAULTS, **parameters}
    if cache_dir is None:
        name = "-".join(str(parameters[key]) for key in ("num_videos", "duration", "fps", "height", "width", "seed"))
        camera = "" if parameters["camera"] == "driving" else f"-{parameters['camera']}"
        # Imported here because recipe_files imports torch and transformers. That takes seconds, in each rendering process too.
        from modeling_poodle.recipe_files import cache_root

        cache_dir = cache_root() / f"{FORMAT}-{name}{camera}"
    return write_videos(cache_dir, **parameters)


def _check(num_videos: int, duration: float, fps: int, height: int, width: int) -> None:
    if height % 2 or width % 2:
        raise ValueError(f"height and width must be even (4:2:0 video), got {height}x{width}")
    for name, value in (("num_videos", num_videos), ("duration", duration), ("fps", fps)):
        if not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}")
    if round(duration * fps) < 1:
        raise ValueError(f"duration {duration} holds no frame at {fps} frames a second: give at least {1 / fps:g}")


def write_videos(
    output_dir: str | Path,
    num_videos: int,
    duration: float,
    fps: int,
    height: int,
    width: int,
    seed: int = 0,
    num_processes: int | None = None,
    camera: str = "driving",
) -> list[str]:
    """
    Render drives to `drive-0000.mp4` … (H.264, one keyframe a second), each with a sidecar `drive-0000.json`, and return the paths.

    The sidecar suffices to compute the exact flow between any two times of the video. Complete drives are left as they are.

    Raises:
        ValueError: the height or width is odd, a value is not positive, the duration holds no frame, the camera is unknown, or the folder
            holds a file that is named like a drive but is not one.
    """
    _check(num_videos, duration, fps, height, width)
    check_camera(camera, "camera")
    output_dir = Path(output_dir)

    def drive(number: int) -> tuple[Path, dict]:
        street = Street(seed + number, height, width, camera=camera)
        sidecar = {"format": FORMAT, "street": street.to_json(), "fps": fps, "num_frames": round(duration * fps)}
        return output_dir / f"drive-{number:04d}.mp4", sidecar

    drives = [drive(number) for number in range(num_videos)]
    if not all(_is_complete(path, sidecar) for path, sidecar in drives):
        with alone(output_dir) as locked:
            begun = _begin_videos(output_dir, drive)
            # Files that killed commands left. Without a lock, they may be those of another command that is still running.
            for left in output_dir.glob("drive-[0-9]*.*.*-*.partial") if locked else ():
                left.unlink(missing_ok=True)
            jobs = [(str(path), sidecar) for path, sidecar in drives if not _is_complete(path, sidecar)]
            done = over_processes(write_video, jobs, num_processes) if jobs else ()
            bar = tqdm(
                done, total=len(jobs), desc="rendering the street", unit="drive", disable=not sys.stderr.isatty()
            )
            for count, _ in enumerate(bar, 1):
                if bar.disable:
                    print(f"rendered drive {count}/{len(jobs)}", flush=True)
            begun.unlink(missing_ok=True)
    return [str(path) for path, _ in drives]


def _begin_videos(output_dir: Path, drive: Callable[[int], tuple[Path, dict]]) -> Path:
    """
    Prepare a folder for rendering. Deletes incomplete drives and those of another street, because readers use all videos in the folder.

    Args:
        drive: maps a drive's number to its path and sidecar.

    Returns:
        The marker file, which exists while the folder's drives may be incomplete.

    Raises:
        ValueError: a file is named like a drive but is not one.
    """
    begun, others = output_dir / ".rendering", []
    for video in sorted(
        {file.with_suffix(".mp4") for kind in ("mp4", "json") for file in output_dir.glob(f"drive-*.{kind}")}
    ):
        number = video.stem.removeprefix("drive-")
        if number.isdecimal() and not _is_complete(*drive(int(number))):
            others.append(video)
            if not begun.exists() and not _is_sidecar(video.with_suffix(".json")):
                raise ValueError(
                    f"{video} is no drive of the street, and rendering could replace it: give a new or an empty folder"
                )
    begun.touch()
    for video in others:
        # Delete the sidecar first: a drive without its sidecar counts as incomplete.
        video.with_suffix(".json").unlink(missing_ok=True)
        video.unlink(missing_ok=True)
    return begun


def _is_sidecar(path: Path) -> bool:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {"format", "street", "fps", "num_frames"} <= stored.keys()
    except (OSError, ValueError, AttributeError):
        return False


def _is_complete(path: Path, sidecar: dict) -> bool:
    try:
        stored = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return path.is_file() and {**stored, "street": Street.from_json(stored["street"]).to_json()} == sidecar
    except (OSError, ValueError, TypeError, KeyError):  # no such file, not JSON, or fields of another format
        return False


def write_video(path: str, sidecar: dict) -> None:
    """
    Render one drive to a video and its sidecar.

    Each file is written under a temporary name and then renamed. The sidecar comes last, so a drive with a sidecar is complete.
    """
    street, fps = Street.from_json(sidecar["street"]), sidecar["fps"]
    # The name is unique, because another process may be writing the same drive.
    aside = f"{os.uname().nodename}-{os.getpid()}.partial"
    partial = f"{path}.{aside}"
    with av.open(partial, "w", format="mp4") as container:
        # x264 uses one thread, so that each rendering writes the same bytes.
        stream = container.add_stream("libx264", rate=fps, options={"crf": "18", "preset": "medium", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = street.height, street.width, "yuv420p"
        stream.codec_context.gop_size = max(fps, 1)
        stream.codec_context.time_base = Fraction(1, fps)
        for number in range(sidecar["num_frames"]):
            frame = av.VideoFrame.from_ndarray(street.frame(number / fps), format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    os.replace(partial, path)
    sidecar_path = Path(path).with_suffix(".json")
    partial_sidecar = Path(f"{sidecar_path}.{aside}")
    partial_sidecar.write_text(json.dumps(sidecar), encoding="utf-8")
    os.replace(partial_sidecar, sidecar_path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m training.street",
        description="Render the street.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--output_dir",
        default=argparse.SUPPRESS,
        help="folder of the videos (default: the cache that --videos street reads)",
    )
    parser.add_argument(
        "--labelled", type=int, default=0, help="write a labelled data set of N held-out frames instead"
    )
    parser.add_argument(
        "--sequences",
        type=int,
        default=0,
        help="write N held-out drives with object masks, as DAVIS is laid out, instead",
    )
    about = {
        "num_videos": "drives",
        "duration": "seconds of each",
        "fps": "frames a second",
        "height": "pixels",
        "width": "pixels",
        "seed": "of the first drive",
        "camera": f"one of {', '.join(CAMERAS)}",
    }
    for name, value in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=about[name])
    options = vars(parser.parse_args(arguments))
    output_dir, labelled, sequences = (options.pop(name, None) for name in ("output_dir", "labelled", "sequences"))
    size = {name: options[name] for name in ("height", "width", "seed", "camera")}
    try:
        if (labelled or sequences) and output_dir is None:
            raise ValueError("--labelled and --sequences need --output_dir")
        if labelled and sequences:
            raise ValueError("--labelled and --sequences write a folder each: give one of them")
        unused = [name for name, value in options.items() if name not in size and value != DEFAULTS[name]]
        if (labelled or sequences) and unused:
            raise ValueError(f"--labelled and --sequences write no videos: leave out --{', --'.join(unused)}")
        if labelled:
            print(f"{labelled} labelled frames in {write_folder(output_dir, labelled, **size)}")
        elif sequences:
            print(f"{sequences} sequences in {write_sequences(output_dir, sequences, **size)}")
        else:
            videos = street_videos(output_dir, **options)
            print(f"{len(videos)} drives in {Path(videos[0]).parent}")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:  # as run_script in modeling_poodle/recipe_files.py, whose import would take seconds
        sys.excepthook = lambda *_: print("\ninterrupted", file=sys.stderr)
        raise
