"""Studies: their recipes are valid, results are found again, and the page agrees with the results."""

import json
import multiprocessing
import subprocess
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from evaluation.segment import main as segment
from evaluation.studies import __main__ as script
from evaluation.studies import study as studies
from evaluation.studies.report import command_section, markdown, not_measured, page, plot, plot_scatter, spread
from evaluation.studies.study import Study, changed, expanded, measured_key, names, read_results, results_of
from training.pretrain import main as pretrain
from training.recipe import Recipe
from training.street_files import write_videos

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", names())
def test_every_run_of_every_study_is_a_recipe_that_training_accepts(name, monkeypatch):
    monkeypatch.setenv("POODLE_DATA", "data")
    monkeypatch.setenv("POODLE_FLOW", "flow/model")
    monkeypatch.setenv("POODLE_FLOW_DIR", "flow/street")
    study = Study.read(name)
    for budget in study.budgets:
        for run in study.runs(budget, [0]):
            Recipe(**{**expanded(run.recipe), "output_dir": "x"})


def test_what_studies_have_in_common_is_one_run():
    keys = {
        name: {run.variant: run.key for run in Study.read(name).runs("cpu", [0])}
        for name in ("main", "ablation", "depth")
    }
    assert keys["main"]["PooDLe"] == keys["ablation"]["PooDLe"] == keys["depth"]["2 blocks"]
    assert keys["ablation"]["dense + pooled"] == keys["depth"]["0 blocks"] != keys["main"]["PooDLe"]
    # The untrained variant shares PooDLe's config.
    assert len({run.key for run in Study.read("main").runs("cpu", [0, 1])}) == 2 * 4


def test_an_untrained_variant_has_the_changes_of_its_twin_and_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "RECIPES", tmp_path)
    variants = """variants:
  trained: {crop_size: [32, 64], measure: {max_test_images: 1}}
  same: {untrained: trained}
  other: {untrained: trained, measure: {max_test_images: 2}}
"""
    before, after = TINY.replace("VIDEOS", "street").replace("SHAPES", "shapes").split("measures:")
    (tmp_path / "tiny.yaml").write_text(f"{before.split('variants:')[0]}{variants}measures:{after}")
    runs = {run.variant: run for run in Study.read("tiny").runs("cpu", [0])}
    assert {name: run.measure["max_test_images"] for name, run in runs.items()} == {
        "trained": 1,
        "same": 1,
        "other": 2,
    }
    assert all(run.recipe["crop_size"] == [32, 64] for run in runs.values())
    assert {name for name, run in runs.items() if run.untrained} == {"same", "other"}


def test_without_git_the_commit_is_not_recorded(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert script.where()["commit"] is None


def test_results_that_a_study_adds_are_no_change_of_the_code(tmp_path, monkeypatch):
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)

    (tmp_path / "results").mkdir()
    for name in ("code.py", "results/main.json"):
        (tmp_path / name).write_text("")
    git("init", "-q"), git("add", "."), git("commit", "-qm", "all")
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script, "RESULTS", tmp_path / "results")
    clean = script.commit()
    assert clean and not clean.endswith("dirty")
    (tmp_path / "results" / "main.json").write_text("{}")
    assert script.commit() == clean
    (tmp_path / "code.py").write_text("x = 1")
    assert script.commit() == f"{clean}-dirty"


def test_the_page_is_made_of_the_results():
    assert (ROOT / "docs/results.md").read_text(encoding="utf-8") == page(read_results())


