"""
Run a study, or write the page with the results of all studies.

    python -m evaluation.studies main [--budget cpu] [--seeds 0 1] [--variants NAME ...] [--runs runs/studies]
    python -m evaluation.studies --report

A study pretrains the variants that its recipe lists, measures them, and writes results/NAME.json. Figures that exist are not measured
again, whichever study measured them, unless the recipe, the command or the weights of the flow network have changed. An interrupted run is
resumed. Two processes may share a study if each gets other seeds. `--report` writes docs/results.md with all studies.
"""

import argparse
import datetime
import json
import logging
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

from evaluation.studies.report import write_page
from evaluation.studies.study import (
    RESULTS,
    Run,
    Study,
    expanded,
    measured_key,
    names,
    read_results,
    results_of,
    weights_of,
)
from modeling_poodle.cpu import usable_cores
from modeling_poodle.folders import write_aside
from modeling_poodle.recipe_files import did_you_mean, run_script

logger = logging.getLogger("poodle")
ROOT = Path(__file__).resolve().parent.parent.parent
KEPT = ("miou", "accuracy", "mean_accuracy")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m evaluation.studies", description=__doc__.strip().split("\n")[0])
    parser.add_argument("study", nargs="?", help=f"one of {', '.join(names())}")
    parser.add_argument("--report", action="store_true", help="write docs/results.md and its plots")
    parser.add_argument("--budget", default="cpu", help="one of the recipe's budgets (cpu, cpu_long, gpu, ...)")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the recipe's")
    parser.add_argument("--variants", nargs="+", help="only these")
    parser.add_argument("--measures", nargs="+", help="only these readouts, such as 'street, linear'")
    parser.add_argument("--runs", default="runs/studies", help="folder of the pretrained encoders")
    parser.add_argument("--results", default=str(RESULTS), help="folder of the JSON files")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    if not options.report and options.study is None:
        raise ValueError(f"give a study, one of {', '.join(names())}, or --report")
    if options.report and not (ROOT / "docs").is_dir():
        raise ValueError(f"--report writes docs/results.md of a clone of the repository, and {ROOT} has no docs/")
    results = Path(options.results)
    if options.study is not None:
        study = Study.read(options.study)
        for field in ("variants", "measures"):
            known = getattr(study, field)
            for name in getattr(options, field) or ():
                if name not in known:
                    raise ValueError(f"{field} must be of {'; '.join(known)}, got {name!r}{did_you_mean(name, known)}")
        run_study(
            study,
            options.budget,
            options.seeds or study.seeds,
            options.variants,
            Path(options.runs).resolve(),
            results,
            options.measures,
        )
    if options.report:
        logger.info("writing docs/results.md and its plots in docs/studies/")  # half a minute
        write_page(ROOT / "docs", read_results(results))


def run_study(
    study: Study, budget: str, seeds: list[int], variants, folder: Path, results: Path, measures=None
) -> None:
    """
    Pretrain and measure what is missing in a study's results.

    Args:
        variants, measures: names of those to run, or `None` for all.
        folder: for the pretrained encoders.
        results: folder of the JSON files.

    Raises:
        ValueError: an environment variable is unset, a data folder is missing, or a script failed.
    """
    chosen = study.runs(budget, seeds) if study.variants else []
    wanted = [
        (run, {**measure, **run.measure})
        for run in chosen
        if not variants or run.variant in variants
        for name, measure in study.measures.items()
        if not measures or name in measures
    ]
    done, new = read_results(results), 0
    for run, measure in wanted:
        if measured_key(run, measure) not in done:
            # Report an unset variable or a missing folder now, not after hours of other runs.
            _, found = expanded([run.recipe, measure])
            if "data_dir" in found and not Path(found["data_dir"]).is_dir():
                raise ValueError(f"{measure['data_dir']}: there is no folder {found['data_dir']}")
    for name, words in study.commands.items():
        key = f"{study.name}/{name}"
        known = read_results(results).get(key)
        if known is None or known["command"] != words[:-1] or other_weights(name, known, words):
            weights = weights_of(words)
            entry = {
                "command": words[:-1],
                **({"weights": weights} if weights else {}),
                **run_command(expanded(words)),
            }
            record(study, results, key, entry)
            new += 1
    for run, measure in wanted:
        key = measured_key(run, measure)
        known = read_results(results).get(key)
        if known is None or other_weights(run.variant, known, run.flow_words):
            model = pretrained(run, folder)
            record(study, results, key, measured(run, budget, measure, model, folder / "measured" / key))
            new += 1
    if not new:
        logger.info("%s, budget %s: all of it has been measured; the figures are in %s", study.name, budget, results)


def other_weights(name: str, known: dict, words: list[str]) -> bool:
    """Whether a figure was measured with other weights than those that `${NAME}` points to now. False if the variable is unset."""
    try:
        return known.get("weights") != weights_of(words)
    except ValueError as error:
        logger.info("%s: not compared with what was measured: %s", name, error)
        return False


