"""The page of all studies: tables and plots made only from the results, and the text of the recipes."""

from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev

from evaluation.compare import aligned
from evaluation.metrics import GROUPS
from evaluation.report import percent
from evaluation.studies.study import Study, measured_key, names

HEAD = """# Results

Made by `python -m evaluation.studies --report` from the JSON files in `evaluation/studies/results/`; no figure in a table is typed by hand. `python -m evaluation.studies NAME` repeats
a study (what is in those files is not measured again; `--results DIR` starts anew elsewhere). Figures are per cent: of three or more seeds the mean ± standard deviation,
of two seeds both figures. Groups are the paper's: small and large by the size of a class's regions, rare and common by its share of the pixels.
Spread is the student's `feature_std` at the end of pretraining: 0 if the features have collapsed, 1 at most.
"""


def page(results: Mapping[str, dict]) -> str:
    """
    Return the text of docs/results.md.

    Args:
        results: entries by key (see [`~evaluation.studies.study.read_results`]).
    """
    # Notes on the stored results as a whole lie in a file, because they change with the results and not with the code.
    parts = [HEAD, Path(__file__).with_name("notes.md").read_text(encoding="utf-8")]
    for number, name in enumerate(ordered(), start=1):
        study = Study.read(name)
        parts.append(
            f"## {number}. {study.title}\n\n`python -m evaluation.studies {name}`. {study.question.strip()}\n"
        )
        for budget in study.budgets:
            parts += budget_section(study, budget, results)
        for command in study.commands:
            parts.append(command_section(study, command, results.get(f"{name}/{command}")))
        if study.finding:
            parts.append(study.finding.strip() + "\n")
    return "\n".join(parts)


def ordered() -> list[str]:
    """Return the names of the studies, sorted by the `order` in their recipes."""
    return sorted(names(), key=lambda name: Study.read(name).order)


def budget_section(study: Study, budget: str, results: Mapping[str, dict]) -> list[str]:
    tables = {measure: collected(study, budget, measure, results) for measure in study.measures}
    entries = [entry for table in tables.values() for found in table.values() for entry in found]
    if not entries:
        return [f"Budget `{budget}`: {study.budgets[budget]['about']}. *Not measured yet.*\n"]
    own = [variant for variant in study.variants if any(table[variant] for table in tables.values())]
    dates = sorted({entry["date"] for entry in entries})
    devices = ", ".join(sorted({entry["device"] for entry in entries}))
    commits = sorted({entry.get("commit") or "not recorded" for entry in entries})
    parts = [
        f"Budget `{budget}`: {study.budgets[budget]['about']}. {devices}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}; commit {', '.join(commits)}.\n"
    ]
    missing = not_measured(tables, len(study.seeds))
    if missing:
        parts.append(f"*Not measured yet: {'; '.join(missing)}.*\n")
    for measure, table in tables.items():
        if any(table.values()):
            parts.append(f"{measure}:\n\n{markdown(table, cost=study.cost)}\n")
            if study.per_class:
                parts.append(f"{measure}, IoU by class:\n\n{markdown(table, 'per_class')}\n")
    if study.plot is not None and len(own) > 1:
        parts.append(f"![{study.title}](studies/{study.name}-{budget}.png)\n")
    return parts


def not_measured(tables: Mapping[str, Mapping[str, list[dict]]], seeds: int) -> list[str]:
    """Name the variants that lack entries: once if each measure lacks the same number, else once for each measure that lacks any."""
    missing = []
    for variant in next(iter(tables.values())):
        counts = {measure: len(table[variant]) for measure, table in tables.items()}
        if len(set(counts.values())) == 1:
            counts = {variant: min(counts.values())}
        else:
            counts = {f"{variant} in {measure}": count for measure, count in counts.items()}
        lacking = {name: count for name, count in counts.items() if count < seeds}
        missing += [f"{name} ({count} of {seeds} seeds)" if count else name for name, count in lacking.items()]
    return missing


def collected(study: Study, budget: str, measure: str, results: Mapping[str, dict]) -> dict[str, list[dict]]:
    """Return the entries of a measure by variant, one for each seed, in the recipe's order."""
    table: dict[str, list[dict]] = {name: [] for name in study.variants}
    for run in study.runs(budget, study.seeds):
        entry = results.get(measured_key(run, {**study.measures[measure], **run.measure}))
        if entry is not None:
            table[run.variant].append(entry)
    return table


def markdown(table: Mapping[str, list[dict]], part: str = "groups", cost: bool = False) -> str:
    """
    Return a Markdown table with one line a variant.

    Args:
        table: entries by variant.
        part: groups, for mIoU, accuracy, the groups' means and `feature_std` at the end of pretraining; or per_class, for IoU by class.
        cost: add the speed and the minutes of pretraining.
    """
    found = [entry for entries in table.values() for entry in entries]
    names = GROUPS if part == "groups" else found[0][part]
    columns = [name for name in names if any(entry[part].get(name) is not None for entry in found)]
    head = ["", "seeds", *(["mIoU", "accuracy"] if part == "groups" else []), *columns]
    shown = {}
    if part == "groups" and any("pretraining" in entry for entry in found):
        shown = {"feature_std": ("spread", ".2f")}
        shown |= {"pairs_per_second": ("pairs/s", ".1f"), "minutes": ("minutes", ".1f")} if cost else {}
    head += [title for title, _ in shown.values()]
    body = []
    for variant, entries in table.items():
        if not entries:
            continue
        figures = [[e[key] for e in entries] for key in ("miou", "accuracy")] if part == "groups" else []
        figures += [[e[part].get(column) for e in entries] for column in columns]
        row = [variant, str(len(entries)), *(spread(values) for values in figures)]
        trained = [e["pretraining"] for e in entries if "pretraining" in e]
        row += [f"{mean(t[key] for t in trained):{form}}" if trained else "" for key, (_, form) in shown.items()]
        body.append(row)
    return aligned([head, *body], markdown=True, words=1)