def test_what_is_not_measured_is_named_with_the_measure_that_lacks_it():
    entry = {}
    first = {"a": [entry] * 2, "b": [entry], "c": [], "d": [entry] * 2, "e": [entry]}
    other = {"a": [entry] * 2, "b": [entry], "c": [], "d": [], "e": [entry] * 2}
    tables = {"street, linear": first, "street, k-NN": other}
    assert not_measured(tables, seeds=2) == [
        "b (1 of 2 seeds)", "c", "d in street, k-NN", "e in street, linear (1 of 2 seeds)"
    ]  # fmt: skip
    assert not_measured({"street, linear": first}, seeds=2) == ["b (1 of 2 seeds)", "c", "e (1 of 2 seeds)"]
    # The page names it, even if only the last measure of the recipe lacks an entry.
    results, study = read_results(), Study.read("main")
    last = list(study.measures)[-1]
    run = next(run for run in study.runs("cpu", study.seeds) if run.variant == "PooDLe")
    del results[measured_key(run, {**study.measures[last], **run.measure})]
    told = f"*Not measured yet: PooDLe in {last} ({len(study.seeds) - 1} of {len(study.seeds)} seeds).*"
    assert told in page(results) and told not in page(read_results())


def test_a_change_reaches_into_mappings_and_leaves_the_base_alone():
    base = {"model": {"dense_weight": 0.5}, "flow": "dis"}
    assert changed(base, {"model.dense_weight": 1.0, "a.b": 2}, "here") == {
        "model": {"dense_weight": 1.0},
        "flow": "dis",
        "a": {"b": 2},
    }
    assert base == {"model": {"dense_weight": 0.5}, "flow": "dis"}
    with pytest.raises(ValueError, match="here: flow.x reaches into flow"):
        changed(base, {"flow.x": 1}, "here")


def test_wrong_recipes_and_names_are_explained(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="did you mean 'main'"):
        Study.read("mian")
    with pytest.raises(ValueError, match="budget of main must be one of cpu, cpu_long, gpu, got 'tpu'"):
        list(Study.read("main").runs("tpu", [0]))
    with pytest.raises(ValueError, match=r"\$\{POODLE_NOWHERE\}/x needs the environment variable POODLE_NOWHERE"):
        expanded(["${POODLE_NOWHERE}/x"])
    monkeypatch.setattr(studies, "RECIPES", tmp_path)
    (tmp_path / "bad.yaml").write_text("title: a\nquestoin: b\n")
    with pytest.raises(ValueError, match="unknown field 'questoin' .did you mean 'question'"):
        Study.read("bad")


def test_means_and_spreads_are_those_of_the_seeds():
    assert spread([0.1, 0.2, 0.3]) == "20.0 ± 10.0" and spread([0.1234]) == "12.3" and spread([None]) == "-"
    assert spread([0.1, None, 0.25]) == "10.0 / 25.0"
    entry = {
        "miou": 0.5,
        "accuracy": 0.75,
        "groups": {"small": 0.25, "large": None},
        "per_class": {"car": 0.5, "pole": 0.0},
    }
    other = {**entry, "miou": 0.7, "pretraining": {"pairs_per_second": 10.0, "minutes": 4.0, "feature_std": 0.625}}
    table = {"a": [entry, other], "b": [], "c": [entry]}
    assert markdown(table).splitlines() == [
        "|   | seeds |        mIoU |    accuracy |       small | spread |",
        "| - | ----: | ----------: | ----------: | ----------: | -----: |",
        "| a |     2 | 50.0 / 70.0 | 75.0 / 75.0 | 25.0 / 25.0 |   0.62 |",
        "| c |     1 |        50.0 |        75.0 |        25.0 |        |",
    ]
    assert markdown(table, "per_class").splitlines()[2] == "| a |     2 | 50.0 / 50.0 | 0.0 / 0.0 |"
    assert markdown(table, cost=True).splitlines()[2].endswith("|   0.62 |    10.0 |     4.0 |")


