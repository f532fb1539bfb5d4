"""Videos as training and evaluation must take them alike: which files, up to which size, which stream, and which way up. PyAV itself is the callers'."""

from importlib.metadata import version

import numpy as np

EXTENSIONS = (
    ".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".wmv", ".flv", ".3gp", ".ogv",
)  # fmt: skip
# Containers that hold their frames themselves: FFmpeg also reads playlists and scripts, which name other files and addresses to open.
CONTAINERS = "mov,matroska,avi,mpeg,mpegts,mpegvideo,asf,flv,ogg,mxf,nut,ivf,m4v,h264,hevc"
# The largest picture of any level of H.264, HEVC, VP9 and AV1 (8192x4352: 8K and DCI 8K are within). Larger ones are refused before
# memory is taken for them: a file of a few bytes can declare 65536x65536.
MAX_PIXELS = 35_651_584
# Tags that are not UTF-8 (AVI has Latin-1) are no reason to leave a video out. From 19 on PyAV takes any, and knows no such argument.
ANY_TAGS = {"metadata_errors": "replace"} if int(version("av").split(".")[0]) < 19 else {}


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
