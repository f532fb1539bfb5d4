"""The tests, files and pages that the documents name exist."""

import re
import runpy
from pathlib import Path

import pytest

from evaluation.boxes import BOX_DATASETS
from evaluation.data import DATASETS
from evaluation.video_masks import VIDEO_DATASETS

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{name}.md" for name in ("scaling", "results", "reliability", "evaluation", "extending")),
]


def test_every_promise_names_a_test_that_exists():
    named, path = [], None
    for file, name in re.findall(
        r"`(tests/\w+\.py)?::(\w+)", (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    ):
        path = file or path
        named.append((path, name))
    assert len(named) > 60
    missing = [
        f"{path}::{name}" for path, name in named if f"def {name}(" not in (ROOT / path).read_text(encoding="utf-8")
    ]
    assert missing == []


@pytest.mark.parametrize("page", DOCUMENTS)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text(encoding="utf-8")):
        assert (ROOT / page).parent.joinpath(target).exists(), target


def test_files_of_the_map_exist():
    cells = [
        line.split("|")[1]
        for line in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| `")
    ]
    for cell in cells:
        folder = None
        for name in re.findall(r"`([^`]+)`", cell):
            path = ROOT / name if folder is None or "/" in name.rstrip("/") else folder / name
            assert path.exists(), name
            folder = path.parent


def test_the_map_has_every_module():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    modules = [
        path for folder in ("modeling_poodle", "training", "evaluation") for path in (ROOT / folder).glob("*.py")
    ]
    assert [path.name for path in modules if path.name != "__init__.py" and f"{path.name}`" not in text] == []


def test_the_readme_names_the_data_sets_of_each_evaluation():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.search(
        r"Data sets of `segment.py`: (.*?);\s+of `detect.py`: (.*?); of `evaluation.propagate`: (.*?)\. A",
        text,
        re.DOTALL,
    )
    for found, known in zip(named.groups(), (DATASETS, BOX_DATASETS, VIDEO_DATASETS), strict=True):
        assert set(re.findall(r"`(\w+)`", found)) == {name for name in known if ":" not in name}
    page = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    assert [name for name in (*DATASETS, *BOX_DATASETS, *VIDEO_DATASETS) if f"`{name}`" not in page] == []


def test_the_spread_of_features_in_the_studies_is_the_one_that_is_told():
    low, high = map(
        float, re.search(r"below 0.01; ([\d.]+) to ([\d.]+) in", (ROOT / "docs/reliability.md").read_text()).groups()
    )
    results = "".join(path.read_text() for path in (ROOT / "evaluation/studies/results").glob("*.json"))
    measured = [float(value) for value in re.findall(r'"feature_std": ([\d.]+)', results)]
    assert low <= min(measured) < low + 0.01 and high - 0.01 < max(measured) <= high


PAGES = [
    *DOCUMENTS,
    *sorted(
        str(path.relative_to(ROOT))
        for folder in ("training", "evaluation", "benchmarks")
        for kind in ("py", "yaml", "sh")
        for path in (ROOT / folder).rglob(f"*.{kind}")
    ),
]
TOOL = re.compile(
    r"(?:python3? -m |python3? |launch (?:--\S+ \S+ )*|--nproc_per_node \S+ )((?:training|evaluation|benchmarks)[./]\w+(?:\.py)?)\b([^`#&]*)"
)


def commands_of(page: str) -> list[tuple[str, str]]:
    """Return the tool and the arguments of each command of a page. A line that ends in a backslash continues on the next."""
    text = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"\\\n[# ]*", " ", text)
    return [
        (tool.removesuffix(".py").replace("/", "."), rest)
        for line in text.splitlines()
        for tool, rest in TOOL.findall(line)
    ]


def help_of(tool: str, monkeypatch, capsys) -> str:
    monkeypatch.setattr("sys.argv", [tool, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(tool, run_name="__main__", alter_sys=True)
    assert end.value.code in (0, None)
    text = capsys.readouterr().out
    # These tools pass options that they do not know to the recipe.
    return text + (
        help_of("training.pretrain", monkeypatch, capsys)
        if tool.startswith("benchmarks") or tool in ("training.flow", "training.flow_writer")
        else ""
    )


def test_every_command_of_the_documents_names_options_that_its_tool_has(monkeypatch, capsys):
    found = [(page, *command) for page in PAGES for command in commands_of(page)]
    assert len(found) > 100 and {"training.pretrain", "evaluation.segment", "benchmarks.step"} <= {c[1] for c in found}
    helps, recipes = {}, {path.stem for path in (ROOT / "training/recipes").rglob("*.yaml")}
    for page, tool, rest in found:
        if tool not in helps:
            helps[tool] = help_of(tool, monkeypatch, capsys)
        for option in re.findall(r"(?<!\S)\[?(--[a-z][\w.]*)", rest):
            assert re.search(rf"{re.escape(option)}(?![\w.])", helps[tool]), f"{page}: {tool} has no {option}"
        for name in re.findall(r"--config (\w+)", rest):
            assert name == "RECIPE" or name in recipes, f"{page}: no recipe {name}"
