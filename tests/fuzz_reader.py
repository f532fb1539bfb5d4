"""
Read the videos named on standard input, one after the other, as a loader's worker does, and print a line of JSON for each.

The line holds the seconds, the MiB by which memory rose at its peak, the number of pairs in two epochs, and (path, reason) of each skipped
video, once for each epoch. It runs as a separate process, so that the test survives if the reader does not.
"""

import json
import sys
import time

from training.pair_plans import PairSampling
from training.video_stream import _PENDING, generate_pairs


def memory(field: str) -> int:
    """Return a memory figure of this process in KiB, from Linux."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))


def main():
    sampling = PairSampling(
        crop_size=(32, 48), frame_scale=(1.0, 1.5), frame_gap_seconds=(0.2, 0.8), pairs_per_video=2
    )
    print("ready", flush=True)
    for line in sys.stdin:
        path = line.rstrip("\n")
        with open("/proc/self/clear_refs", "w") as peak:
            peak.write("5")  # resets VmHWM
        before, start = memory("VmRSS"), time.monotonic()
        samples = list(generate_pairs([((0, path),), ((1, path),)], sampling))
        seconds, peak = time.monotonic() - start, memory("VmHWM")
        shapes = {sample["frames"].shape for sample in samples}
        assert shapes <= {(2, 3, 32, 48)}, shapes
        skipped = [entry for sample in samples for entry in sample["skipped"]] + _PENDING
        _PENDING.clear()
        entry = {"path": path, "seconds": seconds, "mib": (peak - before) / 1024, "pairs": len(samples)}
        print(json.dumps({**entry, "skipped": skipped}), flush=True)


if __name__ == "__main__":
    main()
