"""
When precomputed flow pays: milliseconds to decode a pair, and to compute, write and read its flow in both directions; and the flow's bytes.

    python benchmarks/precomputed.py                                                  # DIS on the street, 128x256 and 512x1024
    python benchmarks/precomputed.py --videos path/to/videos --raft raft_large        # and RAFT, on the device; on a GPU add --bf16 --raft_pairs 16

Milliseconds are processor time of this one process, for RAFT on a GPU elapsed time; files are read from the page cache.
`passes`: how often runs must go through the written pairs until writing and reading flow costs less than computing it each time. The writer
decodes every pair once more, so this is (decode + compute + write) / (compute - read).
`mb_a_second`: the rate at which storage must deliver flow for each core (for RAFT: for the device) that would otherwise compute it,
bytes / (compute - read). Below this rate, reading takes longer than computing.
RAFT without `--flow_weights` has random weights: its time is right, and its size, writing and reading are those of DIS.
"""

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import torch

from benchmarks.common import Clock, benchmark_parser, medians, print_table, write_json
from training.flow import DisFlow, RaftFlow
from training.flow_files import FlowFiles, opening_file
from training.flow_writer import write_opening
from training.pair_plans import PairSampling
from training.street_files import street_videos
from training.video_sources import find_videos
from training.video_stream import video_pairs

SIZES = ((128, 256), (512, 1024))


def openings(paths: list[str], size: tuple[int, int], pairs: int) -> list[tuple[list[dict], float]]:
    """Decode openings of two pairs each and the seconds that each took, from every video in turn, then from the next epoch."""
    sampling = PairSampling(size, (1.0, 1.25), None, (0.5, 1.5), pairs_per_video=2)
    groups = []
    for n in range(-(-pairs // 2)):
        began = time.process_time()
        samples = list(video_pairs(paths[n % len(paths)], sampling, n // len(paths)))
        groups.append((samples, time.process_time() - began))
    return groups


def keep(groups: list[tuple[list[dict], float]], folder: Path, compute) -> dict[str, float]:
    """Medians over openings, per pair: milliseconds to decode, compute, write and read, and KiB of flow."""
    rows, reader = [], FlowFiles(folder)
    for samples, decoding in groups:
        marks = [time.process_time()]
        for sample in samples:
            compute(sample)
        marks.append(time.process_time())
        file = opening_file(folder, samples[0]["epoch"], samples[0]["video"])
        size = write_opening(file, samples[0]["video"], samples)
        marks.append(time.process_time())
        for sample in samples:
            reader(sample)
        marks.append(time.process_time())
        parts = [decoding, *(b - a for a, b in zip(marks, marks[1:]))]
        seconds = dict(zip(("decode_ms", "compute_ms", "write_ms", "read_ms"), parts))
        rows.append(
            {**{name: 1000 * s / len(samples) for name, s in seconds.items()}, "kib": size / len(samples) / 1024}
        )
    return medians(rows[1:] or rows)  # the first opening also loads libraries


def raft_ms(module: RaftFlow, frames: torch.Tensor, bf16: bool, repeats: int) -> float:
    """Milliseconds per pair in the fastest of `repeats` calls on frames (B, 2, 3, H, W), after a warm-up call."""
    device, seconds = frames.device, []
    now = Clock(device).now
    for _ in range(repeats + 1):
        began = now()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            module(frames)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(now() - began)
    return 1000 * min(seconds[1:]) / len(frames)


def paying(row: dict) -> dict:
    """Add `passes` and `mb_a_second` to a row; both are `None` if precomputed flow never pays."""
    saved = row["compute_ms"] - row["read_ms"]
    if saved <= 0:
        return {**row, "passes": None, "mb_a_second": None}
    writing = row["decode_ms"] + row["compute_ms"] + row["write_ms"]
    return {**row, "passes": writing / saved, "mb_a_second": row["kib"] * 1.024 / saved}


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--videos", nargs="+", help="files, folders, ...; without it the street")
    parser.add_argument("--crop_size", type=int, nargs=2, help="one size instead of 128x256 and 512x1024")
    parser.add_argument("--pairs", type=int, default=20, help="pairs that count")
    parser.add_argument("--raft", choices=("raft_large", "raft_small"), help="also this one")
    parser.add_argument("--flow_weights", help="its weights")
    parser.add_argument("--flow_updates", type=int, default=24, help="its iterations")
    parser.add_argument("--raft_pairs", type=int, default=1, help="pairs that it computes at once, as a step does")
    parser.add_argument("--bf16", action="store_true", help="it computes as in a run with --bf16, in half precision")
    parser.add_argument("--repeats", type=int, default=3, help="calls of it that count")
    options = parser.parse_args()
    if options.raft_pairs < 1:
        parser.error(f"--raft_pairs must be at least 1, got {options.raft_pairs}")
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    paths, rows = find_videos(options.videos) if options.videos else street_videos(), []
    for size in [tuple(options.crop_size)] if options.crop_size else SIZES:
        groups = openings(paths, size, max(options.pairs + 2, options.raft_pairs))
        with tempfile.TemporaryDirectory() as folder:
            row = {"size": f"{size[0]}x{size[1]}", "flow": "dis", **keep(groups, Path(folder, "dis"), DisFlow())}
            rows.append(paying(row))
            if options.raft:
                module = RaftFlow(options.raft, options.flow_weights or "random", options.flow_updates).to(device)
                if options.flow_weights:

                    def compute(sample, module=module):
                        sample["flow"] = module(torch.from_numpy(sample["frames"])[None].to(device))[0].cpu().numpy()

                    row = {**row, **keep(groups, Path(folder, "raft"), compute)}
                samples = [sample for of_opening, _ in groups for sample in of_opening][: options.raft_pairs]
                frames = torch.stack([torch.from_numpy(sample["frames"]) for sample in samples]).to(device)
                time_of = raft_ms(module, frames, options.bf16, options.repeats)
                how = (
                    f"{options.flow_updates} updates, {len(samples)} pair(s) at once{', bf16' if options.bf16 else ''}"
                )
                rows.append(paying({**row, "flow": f"{options.raft}, {how}", "compute_ms": time_of}))
    formats = {
        "decode_ms": ".1f",
        "compute_ms": ".1f",
        "write_ms": ".1f",
        "read_ms": ".1f",
        "kib": ".0f",
        "passes": ".2f",
    }
    print_table(rows, {"size": "", "flow": "", **formats, "mb_a_second": ".1f"})
    write_json(options.json, {"rows": rows})


if __name__ == "__main__":
    main()
