"""What the documents name is there: tests, files, and each other."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


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


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "docs/scaling.md", "docs/results.md", "docs/reliability.md"]
)
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
