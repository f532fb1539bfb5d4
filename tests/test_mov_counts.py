"""How many table entries a MOV or MP4 is counted to have before it is opened."""

import io
import zlib
from pathlib import Path

import pytest
from fuzzed_videos import (
    FRAMES,
    box,
    declared_samples,
    write_clip,
)
from test_mov_tables import ALL, movie_of, numbers

from training import mov_tables
from training.mov_tables import read_tables


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> dict[str, Path]:
    return {"first.mp4": write_clip(tmp_path_factory.mktemp("movies") / "first.mp4", ALL["first.mp4"])}


def counted(data: bytes, remote: bool = False, file=io.BytesIO) -> int:
    return read_tables(file(data), len(data), remote, lambda: None).entries


def sound(chunks: int, most: int = 1, first: int = 1, samples: int = 10**6, more: bytes = b"") -> bytes:
    """A sound track whose samples have equal durations, with up to `most` samples in each chunk from chunk `first` on."""
    parts = {b"hdlr": bytes(8) + b"soun", b"stts": numbers(0, 1, samples, 1), b"stsc": numbers(0, 1, first, most, 1)}
    parts |= {b"stsz": numbers(0, 1, samples), b"stco": numbers(0, chunks)}
    return box(b"trak", b"".join(box(*part) for part in parts.items()) + more)


@pytest.mark.parametrize(
    ("tracks", "entries"),
    {
        "fewer than are indexed together": (sound(3), 3),
        "one more than are": (sound(3, 1025), 6),
        "beside another track": (sound(3) + box(b"trak", box(b"stsz", numbers(0, 1, 500))), 503),
        "from a chunk that is not there": (sound(3, first=4), 10**6),
        "a track within": (sound(3, more=box(b"trak", b"")), 10**6),
        "longer than its box": (numbers(len(sound(3)) + 1) + sound(3)[4:], 10**6),
    }.values(),
)
def test_plain_sound_counts_by_the_chunk_where_nothing_speaks_against_it(tracks, entries):
    assert counted(box(b"moov", tracks)) == entries


def test_a_table_on_the_edge_of_what_is_looked_at_together_counts(tmp_path, monkeypatch):
    data = declared_samples(tmp_path / "edits.mov", 4_000_000, 1, 20).read_bytes()
    place = data.index(b"stsz") - data.index(b"moov") - 4
    for behind in (2, 6, 14):
        monkeypatch.setattr(mov_tables, "_WINDOW", place + behind)
        assert counted(data) == 80_000_000


def test_a_file_that_gives_less_than_was_asked_for_is_asked_again(clips):
    class Slow(io.BytesIO):
        def read(self, size: int = -1) -> bytes:
            return super().read(min(size, 100))

    data = clips["first.mp4"].read_bytes()
    assert counted(data, file=Slow) == counted(data) == FRAMES
    assert read_tables(Slow(data), len(data), True, lambda: None).movie == movie_of(clips["first.mp4"])


def test_of_a_remote_file_nothing_is_read_behind_the_media_that_follow_its_tables(clips):
    data = clips["first.mp4"].read_bytes()
    media, sought = data.index(b"mdat"), []

    class Remote(io.BytesIO):
        def seek(self, place: int, *how: int) -> int:
            sought.append(place)
            return super().seek(place, *how)

    assert data.index(b"moov") < media
    assert counted(data + box(b"free", bytes(8)), True, Remote) == FRAMES and max(sought) < media
    assert counted(data + box(b"free", bytes(8)), False, Remote) == FRAMES and max(sought) > media


@pytest.mark.parametrize("packed", [[bytes(5000)], [b"", b""]], ids=["a large one", "two"])
def test_compressed_headers_whose_size_nobody_knows_are_refused(monkeypatch, packed):
    monkeypatch.setattr(mov_tables, "_WINDOW", 4096)
    boxes = [box(b"cmvd", bytes(4) + zlib.compress(box(b"moov", more))) for more in packed]
    with pytest.raises(ValueError, match="compressed headers of unknown size"):
        counted(box(b"moov", b"".join(boxes)))
