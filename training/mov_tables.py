"""
Read the tables of a MOV or MP4, for two purposes.

[`read_tables`] tells how large an index FFmpeg will make of a file, before FFmpeg opens it. A file of a few KB can declare tracks of 2³²
samples each, for which FFmpeg allocates memory at once. FFmpeg tolerates disorder, so the search finds tables by name anywhere except in
the media data. It counts all that they declare. Only sound that FFmpeg indexes in groups counts as less, if nothing contradicts this.

[`track`] tells when and in which orientation a track's frames are shown, which is otherwise known only after reading the whole file. Its
rule is the opposite: tables that are not in perfect order are ignored.
"""

import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_WINDOW = 1 << 26  # bytes that are searched at once: boxes are far smaller, except in films that last days
_OVERLAP = 64  # bytes of overlap, so that one of two windows holds all fields of a table
_MOST_BOXES = 10_000  # in one box
_PCM_SAMPLES = 1024  # in one entry of FFmpeg's index of a sound whose samples all have the same duration
# The upper left 2x2 of a display matrix (a, b, c, d) -> the counter-clockwise turns by 90 degrees that it asks for.
_TURNS = {(1, 0, 0, 1): 0, (0, -1, 1, 0): 1, (-1, 0, 0, -1): 2, (0, 1, -1, 0): 3}


class Tables(NamedTuple):
    """
    What [`read_tables`] finds in a file.

    Args:
        entries: number of entries in the index that FFmpeg makes; 0 for other containers.
        movie: contents of the moov box if it alone describes all frames, else None.
    """

    entries: int
    movie: bytes | None


class Track(NamedTuple):
    """
    What the tables say about a track's samples, in decoding order.

    Args:
        offsets: (samples,) int64, in the track's time base: presentation time minus decoding time, up to a constant for all samples.
        quarter_turns: counter-clockwise turns by 90 degrees from the coded to the displayed frame; None for any other transform.
    """

    offsets: np.ndarray
    quarter_turns: int | None


def read_tables(file, size: int, remote: bool, check) -> Tables:
    """
    Read the tables of a file.

    Args:
        file: an object with `seek` and `read`.
        size: of the file, in bytes.
        remote: stop where FFmpeg stops on opening, at the first media data after the tables. Each later box may take a request.
        check: called for each box and each window; raises when the time is up.
    """
    boxes = []
    for kind, begin, end in _top_boxes(file, size):
        check()
        if kind == b"mdat":
            if remote and any(kind == b"moov" for kind, _, _ in boxes):
                break
            continue
        boxes.append((kind, begin, end))
    if not {b"moov", b"moof", b"hoov", b"free"} & {kind for kind, _, _ in boxes}:
        return Tables(0, None)
    movies = []
    samples = fragments = edits = 0
    for kind, begin, end in boxes:
        file.seek(begin)
        # FFmpeg does not look further into other free boxes either.
        if kind == b"free" and file.read(8)[4:] not in (b"mvhd", b"cmov"):
            continue
        if kind in (b"moov", b"moof", b"hoov", b"free"):
            movies.append(None)
        for place in range(begin, end, _WINDOW):
            check()
            file.seek(place)
            data = _read(file, min(_WINDOW + _OVERLAP, end - place))
            more_samples, more_fragments, more_edits = _count(data, kind == b"moov" and place == begin)
            samples, fragments, edits = samples + more_samples, fragments + more_fragments, max(edits, more_edits)
            if kind == b"moov" and len(data) == end - begin:
                movies[-1] = data
    entries = samples * max(edits, 1) + fragments  # each edit of a track can show all of its samples again
    return Tables(entries, movies[0] if len(movies) == 1 and not fragments else None)


def track(movie: bytes, number: int) -> Track | None:
    """
    Return the track of a movie with the given number.

    The result is None unless its tables are complete, present once each, where they should be, and simple. Simple means no fragments, and
    at most one edit besides empty ones, which only delay its start.
    """
    try:
        movie = _children(memoryview(movie))
        if b"mvex" in movie:
            return None
        header = _only(movie, b"mvhd")
        (found,) = (box for box in map(_children, movie[b"trak"]) if _track_number(box) == number)
        edits = [edit for box in found.get(b"edts", []) for edit in _children(box).get(b"elst", [])]
        if sum(_edits(bytes(edit), 0) for edit in edits) > 1:
            return None
        table = _children(_only(_children(_only(_children(_only(found, b"mdia")), b"minf")), b"stbl"))
        (sizes,) = table.get(b"stsz", []) + table.get(b"stz2", [])
        samples = _number(sizes, 8)
        if b"ctts" in table:
            offsets = _only(table, b"ctts")
            runs = np.frombuffer(offsets[8:], ">i4").reshape(_number(offsets, 4), 2).astype(np.int64)
            # FFmpeg reads counts as signed numbers, and discards the whole table if an offset is implausibly large.
            if (runs[:, 0] < 0).any() or runs[:, 0].sum() != samples or (abs(runs[:, 1]) >= 1 << 28).any():
                return None
            offsets = np.repeat(runs[:, 1], runs[:, 0])
        else:
            offsets = np.zeros(samples, np.int64)
        whole = _matrix(header, 36) == (1, 0, 0, 1)
        return Track(offsets, _TURNS.get(_matrix(_only(found, b"tkhd"), 40)) if whole else None)
    except (ValueError, KeyError, IndexError):
        return None


