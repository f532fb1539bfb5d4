"""Folders, patterns, tars and names as sources of videos: which videos are found, and how missing ones are named."""

import os
import re
import shutil
import tarfile

import fsspec
import pytest
from test_video_stream import SAMPLING, videos

from training.video_index import index_video
from training.video_sources import find_videos
from training.video_stream import video_pairs

__all__ = ["videos"]  # a fixture


def test_sources(tmp_path, videos, caplog):
    folder = str(tmp_path.parent / videos[0]).rsplit("/", 1)[0]
    assert find_videos([folder]) == sorted(videos) == find_videos([folder + "/*.mp4", videos[0]])
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for k in (0, 1):
            archive.add(videos[k], arcname=f"a.b.{k}.mp4")
    members = find_videos([str(tmp_path / "shard.tar")])
    assert len(members) == 2
    for member, path in zip(members, videos):
        a, b = next(video_pairs(member, SAMPLING, 0)), index_video(path)
        assert index_video(member).pts == b.pts and a["frames"].shape == (2, 3, 32, 64)
    # Linked folders are searched too, each once; a link back to a parent does not make the search endless.
    (tmp_path / "drives").mkdir()
    for link, target in (("a", folder), ("b", folder), ("loop", tmp_path / "drives"), ("up", tmp_path)):
        (tmp_path / "drives" / link).symlink_to(target)
    assert find_videos([str(tmp_path / "drives")]) == [
        v.replace(folder, f"{tmp_path}/drives/a") for v in sorted(videos)
    ]
    with pytest.raises(
        ValueError, match=r"(?s)no videos found; tried.*nowhere: no such file.*\*\.xyz: a pattern that matches 0"
    ):
        find_videos([str(tmp_path / "nowhere"), str(tmp_path / "*.xyz")])
    # "clips/cut.mp4" may be a misspelt path or the name of a data set: the error mentions both.
    with pytest.raises(
        ValueError,
        match=r"clips/cut.mp4: no such file or folder here, and as a data set: .*OFFLINE is set: unset it\n",
    ):
        find_videos(["clips/cut.mp4"])
    # One misspelt source is refused even beside good ones, or the run would use fewer videos than meant.
    with pytest.raises(
        ValueError, match=r"(?s)in some sources; tried\n  .*shard.tar: 2 videos\n  .*nowhere: no such file"
    ):
        find_videos([str(tmp_path / "shard.tar"), str(tmp_path / "nowhere")])
    # A compressed tar can only be read from its beginning.
    (tmp_path / "shard.tar").rename(tmp_path / "drives" / "shard.tar.gz")
    with pytest.raises(ValueError, match=r"shard.tar.gz: a compressed tar, .*: decompress it, to .tar"):
        find_videos([str(tmp_path / "drives" / "shard.tar.gz")])
    assert len(find_videos([str(tmp_path / "drives")])) == len(videos)
    assert "1 compressed tars are left out, the first is" in caplog.text


def test_what_often_means_videos_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "frames").mkdir()
    for name in ("frames/0001.png", "frames/0002.png", "frames/about.txt", "list.txt", "all.zip", "table.parquet"):
        (tmp_path / name).write_text("x")
    for source, hint in (
        ("frames", "3 other files): make a video of the images"), ("frames/*.png", "none of them a video: make a video of"),
        ("rtsp://127.0.0.1/live", "rtsp:// is no protocol of files"), ("list.txt", "no video: give the videos of a list themselves"), ("all.zip", "no video: unpack the archive"),
        ("table.parquet", "no video: videos inside tables are not read"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(hint)):
            find_videos([source if "://" in source else str(tmp_path / source)])


def test_what_is_not_there_is_named_and_what_is_hidden_left_out(tmp_path, videos, monkeypatch, caplog):
    """Without a warning, nobody would miss the videos of an unmounted disk. Trash and snapshot folders are left out on purpose."""
    folder = tmp_path / "drives"
    for inner in ("seen", ".Trash-1000/files", ".snapshot/hourly.0", "closed"):
        (folder / inner).mkdir(parents=True)
        shutil.copy(videos[0], folder / inner / "a.mp4")
    found = [str(folder / "closed" / "a.mp4"), str(folder / "seen" / "a.mp4")]
    assert find_videos([str(folder)]) == found and not caplog.text
    (folder / "b.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (folder / "day2").symlink_to(tmp_path / "unmounted")
    assert find_videos([str(folder)]) == found
    assert f"2 links lead nowhere and are left out, the first is {folder}/b.mp4" in caplog.text
    caplog.clear()
    assert find_videos([str(folder / "**" / "*.mp4")]) == found and "1 links lead nowhere" in caplog.text
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)  # root may list any folder
    assert find_videos([str(folder)]) == found[1:]
    assert f"{folder}/closed cannot be listed (Permission denied): what lies in it is left out" in caplog.text
    with tarfile.open(tmp_path / "SHARD.TAR", "w") as archive:
        archive.add(videos[0], arcname="a.mp4")
    (member,) = find_videos([str(tmp_path / "SHARD.TAR")])
    assert next(video_pairs(member, SAMPLING, 0))["frames"].shape == (2, 3, 32, 64)


def test_a_pattern_of_remote_tars_is_opened_as_a_local_one(tmp_path, videos):
    memory = fsspec.filesystem("memory")
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
            archive.add(videos[shard], arcname=f"{shard}.mp4")
        memory.put(str(tmp_path / f"{shard}.tar"), f"/shards/{shard}.tar")
    memory.put(videos[2], "/shards/2.mp4")
    members = [found.replace(f"{tmp_path}/", "memory://shards/") for found in find_videos([str(tmp_path / "*.tar")])]
    assert len(members) == 2
    found = find_videos(["memory://shards/*.tar"])
    assert [name.replace("memory:///", "memory://") for name in found] == members
    assert next(video_pairs(found[0], SAMPLING, 0))["frames"].shape == (2, 3, 32, 64)
    assert len(find_videos(["memory://shards/*"])) == 3
    memory.rm("/shards", recursive=True)
