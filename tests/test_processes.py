"""What several processes do together, beyond the faults of two processes in tests/test_faults_ranks.py."""

import importlib
import json
import sys

import pytest
from conftest import REPOSITORY
from forked_scripts import forked

THREE_PROCESSES = """
import copy, sys, torch
from pathlib import Path
from torch import nn
from evaluation import outputs
from training.assembly import make_accelerator, prepared
from training.recipe import Recipe

accelerator = make_accelerator(Recipe(bf16=False)) if sys.argv[1] == "run" else outputs.make_accelerator()
wrap = (lambda model: prepared(accelerator, model)) if sys.argv[1] == "run" else accelerator.prepare_model

def steps(model, first, last):
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(first, last):
        generator = torch.Generator().manual_seed(3 * step + accelerator.process_index)
        accelerator.backward(wrapped(torch.randn(4, 240, generator=generator)).square().mean())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return copy.deepcopy(model.state_dict())

class Shuffled(nn.ModuleList):
    # Gradients are ready in another order than the parameters have, by which the buckets of the first step are made.
    def forward(self, values):
        for index in (2, 0, 3, 1):
            values = self[index](values.tanh())
        return values

torch.manual_seed(0)
widths = (400, 240, 560, 310)
model = Shuffled(nn.Sequential(nn.Linear(240, width), nn.Tanh(), nn.Linear(width, 240)) for width in widths)
again = copy.deepcopy(model)
whole = steps(model, 0, 4)
again.load_state_dict(steps(again, 0, 2))
resumed = steps(copy.deepcopy(again), 2, 4)
same = all(torch.equal(whole[name], resumed[name]) for name in whole)
Path(sys.argv[2], str(accelerator.process_index)).write_text(str(same))
accelerator.end_training()
"""


def three_go_on(tmp_path, what: str) -> None:
    script = tmp_path / "three.py"
    script.write_text(THREE_PROCESSES)
    done = forked(script, what, tmp_path, ranks=3, PYTHONPATH=str(REPOSITORY))
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == ["True"] * 3


def test_three_processes_go_on_bit_for_bit(tmp_path):
    """The order of a sum of three matters, unlike that of two: DistributedDataParallel must keep one order from the first step on."""
    three_go_on(tmp_path, "run")


def test_a_fit_of_three_processes_goes_on_bit_for_bit(tmp_path):
    three_go_on(tmp_path, "fit")


EVALUATION = """
import dataclasses, json, sys, torch
from pathlib import Path
from types import SimpleNamespace
from evaluation import outputs
from evaluation.engine import FitState, FittedReadout, fit
from evaluation.recipe import EvaluationRecipe

folder, told = Path(sys.argv[1]), {}
rank = int(__import__("os").environ["RANK"])

def note(name, action):
    try:
        action()
    except ValueError as error:
        told[name] = str(error)

class Weight(FittedReadout):
    read = batch = predict = save = None  # not asked for

    def __init__(self):
        super().__init__()
        self.weight, self.data = torch.nn.Parameter(torch.ones(1)), SimpleNamespace(train=[0, 1])

    def trained(self):
        return [self.weight]

recipe = EvaluationRecipe(model=["x"], output_dir=str(folder / "run"), max_steps=3)
note("other recipe", lambda: outputs.begin_processes(dataclasses.replace(recipe, learning_rate=0.5 if rank else 0.01)))
accelerator = outputs.begin_processes(dataclasses.replace(recipe, output_dir=str(folder / str(rank))))
note("other weights", lambda: outputs.finished(accelerator, recipe, {"x": f"{rank}{rank}"}))
# Each machine has a folder of its own, and the state of the fit lies on the first.
mine, readout = folder / str(rank), Weight()
mine.mkdir()
if rank == 0:
    optimizer = torch.optim.AdamW([readout.weight])
    readout.weight.grad = torch.ones(1)
    optimizer.step()
    FitState(mine / "fit.safetensors", "id", 3, 2, [readout.weight], {}, optimizer).save(2, [])
note("fit", lambda: fit(accelerator, readout, recipe, [0], mine, "id", resume=True))
(folder / f"told-{rank}").write_text(json.dumps(told))
accelerator.end_training()
"""


def test_processes_of_an_evaluation_that_differ_are_refused_before_they_wait_or_measure(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(EVALUATION)
    done = forked(script, tmp_path, ranks=2, PYTHONPATH=str(REPOSITORY))
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        fit = f"all processes must have the same {tmp_path}/{rank}/fit.safetensors, in an output_dir that they share, got rank 0: 2 steps; rank 1: 0 steps"
        assert json.loads((tmp_path / f"told-{rank}").read_text()) == {
            "other recipe": "all processes must have the same learning_rate, got rank 0: 0.01; rank 1: 0.5",
            "other weights": "all processes must have the same weights of the models, got rank 0: 00; rank 1: 11",
            "fit": fit,
        }


def test_what_needs_linux_or_macos_says_so(monkeypatch):
    """Windows has no fcntl."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.delitem(sys.modules, "modeling_poodle.locks", raising=False)
    with pytest.raises(ImportError, match="run on Linux and macOS; on Windows, use them in WSL"):
        importlib.import_module("modeling_poodle.locks")
