"""Which checkpoint a run resumes from, when it is refused, and which lines of its log are kept."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_faults import made_up

from training.recipe import Recipe
from training.resume import _refuse_other_ranks, cut_metrics, find_checkpoint


def begun(output_dir: Path, **values) -> Recipe:
    """Write a run's recipe to its folder, as a run does when it begins; returns the recipe."""
    recipe = Recipe(videos=["a.mp4"], output_dir=str(output_dir), **values)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "config.yaml").write_text(recipe.to_yaml())
    return recipe


def logged(output_dir: Path, *steps: int) -> None:
    (output_dir / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in steps))


def test_a_run_is_known_by_its_folder_however_it_is_named(tmp_path, monkeypatch):
    recipe = begun(tmp_path / "run")
    made_up(tmp_path / "run", 1)
    os.symlink(tmp_path / "run", tmp_path / "link")
    monkeypatch.chdir(tmp_path)
    for name in ("run", "./run", "link", str(tmp_path / "run")):
        recipe.resume_from_checkpoint = f"{name}/checkpoints/step-1"
        assert find_checkpoint(recipe) == Path(recipe.resume_from_checkpoint)
    recipe.resume_from_checkpoint = "run/checkpoints/step-2"
    with pytest.raises(ValueError, match=r"step-2: no finished checkpoint there \(no state.json\)"):
        find_checkpoint(recipe)


def test_another_run_s_checkpoint_is_gone_on_from_by_that_run_s_configuration_alone(tmp_path):
    begun(tmp_path / "first")
    made_up(tmp_path / "first", 1)
    named = {"videos": ["a.mp4"], "output_dir": str(tmp_path / "new")}
    named["resume_from_checkpoint"] = str(tmp_path / "first" / "checkpoints" / "step-1")
    assert find_checkpoint(Recipe(**named)) == Path(named["resume_from_checkpoint"])
    with pytest.raises(ValueError, match=r"of another configuration .*first/config.yaml.*: seed: 0 in the run, 1 now"):
        find_checkpoint(Recipe(**named, seed=1))


def test_a_field_that_an_earlier_version_did_not_have_is_as_its_default(tmp_path):
    config = tmp_path / "run" / "config.yaml"
    recipe = begun(tmp_path / "run", resume_from_checkpoint="latest")
    made_up(tmp_path / "run", 1)
    lines = config.read_text().splitlines(keepends=True)
    config.write_text("".join(line for line in lines if not line.startswith("subcrops_follow_flow")))
    assert len(config.read_text()) < len("".join(lines)) and find_checkpoint(recipe).name == "step-1"
    recipe.subcrops_follow_flow = False
    with pytest.raises(ValueError, match="subcrops_follow_flow: True in the run, False now"):
        find_checkpoint(recipe)


@pytest.mark.parametrize("name", ["encoder", "model", "metrics.jsonl", "probe.jsonl", "evaluation.json", "step-3"])
def test_whatever_a_new_run_would_write_over_is_named(tmp_path, name):
    if name == "step-3":
        made_up(tmp_path, 3)
        name = "checkpoints/step-3"
    else:
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"holds {name}, but no config.yaml of a run"):
        find_checkpoint(Recipe(videos=["a.mp4"], output_dir=str(tmp_path)))


