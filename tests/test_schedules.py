import math

import pytest

from training.recipe import Recipe
from training.schedules import cosine, count_steps, learning_rate, teacher_momentum


def test_steps_of_a_recipe():
    recipe = Recipe(num_train_epochs=2.5, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert count_steps(recipe, 1, 64) == 20 and count_steps(recipe, 2, 64) == 10 and count_steps(recipe, 8, 1) == 1
    assert count_steps(Recipe(max_steps=7), 2, 64) == 7


def test_learning_rate_warms_up_linearly_then_follows_a_cosine():
    rates = [learning_rate(step, 10, 4, 2.0, 0.2) for step in range(10)]
    expected = [0.5, 1.0, 1.5, 2.0] + [0.2 + 1.8 * (1 + math.cos(math.pi * k / 6)) / 2 for k in range(6)]
    assert rates == pytest.approx(expected)


def test_learning_rate_without_warmup_starts_at_its_peak_and_ends_at_the_floor():
    assert learning_rate(0, 100, 0, 3e-4) == pytest.approx(3e-4)
    assert learning_rate(100, 100, 0, 3e-4, 1e-5) == pytest.approx(1e-5)
    assert learning_rate(50, 100, 0, 3e-4) == pytest.approx(1.5e-4)


def test_momentum_runs_from_start_to_one():
    assert teacher_momentum(0, 1000) == pytest.approx(0.996)
    assert teacher_momentum(500, 1000) == pytest.approx(0.998)
    assert teacher_momentum(1000, 1000) == 1.0


def test_schedules_at_their_ends():
    recipe = Recipe(num_train_epochs=1, per_device_train_batch_size=4)
    assert [count_steps(recipe, 1, pairs) for pairs in (1, 7, 9)] == [1, 2, 2]
    assert count_steps(Recipe(max_steps=1), 1, 64) == 1
    assert cosine(1.0, 0.2, 1.5) == pytest.approx(0.2) and cosine(1.0, 0.2, -0.5) == pytest.approx(1.0)
    assert learning_rate(10, 10, 10, 2.0, 0.2) == pytest.approx(2.0)  # a run of warm-up alone


@pytest.mark.parametrize("warmup", [1.5, 2.5, 3])
def test_a_warmup_between_whole_steps_does_not_pass_its_peak(warmup):
    rates = [learning_rate(step, 100, warmup, peak=2.0) for step in range(100)]
    assert max(rates) == pytest.approx(2.0, rel=0.01) and max(rates) <= 2.0 and rates[0] < 2.0