def test_what_a_command_says_beside_its_table_is_shown(tmp_path):
    study = Study.read("subcrops")
    scatter = {"names": ["a", "b"], "x": [1.0, 10.0], "series": {"one": [2.0, 20.0]}, "xlabel": "x", "ylabel": "y"}
    entry = {"device": "d", "date": "2026-01-01", "result": {"table": [["", "n"], ["a", 1.5]], "notes": ["So it is."]}}
    text = command_section(study, "street", {**entry, "commit": "abc"})
    assert text.startswith("street (d, 2026-01-01, commit abc):\n\n|") and text.endswith("|\n\nSo it is.\n")
    entry["result"]["scatter"] = scatter
    text = command_section(study, "street", entry)
    assert "commit not recorded" in text and text.endswith("![Subcrops: street](studies/subcrops-street.png)\n")
    plot_scatter(scatter, "title", tmp_path / "new" / "plot.png")
    assert (tmp_path / "new" / "plot.png").read_bytes()[:4] == b"\x89PNG"


TINY = """
order: 1
title: Tiny
question: Does it run?
seeds: [0]
budgets:
  cpu:
    about: two steps
    base: street
    change:
      videos: [VIDEOS]
      crop_size: [64, 64]
      num_subcrops: 1
      subcrop_size: 32
      model: {backbone_config: {model_type: resnet, layer_type: basic, depths: [1, 1, 1, 1], hidden_sizes: [8, 8, 8, 8], embedding_size: 8}, projection_hidden_size: 8, projection_size: 8}
      max_steps: 2
      warmup_steps: 0
      per_device_train_batch_size: 2
      dataloader_num_workers: 0
variants:
  untrained: {untrained: trained}
  trained: {}
measures:
  shapes: {dataset: folder, data_dir: SHAPES, readout: knn}
plot: {kind: bars}
"""


