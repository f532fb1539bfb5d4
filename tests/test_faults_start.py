"""
Faults before the first step.

Errors in a command are found before the street is rendered. Signals can come while the script imports, prepares the run or closes.
"""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from accelerate import Accelerator
from conftest import REPOSITORY
from forks import in_child, wait_for
from small_runs import flags, metrics, names

from evaluation import detect, segment
from training import flow_writer, pretrain, stopping, video_loader
from training.checkpoint_files import damage
from training.recipe import parse_recipe
from training.resume import prepare_output_dir

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def catches(pid: int, number: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (number - 1) & 1)


def signalled(arguments: list[str], moment, number: int) -> tuple[int, str]:
    """Send the signal to the script once `moment(pid)` is true, and return its exit code and stderr."""
    process = subprocess.Popen(
        [sys.executable, "training/pretrain.py", *arguments], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        wait_for(lambda: process.poll() is not None or moment(process.pid), seconds=120)
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, said


def rendered(*_, **__):
    raise AssertionError("the street was rendered first, which takes minutes")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--init_encoder", "./nowhere"], "init_encoder './nowhere' is no encoder that can be loaded"),
        (["--flow", "raft_small", "--flow_weights", "nowhere.pth"], "flow_weights"),
        (["--flow", "unflow", "--flow_model", "./nowhere"], "flow_model"),
        (["--probe", "folder:nowhere"], "probe: "),
        (["--model", '{"backbone_config": {"model_type": "timm_backbone", "backbone": "resnt18"}}'], "timm has no network 'resnt18'"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_run_is_found_before_the_street_is_rendered(tmp_path, monkeypatch, more, said):
    monkeypatch.setattr(video_loader, "street_videos", rendered)
    with pytest.raises(ValueError, match=said):
        pretrain.main(["--config", "street", "--output_dir", str(tmp_path / "run"), *more])
    if "--flow" in more:
        with pytest.raises(ValueError, match=said):
            flow_writer.main(["--config", "street", "--out", str(tmp_path / "flow"), *more])
        assert not (tmp_path / "flow").exists()


@pytest.mark.parametrize("script", [segment, detect])
@pytest.mark.parametrize("model", ["./nowhere", "timm/resnt18"])
def test_a_model_that_is_not_there_is_found_before_the_street_is_rendered(tmp_path, monkeypatch, script, model):
    monkeypatch.setattr(script, "load_dataset" if script is segment else "load_boxes", rendered)
    with pytest.raises(ValueError, match=f"--model {model}: no such model"):
        script.main(["--model", model, "--dataset", "street", "--output_dir", str(tmp_path / "run")])


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells when the handler is there")
def test_a_signal_while_the_script_imports(drives, tmp_path):
    code, said = signalled(flags(drives, tmp_path / "run"), lambda pid: catches(pid, signal.SIGTERM), signal.SIGINT)
    assert code == stopping.RESUMABLE_EXIT_CODE == 75
    assert said == "\nSIGINT: the run stops outside of its steps; nothing is done yet, repeat the command\n"
    assert not (tmp_path / "run").exists()


def test_a_signal_while_the_run_is_prepared(drives, tmp_path):
    """Preparation locks the folder first. The indices of the videos, the network and the checkpoint follow."""
    run = tmp_path / "run"
    code, said = signalled(flags(drives, run), lambda pid: (run / ".lock").exists(), signal.SIGTERM)
    assert code == 75 and "Traceback" not in said
    assert said.endswith("\nSIGTERM: the run stops outside of its steps; nothing is done yet, repeat the command\n")
    assert not (run / "config.yaml").exists()
    for more in ((), ("--resume_from_checkpoint", "latest")):  # both commands start the run
        assert prepare_output_dir(Accelerator(cpu=True), parse_recipe(flags(drives, run, *more))) is None


def test_a_signal_during_the_steps_of_the_script(drives, tmp_path):
    run = tmp_path / "run"
    code, said = signalled(flags(drives, run, steps=500), lambda pid: (run / "metrics.jsonl").exists(), signal.SIGTERM)
    assert code == 75 and "Traceback" not in said
    assert "SIGTERM: the run saves and stops after this step" in said and "outside of its steps" not in said
    (checkpoint,) = names(run)
    assert checkpoint == f"step-{metrics(run)[-1]['step']}" and damage(run / "checkpoints" / checkpoint) is None
    recipe = parse_recipe(flags(drives, run, "--resume_from_checkpoint", "latest", steps=500))
    assert prepare_output_dir(Accelerator(cpu=True), recipe) == run / "checkpoints" / checkpoint


def test_a_run_whose_terminal_is_closed_saves(drives, tmp_path):
    """As when an ssh connection drops: SIGHUP comes, and from then on writing to the terminal is an error."""
    run, terminal = tmp_path / "run", os.openpty()
    command = [sys.executable, "training/pretrain.py", *flags(drives, run, steps=500)]
    owner = "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", owner, *command], cwd=REPOSITORY, stdin=terminal[1], stdout=terminal[1], stderr=terminal[1],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    os.close(terminal[1])
    os.set_blocking(terminal[0], False)

    def stepping() -> bool:
        with suppress(OSError):  # nothing was written since
            os.read(terminal[0], 1 << 16)
        return process.poll() is not None or (run / "metrics.jsonl").exists()

    try:
        wait_for(stepping, seconds=120)
        os.close(terminal[0])
        assert process.wait(120) == stopping.RESUMABLE_EXIT_CODE
    finally:
        process.kill()
    (checkpoint,) = names(run)
    assert checkpoint == f"step-{metrics(run)[-1]['step']}" and damage(run / "checkpoints" / checkpoint) is None


def test_a_run_that_writes_to_a_program_which_a_closed_terminal_ends_saves(drives, tmp_path):
    """As `pretrain.py | tee log` when an ssh connection drops: both get SIGHUP, and tee ends first."""
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "training/pretrain.py", *flags(drives, run, steps=500)],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        wait_for(lambda: process.poll() is not None or (run / "metrics.jsonl").exists(), seconds=120)
        process.send_signal(signal.SIGSTOP)  # so that it writes nothing in between
        process.stdout.close()
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGCONT)
        assert process.wait(120) == stopping.RESUMABLE_EXIT_CODE
    finally:
        process.kill()
    (checkpoint,) = names(run)
    assert checkpoint == f"step-{metrics(run)[-1]['step']}" and damage(run / "checkpoints" / checkpoint) is None


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_signal_once_the_run_has_its_folder(capfd, monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)

    def close() -> None:
        stopping.end_on_signals()
        stopping.mark_begun()
        child = os.fork()
        if child == 0:  # the handler is not meant for a child process
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(9)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)

    _, status = os.waitpid(in_child(close), 0)
    assert os.waitstatus_to_exitcode(status) == 75
    words = "\nSIGTERM: the run stops outside of its steps; go on with --resume_from_checkpoint latest\n"
    assert capfd.readouterr().err == (words if rank == "0" else "")
