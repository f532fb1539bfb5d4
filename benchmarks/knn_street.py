"""
k-NN readout on held-out street frames: a trained model beside its untrained twin. Nothing is fitted.

    python benchmarks/knn_street.py --model runs/quickstart/model

Each cell of the dense features of the test frames takes the label of its nearest cells (cosine, k = 20) among those of the reference
frames; all frames come from drives that pretraining never saw. Prints mean IoU over the classes present, and pixel accuracy.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch.nn import functional as F

from modeling_poodle import PoodleModel
from training.street import STREET_CLASSES, Street
from training.street_files import HELD_OUT_SEED
from training.views import normalise


def held_out_frames(first: int, count: int, height: int = 128, width: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 3, H, W) normalised and labels (N, H, W), one frame from each of `count` drives."""
    streets = [Street(HELD_OUT_SEED + first + number, height, width) for number in range(count)]
    images = np.stack([street.frame(2.0) for street in streets]).transpose(0, 3, 1, 2)
    labels = np.stack([street.labels(2.0) for street in streets])
    return normalise(torch.from_numpy(images.copy()).float() / 255), torch.from_numpy(labels).long()


@torch.no_grad()
def dense_features(model: PoodleModel, images: torch.Tensor, stride: int = 8) -> torch.Tensor:
    """Unit features of the cells of a grid of the given stride, (N, h, w, C)."""
    size = [side // stride for side in images.shape[-2:]]
    maps = torch.cat([model(chunk).last_hidden_state for chunk in images.split(8)])
    maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    return F.normalize(maps, dim=1).permute(0, 2, 3, 1)


def majority(labels: torch.Tensor, stride: int, num_classes: int) -> torch.Tensor:
    """The most frequent label of each cell, (N, h, w)."""
    counts = F.one_hot(labels, num_classes).permute(0, 3, 1, 2).float()
    return F.avg_pool2d(counts, stride).argmax(dim=1)


def knn_confusion(model: PoodleModel, reference, test, k: int = 20, stride: int = 8) -> torch.Tensor:
    """Confusion matrix (truth, prediction) over the test frames' pixels."""
    classes = len(STREET_CLASSES)
    bank = dense_features(model, reference[0], stride).flatten(0, 2)
    bank_labels = majority(reference[1], stride, classes).flatten()
    confusion = torch.zeros(classes, classes, dtype=torch.long)
    for image, truth in zip(test[0].split(1), test[1].split(1)):
        cells = dense_features(model, image, stride)
        similarity, index = (cells.flatten(0, 2) @ bank.T).topk(k, dim=1)
        votes = torch.zeros(len(index), classes).scatter_add_(1, bank_labels[index], (similarity / 0.07).exp())
        scores = votes.view(*cells.shape[:3], classes).permute(0, 3, 1, 2)
        prediction = F.interpolate(scores, size=truth.shape[-2:], mode="bilinear", align_corners=False).argmax(dim=1)
        confusion += torch.bincount((truth * classes + prediction).flatten(), minlength=classes**2).view(
            classes, classes
        )
    return confusion


def scores(confusion: torch.Tensor) -> tuple[float, float]:
    """Mean IoU over classes that occur in the truth, and pixel accuracy."""
    hits, truth, predicted = confusion.diag().double(), confusion.sum(1).double(), confusion.sum(0).double()
    present = truth > 0
    return (hits / (truth + predicted - hits))[present].mean().item(), (hits.sum() / truth.sum()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a PoodleModel")
    parser.add_argument("--frames", type=int, default=48, help="reference frames, and test frames")
    options = parser.parse_args()
    if not (Path(options.model) / "config.json").is_file():
        parser.error(f"--model {options.model}: no PoodleModel there (no config.json)")
    trained = PoodleModel.from_pretrained(options.model).eval()
    torch.manual_seed(0)
    untrained = PoodleModel(trained.config)
    reference, test = held_out_frames(0, options.frames), held_out_frames(options.frames, options.frames)
    # An untrained network gets the BatchNorm statistics of the reference frames, or it would be handicapped for nothing.
    with torch.no_grad():
        for chunk in reference[0].split(8) * 4:
            untrained.train()(chunk)
    print(f"k-NN readout, {options.frames} held-out street drives, stride 8\n{'':12}{'mIoU':>8}{'accuracy':>10}")
    for name, model in (("untrained", untrained.eval()), ("trained", trained)):
        miou, accuracy = scores(knn_confusion(model, reference, test))
        print(f"{name:12}{100 * miou:8.1f}{100 * accuracy:10.1f}")


if __name__ == "__main__":
    main()
