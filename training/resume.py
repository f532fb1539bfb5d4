"""Choose the checkpoint to resume a run from, check that it fits the run, and cut back files that later steps wrote."""

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator

from modeling_poodle.config_checks import is_int
from modeling_poodle.folders import write_aside
from modeling_poodle.locks import lock_output_dir
from modeling_poodle.processes import launched_with, need_shared, on_main, same_fields
from modeling_poodle.recipe_files import read_yaml_mapping
from training.addresses import public_value
from training.checkpoint_files import damage, list_checkpoints, read_state
from training.run_recipe import FREE_ON_INEXACT_RESUME, FREE_ON_RESUME, RunRecipe

logger = logging.getLogger("poodle")
# Fields that may differ between the processes of a run, because each machine may have the files at other paths. The videos themselves are
# compared once they have been found.
_OF_A_MACHINE = frozenset(
    ("videos", "output_dir", "resume_from_checkpoint", "init_encoder", "flow_dir", "flow_weights", "flow_model")
)


def prepare_output_dir(accelerator: Accelerator, recipe: RunRecipe) -> Path | None:
    """
    Lock the run's folder, and return the checkpoint to resume from, or `None` for a new run. Call this before anything costly.

    Raises:
        ValueError: the folder is in use or holds another run; the checkpoint is missing, damaged or of another configuration; or the
            processes have different recipes or do not share the folder.
    """
    # If learning rates differed between ranks, their weights would diverge; if save_steps differed, one rank would wait for the others.
    same_fields(accelerator, public_value(dataclasses.asdict(recipe)), _OF_A_MACHINE)
    output_dir = Path(recipe.output_dir)

    def prepare() -> tuple[Path | None, Path | None]:
        lock_output_dir(output_dir)
        checkpoint = find_checkpoint(recipe)
        if checkpoint is not None:
            _refuse_other_ranks(accelerator, recipe, checkpoint)
            if checkpoint.resolve().is_relative_to(output_dir.resolve()):
                return checkpoint, checkpoint.resolve().relative_to(output_dir.resolve())
        return checkpoint, None

    checkpoint, within = on_main(accelerator, prepare)
    need_shared(accelerator, output_dir)
    if accelerator.is_main_process or checkpoint is None:
        return checkpoint
    if within is not None:  # output_dir may have another path on this machine than on rank 0
        return output_dir / within
    own = recipe.resume_from_checkpoint
    return checkpoint if own in (None, "latest") else Path(own)


def find_checkpoint(recipe: RunRecipe) -> Path | None:
    """
    Find the checkpoint to resume from, or return `None` to start from the beginning. Raises the errors of [`prepare_output_dir`].

    A run that started from another run's checkpoint and has not saved one of its own yet starts from that checkpoint again.
    """
    output_dir, resume = Path(recipe.output_dir), recipe.resume_from_checkpoint
    saved_config = output_dir / "config.yaml"
    if resume is None:
        if saved_config.exists():
            raise ValueError(
                f"output_dir {output_dir} holds a run already: go on with it by --resume_from_checkpoint latest, "
                "or choose another --output_dir"
            )
        _refuse_other_files(output_dir)
        return None
    if resume == "latest":
        checkpoint = _latest(output_dir)
    else:
        checkpoint = _named(Path(resume), output_dir)
        saved_config = checkpoint.resolve().parent.parent / "config.yaml"
    if saved_config.is_file():
        _refuse_other_configuration(recipe, saved_config)
    if checkpoint is None:
        checkpoint = _origin(recipe, read_yaml_mapping(saved_config) if saved_config.is_file() else {})
    return checkpoint


def _named(checkpoint: Path, output_dir: Path) -> Path:
    """
    Check the checkpoint that the user named, and return it.

    Raises:
        ValueError: the checkpoint is not whole, or `output_dir` holds another run.
    """
    if not (checkpoint / "state.json").is_file():
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint}: no finished checkpoint there (no state.json); give latest, or RUN/checkpoints/step-N"
        )
    if output_dir.resolve() != checkpoint.resolve().parent.parent:
        config = output_dir / "config.yaml"
        began = read_yaml_mapping(config).get("resume_from_checkpoint") if config.exists() else None
        if isinstance(began, str) and Path(began) == checkpoint:
            raise ValueError(
                f"output_dir {output_dir} holds a run already, which began at {checkpoint}: go on with it by --resume_from_checkpoint latest, "
                "or choose a new --output_dir"
            )
        if config.exists():
            raise ValueError(
                f"output_dir {output_dir} holds another run than {checkpoint}: give the checkpoint's own run, or a new --output_dir"
            )
        _refuse_other_files(output_dir)
    wrong = damage(checkpoint)
    if wrong:
        raise ValueError(f"checkpoint {checkpoint} is damaged: {wrong}; name another with --resume_from_checkpoint")
    return checkpoint


def _refuse_other_files(output_dir: Path) -> None:
    """
    Refuse a folder that holds results, because a new run would overwrite them.

    Called if the folder has no config.yaml: the results are another command's, or those of a run whose config.yaml is lost.
    """
    names = ("encoder", "model", "metrics.jsonl", "probe.jsonl", "evaluation.json")
    found = [name for name in names if (output_dir / name).exists()]
    found += [f"checkpoints/{checkpoint.name}" for checkpoint in list_checkpoints(output_dir)]
    if found:
        raise ValueError(
            f"output_dir {output_dir} holds {', '.join(found)}, but no config.yaml of a run, and a new run would write over them: "
            "choose another --output_dir"
        )


