"""What PyAV says of a video's streams and frames, which training and evaluation must take alike. PyAV itself is the callers'."""

import numpy as np


def moving(container) -> list:
    """The video streams of a container. FFmpeg makes one of a cover picture too, which may stand before them."""
    streams = container.streams.video
    return [stream for stream in streams if not stream.disposition & type(stream.disposition).attached_pic]


def upright_of(frame) -> tuple[int, bool]:
    """Counter-clockwise turns by 90 degrees that a frame is displayed with, and whether it is mirrored before these."""
    turns, matrix = round(frame.rotation / 90) % 4, frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return turns, False
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    mirrored = a * d < b * c
    # FFmpeg's angle is that of the matrix's first row, which mirroring turns round.
    return (turns + 2 * mirrored) % 4, mirrored
