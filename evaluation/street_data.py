"""The rendered street as a data set: its names, its folders, and rendering what is missing."""

import json
import subprocess
import sys
from pathlib import Path

from modeling_poodle.folders import write_aside
from modeling_poodle.recipe_files import cache_root

# Cameras of the street (training/street_cameras.py), besides the car's, which is `street` itself.
STREET_CAMERAS = ("walking", "static", "aerial")
STREETS = ("street", *(f"street:{camera}" for camera in STREET_CAMERAS))
# Number of labelled images, and seed among the drives held out from pretraining.
STREET_SPLITS = {"train": (96, 0), "val": (48, 10_000)}


def street_place(name: str, what: str, data_dir: str | None) -> Path:
    """Return the folder for `what` (such as labelled frames) of one of `STREETS`: `data_dir`, or by default one in the cache."""
    if data_dir is not None:
        return Path(data_dir).expanduser().resolve()
    return (cache_root() / f"street-{what}{name.removeprefix('street').replace(':', '-')}").resolve()


def render_street(name: str, what: str, folder: Path, *words: str) -> None:
    """
    Render one of `STREETS` with the street's own command, which keeps files that exist already.

    Raises:
        ValueError: rendering failed; the message says what was to be rendered, and why it failed.
    """
    # In a separate process, because evaluation/ does not import training/.
    command = [sys.executable, "-m", "training.street", "--camera", name.partition(":")[2] or "driving"]
    done = subprocess.run(
        [*command, "--output_dir", str(folder), *words],
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ValueError(f"the street's {what} could not be rendered: {done.stderr.strip()}")


def _written_by_street(listed: Path) -> bool:
    """Whether the street's command wrote this classes.json; the command records in it what was rendered."""
    try:
        values = json.loads(listed.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(values, dict) and isinstance(values.get("street"), dict)


def street_folder(name: str, data_dir: str | None = None) -> Path:
    """Return the folder of labelled frames of one of `STREETS`; missing frames are rendered."""
    folder = street_place(name, "labelled", data_dir)
    listed = folder / "classes.json"
    if listed.is_file() and not _written_by_street(listed):
        raise ValueError(
            f"{listed} is not the street's: data_dir is where {name} is rendered; for data of your own give --dataset folder"
        )
    for split, (count, seed) in STREET_SPLITS.items():
        render_street(name, "labelled frames", folder / split, "--labelled", str(count), "--seed", str(seed))
    text = (folder / "train" / "classes.json").read_text(encoding="utf-8")
    if not listed.is_file() or listed.read_text(encoding="utf-8") != text:  # another process may be reading the file
        write_aside(listed, text)
    return folder
