"""Writes folders of precomputed flow in the test's own process."""

from accelerate.state import AcceleratorState

from training import flow_writer
from training.recipe import Recipe, parse_recipe


def writer_flags(drives, out, *more) -> list[str]:
    return [
        "--config", "street", "--videos", str(drives), "--crop_size", "64", "128", "--pairs_per_video", "3", "--dataloader_num_workers", "0",
        "--out", str(out), *more,
    ]  # fmt: skip


def write(drives, out, *more) -> None:
    AcceleratorState._reset_state(True)
    flow_writer.main(writer_flags(drives, out, *more))


def recipe_of(drives, out, *more) -> Recipe:
    given = writer_flags(drives, out, "--flow", "precomputed", "--flow_dir", str(out), *more)
    at = given.index("--out")
    return parse_recipe(given[:at] + given[at + 2 :])


def videos(folder) -> list[str]:
    return sorted(str(path) for path in folder.glob("*.mp4"))
