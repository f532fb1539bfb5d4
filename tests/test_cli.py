"""The training script as a user runs it: killed, resumed, on two processes, and with wrong input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forked_scripts import forked
from safetensors.torch import load_file
from transformers import AutoImageProcessor, ResNetBackbone

from modeling_poodle import PoodleBackbone, PoodleModel
from modeling_poodle.recipe_files import run_script
from training.pretrain import main
from training.street_files import write_videos

REPOSITORY = Path(__file__).resolve().parent.parent
TIMINGS = ("pairs_per_second", "data_wait")
MODEL = {
    "backbone_config": {
        "model_type": "resnet",
        "layer_type": "basic",
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [8, 8, 16, 16],
        "embedding_size": 8,
    },
    "decoder_reduction": 2,
    "projection_hidden_size": 16,
    "projection_size": 8,
}


@pytest.fixture(scope="session")
def drives(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drives")
    write_videos(folder, num_videos=3, duration=2.0, fps=5, height=64, width=128, num_processes=2)
    return folder


THREADS = "2"  # not 1, which is ignored under a launcher; runs with different numbers of threads differ


def command(drives, output_dir, *flags, processes=1, workers=2, launcher=True):
    # On CPUs `accelerate launch` starts more than one process only under MPI. torchrun starts two, which Accelerate then detects.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    if not launcher:
        launch = [sys.executable]
    if processes > 1:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [
        *launch, str(REPOSITORY / "training" / "pretrain.py"), "--videos", str(drives), "--output_dir", str(output_dir),
        "--config", "street", "--model", json.dumps(MODEL), "--crop_size", "64", "128", "--per_device_train_batch_size", "4",
        "--subcrop_size", "32", "--num_subcrops", "2", "--warmup_steps", "2", "--logging_steps", "1", "--panel_steps", "100",
        "--dataloader_num_workers", str(workers), *flags,
    ]  # fmt: skip


def run(*args, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*args, **kwargs),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": THREADS},
    )


def refusal(drives, output_dir, *flags) -> str:
    """Run the script in this process and return its error message. Starting another process would take seconds."""
    words = command(drives, output_dir, *flags, launcher=False)
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: main(words[2:]))
    assert ended.value.code.startswith("error: ")
    return ended.value.code


def metrics(output_dir) -> list[dict]:
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


@pytest.fixture(scope="session")
def whole_run(drives, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("runs") / "whole"
    done = run(drives, output_dir, "--max_steps", "8", "--save_steps", "3")
    assert done.returncode == 0, done.stderr
    return output_dir


@pytest.fixture(scope="session")
def whole_run_of_two(drives, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("runs") / "two"
    words = command(drives, output_dir, "--max_steps", "8", "--save_steps", "3", launcher=False)
    done = forked(
        *words[1:], ranks=2, OMP_NUM_THREADS=THREADS
    )  # torchrun starts the run that is compared with this one
    assert done.returncode == 0, done.stderr
    assert "on 2 process(es)" in done.stdout + done.stderr
    return output_dir


def test_a_run_leaves_what_the_documents_promise(whole_run):
    lines = metrics(whole_run)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert set(lines[0]) == {
        "step", "epoch", "loss", "dense_loss", "pooled_loss", "valid_fraction", "matched_fraction", "lr", "momentum", "grad_norm",
        "feature_std", "skipped_videos", "skipped_updates",
    }  # fmt: skip
    assert all(0 < line["loss"] < 4 and 0 <= line["valid_fraction"] <= 1 for line in lines)
    assert [path.name for path in sorted((whole_run / "checkpoints").iterdir())] == ["step-6", "step-8"]
    assert sorted(path.name for path in (whole_run / "panels").iterdir()) == ["step-000001.png", "step-000008.png"]
    checkpoint = load_file(whole_run / "checkpoints" / "step-8" / "model.safetensors")
    assert not any("flow" in name or "raft" in name for name in checkpoint)
    model = PoodleModel.from_pretrained(whole_run / "model").eval()
    for name, value in model.state_dict().items():
        assert torch.equal(value, checkpoint[f"teacher.{name}"]), name  # the exported model is the teacher
    image = torch.rand(1, 3, 64, 96)
    encoder = ResNetBackbone.from_pretrained(whole_run / "encoder").eval()
    backbone = PoodleBackbone.from_pretrained(whole_run / "model", out_features=["stage4", "decoder"]).eval()
    assert torch.equal(encoder(image).feature_maps[-1], backbone(image).feature_maps[0])
    assert torch.equal(model(image).last_hidden_state, backbone(image).feature_maps[1])
    assert encoder.config.out_features == ["stage1", "stage2", "stage3", "stage4"]
    for folder in ("encoder", "model"):
        processor = AutoImageProcessor.from_pretrained(whole_run / folder)
        assert list(processor.image_mean) == pytest.approx([0.485, 0.456, 0.406])
        assert "after 8 steps" in (whole_run / folder / "README.md").read_text()


def kill_run(output_dir) -> None:
    """Send SIGKILL to all processes of a run: launcher, ranks and workers."""
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(output_dir).encode() in (entry / "cmdline").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            continue


@pytest.mark.parametrize(
    ("moment", "processes"),
    [
        pytest.param("step", 1, marks=pytest.mark.long),
        ("checkpoint", 1),
        pytest.param("step", 2, marks=pytest.mark.long),
        ("checkpoint", 2),
    ],
)
def test_killed_and_resumed_equals_the_whole_run(drives, whole_run, whole_run_of_two, tmp_path, moment, processes):
    """
    SIGKILL comes in the middle of a step after the first checkpoint, or while the second checkpoint is written.

    A single process starts without the launcher of the whole run. All runs resume in forks, because imports take as long as the run.
    """
    output_dir, whole = tmp_path / "killed", whole_run if processes == 1 else whole_run_of_two
    flags = ("--max_steps", "8", "--save_steps", "3")
    process = subprocess.Popen(
        command(drives, output_dir, *flags, processes=processes, launcher=False), cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": THREADS},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    log, deadline = output_dir / "metrics.jsonl", time.monotonic() + 120
    partial = output_dir / "checkpoints" / ".step-6.partial"
    while time.monotonic() < deadline and process.poll() is None:
        if moment == "step" and log.exists() and len(log.read_text().splitlines()) >= 4:
            break
        if moment == "checkpoint" and partial.exists():
            break
        time.sleep(0.0005)
    assert process.poll() is None, "the run ended before it could be killed"
    kill_run(output_dir)
    process.wait()
    assert (output_dir / "checkpoints" / "step-3").is_dir()
    assert not (output_dir / "checkpoints" / "step-8").exists()
    words = command(drives, output_dir, *flags, "--resume_from_checkpoint", "latest", launcher=False)
    resumed = forked(*words[1:], ranks=processes if processes > 1 else 0, OMP_NUM_THREADS=THREADS)
    assert resumed.returncode == 0, resumed.stderr
    assert metrics(output_dir) == metrics(whole)
    for name in ("encoder", "model"):
        ours, theirs = (load_file(folder / name / "model.safetensors") for folder in (output_dir, whole))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.usefixtures("fresh_accelerator")
def test_another_number_of_processes_is_refused_with_the_command_that_works(drives, whole_run_of_two):
    assert len(metrics(whole_run_of_two)) == 8
    flags = ("--max_steps", "8", "--save_steps", "3", "--resume_from_checkpoint", "latest")
    assert "2 processes, this one has 1" in refusal(drives, whole_run_of_two, *flags)


def test_wrong_input_ends_the_script_with_a_sentence(drives, tmp_path):
    done = run(drives, tmp_path / "run", "--max_steps", "1", "--videos", "/nowhere/at/all", launcher=False)
    assert done.returncode == 1 and "error: no videos found; tried" in done.stderr
    assert "Traceback" not in done.stderr
    assert "leaked" not in done.stderr  # triton 3.9 reports objects that still exist when Python ends


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rat", "1"], "did you mean 'learning_rate'"),
        (["--lr", "1"], "did you mean 'learning_rate' or 'min_learning_rate'"),
        (["--wd", "1"], "did you mean 'weight_decay'"),
        (["--config", ""], "--config: no such recipe file"),
        (["--frame_gap_seconds", "50", "60"], "is too short"),
        (["--crop_size", "60", "128"], "crop_size must be multiples of the resnet encoder's 32"),
        (["--frame_size", "64", "64"], "is larger than the frame"),
        (
            ["--flow", "raft_large"],
            "at least 128x128 with flow raft_large (--flow dis takes smaller ones), got [64, 128]",
        ),
        (
            "--flow_weights missing.pth --flow raft_large --crop_size 128 128 --frame_size 192 384".split(),
            "flow_weights missing.pth cannot be loaded",
        ),
        (["--config", "nothing"], "no such recipe"),
        (["--init_encoder", "/nowhere/encoder"], "is no encoder that can be loaded"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_input_is_a_sentence_not_a_stack_trace(drives, tmp_path, flags, message):
    assert message in refusal(drives, tmp_path / "run", "--max_steps", "1", *flags)


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_folder_with_another_run_is_refused(drives, whole_run):
    assert "holds a run already" in refusal(drives, whole_run, "--max_steps", "8")
    said = refusal(
        drives, whole_run, "--max_steps", "8", "--learning_rate", "0.5", "--resume_from_checkpoint", "latest"
    )
    assert "another configuration" in said and "learning_rate" in said
