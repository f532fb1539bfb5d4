"""Settings and fixtures of all tests: no internet, a core for each worker, and the optional folder of real clips."""

import gc
import json
import logging
import os
import runpy
import sys
from pathlib import Path

# Set before torch or huggingface_hub are imported: tests never reach the internet.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Under pytest-xdist each worker, with all processes it starts, keeps to its own core. Threads of several workers on the same cores would
# wait for each other in spinning barriers and be many times slower than one thread each.
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % len(cores)]})
    os.environ["OMP_NUM_THREADS"] = "1"
    gc.disable()  # while tests are imported, as in the scripts
else:
    os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch
from forked_scripts import forked, forked_before_hub
from labelled_shapes import RESNET, squares
from loopback import serve
from loopback_hub import HubServer, Interpreter
from published import clean, installed, own_hub, published_run, shared_hub
from small_runs import drives, fresh_accelerator, whole

from modeling_poodle import PoodleConfig, PoodleModel
from training.street_labels import write_folder

REPOSITORY = Path(__file__).resolve().parent.parent
# The longest files first: pytest-xdist distributes files in this order, so that short ones fill the end.
LONGEST = (
    "cli",
    "pretrain",
    "detect",
    "studies",
    "explore_page",
    "faults",
    "benchmarks",
    "faults_ranks",
    "flow_files",
    "propagate",
)


def pytest_collection_modifyitems(items) -> None:
    rank = {f"test_{name}.py": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # otherwise triton 3.9 reports leaks
    forked.close()
    forked_before_hub.close()


@pytest.fixture(scope="session")
def poodle_data() -> Path:
    """Folder of real clips and CamVid. Skips the test if the folder is absent (it is never part of the repository)."""
    folder = Path(os.environ.get("POODLE_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "videos").is_dir():
        pytest.skip(f"real clips not found in {folder}; set POODLE_DATA to their folder to run this test")
    return folder


@pytest.fixture
def as_script(monkeypatch):
    """
    Run a script that fails, as `python FILE ARGUMENTS` would, and return its last sentence.

    It runs in this process, because starting one takes seconds. Run by `python`, it would print the sentence to stderr without a stack trace
    and end with exit code 1.
    """

    def run(script: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.delenv("POODLE_TRACEBACK", raising=False)
        monkeypatch.setattr(gc, "freeze", lambda: None)  # what earlier tests left is garbage, and must not be frozen
        threads, levels = (
            torch.get_num_threads(),
            {name: logging.getLogger(name).level for name in ("httpx", "datasets", "fsspec")},
        )
        try:
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(REPOSITORY / script), run_name="__main__")
        finally:
            torch.set_num_threads(threads)
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
        assert isinstance(ended.value.code, str)  # a number would be the exit code itself
        return ended.value.code

    return run


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    squares(folder / "train", 12, 0)
    squares(folder / "val", 5, 1)
    (folder / "classes.json").write_text(json.dumps({"classes": ["grass", "red <b>", "blue"], "ignore_index": 255}))
    return folder


@pytest.fixture(scope="module")
def poodle(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    config = PoodleConfig(backbone_config={"model_type": "resnet", **RESNET}, decoder_reduction=2)
    PoodleModel(config).save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def street_boxes(tmp_path_factory) -> Path:
    """A folder with `four`, whose training and test images are the same four of the street, and `five`, with a fifth test image."""
    root = tmp_path_factory.mktemp("street")
    write_folder(root / "five" / "val", 5, 96, 192, seed=3, num_processes=2)
    annotations = root / "five" / "val" / "annotations.json"
    coco = json.loads(annotations.read_text())
    # Boxes of a few pixels prove nothing.
    coco["annotations"] = [a for a in coco["annotations"] if min(a["bbox"][2:]) >= 8]
    annotations.write_text(json.dumps(coco))
    four = {**coco, "images": coco["images"][:4], "annotations": [a for a in coco["annotations"] if a["image_id"] < 4]}
    for split in ("train", "val"):
        (root / "four" / split).mkdir(parents=True)
        (root / "four" / split / "annotations.json").write_text(json.dumps(four))
        os.symlink(root / "five" / "val" / "images", root / "four" / split / "images")
    os.symlink(root / "four" / "train", root / "five" / "train")
    return root


@pytest.fixture(scope="module")
def bare_hub(tmp_path_factory):
    """A Hub on 127.0.0.1 without any repository."""
    with serve(tmp_path_factory.mktemp("hub"), HubServer) as server:
        yield server


@pytest.fixture(scope="module")
def hub_process(bare_hub, tmp_path_factory):
    """A process with an empty cache that talks to `bare_hub`."""
    interpreter = Interpreter(bare_hub, tmp_path_factory.mktemp("process"))
    yield interpreter
    interpreter.close()


__all__ = [
    "clean",
    "drives",
    "fresh_accelerator",
    "installed",
    "own_hub",
    "published_run",
    "shared_hub",
    "whole",
]  # fixtures


@pytest.fixture(scope="module")
def written(drives, tmp_path_factory) -> Path:
    """Folder of flow written by DIS for two epochs."""
    from flow_folders import write  # imported here, because it imports training/, which other tests do not need

    out = tmp_path_factory.mktemp("flow") / "dis"
    write(drives, out, "--epochs", "2")
    return out
