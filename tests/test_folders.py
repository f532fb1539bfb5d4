"""Files and folders that appear complete or not at all."""

import ast
import os
from pathlib import Path

import pytest

from modeling_poodle import folders
from modeling_poodle.folders import folder_aside, spread, sweep_aside, write_aside


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_write_that_is_killed_leaves_the_file_before_and_what_is_swept_away(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    write_aside(file, "before")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folders.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_aside(file, b"after")
    assert file.read_text() == "before" and len(names(tmp_path)) == 2
    (tmp_path / ".model.partial").mkdir()  # a folder, which its writer removes itself
    sweep_aside(tmp_path)
    assert names(tmp_path) == [".model.partial", "a.json"]


def test_a_full_disk_leaves_the_file_before_and_makes_room(tmp_path, monkeypatch):
    file, synced = tmp_path / "a.json", []
    write_aside(file, "before", sync=True)

    def full(descriptor):
        synced.append(descriptor)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_aside(file, "after", sync=True)
    assert len(synced) == 1 and file.read_text() == "before" and names(tmp_path) == ["a.json"]


def test_a_folder_takes_its_name_once_it_is_filled(tmp_path):
    final = tmp_path / "model"
    for text in ("first", "second"):
        with folder_aside(final) as partial:
            partial.mkdir()
            (partial / text).touch()
            assert not (final / text).exists()
        assert names(final) == [text]
    with pytest.raises(ValueError), folder_aside(final) as partial:
        partial.mkdir()
        raise ValueError
    assert names(final) == ["second"]
    os.rename(final, tmp_path / "other")  # as by a user who renames the folder meanwhile
    with folder_aside(final) as partial:
        partial.mkdir()
    assert names(tmp_path) == ["model", "other"]


def test_some_of_many_are_spread_from_the_first_to_the_last():
    assert spread(range(100), 4) == (0, 33, 66, 99) and spread("abc", None) == spread("abc", 7) == ("a", "b", "c")
    assert spread([5, 6], 1) == (5,)
    for length in range(1, 40):
        for count in range(1, length + 1):
            assert len({*spread(range(length), count)}) == count


def text_files(source: str) -> list[ast.Call]:
    """The calls in a module that read or write a text file without saying in which encoding."""
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name = getattr(call.func, "attr", getattr(call.func, "id", None))
        as_text = name in ("read_text", "write_text") and isinstance(call.func, ast.Attribute)
        as_text |= isinstance(call.func, ast.Name) and name == "open" and "b" not in ast.unparse(call.args[1:2])
        if as_text and not any(keyword.arg == "encoding" for keyword in call.keywords):
            found.append(call)
    return found


def test_text_files_are_utf_8_whatever_the_locale():
    """Before Python 3.15 the locale decides otherwise: names of classes were read wrong and cards written wrong, or not at all."""
    assert (
        len(text_files("open(a); open(a, 'w'); open(a, 'rb'); a.read_text(); a.write_text(b, encoding='utf-8')")) == 3
    )
    root = Path(folders.__file__).parents[1]
    files = [
        path for package in ("modeling_poodle", "training", "evaluation") for path in root.glob(f"{package}/**/*.py")
    ]
    assert len(files) > 50
    assert not [(path.name, call.lineno) for path in files for call in text_files(path.read_text(encoding="utf-8"))]
