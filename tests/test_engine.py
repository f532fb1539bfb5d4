"""The fit of a readout, the state of the fit, and the loop over the test images."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from evaluation import engine
from evaluation.data import load_dataset
from evaluation.engine import FitState, FittedReadout, draw, evaluate, fit, over_test_images
from evaluation.recipe import EvaluationRecipe


def recipe(**values) -> EvaluationRecipe:
    return EvaluationRecipe(model=["x"], **values)


# --- the order of the examples ---


def test_every_image_is_drawn_once_an_epoch():
    drawn = [index for step in range(6) for index in draw(8, 4, step, seed=1)]
    assert [sorted(drawn[k : k + 8]) for k in (0, 8, 16)] == [list(range(8))] * 3
    assert drawn[:8] != drawn[8:16]


def test_another_seed_draws_in_another_order():
    orders = [draw(30, 30, 0, seed) for seed in (1, 2, 1)]
    assert orders[0] == orders[2] != orders[1]


# --- the fit ---


class Weight(FittedReadout):
    """A readout whose examples are its losses; they do not depend on its one weight. It records the seed of each step."""

    def __init__(self, losses):
        super().__init__()
        self.weight, self.data, self.seeds = torch.nn.Parameter(torch.ones(1)), SimpleNamespace(train=losses), []

    predict = save = None  # not used here

    def trained(self):
        return [self.weight]

    def read(self, example):
        return example

    def batch(self, read, generator):
        self.seeds.append(generator.initial_seed())
        return {"losses": torch.tensor(read)}

    def forward(self, losses):
        return losses.mean() + 0 * self.weight.sum()


def fitted(readout, folder, rank: int = 0, ranks: int = 1, **values) -> list[dict]:
    accelerator = SimpleNamespace(
        num_processes=ranks, process_index=rank, is_main_process=rank == 0, prepare_model=lambda model: model,
        backward=lambda loss: loss.backward(), reduce=lambda value, reduction: value,
    )  # fmt: skip
    values = recipe(**{"per_device_train_batch_size": 1, "logging_steps": 1, **values})
    return fit(accelerator, readout, values, list(readout.data.train), folder, "x", resume=False)


def test_the_learning_rate_rises_over_a_twentieth_and_falls_as_a_cosine(tmp_path):
    rates = [point["lr"] for point in fitted(Weight([1.0]), tmp_path, max_steps=40, learning_rate=2.0)]
    assert rates[:2] == [1.0, 2.0] and rates[21] == pytest.approx(1.0)
    assert rates[1:] == sorted(rates[1:], reverse=True) and 0 < rates[-1] < 0.01


def test_a_point_of_the_curve_is_the_mean_of_the_steps_since_the_one_before(tmp_path):
    curve = fitted(Weight([float(n) for n in range(8)]), tmp_path, max_steps=8, logging_steps=4, seed=1)
    drawn = draw(8, 8, 0, seed=1)
    assert [point["step"] for point in curve] == [1, 4, 8]
    means = [drawn[0], np.mean(drawn[1:4]), np.mean(drawn[4:])]
    assert [point["loss"] for point in curve] == pytest.approx(means)


def test_a_loss_that_is_not_finite_ends_the_fit(tmp_path):
    with pytest.raises(FloatingPointError, match="not finite at step 1; lower learning_rate"):
        fitted(Weight([float("nan")]), tmp_path, max_steps=9, logging_steps=3)
    assert not (tmp_path / "fit.safetensors").exists()


def test_each_process_and_each_step_draws_for_itself_and_all_share_the_epochs(tmp_path):
    seeds = []
    for rank in (0, 1):
        readout = Weight([0.0] * 12)
        curve = fitted(readout, tmp_path, rank, ranks=2, per_device_train_batch_size=2, num_train_epochs=3)
        assert len(curve) == len(readout.seeds) == 9
        seeds += readout.seeds
    assert len(set(seeds)) == 18


def test_weight_decay_is_that_of_the_recipe(tmp_path):
    kept, decayed = Weight([0.0]), Weight([0.0])
    for readout, decay in ((kept, 0.0), (decayed, 0.5)):
        fitted(readout, tmp_path, max_steps=1, learning_rate=0.1, weight_decay=decay)
    assert kept.weight.item() == 1 and decayed.weight.item() == pytest.approx(0.95)


def test_a_save_that_is_killed_leaves_the_one_before(tmp_path, monkeypatch):
    weight = Weight([0.0]).weight
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.grad = torch.ones(1)
    optimizer.step()
    state = FitState(tmp_path / "fit.safetensors", "x", 4, 1, [weight], {}, optimizer)
    state.save(2, [])

    def killed(tensors, path, **more):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        state.save(3, [])
    assert state.load() == (2, [])


def test_a_full_disk_is_an_error_of_the_system_that_names_the_file(tmp_path, monkeypatch):
    def full(*_, **more):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(engine, "save_file", full)
    with pytest.raises(OSError, match=r"fit.partial cannot be written: .*No space left on device"):
        FitState(tmp_path / "fit.safetensors", "x", 4, 1, [], {}, None).save(1, [])


def test_a_damaged_fit_is_named(tmp_path):
    state = FitState(tmp_path / "fit.safetensors", "x", 4, 1, [], {}, None)
    state.save(1, [])
    for content in (b"", state.path.read_bytes()[:40]):  # a power cut can leave an empty file
        state.path.write_bytes(content)
        with pytest.raises(ValueError, match="fit.safetensors is damaged .*; remove it, and the fit begins anew"):
            state.load()


# --- the test images ---


def test_images_of_several_processes_come_in_the_order_of_the_test_images(monkeypatch):
    of_others = [(1, "B"), (3, "D")]
    monkeypatch.setattr(engine, "gather_object", lambda own: [*own, *of_others])
    monkeypatch.setattr(engine, "on_all", lambda _, action: action())
    accelerator = SimpleNamespace(process_index=0, num_processes=2, is_main_process=False)
    data = SimpleNamespace(test=list("abcde"))
    assert over_test_images(accelerator, data, lambda name: (name,), str.upper, "") == list("ABCDE")


def test_a_prediction_of_another_shape_is_refused_and_a_class_that_no_image_shows_counts_for_nobody(shapes):
    data = load_dataset("folder", str(shapes))
    label = np.zeros((4, 6), np.uint8)
    label[:, 3:] = 1
    example = dataclasses.replace(data.test[0], image=lambda: np.zeros((4, 6, 3), np.uint8), label=lambda: label)
    data, accelerator = dataclasses.replace(data, test=(example,)), Accelerator(cpu=True)
    with pytest.raises(ValueError, match=r"image \(6, 4\) and label \(4, 6\) differ in size"):
        evaluate(accelerator, lambda image: label.T, data)
    shown = label.copy()
    shown[:, 5] = 2
    metric, _ = evaluate(accelerator, lambda image: shown, data)
    assert metric.compute()["miou"] == pytest.approx((1 + 2 / 3) / 2)
