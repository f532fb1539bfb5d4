"""
Reads the videos named on standard input, one after the other, as a loader's worker does, and prints a line of JSON for each: seconds,
MiB of memory that it took at its peak beyond what was there before, pairs of two epochs, and (path, reason) of what was skipped, once for
each epoch. A process of its own, so that the test survives what the reader does not.
"""

import json
import sys
import time

from training.pair_plans import PairSampling
from training.video_stream import _PENDING, generate_pairs


def memory(field: str) -> int:
    """KiB of this process, from Linux."""
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
            peak.write("5")  # VmHWM begins anew
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
