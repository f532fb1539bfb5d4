"""
The tables of a MOV or MP4, read for two things.

How large an index FFmpeg will make of them, before it is opened: a file of some KB can declare tracks of 2³² samples each, for which
FFmpeg takes memory at once. FFmpeg forgives disorder, so these look for the tables by their names, wherever they stand but in the media
data; nothing that is declared is taken for true but what makes the index smaller.

When and how upright a track's frames are shown ([`track`]), which is else known only once the whole file has been read. Here it is the
other way round: what is not in perfect order tells nothing.
"""

import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_WINDOW = 1 << 26  # bytes that are looked at together: boxes are far smaller, but for films of days
_OVERLAP = 64  # of windows: a table's fields lie whole in one of them
_MOST_BOXES = 10_000  # in a box that is looked through
_PCM_SAMPLES = 1024  # of an entry of the index that FFmpeg makes of sound with one duration for all samples
# The sides of a display matrix (a, b, c, d), and the counter-clockwise turns by 90 degrees that it asks for.
_TURNS = {(1, 0, 0, 1): 0, (0, -1, 1, 0): 1, (-1, 0, 0, -1): 2, (0, 1, -1, 0): 3}


class Tables(NamedTuple):
    """
    Args:
        entries: of the index that FFmpeg makes; 0 of other containers.
        movie: the text of the one moov box by which all frames are described; None of other files.
    """

    entries: int
    movie: bytes | None


class Track(NamedTuple):
    """
    What the tables say of a track's samples, in the order of decoding.

    Args:
        offsets: (samples,) int64; from a sample's decoding to its presentation, all of them up to one number, in the track's time base.
        quarter_turns: counter-clockwise turns by 90 degrees from the coded to the displayed frame; None where it is more than that.
    """

    offsets: np.ndarray
    quarter_turns: int | None


def read_tables(file, size: int, remote: bool, check) -> Tables:
    """
    The tables of a file.

    Args:
        file: with `seek` and `read`.
        remote: look no further than FFmpeg does on opening, up to the first media data behind the tables; each box behind may be a request.
        check: called once a box; raises where the time is over.
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
        if kind == b"free" and file.read(8)[4:] not in (b"mvhd", b"cmov"):  # FFmpeg, too, looks no further into it
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
    A track of a movie by its number; None unless its tables are complete, once each, where they should be, and simple: no fragments, and at
    most one edit, which may begin later.
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
            # FFmpeg takes counts for signed, and throws the table away where offsets are out of all measure.
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
    """The boxes in a box by their types."""
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
    """The sides of the matrix that stands at `place` of a header of version 0, with times of 64 bits 12 bytes behind."""
    place += 12 if header[0] == 1 else 0
    matrix = np.frombuffer(header[place : place + 36], ">i4")
    return tuple((matrix.reshape(9)[[0, 1, 3, 4]] / 65536).tolist())


def _top_boxes(file, size: int) -> Iterator[tuple[bytes, int, int]]:
    """Type, begin and end of the contents of each box of the top level, as FFmpeg goes through them."""
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
    """The tables of a QuickTime movie whose header is compressed."""
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
    """Samples of tracks, samples of fragments, and edits of the track that has the most. `movie`: the text is that of a moov box."""
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
    """Places behind the head of each box of this type, where its version and flags stand."""
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
    Begin and end of each track whose samples FFmpeg indexes not one by one, but 1024 of a chunk together, with the entries: hours of
    PCM have a thousand times the samples. Only of tracks that stand where they should and hold nothing by which they could be others.
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
