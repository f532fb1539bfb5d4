"""
RAFT in both directions of a pair: time, memory and agreement of our implementation and of torchvision's, run twice at its defaults.

    python benchmarks/raft.py --crop_size 512 1024 --pairs 8                    # on a GPU
    python benchmarks/raft.py --crop_size 512 1024 --pairs 8 --overfit 300      # also on a RAFT that knows the street
    python benchmarks/raft.py --variant raft_small --crop_size 128 256 --pairs 1 --updates 12 --overfit 100    # a CPU can do this

Ours runs in float32 and, on a GPU, under autocast (float16). Untrained weights give flow of a fraction of a pixel, on which a lower
precision shows no error. --overfit N first fits the weights for N steps to one pair of street frames with exact flow, so that the flow is
large and the update matters. Differences are lengths of vectors, in pixels, to torchvision's flow in float32 without TF32. By default
PyTorch computes float32 convolutions on a GPU in TF32, so both float32 rows are shown there with and without TF32. Weights of your own:
--weights FILE.
"""

import copy
import statistics
import sys
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import Clock, benchmark_parser, memory_bytes, print_table, reset_peak, write_json
from benchmarks.reference import torchvision_twice
from training.flow import RaftFlow
from training.street import Street


def street_pairs(pairs: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Render frames (B, 2, 3, H, W) uint8 a fifth of a second apart, exact flow (B, 2, 2, H, W) and its visibility mask (B, 2, H, W)."""
    frames, flows, seen = [], [], []
    for seed in range(pairs):
        street = Street(seed, height, width)
        frames.append(np.stack([street.frame(t).transpose(2, 0, 1) for t in (1.0, 1.2)]))
        both = [street.flow(1.0, 1.2), street.flow(1.2, 1.0)]
        flows.append(np.stack([flow for flow, _ in both]))
        seen.append(np.stack([visible for _, visible in both]))
    return tuple(torch.from_numpy(np.stack(arrays)) for arrays in (frames, flows, seen))


def overfit(raft: torch.nn.Module, frames: Tensor, flow: Tensor, seen: Tensor, steps: int, updates: int) -> float:
    """Fit the weights to the pairs in both directions. Returns the mean error of the last step in pixels."""
    raft.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(raft.parameters(), lr=4e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-4, total_steps=steps, pct_start=0.1)
    images = frames.float() / 127.5 - 1
    weights = 0.8 ** torch.arange(updates - 1, -1, -1, device=frames.device)  # RAFT's own loss
    for step in range(steps):
        k = step % 2
        found = torch.stack(raft(images[:, k], images[:, 1 - k], num_flow_updates=updates))
        length = (found - flow[:, k]).norm(dim=2)
        error = torch.where(seen[:, k], length, 0.0).sum(dim=(1, 2, 3)) / seen[:, k].sum()
        optimizer.zero_grad()
        (weights * error).sum().backward()
        torch.nn.utils.clip_grad_norm_(raft.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    raft.requires_grad_(False).eval()
    return error[-1].item()


def timed(function, device: torch.device, repeats: int) -> tuple[Tensor, float, float | None]:
    """Return the result, the median milliseconds (processor time on a CPU), and on a GPU the peak GiB above what was held before."""
    clock, seconds, before = Clock(device), [], memory_bytes(device)
    clock.exact = True
    for number in range(repeats + 2):
        if number == 2:
            reset_peak(device)
        clock.seconds = {}
        with clock.part("flow"):
            result = function()
        seconds.append(clock.seconds["flow"])
    # On a CPU the resident memory is no measure: it still includes memory that earlier runs have freed.
    peak = (memory_bytes(device, peak=True) - before) / 2**30 if device.type == "cuda" else None
    return result, 1000 * statistics.median(seconds[2:]), peak


@contextmanager
def tf32_convolutions(allowed: bool):
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--variant", choices=("raft_large", "raft_small"), default="raft_large")
    parser.add_argument("--weights", default="random", help="a .pth or .safetensors file")
    parser.add_argument("--crop_size", type=int, nargs=2, default=[512, 1024])
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--updates", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=10, help="runs that count")
    parser.add_argument("--compile", action="store_true", help="ours compiled as well")
    parser.add_argument("--overfit", type=int, default=0, help="steps of fitting to the street first")
    options = parser.parse_args()
    if any(side % 8 for side in options.crop_size):
        parser.error(f"--crop_size must be multiples of 8, which torchvision's model needs, got {options.crop_size}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    frames, flow, seen = (array.to(device) for array in street_pairs(options.pairs, *options.crop_size))
    ours = RaftFlow(options.variant, options.weights, options.updates).to(device)
    figures = {**vars(options), "device": str(device)}
    if options.overfit:
        figures["overfit_error_px"] = overfit(
            ours.raft, frames[:1], flow[:1].float(), seen[:1], options.overfit, min(options.updates, 12)
        )
        print(f"overfitted for {options.overfit} steps: mean error {figures['overfit_error_px']:.2f} px on its pair")

    def reduced(raft):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return raft(frames)

    # In torchvision's default memory format; our weights are in channels_last.
    plain = RaftFlow(options.variant, "random", options.updates).raft
    plain.load_state_dict(ours.raft.state_dict())
    plain.to(device, memory_format=torch.contiguous_format)
    ways = {
        "torchvision twice": lambda: torchvision_twice(plain, frames, options.updates),
        "ours, float32": lambda: ours(frames),
        "ours, float16": lambda: reduced(ours),
    }
    if options.compile:
        compiled = copy.copy(ours)  # shares the weights
        compiled.compile()
        ways |= {"compiled, float32": lambda: compiled(frames), "compiled, float16": lambda: reduced(compiled)}
    if device.type == "cpu":  # ours stays in float32 there
        ways = {name: way for name, way in ways.items() if "float16" not in name}
    # On a GPU, PyTorch's default convolutions are in TF32, which is not full precision, so both are also measured without TF32.
    full = {f"{name}, no TF32": ways[name] for name in ("torchvision twice", "ours, float32")}
    with tf32_convolutions(False), torch.no_grad():
        expected = ways["torchvision twice"]()
    rows = []
    for name, function in {**ways, **(full if device.type == "cuda" else {})}.items():
        with tf32_convolutions(name not in full):
            found, milliseconds, peak = timed(function, device, options.repeats)
        difference = (found - expected).norm(dim=2)
        rows.append({"RAFT": name, "ms_a_pair": milliseconds / options.pairs, "gib": peak})
        rows[-1] |= {"mean_px": difference.mean().item(), "max_px": difference.max().item()}
        rows[-1]["ratio"] = rows[0]["ms_a_pair"] / rows[-1]["ms_a_pair"]
    length = expected.norm(dim=2).mean().item()
    print(f"{options.variant}, {options.updates} updates, {options.pairs} pairs of {options.crop_size}, {device}")
    print(f"mean length of the flow {length:.2f} px; mean_px, max_px: difference to torchvision in float32, no TF32")
    formats = {"ms_a_pair": ".1f", "ratio": ".2f", "gib": ".2f", "mean_px": ".5f", "max_px": ".5f"}
    print_table(rows, {"RAFT": "", **formats})
    write_json(options.json, {**figures, "mean_flow_px": length, "rows": rows})


if __name__ == "__main__":
    main()