def _origin(recipe: RunRecipe, saved: dict) -> Path | None:
    """
    Return where a run that has saved no checkpoint starts again: the other run's checkpoint that it began at, or `None` for the beginning.

    Args:
        saved: content of the run's `config.yaml`.

    Raises:
        ValueError: the run had already saved something that starting again would overwrite, or the checkpoint that it began at is damaged.
    """
    output_dir, began = Path(recipe.output_dir), saved.get("resume_from_checkpoint")
    began = None if not isinstance(began, str) or began == "latest" else began
    results = [f"{name}/" for name in ("encoder", "model") if (output_dir / name).exists()]
    steps = [step for step, _ in _lines(output_dir / "metrics.jsonl")]
    save_steps = saved["save_steps"] if is_int(saved.get("save_steps")) else recipe.save_steps
    first = steps[0] - 1 if steps and began else 0
    # The log has a line after the first save, so there was a checkpoint.
    if steps and (steps[-1] - 1) // max(save_steps, 1) > first // max(save_steps, 1):
        results.append(f"metrics.jsonl up to step {steps[-1]}")
    if results:
        raise ValueError(
            f"no checkpoint in {output_dir / 'checkpoints'}, but {', '.join(results)} of a run that had saved some: mount or restore "
            "checkpoints/, choose another --output_dir, or remove the folder to start from the beginning"
        )
    if began is None:
        logger.warning("no finished checkpoint in %s: starting from the beginning", output_dir)
        return None
    wrong = damage(Path(began))
    if wrong:
        raise ValueError(
            f"the run in {output_dir} has no checkpoint yet and began at {began}, which is damaged: {wrong}; restore that, or choose "
            "another --output_dir"
        )
    logger.warning("no finished checkpoint in %s: starting again from %s", output_dir, began)
    recipe.resume_from_checkpoint = began  # written to config.yaml, in case the run is stopped again
    return Path(began)


def _latest(output_dir: Path) -> Path | None:
    """
    Return the newest undamaged checkpoint, or `None` if the run has no checkpoints. Each newer, damaged one is logged as a warning.

    Raises:
        ValueError: the run has checkpoints, but all are damaged.
    """
    found = []
    for checkpoint in reversed(list_checkpoints(output_dir)):
        wrong = damage(checkpoint)
        if wrong is None:
            return checkpoint
        found.append(f"{checkpoint} is damaged: {wrong}")
        logger.warning("%s; going back to the one before", found[-1])
    if found:
        raise ValueError(
            "no checkpoint of this run is whole:\n  " + "\n  ".join(found) + "\nStart anew in another --output_dir"
        )
    return None


def _refuse_other_configuration(recipe: RunRecipe, saved_config: Path) -> None:
    # Compare URLs without password and signature: with new ones, a URL still names the same video.
    saved, own = public_value(read_yaml_mapping(saved_config)), public_value(dataclasses.asdict(recipe))
    # A field that was added after this run was written counts as its default, which keeps the earlier behaviour.
    fields = dataclasses.fields(recipe)
    saved = {f.name: f.default_factory() if f.default is dataclasses.MISSING else f.default for f in fields} | saved
    changed = {
        name: f"{name}: {saved[name]!r} in the run, {value!r} now"
        for name, value in own.items()
        if name not in FREE_ON_RESUME and saved[name] != value
    }
    if recipe.resume_inexact:
        changed = {name: text for name, text in changed.items() if name not in FREE_ON_INEXACT_RESUME}
    if changed:
        hint = "" if changed.keys() - FREE_ON_INEXACT_RESUME else f", or {_INEXACT}"
        if hint and changed.keys() & {"per_device_train_batch_size", "gradient_accumulation_steps"}:
            hint = f", or, if all processes together have as many pairs a step as before, {_INEXACT}"
        raise ValueError(
            f"the checkpoint is one of another configuration ({saved_config}): "
            + "; ".join(changed.values())
            + f". Resume with the run's own values, or start a new run in another --output_dir{hint}"
        )


_INEXACT = "add --resume_inexact true: weights, optimizer and schedules go on, with other pairs or values than an uninterrupted run's"


def _refuse_other_ranks(accelerator: Accelerator, recipe: RunRecipe, checkpoint: Path) -> None:
    state = read_state(checkpoint)
    was, now = state["num_processes"], accelerator.num_processes
    if was != now and not recipe.resume_inexact:
        raise ValueError(
            f"{checkpoint} is of a run on {was} processes, this one has {now}: resume with as many "
            f"({launched_with(accelerator, was)}), or {_INEXACT}"
        )
    pairs = recipe.pairs_per_process * now
    if pairs != state["pairs_per_step"]:
        raise ValueError(
            f"{checkpoint} is of a run with {state['pairs_per_step']} pairs a step, this one has {pairs} ({now} processes x "
            f"{recipe.per_device_train_batch_size} pairs x {recipe.gradient_accumulation_steps} micro-steps), and the schedules count "
            "steps: choose --per_device_train_batch_size and --gradient_accumulation_steps so that there are as many"
        )


def cut_metrics(path: Path, step: int) -> None:
    """Drop the lines after `step`, which the resumed run will write again, and unreadable lines such as one that a kill cut off."""
    if not path.exists():
        return
    write_aside(path, "".join(line + "\n" for at, line in _lines(path) if at <= step), sync=True)


def drop_later_panels(folder: Path, step: int) -> None:
    """Delete the panels of steps after `step`: the last panel is sent to the Hub, so it must not be newer than the weights."""
    for panel in folder.glob("step-*.png"):
        number = panel.stem.removeprefix("step-")
        if number.isdecimal() and int(number) > step:
            panel.unlink()


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (step, line) for each readable line of a log such as metrics.jsonl, and nothing if there is no such file."""
    for line in path.read_text(errors="replace", encoding="utf-8").splitlines() if path.exists() else ():
        try:
            yield int(json.loads(line)["step"]), line
        except (ValueError, KeyError, TypeError, OverflowError):
            continue
