"""Output folders of evaluations, and what is noted of how they were made."""

import dataclasses
import json
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from forks import in_child, wait_for
from test_segment import flags

from evaluation import segment
from evaluation.data import load_dataset
from evaluation.outputs import check_output_dir, make_accelerator, provenance
from evaluation.propagate import PropagationRecipe
from evaluation.recipe import parse_recipe
from evaluation.segment import main
from modeling_poodle.locks import lock_output_dir


def test_accelerates_own_settings_do_not_change_the_arithmetic(monkeypatch):
    """`accelerate config` may have set bf16; a fit in bf16 would silently give other figures."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(True)
    try:
        assert make_accelerator().mixed_precision == "no"
    finally:
        AcceleratorState._reset_state(True)


def test_a_finished_evaluation_is_replaced_by_its_like_alone_and_once_the_input_is_right(shapes, poodle, tmp_path):
    run, model = tmp_path / "run", shutil.copytree(poodle, tmp_path / "model")
    values = {"max_steps": 2, "save_steps": 1}

    def files() -> dict[str, bytes]:
        return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}

    main(flags(shapes, run, model, **values))
    other = run / "other"  # another evaluation, in a folder below
    main(flags(shapes, other, poodle, readout="knn"))
    kept = files()
    with pytest.raises(ValueError, match=r"run holds a finished evaluation of other values \(model\); choose another"):
        main(flags(shapes, run, tmp_path / "nothing", **values))
    with pytest.raises(ValueError, match=r"of other values \(max_steps, readout\)"):
        main(flags(shapes, run, model, readout="knn"))
    moved = model.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="no such model|holds no model"):
        main(flags(shapes, run, model, **values))
    moved.rename(model)
    assert files() == kept
    # The link keeps the inode in use, so that no new file gets its number.
    os.link(run / "evaluation.json", tmp_path / "before")
    before = (run / "evaluation.json").stat().st_ino
    (run / "readout" / "left").touch()
    (again,) = main(flags(shapes, run, model, **values))
    assert (run / "evaluation.json").stat().st_ino != before and not (run / "readout" / "left").exists()
    assert again["per_class"] == json.loads(kept["evaluation.json"])["per_class"]
    assert (other / "evaluation.json").is_file()
    (run / "config.yaml").write_text("- no recipe")
    with pytest.raises(ValueError, match="its config.yaml cannot be read"):
        main(flags(shapes, run, model, **values))


def test_an_evaluation_writes_over_no_other_run_and_no_other_files(shapes, poodle, tmp_path):
    run, values = tmp_path / "run", parse_recipe(flags(shapes, tmp_path / "run", poodle))
    run.mkdir()
    (run / "readout").mkdir()
    with pytest.raises(ValueError, match=r"holds readout/, which are no evaluation's .*\(there is no config.yaml\)"):
        check_output_dir(values)
    (run / "readout").rmdir()
    check_output_dir(values)
    (run / "config.yaml").write_text("videos: [clips]\nflow: dis\n")  # the recipe of a pretraining run
    propagation = PropagationRecipe(model=[str(poodle)], output_dir=str(run))
    for kind in (values, propagation):
        with pytest.raises(
            ValueError, match=r"holds a run, or an interrupted evaluation, of other values \(model, .* more\)"
        ):
            check_output_dir(kind)
    two = dataclasses.replace(values, model=["runs/mine", "../runs/mine"], output_dir=str(tmp_path / "new"))
    with pytest.raises(
        ValueError, match="runs/mine and ../runs/mine would both be written to .*new/runs-mine; give one"
    ):
        check_output_dir(two)


def test_what_another_evaluation_has_written_meanwhile_is_not_replaced(shapes, poodle, tmp_path, monkeypatch):
    def meanwhile(*arguments):
        monkeypatch.undo()
        main(flags(shapes, tmp_path / "run", poodle, max_steps=1))
        return load_dataset(*arguments)

    monkeypatch.setattr(segment, "load_dataset", meanwhile)
    with pytest.raises(ValueError, match=r"run holds a finished evaluation of other values \(max_steps, readout\)"):
        main(flags(shapes, tmp_path / "run", poodle, readout="knn"))
    assert (tmp_path / "run" / "readout").is_dir()


def test_a_second_evaluation_in_the_folder_is_refused_until_the_first_is_gone(shapes, poodle, tmp_path):
    def hold() -> None:
        lock_output_dir(tmp_path / "run")
        (tmp_path / "held").touch()

    pid = in_child(hold)
    wait_for((tmp_path / "held").exists)
    with pytest.raises(ValueError, match=f"in use by the run of process {pid} on "):
        main(flags(shapes, tmp_path / "run", poodle, readout="knn"))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    main(flags(shapes, tmp_path / "run", poodle, readout="knn"))


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("[gloo/transport/tcp/pair.cc:547] Connection closed by peer", ConnectionError, "another process of the run is gone; .*go on with --resume"),
        ("ProcessGroupNCCL's watchdog got stuck: Timed out", ConnectionError, "did not answer for two hours; "),
        ("mat1 and mat2 shapes cannot be multiplied", RuntimeError, "^mat1 and mat2 shapes cannot be multiplied$"),
    ],
)  # fmt: skip
def test_a_process_that_is_gone_is_reported_in_words(shapes, poodle, tmp_path, monkeypatch, text, kind, said):
    def broken(*_):
        raise RuntimeError(text)

    monkeypatch.setattr(segment, "measure", broken)
    with pytest.raises(kind, match=said):
        main(flags(shapes, tmp_path / "run", poodle))


@pytest.mark.parametrize(
    ("device", "processes", "expected"),
    [
        ("cpu", 1, "accelerate launch evaluation/segment.py --seed 1"),
        ("cpu", 2, "torchrun --standalone --nproc_per_node 2 evaluation/segment.py --seed 1"),
        ("cuda", 8, "accelerate launch --num_processes 8 evaluation/segment.py --seed 1"),
    ],
)
def test_the_command_is_noted_with_its_processes(device, processes, expected, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/evaluation/segment.py", "--seed", "1"])
    found = provenance(SimpleNamespace(num_processes=processes, device=torch.device(device)))
    assert (found["command"], found["num_processes"]) == (expected, processes)