def _children(data: memoryview) -> dict[bytes, list[memoryview]]:
    """Return the boxes inside a box, by their types."""
    found, place, count = {}, 0, 0
    while place < len(data):
        length, count = _number(data, place), count + 1
        if length < 8 or place + length > len(data) or count > _MOST_BOXES:
            raise ValueError("boxes out of order")
        found.setdefault(bytes(data[place + 4 : place + 8]), []).append(data[place + 8 : place + length])
        place += length
    return found


def _only(boxes: dict[bytes, list[memoryview]], name: bytes) -> memoryview:
    (box,) = boxes[name]
    return box


def _track_number(boxes: dict[bytes, list[memoryview]]) -> int:
    header = _only(boxes, b"tkhd")
    return _number(header, 20 if header[0] == 1 else 12)


def _matrix(header: memoryview, place: int) -> tuple:
    """Return the upper left 2x2 of a header's matrix. It lies at `place` in version 0, and 12 bytes later in version 1 (64-bit times)."""
    place += 12 if header[0] == 1 else 0
    matrix = np.frombuffer(header[place : place + 36], ">i4")
    return tuple((matrix.reshape(9)[[0, 1, 3, 4]] / 65536).tolist())


def _top_boxes(file, size: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield the type of each top-level box, and where its contents begin and end, as FFmpeg goes through the boxes."""
    place = 0
    while place + 8 <= size:
        file.seek(place)
        head = file.read(16)
        begin, length = place + 8, int.from_bytes(head[:4])
        if length == 1:
            begin, length = place + 16, int.from_bytes(head[8:])
        end = size if length == 0 else min(place + length, size)
        if end < begin or len(head) < 8:
            return
        yield head[4:8], begin, end
        place = end


def _read(file, size: int) -> bytes:
    parts = []
    while size > 0 and (part := file.read(size)):  # a remote file may give less than was asked for
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _inflated(data: bytes) -> bytes:
    """Return the tables of a QuickTime movie with a compressed header, or nothing if there is none."""
    places = list(_tables(data, b"cmvd"))
    if not places:
        return b""
    inflater = zlib.decompressobj()
    try:
        header = inflater.decompress(data[places[0] + 4 :], _WINDOW)
    except zlib.error:
        return b""
    if inflater.unconsumed_tail or len(places) > 1:
        raise ValueError("compressed headers of unknown size")
    return header[8:]


def _count(data: bytes, movie: bool) -> tuple[int, int, int]:
    """Count the samples of tracks, those of fragments, and the most edits of a track. `movie`: `data` begins a moov box's contents."""
    samples = fragments = edits = 0
    for text in (data, _inflated(data)):
        sound = _plain_sound(text) if movie else []
        for name in (b"stsz", b"stz2"):
            for place in _tables(text, name):
                known = [entries for begin, end, entries in sound if begin <= place < end]
                samples += known[0] if known else _number(text, place + 8)
        fragments += sum(_number(text, place + 4) for place in _tables(text, b"trun"))
        edits = max([edits, *(_edits(text, place) for place in _tables(text, b"elst"))])
    return samples, fragments, edits


def _tables(data: bytes, name: bytes) -> Iterator[int]:
    """Yield the place after the header of each box of this type, where its version and flags are."""
    place = data.find(name, 4)
    while place >= 0:
        yield place + (12 if _number(data, place - 4) == 1 else 4)
        place = data.find(name, place + 4)


def _number(data: bytes | memoryview, place: int) -> int:
    return int.from_bytes(data[place : place + 4])


def _edits(data: bytes, place: int) -> int:
    count, wide = _number(data, place + 4), data[place : place + 1] == b"\1"
    length = 20 if wide else 12
    table = data[place + 8 : place + 8 + count * length]
    begin, end = (8, 16) if wide else (4, 8)
    empty = sum(table[i + begin : i + end] == b"\xff" * (end - begin) for i in range(0, len(table), length))
    return count - empty


def _plain_sound(data: bytes) -> list[tuple[int, int, int]]:
    """
    Find the tracks of sound of which FFmpeg indexes up to 1024 samples of a chunk in one entry. Hours of PCM have a thousand times as many
    samples as such entries.

    Only tracks that are where they should be count, and only if they contain nothing that could make FFmpeg treat them otherwise.

    Returns:
        Begin, end and number of entries of each such track.
    """
    found, place = [], 0
    while place + 8 <= len(data):
        length, kind = _number(data, place), data[place + 4 : place + 8]
        if length < 8:
            break
        track = data[place + 8 : place + length]
        place += length
        if kind != b"trak" or len(track) != length - 8 or b"trak" in track:
            continue
        handlers = {track[at + 8 : at + 12] for at in _tables(track, b"hdlr")}
        times = {(_number(track, at + 4), _number(track, at + 12)) for at in _tables(track, b"stts")}
        if not {b"soun"} <= handlers <= {b"soun", b"alis", b"url ", b"mdta", b"mdir"} or times != {(1, 1)}:
            continue
        chunks = max([0, *(_number(track, at + 4) for name in (b"stco", b"co64") for at in _tables(track, name))])
        runs = [
            np.frombuffer(track, ">u4", min(_number(track, at + 4), (len(track) - at - 8) // 12) * 3, at + 8)
            for at in _tables(track, b"stsc")
        ]
        firsts = [int(run[::3].max()) for run in runs if len(run)]
        most = max([0, *(int(run[1::3].max()) for run in runs if len(run))])
        if len(firsts) == len(runs) and all(first <= chunks for first in firsts):
            found.append((place - length, place, chunks * -(-most // _PCM_SAMPLES)))
    return found
