"""
The segmentation metric: seconds and memory, compared with the `mean_iou` metric that the `evaluate` library loads from the Hub.

    python benchmarks/metrics.py
    python benchmarks/metrics.py --json metrics.json

The Hub metric's arithmetic is rewritten here from its definition: for each image, pixels of the ignored label are removed, and three calls
of `np.histogram` count the pixels that agree, the predicted and the true ones. It gets its maps as arrays: the metric of the Hub also
writes them to an Arrow table first, which is not measured. Both must give the same IoU for every class.
"""

import argparse
import json
import statistics
import sys
import time
import tracemalloc
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from evaluation.metrics import MeanIoU

IGNORE = 255
MAPS, SIDE, CLASSES = 64, 512, 150  # maps in a round, their height and width, and the classes
ROUNDS = 5  # rounds that count


def random_maps(count: int, side: int, classes: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Make predictions and truths (side, side) uint8 of 16x16 blocks; a tenth of the pixels is predicted wrong, a tenth ignored."""
    rng = np.random.default_rng(0)
    predictions, truths = [], []
    for _ in range(count):
        blocks = rng.integers(0, classes, (side // 16 + 1, side // 16 + 1)).astype(np.uint8)
        truth = np.kron(blocks, np.ones((16, 16), np.uint8))[:side, :side].copy()
        wrong = rng.random(truth.shape) < 0.1
        predictions.append(np.where(wrong, rng.integers(0, classes, truth.shape), truth).astype(np.uint8))
        truth[rng.random(truth.shape) < 0.1] = IGNORE
        truths.append(truth)
    return predictions, truths


class MeanIouOfTheHub:
    """The arithmetic of `mean_iou`. All maps are kept until `compute`, as metrics of `evaluate` keep everything that is added."""

    def __init__(self, classes: int):
        self.classes, self.maps = classes, []

    def add_batch(self, predictions, references) -> None:
        # Copied, because evaluate also writes the maps to its own table.
        self.maps += [(np.array(p), np.array(r)) for p, r in zip(predictions, references)]

    def compute(self) -> np.ndarray:
        """Return the IoU of each class, NaN if a class does not occur."""
        total = np.zeros((3, self.classes))
        for prediction, truth in self.maps:
            kept = truth != IGNORE
            prediction, truth = prediction[kept], truth[kept]
            for row, values in enumerate((prediction[prediction == truth], prediction, truth)):
                total[row] += np.histogram(values, bins=self.classes, range=(0, self.classes - 1))[0]
        self.maps = []
        with np.errstate(invalid="ignore"):
            return total[0] / (total[1] + total[2] - total[0])


def ours(classes: int) -> MeanIoU:
    return MeanIoU([str(index) for index in range(classes)], ignore_index=IGNORE)


def seconds(make, classes: int, maps, rounds: int) -> tuple[float, object]:
    """Return the median seconds of a round (add all maps, then compute) after a warm-up round, and the computed result."""
    times = []
    for _ in range(rounds + 1):
        metric = make(classes)
        began = time.perf_counter()
        metric.add_batch(predictions=maps[0], references=maps[1])
        result = metric.compute()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:]), result


def growth(make, classes: int, maps, rounds: int) -> list[float]:
    """MiB that a metric holds after each round of adding all maps, without computing anything."""
    metric, held = make(classes), []
    metric.add_batch(predictions=maps[0][:1], references=maps[1][:1])
    tracemalloc.start()
    for _ in range(rounds):
        metric.add_batch(predictions=maps[0], references=maps[1])
        held.append(tracemalloc.get_traced_memory()[0] / 2**20)
    tracemalloc.stop()
    return held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args()
    bytes_ = random_maps(MAPS, SIDE, CLASSES)
    print(f"{MAPS} maps of {SIDE}x{SIDE}, {CLASSES} classes, median of {ROUNDS}")
    print(f"{'maps':8}{'metric':10}{'seconds':>10}{'ms a map':>10}   MiB held after 1, 2, 3 rounds")
    figures = {"classes": CLASSES, "maps": MAPS, "side": SIDE, "rounds": ROUNDS}
    for kind in (np.uint8, np.int64):
        maps = tuple([array.astype(kind) for array in arrays] for arrays in bytes_)
        rows, found, name = {}, {}, np.dtype(kind).name
        for metric, make in (("ours", ours), ("mean_iou", MeanIouOfTheHub)):
            took, found[metric] = seconds(make, CLASSES, maps, ROUNDS)
            rows[metric] = {"seconds": took, "held_mib": growth(make, CLASSES, maps, 3)}
            held = ", ".join(f"{value:.1f}" for value in rows[metric]["held_mib"])
            print(f"{name:8}{metric:10}{took:10.3f}{1000 * took / MAPS:10.2f}   {held}", flush=True)
        iou = np.array([np.nan if v is None else v for v in found["ours"]["per_class"].values()])
        np.testing.assert_allclose(iou, found["mean_iou"], rtol=1e-12)
        ratio = rows["mean_iou"]["seconds"] / rows["ours"]["seconds"]
        print(f"{name:8}ours is {ratio:.1f} times as fast; the IoU of every class is equal")
        figures[name] = {"ratio": ratio, **rows}
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