def test_a_study_is_run_once_and_its_results_are_kept(tmp_path, monkeypatch, shapes, caplog):
    caplog.set_level("INFO", "poodle")
    write_videos(tmp_path / "drives", num_videos=1, duration=1.5, fps=4, height=64, width=128, num_processes=1)
    monkeypatch.setattr(studies, "RECIPES", tmp_path)
    (tmp_path / "tiny.yaml").write_text(
        TINY.replace("VIDEOS", str(tmp_path / "drives")).replace("SHAPES", str(shapes))
    )
    arguments = ["tiny", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    begun, launch = [], script.launch

    def launch_once(words, log):
        """Launch each script's first call as a study does, and run later calls in this process, which is faster than starting another."""
        begun.append(words[0])
        if begun.count(words[0]) == 1:
            return launch(words, log)
        AcceleratorState._reset_state(True)
        return {"training/pretrain.py": pretrain, "evaluation/segment.py": segment}[words[0]](words[1:])

    monkeypatch.setattr(script, "launch", launch_once)
    script.main(arguments)
    assert {"training/pretrain.py", "evaluation/segment.py"} == set(begun)
    entries = read_results(tmp_path / "results")
    by_variant = {entry["variant"]: entry for entry in entries.values()}
    assert set(by_variant) == {"untrained", "trained"} and "pretraining" not in by_variant["untrained"]
    trained = by_variant["trained"]
    folder = tmp_path / "runs" / trained["key"]
    assert (
        trained["pretraining"]["step"] == 2
        and (folder / "model/model.safetensors").exists()
        and not (folder / "checkpoints").exists()
    )
    measured = [json.loads(p.read_text()) for p in (tmp_path / "runs/measured").rglob("evaluation.json")]
    assert {round(result["miou"], 4) for result in measured} == {entry["miou"] for entry in entries.values()}
    assert {entry["commit"] for entry in entries.values()} == {script.where()["commit"]}
    # A second call repeats nothing: it needs no launcher and leaves the results as they are.
    monkeypatch.setattr(script, "launch", None)
    before = (tmp_path / "results/tiny.json").read_bytes()
    assert "has been measured" not in caplog.text
    script.main(arguments)
    assert f"tiny, budget cpu: all of it has been measured; the figures are in {tmp_path / 'results'}" in caplog.text
    assert (tmp_path / "results/tiny.json").read_bytes() == before
    plot(Study.read("tiny"), "cpu", entries, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_an_unset_variable_is_an_error_before_the_first_run(tmp_path, monkeypatch):
    monkeypatch.delenv("POODLE_FLOW_DIR", raising=False)
    begun = []
    monkeypatch.setattr(script, "pretrained", lambda run, folder: begun.append(run.variant))
    chosen = ["DIS", "DIS, 2 epochs again and again"]
    with pytest.raises(ValueError, match=r"\$\{POODLE_FLOW_DIR\} needs the environment variable POODLE_FLOW_DIR"):
        script.run_study(Study.read("flow"), "cpu", [0], chosen, tmp_path, tmp_path / "results")
    monkeypatch.setenv("POODLE_DATA", str(tmp_path))
    values = (Study.read("main"), "cpu", [0], ["PooDLe"], tmp_path, tmp_path / "results")
    with pytest.raises(ValueError, match=r"\$\{POODLE_DATA\}/camvid: there is no folder .*/camvid"):
        script.run_study(*values)
    assert not begun
    monkeypatch.setattr(script, "measured", lambda *_: {})
    script.run_study(*values, measures=["street, linear"])
    assert begun == ["PooDLe"]


def test_other_weights_or_words_are_other_figures(tmp_path, monkeypatch, caplog):
    """What `${NAME}` points to and a command's words are not part of an entry's key; they are compared with the entry."""
    caplog.set_level("INFO", "poodle")
    flow = Study.read("flow")
    (run,) = (run for run in flow.runs("cpu", [0]) if run.variant == "unflow")
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)
    monkeypatch.setenv("POODLE_FLOW", str(tmp_path / "a"))
    first = run.weights
    assert first is not None and first == run.weights
    monkeypatch.setenv("POODLE_FLOW", str(tmp_path / "b"))
    assert run.weights != first
    monkeypatch.setenv("POODLE_FLOW_DIR", str(tmp_path))
    done = []
    monkeypatch.setattr(script, "pretrained", lambda run, folder: done.append(run.variant))
    monkeypatch.setattr(script, "measured", lambda run, *_: {"weights": run.weights} if run.weights else {})
    monkeypatch.setattr(script, "run_command", lambda words: done.append(words[-1]) or {"result": {}})

    def again() -> list[str]:
        done.clear()
        script.run_study(flow, "cpu", [0], None, tmp_path, tmp_path / "results")
        return list(done)

    assert again() == ["{json}", *(name for name in flow.variants for _ in flow.measures)]
    assert again() == []
    monkeypatch.setenv("POODLE_FLOW", str(tmp_path / "a"))
    assert again() == ["{json}", "unflow", "unflow"]
    monkeypatch.delenv("POODLE_FLOW")  # existing figures stand; only new ones need the variable
    assert again() == [] and "not compared with what was measured: unflow:${POODLE_FLOW} needs" in caplog.text
    with pytest.raises(ValueError, match="needs the environment variable POODLE_FLOW"):
        script.run_study(flow, "cpu", [0], None, tmp_path, tmp_path / "elsewhere")
    monkeypatch.setenv("POODLE_FLOW", str(tmp_path / "a"))
    flow.commands["end-point error"] = [*flow.commands["end-point error"][:-1], "--gaps", "{json}"]
    assert again() == ["{json}"]


def test_two_processes_may_write_the_results_of_one_study(tmp_path):
    def write(who: str) -> None:
        for k in range(20):
            with results_of("both", tmp_path) as entries:
                entries[f"{who}{k}"] = {"k": k}

    fork = multiprocessing.get_context("fork")
    running = [fork.Process(target=write, args=(who,)) for who in "ab"]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
    assert [process.exitcode for process in running] == [0, 0]
    assert len(read_results(tmp_path)) == 40
    with results_of("both", tmp_path) as entries:
        entries.clear()
    assert read_results(tmp_path) == {}