def test_a_run_without_a_checkpoint_begins_again_only_where_it_had_saved_none(tmp_path):
    """Tested with a save every ten steps, for a run from step 0 and for one that began at step 25 of another."""
    origin, run = tmp_path / "first" / "checkpoints" / "step-25", tmp_path / "run"
    made_up(tmp_path / "first", 25)
    for began in (None, "latest", str(origin)):
        begun(run, save_steps=10, resume_from_checkpoint=began)
        first = 26 if began == str(origin) else 1
        recipe = Recipe(videos=["a.mp4"], output_dir=str(run), save_steps=1000, resume_from_checkpoint="latest")
        logged(run, *range(first, first // 10 * 10 + 11))  # the save at the last step had not ended
        assert find_checkpoint(recipe) == (origin if first == 26 else None)
        assert recipe.resume_from_checkpoint == (str(origin) if first == 26 else "latest")
        logged(run, *range(first, first // 10 * 10 + 12))
        recipe.resume_from_checkpoint = "latest"
        with pytest.raises(
            ValueError, match=rf"no checkpoint in .*, but metrics.jsonl up to step {first // 10 + 1}1 of"
        ):
            find_checkpoint(recipe)
    logged(run, 30, 35)  # one line per five steps: step 30 was saved
    with pytest.raises(ValueError, match="but metrics.jsonl up to step 35 of"):
        find_checkpoint(recipe)
    logged(run, 26)
    shutil.rmtree(origin)
    with pytest.raises(ValueError, match="no checkpoint yet and began at .*step-25, which is damaged: .*restore that"):
        find_checkpoint(recipe)


def test_the_word_for_other_pairs_is_offered_where_it_would_do_and_excuses_nothing_else(tmp_path):
    begun(tmp_path / "run")
    made_up(tmp_path / "run", 1)

    def found(**values) -> Path:
        return find_checkpoint(
            Recipe(videos=["a.mp4"], output_dir=str(tmp_path / "run"), resume_from_checkpoint="latest", **values)
        )

    other = {"dataloader_num_workers": 7}
    with pytest.raises(ValueError, match="dataloader_num_workers: .* 7 now.*or add --resume_inexact true"):
        found(**other)
    assert found(**other, resume_inexact=True) == tmp_path / "run" / "checkpoints" / "step-1"
    # These values may be changed to continue a run that has gone wrong.
    lower = {"learning_rate": 1e-5, "teacher_momentum": 0.999, "bf16": True, "gradient_checkpointing": True}
    with pytest.raises(ValueError, match="or add --resume_inexact true"):
        found(**lower)
    assert found(**lower, resume_inexact=True) == tmp_path / "run" / "checkpoints" / "step-1"
    for inexact in (False, True):
        with pytest.raises(ValueError, match="seed: 0 in the run, 1 now") as caught:
            found(**other, seed=1, resume_inexact=inexact)
        assert "--resume_inexact" not in str(caught.value) and ("workers" in str(caught.value)) != inexact


def test_other_processes_need_the_word_and_as_many_pairs_a_step(tmp_path):
    (tmp_path / "state.json").write_text(json.dumps({"step": 1, "num_processes": 2, "pairs_per_step": 8}))

    def refuse(processes: int, pairs: int, inexact: bool) -> None:
        accelerator = SimpleNamespace(num_processes=processes, device=torch.device("cpu"))
        recipe = Recipe(videos=["a.mp4"], per_device_train_batch_size=pairs, resume_inexact=inexact)
        _refuse_other_ranks(accelerator, recipe, tmp_path)

    refuse(2, 4, False)
    refuse(4, 2, True)
    with pytest.raises(ValueError, match=r"on 2 processes, this one has 4: .*torchrun .*_node 2\), or .*inexact true"):
        refuse(4, 2, False)
    for pairs in (1, 4):
        with pytest.raises(ValueError, match=rf"8 pairs a step, this one has {4 * pairs} \(4 processes x {pairs}"):
            refuse(4, pairs, True)


def test_lines_behind_the_checkpoint_and_those_that_are_none_are_cut(tmp_path):
    good = ['{"step": 1}', '{"step": 2, "loss": NaN}']
    bad = ['{"step": Infinity}', '{"step": null}', "[]", "3", '{"loss": 1}', '{"step": 3}', '{"step": 2, "lo']
    cut_metrics(tmp_path / "none.jsonl", 2)
    assert list(tmp_path.iterdir()) == []
    lines = [good[0], *bad[:-1], good[1], bad[-1]]
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\xff")
    cut_metrics(tmp_path / "metrics.jsonl", 2)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(f"{line}\n" for line in good)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
