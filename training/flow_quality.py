"""
Measure how good an estimator's flow is, against the street's exact flow.

    python -m training.flow_quality --flow dis --flow unflow:DIR [--gaps 0.25 0.5 1.0] [--drives 24] [--size 128 256] [--camera NAME] [--json FILE]

Flows: zero, exact (shows what the forward-backward check does with the street's own flow), dis, raft_large, raft_small (with a file of
weights: raft_small:FILE), unflow:DIR. The figures are taken over both directions of one pair of each held-out drive, all pixels together:

- `epe_mean`, `epe_median`: end-point error in pixels, over pixels whose point is seen in the other frame;
- `kept`: share of all pixels that PooDLe's forward-backward check keeps;
- `wrong`: share of the kept pixels whose error is above 3 px;
- `hidden`: share of the kept pixels whose point is not seen in the other frame;
- `wrong_seen`: share of the kept and seen pixels whose error is above 3 px, that is wrong matches apart from occlusion.

Two figures describe the exact flow at points that are seen: `motion` is its mean length in pixels, and `not_affine` its mean distance in
pixels from the affine map of the whole frame that fits it best.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from modeling_poodle.geometry_poodle import flow_valid_mask
from modeling_poodle.recipe_files import run_script
from training.flow import flow_function
from training.street import Street
from training.street_cameras import CAMERAS, check_camera
from training.street_labels import HELD_OUT_SEED, held_out_time

WRONG = 3.0  # pixels


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "training.flow_quality", description="Measure flow against the street's exact one."
    )
    parser.add_argument("--flow", action="append", required=True, metavar="NAME[:FILE]", help="Estimator; repeatable.")
    parser.add_argument("--gaps", type=float, nargs="+", default=[0.25, 0.5, 1.0], help="Seconds between the frames.")
    parser.add_argument("--drives", type=int, default=24, help="Held-out drives, one pair of each.")
    parser.add_argument("--camera", default="driving", help=f"One of {', '.join(CAMERAS)}.")
    parser.add_argument("--size", type=int, nargs=2, default=[128, 256], help="Height and width of the frames.")
    parser.add_argument("--json", type=Path, help="Write the figures there as well.")
    options = parser.parse_args(arguments)
    if options.drives < 1 or min(options.gaps) < 0:
        raise ValueError(
            f"--drives must be at least 1 and --gaps not negative, got {options.drives} and {options.gaps}"
        )
    check_camera(options.camera, "--camera")
    estimators = {spec: build_estimator(spec) for spec in dict.fromkeys(options.flow)}
    names = [spec.partition(":")[0] for spec in estimators]
    # The table shows a file's path only if the name alone does not tell two estimators apart.
    shown = {spec: spec if names.count(name) > 1 else name for spec, name in zip(estimators, names)}
    results = []
    for gap in options.gaps:
        pairs = held_out_pairs(options.drives, *options.size, gap, options.camera)
        if not any(visible.any() for _, _, visible in pairs):
            raise ValueError(f"--gaps {gap:g}: no point of a frame is seen that long after it; give shorter gaps")
        results += [{"flow": shown[spec], "gap": gap, **measure(each, pairs)} for spec, each in estimators.items()]
    table = [["flow", "gap, s", "mean error, px", "median", "kept, %", "of these wrong, %"]]
    table[0] += ["hidden, %", "wrong of kept and seen, %", "motion, px", "not affine, px", "ms a pair"]
    for r in results:
        shares = [
            "" if r[name] is None else f"{100 * r[name]:.1f}" for name in ("kept", "wrong", "hidden", "wrong_seen")
        ]
        errors = [f"{r['epe_mean']:.2f}", f"{r['epe_median']:.2f}"]
        motion = [f"{r['motion']:.2f}", f"{r['not_affine']:.2f}"]
        table.append([r["flow"], f"{r['gap']:g}", *errors, *shares, *motion, f"{r['ms']:.0f}"])
    print("\n".join(f"| {' | '.join(row)} |" for row in [table[0], ["---"] * len(table[0]), *table[1:]]))
    if options.json is not None:
        measured = {"drives": options.drives, "size": options.size, "first_seed": HELD_OUT_SEED, "wrong_above": WRONG}
        measured["table"] = table
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**measured, "results": results}, indent=1) + "\n", encoding="utf-8")


def build_estimator(spec: str):
    """
    Build the estimator that is named by NAME or NAME:FILE.

    Returns:
        A function from frames (2, 3, H, W) uint8 to flow (2, 2, H, W) float32, or `None` for the exact flow.

    Raises:
        ValueError: the name is unknown, or the weights cannot be loaded.
    """
    name, _, file = spec.partition(":")
    if name == "zero":
        return lambda frames: np.zeros((2, 2, *frames.shape[-2:]), np.float32)
    if name == "exact":
        return None
    if name == "unflow" and not file:
        raise ValueError("--flow unflow needs its model: --flow unflow:DIR")
    if name == "precomputed":
        raise ValueError("--flow precomputed is of other pairs: name the estimator that wrote it")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    estimate = flow_function(name, device, weights=file or None, model=file)
    return lambda frames: estimate(torch.from_numpy(frames)[None].to(device))[0].cpu().numpy()


def held_out_pairs(
    drives: int, height: int, width: int, gap: float, camera: str = "driving"
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """
    Render one pair of each held-out drive.

    Returns:
        For each drive: frames (2, 3, H, W) uint8, exact flow (2, 2, H, W), and a mask (2, H, W), True where the point is seen in the other
        frame.
    """
    pairs = []
    for number in range(drives):
        street, begin = Street(HELD_OUT_SEED + number, height, width, camera=camera), held_out_time(number)
        frames = np.stack([street.frame(begin), street.frame(begin + gap)]).transpose(0, 3, 1, 2)
        flows, seen = zip(street.flow(begin, begin + gap), street.flow(begin + gap, begin))
        pairs.append((np.ascontiguousarray(frames), np.stack(flows), np.stack(seen)))
    return pairs


def measure(estimate, pairs) -> dict[str, float | None]:
    """
    Compute the figures of one estimator over all pairs.

    Args:
        estimate: of [`build_estimator`]; `None` for the exact flow.
        pairs: of [`held_out_pairs`].

    Returns:
        The figures by the names at the top of this file, and `ms`, milliseconds a pair. Shares of no pixel at all are `None`.
    """
    errors, seen, kept, motion, seconds = [], [], [], [], 0.0
    for frames, exact, visible in pairs:
        began = time.perf_counter()
        flow = np.ascontiguousarray(exact if estimate is None else estimate(frames), dtype=np.float32)
        seconds += time.perf_counter() - began
        errors.append(np.linalg.norm(flow - exact, axis=1))
        seen.append(visible)
        motion += [_motion(*one) for one in zip(exact, visible) if one[1].any()]
        both = torch.from_numpy(flow)
        kept.append(flow_valid_mask(both, both.flip(0)).numpy())
    lengths, rests = np.mean(motion, axis=0) if motion else (0.0, 0.0)
    errors, seen, kept = (np.concatenate(parts).ravel() for parts in (errors, seen, kept))
    return {
        "epe_mean": float(errors[seen].mean()),
        "epe_median": float(np.median(errors[seen])),
        "kept": float(kept.mean()),
        "wrong": float((errors[kept] > WRONG).mean()) if kept.any() else None,
        "hidden": float((~seen[kept]).mean()) if kept.any() else None,
        "wrong_seen": float((errors[kept & seen] > WRONG).mean()) if (kept & seen).any() else None,
        "motion": float(lengths),
        "not_affine": float(rests),
        "ms": 1000 * seconds / len(pairs),
    }


def _motion(flow: np.ndarray, seen: np.ndarray) -> tuple[float, float]:
    """Return the mean length in pixels of flow (2, H, W) at the points `seen` (H, W), and its mean distance from its best affine fit."""
    rows, columns = np.nonzero(seen)
    own = flow[:, rows, columns].T
    places = np.stack([np.ones(len(rows)), rows, columns], axis=1)
    rest = own - places @ np.linalg.lstsq(places, own, rcond=None)[0]
    return float(np.linalg.norm(own, axis=1).mean()), float(np.linalg.norm(rest, axis=1).mean())


if __name__ == "__main__":
    run_script(main)
