"""Rules for videos that training and evaluation share: file types, largest size, stream and orientation. Callers import PyAV themselves."""

from importlib.metadata import version

import numpy as np

EXTENSIONS = (
    ".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".wmv", ".flv", ".3gp", ".ogv",
)  # fmt: skip
# Only containers that hold their own frames. FFmpeg also reads playlists and scripts, which name other files and addresses to open.
CONTAINERS = "mov,matroska,avi,mpeg,mpegts,mpegvideo,asf,flv,ogg,mxf,nut,ivf,m4v,h264,hevc"
# The largest picture of any level of H.264, HEVC, VP9 and AV1 (8192x4352: 8K and DCI 8K are within). Larger ones are refused before
# memory is taken for them: a file of a few bytes can declare 65536x65536.
MAX_PIXELS = 35_651_584
# Accept videos whose tags are not UTF-8 (AVI uses Latin-1). From version 19 on PyAV accepts any tags and no longer has this argument.
ANY_TAGS = {"metadata_errors": "replace"} if int(version("av").split(".")[0]) < 19 else {}


def moving(container) -> list:
    """The video streams of a container, without cover pictures: FFmpeg lists these as video streams too, sometimes first."""
    streams = container.streams.video
    return [stream for stream in streams if not stream.disposition & type(stream.disposition).attached_pic]


def upright_of(frame) -> tuple[int, bool]:
    """Number of counter-clockwise turns by 90 degrees with which a frame is displayed, and whether it is mirrored before the turns."""
    turns, matrix = round(frame.rotation / 90) % 4, frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return turns, False
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    mirrored = a * d < b * c
    # FFmpeg computes the angle from the first row of the matrix, which mirroring reverses.
    return (turns + 2 * mirrored) % 4, mirrored
