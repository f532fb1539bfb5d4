"""Files and folders that appear complete or not at all."""

import os

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
