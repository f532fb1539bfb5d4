"""The number of optimizer steps of a run, and the schedules of its learning rate and teacher momentum."""

import math


def cosine(start: float, end: float, progress: float) -> float:
    """Follow half a cosine from `start` at progress 0 to `end` at progress 1. `progress` is clamped to this range."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def count_steps(recipe, num_processes: int, pairs_per_epoch: int) -> int:
    """Return the number of optimizer steps: the recipe's `max_steps`, or if that is not set, the steps that `num_train_epochs` take."""
    if recipe.max_steps > 0:
        return recipe.max_steps
    pairs = recipe.per_device_train_batch_size * num_processes * recipe.gradient_accumulation_steps
    return max(1, round(recipe.num_train_epochs * pairs_per_epoch / pairs))


def learning_rate(step: int, max_steps: int, warmup_steps: float, peak: float, floor: float = 0.0) -> float:
    """
    Warm up linearly to `peak` over `warmup_steps`, then follow a cosine to `floor` at `max_steps` (arXiv 2408.11208, section 3).

    Args:
        step: number of optimizer steps already taken. With n warm-up steps, the first step uses peak / n, not 0.
    """
    if step < warmup_steps:
        return peak * min(1.0, (step + 1) / warmup_steps)
    return cosine(peak, floor, (step - warmup_steps) / max(max_steps - warmup_steps, 1))


def teacher_momentum(step: int, max_steps: int, start: float = 0.996, end: float = 1.0) -> float:
    """Follow a cosine from `start` to `end` over the run (arXiv 2408.11208, section 3)."""
    return cosine(start, end, step / max(max_steps, 1))
