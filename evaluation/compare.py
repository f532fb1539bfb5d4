"""
Print one table of several evaluations.

    python -m evaluation.compare runs/a/evaluation.json runs/b/evaluation.json [--markdown]

There is one line for each model and readout, in the order of the files. The files come from evaluation/segment.py; nothing is measured anew.
"""

import argparse
import json
import sys
from pathlib import Path

from evaluation.metrics import GROUPS
from evaluation.report import percent
from modeling_poodle.recipe_files import run_script

COLUMNS = {"miou": "mIoU", "accuracy": "accuracy", "mean_accuracy": "mean acc"}


def read_results(path: str | Path) -> list[dict]:
    """
    Read the results in an evaluation.json of one or several models.

    Raises:
        ValueError: the file cannot be read, or evaluation/segment.py did not write it.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: not JSON, or not UTF-8
        raise ValueError(f"{path} cannot be read as an evaluation.json: {error}") from None
    results = values.get("results", [values]) if isinstance(values, dict) else []
    whole = isinstance(results, list) and all(isinstance(r, dict) and {"miou", "readout"} <= r.keys() for r in results)
    if not results or not whole:
        raise ValueError(f"{path} holds no segmentation results; give files that evaluation/segment.py wrote")
    return results


def rows(results: list[dict]) -> list[list[str]]:
    """Return the table's header and rows: model, data set, readout, settings, and figures in per cent."""
    groups = [name for name in GROUPS if any(r["groups"].get(name) is not None for r in results)]
    head = ["model", "data", "readout", "features", "steps", "seed", *COLUMNS.values(), *groups]
    body = [
        [
            *(str(r[key]) for key in ("model", "dataset", "readout", "features", "steps", "seed")),
            *(percent(r[key]) for key in COLUMNS),
            *(percent(r["groups"].get(name)) for name in groups),
        ]
        for r in results
    ]
    return [head, *body]


def differences(results: list[dict]) -> list[str]:
    """Return a note for each setting in which results on the same data set differ, so that their figures are not comparable."""
    told = []
    for name in dict.fromkeys(result["dataset"] for result in results):
        those = [result for result in results if result["dataset"] == name]
        for what, of in (
            ("classes", lambda r: list(r.get("per_class") or {}) or None),
            ("groups of classes", lambda r: r.get("group_members")),
            ("number of training images", lambda r: r.get("num_train_images")),
            ("number of test images", lambda r: r.get("num_test_images")),
        ):
            values = [value for value in map(of, those) if value is not None]
            if any(value != values[0] for value in values):
                told.append(f"note: the results on {name} differ in their {what}")
        for readout in dict.fromkeys(result["readout"] for result in those):
            settings = [
                {**r["protocol"], **({} if readout == "knn" else {"num_processes": r.get("num_processes")})}
                for r in those
                if r["readout"] == readout and isinstance(r.get("protocol"), dict)
            ]
            names = dict.fromkeys(key for values in settings for key in values)
            unlike = [key for key in names if any(values.get(key) != settings[0].get(key) for values in settings)]
            if unlike:
                told.append(f"note: the {readout} readouts on {name} differ in {', '.join(unlike)}")
    return told


def aligned(table: list[list[str]], markdown: bool = False, words: int = 4) -> str:
    """Format a table with aligned columns: the first `words` to the left, the figures after them to the right. `markdown`: as Markdown."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = []
    for row in table:
        cells = [
            cell.ljust(width) if column < words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append(f"| {' | '.join(cells)} |" if markdown else "  ".join(cells).rstrip())
    if markdown:
        rule = [("-" * width if column < words else "-" * (width - 1) + ":") for column, width in enumerate(widths)]
        lines.insert(1, f"| {' | '.join(rule)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m evaluation.compare", description=__doc__.strip().split("\n")[0])
    parser.add_argument("files", nargs="+", help="evaluation.json files, or the folders that hold them")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    options = parser.parse_args(arguments)
    files = [Path(name, "evaluation.json") if Path(name).is_dir() else Path(name) for name in options.files]
    results = [result for path in files for result in read_results(path)]
    print(aligned(rows(results), options.markdown))
    for sentence in differences(results):
        print(sentence, file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
