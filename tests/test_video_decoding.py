"""Frames of MOV and MP4 files, decoded alone and in passes, from new files and from files already indexed."""

import dataclasses

import av
import numpy as np
import pytest
from fuzzed_videos import FAST, FRAMES, RATE, Kind, write_clip
from test_mov_tables import ALL, WHOLE, with_matrix

from evaluation.explore_features import read_clip
from training import video_decoding, video_files
from training.pair_plans import PairSampling
from training.video_decoding import Cut, cut_frame, decode_cuts
from training.video_files import UnreadableVideo
from training.video_index import index_video, read_index
from training.video_stream import video_pairs


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return {name: write_clip(folder / name, kind) for name, kind in ALL.items()}


@pytest.mark.parametrize("name", ALL)
def test_each_frame_is_found_alone_as_in_one_pass(clips, name):
    path = str(clips[name])
    index = read_index(path)
    whole = (0, 0, index.width, index.height), (index.height, index.width)
    together, _ = decode_cuts(path, index, [Cut(number, *whole) for number in range(FRAMES)])
    for number in range(FRAMES):
        (alone,), _ = decode_cuts(path, index, [Cut(number, *whole)])
        assert np.array_equal(alone, together[number]), number


@pytest.mark.parametrize("name", ALL)
def test_a_new_file_is_opened_once_and_gives_what_a_known_one_gives(clips, monkeypatch, name):
    path, opened, open_container = str(clips[name]), [], video_files.av.open
    monkeypatch.setattr(video_files.av, "open", lambda file, **how: opened.append(file) or open_container(file, **how))
    sampling = PairSampling(crop_size=(48, 64), frame_gap_seconds=(0.2, 0.5), pairs_per_video=3)
    stated = read_index(path).stated
    once = len(opened)  # 2 for MPEG-4 Part 2, else 1
    index_video.cache_clear()
    first = list(video_pairs(path, sampling, 0))
    assert len(opened) == once + (once if stated else 2 * once)
    again = list(video_pairs(path, sampling, 0))
    assert len(first) == 3 and index_video.kept
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(one["frames"], other["frames"]) and np.array_equal(one["times"], other["times"])


@pytest.mark.parametrize("container", ["mp4", "mkv", "ts"])
def test_frames_between_intra_refreshes_are_found(tmp_path, container):
    """A marked keyframe gives no whole picture until every part has been refreshed, at the next mark 8 frames later."""
    options = {**FAST, "x264-params": "intra-refresh=1:bframes=0"}
    path = str(write_clip(tmp_path / f"clip.{container}", Kind("", "libx264", size=(144, 176), options=options)))
    whole = (0, 0, 176, 144), (144, 176)
    with av.open(path) as video:
        in_turn = [cut_frame(frame, *whole, 0) for frame in video.decode(video=0)]
    index = read_index(path)
    assert len(index.keyframes) == 3 and len(in_turn) == FRAMES
    together, _ = decode_cuts(path, index, [Cut(number, *whole) for number in range(FRAMES)])
    assert np.array_equal(together, in_turn)
    for number in range(FRAMES):
        (alone,), _ = decode_cuts(path, index, [Cut(number, *whole)])
        assert np.array_equal(alone, in_turn[number]), number


def test_a_frame_that_is_not_there_is_looked_for_a_bounded_number_of_times(clips, monkeypatch):
    path, sought, packets_up_to = str(clips["intra.mov"]), [], video_decoding._packets_up_to
    monkeypatch.setattr(video_decoding, "_packets_up_to", lambda *a: sought.append(a[4]) or packets_up_to(*a))
    index = read_index(path)
    decode_cuts(path, index, [Cut(12, *WHOLE)])
    assert sought == [index.pts[12]]
    untrue = index.pts[:]
    untrue[12] += 1
    with pytest.raises(UnreadableVideo, match="skips the frame at 1.00 s"):
        decode_cuts(path, dataclasses.replace(index, pts=untrue), [Cut(12, *WHOLE)])
    assert sought[1:] == list(index.pts[12:8:-1])


@pytest.mark.parametrize("sides", [(-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0), (0, 1, -1, 0)])
def test_mirrored_frames_are_shown_as_their_matrix_says(clips, tmp_path, sides):
    """The matrix is x' = a x + c y, y' = b x + d y, with y down (ISO 14496-12)."""
    data, path = clips["h264.mp4"].read_bytes(), tmp_path / "clip.mp4"
    path.write_bytes(with_matrix(data, b"tkhd", *sides))
    plain, (a, b, c, d) = str(clips["h264.mp4"]), sides

    def shown(coded):
        y, x = np.indices(coded.shape[1:])
        x, y = a * x + c * y, b * x + d * y
        picture = np.empty((3, np.ptp(y) + 1, np.ptp(x) + 1), np.uint8)
        picture[:, y - y.min(), x - x.min()] = coded
        return picture

    expected = shown(decode_cuts(plain, read_index(plain), [Cut(5, *WHOLE)])[0][0])
    index = read_index(str(path))
    assert (index.height, index.width) == expected.shape[1:]
    cuts = [Cut(5, (0, 0, index.width, index.height), expected.shape[1:]), Cut(5, (8, 6, 40, 42), (36, 32))]
    (whole, part), _ = decode_cuts(str(path), index, cuts)
    assert np.array_equal(whole, expected)
    assert np.abs(part.astype(int) - expected[:, 6:42, 8:40]).max() < 5  # colours differ slightly at a crop's edges
    of_page, plain_of_page = (
        read_clip(file, 5 / RATE, 1, 1, 64).frames[0].transpose(2, 0, 1) for file in (str(path), plain)
    )
    assert np.array_equal(of_page, shown(plain_of_page))


def test_damage_stays_up_to_the_next_group_of_pictures(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", ALL["h264.mp4"])
    data = path.read_bytes()
    with av.open(str(path)) as video:
        entries = list(video.streams.video[0].index_entries)
        keys = [number for number, entry in enumerate(entries) if entry.is_keyframe]
    first = keys[1] + 1
    place, size = entries[first].pos, entries[first].size
    path.write_bytes(data[: place + size // 2] + bytes(size - size // 2) + data[place + size :])
    index, outcomes = read_index(str(path), whole=True), []
    for number in range(FRAMES):
        try:
            decode_cuts(str(path), index, [Cut(number, *WHOLE)])
            outcomes.append(True)
        except UnreadableVideo:
            outcomes.append(False)
    end = keys[2] if len(keys) > 2 else FRAMES
    assert outcomes == [not first <= number < end for number in range(FRAMES)]