def record(study: Study, results: Path, key: str, entry: dict) -> None:
    with results_of(study.name, results) as entries:
        entries[key] = entry


def pretrained(run: Run, folder: Path) -> Path:
    """Pretrain a run to its end, unless that is done already, and return its folder."""
    recipe, output_dir = expanded(run.recipe), folder / "-".join(filter(None, (run.key, run.weights)))
    if run.untrained:  # one step yields the model's config; `random:` draws new weights
        recipe, output_dir = {**recipe, "max_steps": 1, "warmup_steps": 0}, folder / f"{run.key}-untrained"
    finished = output_dir / "finished.json"
    if finished.exists():
        return output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / "study.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    words = ["training/pretrain.py", "--config", str(path), "--seed", str(run.seed), "--output_dir", str(output_dir)]
    if (output_dir / "config.yaml").exists():
        words += ["--resume_from_checkpoint", "latest"]
    logger.info("pretraining %s, seed %d, in %s", run.variant, run.seed, output_dir)
    launch(words, output_dir / "log.txt")
    write_aside(finished, json.dumps(summary(output_dir)))
    shutil.rmtree(output_dir / "checkpoints", ignore_errors=True)  # gigabytes over all runs; encoder/ and model/ stay
    return output_dir


def summary(output_dir: Path) -> dict:
    """Return the last line of a run's metrics, with its median rate and the minutes computed from it, so that interruptions do not count."""
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last, rate = lines[-1], statistics.median(line["pairs_per_second"] for line in lines)
    state = json.loads(
        (output_dir / "checkpoints" / f"step-{last['step']}" / "state.json").read_text(encoding="utf-8")
    )
    pairs = last["step"] * state["pairs_per_step"]  # pairs of all processes
    return {**last, "pairs_per_second": rate, "minutes": round(pairs / rate / 60, 1)}


def measured(run: Run, budget: str, measure: dict, model: Path, output_dir: Path) -> dict:
    """Measure one readout of a run and return it as an entry of the results."""
    fields = {**expanded(measure), "model": f"random:{model}" if run.untrained else str(model), "seed": run.seed}
    shutil.rmtree(output_dir, ignore_errors=True)
    logger.info("measuring %s, seed %d: %s", run.variant, run.seed, ", ".join(f"{k} {v}" for k, v in measure.items()))
    words = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    began = time.perf_counter()
    output_dir.mkdir(parents=True)
    launch(["evaluation/segment.py", *words, "--output_dir", str(output_dir / "evaluation")], output_dir / "log.txt")
    result = json.loads((output_dir / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    entry = {"variant": run.variant, "seed": run.seed, "budget": budget, "measure": measure, "key": run.key}
    entry |= {"weights": run.weights} if run.weights else {}
    entry |= {name: _rounded(result[name]) for name in KEPT}
    for name in ("groups", "per_class"):
        entry[name] = {key: _rounded(value) for key, value in result[name].items()}
    if not run.untrained:
        finished = json.loads((model / "finished.json").read_text(encoding="utf-8"))
        names = (
            "step",
            "loss",
            "dense_loss",
            "pooled_loss",
            "valid_fraction",
            "feature_std",
            "pairs_per_second",
            "minutes",
        )
        entry["pretraining"] = {name: _rounded(finished[name]) for name in names}
    entry |= {"readout_minutes": round((time.perf_counter() - began) / 60, 1), **where()}
    return entry


def run_command(words: list[str]) -> dict:
    """Run a command of the project and return the contents of the JSON file that it writes; `{json}` in its words is the file's path."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "result.json")
        words = [word.replace("{json}", str(path)) for word in words]
        logger.info("%s", " ".join(words))
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True)
        return {"result": json.loads(path.read_text(encoding="utf-8")), **where()}


def where() -> dict:
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{usable_cores()} CPU core(s), {platform.machine()}"
    )
    return {
        "device": device,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
    }


def commit() -> str | None:
    """Return the code's commit, with `-dirty` if files other than the studies' results differ from it; `None` without git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", f":!{RESULTS.relative_to(ROOT)}")
        return (git("describe", "--always") + ("-dirty" if changed else "")) or None
    except OSError:  # no git
        return None


def launch(words: list[str], log: Path) -> None:
    """
    Run a script of the project and append its output to a file.

    Raises:
        ValueError: the script failed; the message shows the end of the file.
    """
    # Without `accelerate launch`, which would start one process for each GPU and so change the batch size.
    with open(log, "a", encoding="utf-8") as file:
        done = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        end = "\n".join(log.read_text(errors="replace", encoding="utf-8").splitlines()[-15:])
        raise ValueError(f"{' '.join(words)} ended with code {done.returncode}; the end of {log}:\n{end}")


def _rounded(value):
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    run_script(main)