def spread(values: list[float | None]) -> str:
    """Format the mean ± standard deviation over the seeds, in per cent; for one or two seeds, their figures."""
    values = [value for value in values if value is not None]
    if len(values) < 3:
        return " / ".join(map(percent, values)) or percent(None)
    return f"{percent(mean(values))} ± {percent(stdev(values))}"


def command_section(study: Study, name: str, entry: dict | None) -> str:
    if entry is None:
        return f"{name}: *not measured yet*.\n"
    rows = entry["result"]["table"]  # a header and rows of words and numbers
    shown = [
        [f"{cell:.3g}" if isinstance(cell, float) else "" if cell is None else str(cell) for cell in row]
        for row in rows
    ]
    parts = [f"{name} ({entry['device']}, {entry['date']}, commit {entry.get('commit') or 'not recorded'}):"]
    parts += [aligned(shown, markdown=True, words=1), *entry["result"].get("notes", [])]
    if "scatter" in entry["result"]:
        parts.append(f"![{study.title}: {name}](studies/{scatter_name(study, name)})")
    return "\n\n".join(parts) + "\n"


def scatter_name(study: Study, command: str) -> str:
    return f"{study.name}-{command.lower().replace(' ', '-')}.png"


# --- plots ---


def write_page(docs: Path, results: Mapping[str, dict]) -> None:
    """
    Write docs/results.md and docs/studies/*.png.

    Raises:
        ValueError: matplotlib is not installed (`pip install -e '.[studies]'`).
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError("the plots need matplotlib: pip install -e '.[studies]'") from None
    matplotlib.use("agg")
    (docs / "results.md").write_text(page(results), encoding="utf-8")
    for name in ordered():
        study = Study.read(name)
        for budget in study.budgets if study.plot is not None else ():
            plot(study, budget, results, docs / "studies" / f"{name}-{budget}.png")
        for command in study.commands:
            result = results.get(f"{name}/{command}", {}).get("result", {})
            if "scatter" in result:
                plot_scatter(
                    result["scatter"], f"{study.title}: {command}", docs / "studies" / scatter_name(study, command)
                )


def plot_scatter(scatter: dict, title: str, path: Path) -> None:
    """Plot several series over the same x, on logarithmic axes. The points of the last series are labelled with their names."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for label, values in scatter["series"].items():
        axis.scatter(scatter["x"], values, label=label, s=16)
    for name, x, y in zip(scatter["names"], scatter["x"], values):
        axis.annotate(name, (x, y), (3, 3), textcoords="offset points", fontsize=7)
    axis.set(xscale="log", yscale="log", xlabel=scatter["xlabel"], ylabel=scatter["ylabel"])
    axis.set_title(title, fontsize=10)
    axis.legend(fontsize=8)
    saved(figure, path)


def saved(figure, path: Path) -> None:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80, metadata={"Software": None})
    pyplot.close(figure)


def plot(study: Study, budget: str, results: Mapping[str, dict], path: Path) -> None:
    """Plot the IoU of all, small and large classes in a panel for each measure: bars by variant, or lines over what the variants change."""
    from matplotlib import pyplot

    tables = {measure: collected(study, budget, measure, results) for measure in study.measures}
    tables = {measure: table for measure, table in tables.items() if any(table.values())}
    if not tables or sum(any(table[variant] for table in tables.values()) for variant in study.variants) < 2:
        return path.unlink(missing_ok=True)
    shown = {
        "mIoU": lambda e: e["miou"],
        "small": lambda e: e["groups"]["small"],
        "large": lambda e: e["groups"]["large"],
    }
    figure, axes = pyplot.subplots(
        1, len(tables), figsize=(4.5 * len(tables), 3.2), squeeze=False, layout="constrained"
    )
    for axis, (measure, table) in zip(axes[0], tables.items()):
        table = {variant: entries for variant, entries in table.items() if entries}
        for index, (label, figure_of) in enumerate(shown.items()):
            values = [
                [100 * figure_of(e) for e in entries if figure_of(e) is not None] or [0.0]
                for entries in table.values()
            ]
            errors = [stdev(v) if len(v) > 1 else 0 for v in values]
            if study.plot["kind"] == "bars":
                places = [k + 0.27 * (index - 1) for k in range(len(table))]
                axis.bar(places, [mean(v) for v in values], 0.25, yerr=errors, label=label)
            else:
                axis.errorbar(
                    [study.plot["x"][variant] for variant in table],
                    [mean(v) for v in values],
                    errors,
                    label=label,
                    marker="o",
                )
        if study.plot["kind"] == "bars":
            axis.set_xticks(range(len(table)), list(table), rotation=25, ha="right")
        else:
            axis.set_xlabel(study.plot["label"])
        axis.set_title(measure, fontsize=10)
        axis.set_ylabel("IoU, %")
        axis.legend(fontsize=8)
    saved(figure, path)
