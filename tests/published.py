"""A run published on a Hub on 127.0.0.1, and processes that load it. conftest.py makes the fixtures available to all tests."""

import json
import subprocess
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from forked_scripts import forked_before_hub
from loopback import serve
from loopback_hub import TOKEN, HubServer, Interpreter

from training.pretrain import main as pretrain

REPOSITORY = Path(__file__).resolve().parent.parent
RESNET = {
    "model_type": "resnet", "layer_type": "basic", "depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16], "embedding_size": 8,
}  # fmt: skip
MODEL = {"backbone_config": RESNET, "decoder_reduction": 2, "projection_hidden_size": 16, "projection_size": 8}
EVALUATION = {
    "miou": 0.25, "accuracy": 0.75, "mean_accuracy": None, "per_class": {}, "groups": {}, "dataset": "camvid", "readout": "linear",
    "features": "decoder", "inference": "whole image", "num_train_images": 367, "num_test_images": 233, "seed": 0, "steps": 10,
}  # fmt: skip
# Removes the editable installation, which puts the package on the path of every process of this interpreter.
WITHOUT_THE_PACKAGE = """
import sys
from pathlib import Path
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]
sys.path = [path for path in sys.path if path and not Path(path, "modeling_poodle").is_dir()]
try:
    import modeling_poodle
    raise SystemExit("modeling_poodle is on the path: this test would prove nothing")
except ModuleNotFoundError:
    pass
"""
SAME = """
from pathlib import Path
import torch
from safetensors.torch import load_file
torch.set_grad_enabled(False)
def same(ours, theirs):
    assert torch.equal(ours, theirs), (ours - theirs).abs().max()
"""


def flags(videos, output_dir, *more, steps=2):
    return [
        "--config", "street", "--videos", str(videos), "--output_dir", str(output_dir), "--model", json.dumps(MODEL),
        "--crop_size", "64", "128", "--subcrop_size", "32", "--num_subcrops", "2", "--per_device_train_batch_size", "2",
        "--max_steps", str(steps), "--warmup_steps", "1", "--logging_steps", "1", "--panel_steps", "1000", "--save_steps", "1",
        "--dataloader_num_workers", "0", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def published_run(drives, tmp_path_factory) -> Path:
    """A finished run like a user's. Its teacher differs from its student."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    AcceleratorState._reset_state(True)
    pretrain(flags(drives, folder, "--teacher_momentum", "0.5"))
    AcceleratorState._reset_state(True)
    return folder


@pytest.fixture(scope="module")
def shared_hub(published_run, tmp_path_factory):
    """A Hub on which the run is published."""
    with serve(tmp_path_factory.mktemp("hub"), HubServer) as server:
        done = publish(server, published_run, "--repo_id", "org/poodle-r18")
        assert done.returncode == 0, done.stderr
        server.first_revision = server.repository("org/poodle-r18").commits[-1].oid
        yield server


@pytest.fixture
def own_hub(tmp_path):
    (tmp_path / "hub").mkdir()
    with serve(tmp_path / "hub", HubServer) as server:
        yield server


def python(hub, home: Path, script: str, *arguments, **variables) -> subprocess.CompletedProcess:
    """Run a script in a process that uses `hub`, with a cache in `home`."""
    (home / "script.py").write_text(script)
    environment = {**hub.environment(home / "hf"), **variables}
    return forked_before_hub(home / "script.py", *arguments, environment=environment)


def publish(hub, folder, *arguments, token=TOKEN) -> subprocess.CompletedProcess:
    environment = hub.environment(hub.folder / "home", token)
    return forked_before_hub("training.publish", folder, *arguments, environment=environment)


@pytest.fixture(scope="module")
def clean(shared_hub, tmp_path_factory):
    """A process with an empty cache that cannot import this package."""
    interpreter = Interpreter(shared_hub, tmp_path_factory.mktemp("clean"), WITHOUT_THE_PACKAGE)
    yield interpreter
    interpreter.close()


@pytest.fixture(scope="module")
def installed(shared_hub, tmp_path_factory):
    """A process with an empty cache that imports this package."""
    interpreter = Interpreter(shared_hub, tmp_path_factory.mktemp("installed"))
    yield interpreter
    interpreter.close()
