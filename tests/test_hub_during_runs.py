"""What a run sends to the Hub while it trains, and what comes back."""

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from loopback_hub import TOKEN
from published import REPOSITORY, flags
from safetensors.torch import load_file

from training import publish as publishing
from training.pretrain import main as pretrain
from training.publish import BackgroundPublisher


def test_a_run_sends_its_checkpoints_and_survives_a_failing_hub(shared_hub, installed, drives, tmp_path):
    """The first uploads are refused, the last ones arrive, and the run never stops."""
    arguments = flags(drives, tmp_path / "run", "--push_to_hub", "true", "--hub_model_id", "org/live", steps=3)
    script = (
        f"import sys; sys.path[:0] = [{str(REPOSITORY)!r}]\nfrom training.pretrain import main; main({arguments!r})"
    )
    shared_hub.fail("POST /api/repos/create", 403, 2)  # encoder and model of the first checkpoint
    try:
        printed = installed(tmp_path, script)
    finally:
        shared_hub.faults.clear()
    errors = installed.errors()
    assert "was not sent to the Hub (training goes on): org/live on http://127.0.0.1" in errors
    assert "403, the token may not write there" in errors and "Traceback" not in errors
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert not (tmp_path / "run" / ".publish").exists()
    for name, folder in (("org/live", "encoder"), ("org/live-sdm", "model")):
        commits = shared_hub.repository(name).commits
        assert commits[-1].message == "Step 3" and len(commits) <= 3  # the Hub's own commit and at most steps 2 and 3
        weights = load_file(commits[-1].files["model.safetensors"].path)
        ours = load_file(tmp_path / "run" / folder / "model.safetensors")
        assert all(torch.equal(weights[key], ours[key]) for key in ours)
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    assert TOKEN not in printed + errors


@pytest.fixture
def two_parts(monkeypatch):
    """Replace a run's parts by the folders `a` and `b`, each with one file instead of weights; gives the function that writes them."""
    monkeypatch.setattr(publishing, "parts_of", lambda run, repo_id: [(run / name, f"org/{name}") for name in "ab"])
    monkeypatch.setattr(publishing, "stage", lambda source, target, *_: shutil.copytree(source, target))

    def export(run: Path, step: int) -> None:
        for name in "ab":
            (run / name).mkdir(exist_ok=True)
            (run / name / "step").write_text(str(step))

    return export


@pytest.mark.parametrize("private", [True, False])
def test_of_uploads_that_wait_the_newest_alone_is_sent(tmp_path, monkeypatch, two_parts, private):
    begun, go_on, sent = threading.Event(), threading.Event(), []

    def push(folder, repo_id, message, private=None):
        begun.set()
        assert go_on.wait(60)
        sent.append((repo_id, message, (folder / "step").read_text(), private))

    monkeypatch.setattr(publishing, "push", push)
    (tmp_path / ".publish" / "step-9").mkdir(parents=True)  # left by a run that was killed
    publisher = BackgroundPublisher(tmp_path, "org/p", private)
    for step in (1, 2, 3):
        two_parts(tmp_path, step)
        publisher.submit(step)
        assert begun.wait(60)
    assert sorted(path.name for path in (tmp_path / ".publish").iterdir()) == ["step-1", "step-3"]
    go_on.set()
    publisher.close()
    assert sent == [(f"org/{name}", f"Step {n}", str(n), private or None) for n in (1, 3) for name in "ab"]
    assert not (tmp_path / ".publish").exists()


def test_whatever_an_upload_raises_is_a_warning_and_the_next_is_tried(tmp_path, monkeypatch, caplog, two_parts):
    def push(folder, repo_id, message, private=None):
        sent.append((repo_id, message))
        if repo_id == "org/a":
            raise KeyError("what no one has thought of")

    sent = []
    monkeypatch.setattr(publishing, "push", push)
    publisher = BackgroundPublisher(tmp_path, "org/p", False)
    publisher.submit(1)  # nothing has been exported yet
    assert "step 1 was not sent to the Hub: [Errno 2]" in caplog.text
    stage = publishing.stage
    monkeypatch.setattr(publishing, "stage", lambda *_: [][0])
    two_parts(tmp_path, 2)
    publisher.submit(2)
    assert "step 2 was not sent to the Hub: list index out of range" in caplog.text
    monkeypatch.setattr(publishing, "stage", stage)
    publisher.submit(2)
    publisher.close()
    assert sent == [("org/a", "Step 2"), ("org/b", "Step 2")]
    assert "step 2 was not sent to the Hub (training goes on): 'what no one has thought of'" in caplog.text


@pytest.mark.parametrize("panel", [True, False])
def test_a_picture_is_sent_unless_the_run_writes_none(published_run, tmp_path, monkeypatch, panel):
    """A run that is resumed with `panel_steps` 0 may still have panels from before."""
    sent, run = [], shutil.copytree(published_run, tmp_path / "run")
    monkeypatch.setattr(publishing, "push", lambda folder, *_, **__: sent.append((folder / "panel.png").exists()))
    publisher = BackgroundPublisher(run, "org/p", False, panel=panel)
    publisher.submit(2)
    publisher.close()
    assert sent == [panel, panel]


def test_an_unreachable_hub_does_not_stop_a_run(drives, tmp_path, monkeypatch, caplog):
    """The Hub client is offline in the tests' own process, so every upload fails."""
    AcceleratorState._reset_state(True)
    pretrain(
        flags(
            drives,
            tmp_path / "run",
            "--push_to_hub",
            "true",
            "--hub_model_id",
            "org/live",
            "--hub_private_repo",
            "true",
        )
    )
    AcceleratorState._reset_state(True)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert sum("HF_HUB_OFFLINE is set" in warning for warning in warnings) >= 2


def test_a_truncated_download_is_a_sentence_and_fetched_anew(shared_hub, installed, tmp_path):
    """A download that keeps breaking off is a sentence, as for `--init_encoder` and `--model`; the next attempt continues it."""
    script = """
from modeling_poodle.loading_poodle import load_encoder
for attempt in range(2):
    try:
        print(len(load_encoder("org/poodle-r18")[1]))
    except ValueError as error:
        print("sentence:", str(error).replace(chr(10), " "))
"""
    shared_hub.fail("GET /cdn/", "truncate", 7)
    try:
        failed, loaded = installed(tmp_path, script).splitlines()
        assert "sentence: 'org/poodle-r18' is no encoder that can be loaded" in failed
        assert int(loaded) > 20 and shared_hub.faults[0][2] == 0
    finally:
        shared_hub.faults.clear()
