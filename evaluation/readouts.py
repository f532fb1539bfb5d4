"""Readouts of an encoder: linear on frozen features, k-NN without fitting, UperNet fine-tuned. Each predicts a map of class ids."""

import logging
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoBackbone, SegformerImageProcessor, UperNetConfig, UperNetForSemanticSegmentation

from evaluation.encoders import Encoder, four_stages, freeze_idle, resize_up, stage_stride
from evaluation.labelled_images import IGNORE, Example, LabelledImages
from evaluation.recipe import EvaluationRecipe
from modeling_poodle.loading_poodle import not_of_maps

logger = logging.getLogger("poodle")
# Pixels of an image that the loss is taken at, drawn anew each step: the mean over them is an unbiased estimate of that over all.
# Measured on CamVid with a ResNet-50 (benchmarks/readout.py, 2 cores under other load): a step of 8 images 75 ms, at all pixels 768 ms; mIoU
# after 20 steps 13.6 and 13.3 %. Features kept in a file against computed anew: a whole readout in 5 minutes against 77.
POINTS = 8192
HALF = torch.finfo(torch.float16).max


def upsample(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """(1, K, h, w) -> (1, K, H, W), bilinear: the label's own size."""
    return F.interpolate(scores, size=size, mode="bilinear", align_corners=False)


def processor_of(encoder: Encoder) -> SegformerImageProcessor:
    """Image processor that a saved readout needs in a pipeline: no resizing, the encoder's own mean and deviation."""
    return SegformerImageProcessor(do_resize=False, image_mean=list(encoder.mean), image_std=list(encoder.std))


class FeatureStore:
    """
    Frozen features of images in half precision, one after the other in a memory-mapped file that disappears with the process.

    Args:
        limit: bytes. What would be larger is computed anew each time instead.
    """

    def __init__(self, limit: float):
        self.limit, self.places, self.file, self.memory = limit, {}, None, None

    def fill(self, examples, compute) -> bool:
        """Keep `compute(example)` (C, h, w) of all examples. False, and nothing kept, where the limit would be passed."""
        first = compute(examples[0])
        if first.numel() * 2 * len(examples) > self.limit:
            return False
        self.file = tempfile.NamedTemporaryFile(prefix="poodle-features-", dir=os.environ.get("POODLE_SCRATCH"))
        offset = 0
        for example in examples:
            features = first if example is examples[0] else compute(example)
            # A channel that is nearly dead in the images of the statistics may be thousands of deviations away in others: inf, and the loss nan.
            array = features.clamp(-HALF, HALF).half().cpu().numpy()
            if offset + array.size * 2 > self.limit:  # a later image is much larger than the first
                self.file, self.places = None, {}
                return False
            self.file.write(array.tobytes())
            self.places[example.name] = (offset, array.shape)
            offset += array.size * 2
        self.file.flush()
        self.memory = np.memmap(self.file.name, dtype=np.float16, mode="r")
        return True

    def __getitem__(self, example: Example) -> Tensor:
        offset, shape = self.places[example.name]
        begin = offset // 2
        return torch.from_numpy(self.memory[begin : begin + int(np.prod(shape))].reshape(shape).astype(np.float32))


class LinearReadout(nn.Module):
    """
    A 1x1 convolution on frozen features; the encoder, BatchNorm statistics included, stays as it is.

    Features are standardised channel by channel with the statistics of up to 32 training images, which are folded into the
    convolution when it is saved: it fits as quickly on features of any scale and remains a 1x1 convolution.
    """

    trains_encoder = False

    def __init__(self, encoder: Encoder, data: LabelledImages, recipe: EvaluationRecipe):
        super().__init__()
        self.encoder, self.data, self.recipe = encoder, data, recipe
        encoder.eval().requires_grad_(False)
        self.classifier = encoder.model.classifier.requires_grad_(True)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)
        self.store = FeatureStore(recipe.feature_cache_gb * 1e9)
        self.cached = False

    def prepare(self, examples: list[Example]) -> None:
        """Statistics from the data set's first images (the same on all ranks), then the features of this rank's `examples`."""
        sums = torch.zeros(3, self.encoder.channels, dtype=torch.float64)
        for example in self.data.train[:32]:
            flat = self._raw(example).flatten(1).double().cpu()
            sums += torch.stack([flat.sum(1), flat.square().sum(1), torch.full_like(sums[2], flat.shape[1])])
        mean = sums[0] / sums[2]
        std = (sums[1] / sums[2] - mean.square()).clamp(min=0).sqrt()
        device = self.encoder.model.device
        self.mean = mean.float()[:, None, None].to(device)
        self.std = torch.where(std > 1e-6, std, 1.0).float()[:, None, None].to(device)
        self.cached = self.store.fill(examples, self._features)
        if not self.cached:
            logger.info("features of %d images pass feature_cache_gb: computed anew each time", len(examples))

    @torch.no_grad()
    def _raw(self, example: Example) -> Tensor:
        return self.encoder(self.encoder.normalise(self.data.image(example)))[0].float()

    def _features(self, example: Example) -> Tensor:
        return (self._raw(example) - self.mean) / self.std

    def batch(self, examples: list[Example], generator: torch.Generator) -> dict:
        """Features and labels of `examples`, and the points that the loss is taken at."""
        device = self.encoder.model.device
        features = [(self.store[e] if self.cached else self._features(e)).to(device) for e in examples]
        points, targets = [], []
        for example in examples:
            label = torch.from_numpy(self.data.label(example).astype(np.int64))
            kept = (label != IGNORE).flatten().nonzero()[:, 0]
            chosen = kept[torch.randint(max(len(kept), 1), (POINTS,), generator=generator)] if len(kept) else None
            if chosen is None:
                targets.append(torch.full((POINTS,), IGNORE))
                points.append(torch.zeros(POINTS, 2))
                continue
            height, width = label.shape
            targets.append(label.flatten()[chosen])
            xy = torch.stack([chosen % width, chosen // width], dim=1) + 0.5
            points.append(xy / torch.tensor([width, height]) * 2 - 1)
        return {
            "features": features,
            "points": torch.stack(points).float().to(device),
            "targets": torch.stack(targets).to(device),
        }

    def forward(self, features: list[Tensor], points: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy of the bilinearly upsampled logits at the points; a mean over the labelled ones, 0 without any."""
        sampled = []
        for feature, where in zip(features, points):
            logits = self.classifier(feature[None])
            # Border padding is what interpolate does beyond the outermost cell centres.
            sampled.append(
                F.grid_sample(logits, where[None, None], padding_mode="border", align_corners=False)[0, :, 0]
            )
        total = F.cross_entropy(torch.stack(sampled), targets, ignore_index=IGNORE, reduction="sum")
        return total / (targets != IGNORE).sum().clamp(min=1)

    @torch.no_grad()
    def predict(self, image: np.ndarray) -> np.ndarray:
        features = (self.encoder(self.encoder.normalise(image)) - self.mean) / self.std
        return upsample(self.classifier(features), image.shape[:2]).argmax(dim=1)[0].byte().cpu().numpy()

    def trained(self) -> list[nn.Parameter]:
        return list(self.classifier.parameters())

    @torch.no_grad()
    def save(self, folder: Path) -> None:
        model, std = self.encoder.model, self.std[:, 0, 0]
        plain = (self.classifier.weight.clone(), self.classifier.bias.clone())
        self.classifier.weight.div_(std[None, :, None, None])
        self.classifier.bias.sub_(self.classifier.weight[:, :, 0, 0] @ self.mean[:, 0, 0])
        model.save_pretrained(folder)
        processor_of(self.encoder).save_pretrained(folder)
        self.classifier.weight.copy_(plain[0])
        self.classifier.bias.copy_(plain[1])


class KnnReadout(nn.Module):
    """
    Dense nearest neighbours; nothing is fitted. Each cell of the features takes the votes of its nearest cells (cosine) of the training
    images, weighted by exp(similarity / 0.07) (Wu et al. 2018); the votes are upsampled like logits.

    Features are read at a grid of stride 8, coarser ones upsampled to it; a cell's label is the most frequent one of its pixels.
    """

    trains_encoder = False
    STRIDE, TEMPERATURE, CHUNK = 8, 0.07, 2048

    def __init__(self, encoder: Encoder, data: LabelledImages, recipe: EvaluationRecipe):
        super().__init__()
        self.encoder, self.data, self.recipe = encoder.eval().requires_grad_(False), data, recipe

    def prepare(self, examples: list[Example]) -> None:
        """The reference cells, from all training images on every rank."""
        generator = torch.Generator().manual_seed(self.recipe.seed)
        share = -(-self.recipe.max_reference_cells // len(self.data.train))
        bank, labels = [], []
        for example in self.data.train:
            cells = self._cells(self.data.image(example))[0]
            label = majority(self.data.label(example), tuple(cells.shape[1:]), len(self.data.classes)).flatten()
            kept = (label != IGNORE).nonzero()[:, 0]
            kept = kept[torch.randperm(len(kept), generator=generator)[:share]]
            bank.append(cells.flatten(1).t()[kept.to(cells.device)])
            labels.append(label[kept])
        self.bank = torch.cat(bank).t().contiguous()
        self.labels = torch.cat(labels).to(self.bank.device)
        if len(self.labels) == 0:
            raise ValueError("the training images have no labelled cell: k-NN has nothing to compare with")

    @torch.no_grad()
    def _cells(self, image: np.ndarray) -> Tensor:
        size = [max(side // self.STRIDE, 1) for side in image.shape[:2]]
        features = self.encoder(self.encoder.normalise(image)).float()
        return F.normalize(F.interpolate(features, size=size, mode="bilinear", align_corners=False), dim=1)

    @torch.no_grad()
    def predict(self, image: np.ndarray) -> np.ndarray:
        cells, classes = self._cells(image), len(self.data.classes)
        k = min(self.recipe.num_neighbours, len(self.labels))
        votes = []
        for chunk in cells[0].flatten(1).t().split(self.CHUNK):
            similarity, index = (chunk @ self.bank).topk(k, dim=1)
            weight = (similarity / self.TEMPERATURE).exp()
            votes.append(weight.new_zeros(len(chunk), classes).scatter_add_(1, self.labels[index], weight))
        scores = torch.cat(votes).t().unflatten(1, cells.shape[2:])[None]
        scores = scores / scores.sum(dim=1, keepdim=True)
        return upsample(scores, image.shape[:2]).argmax(dim=1)[0].byte().cpu().numpy()


def majority(label: np.ndarray, size: tuple[int, int], num_classes: int) -> Tensor:
    """The most frequent class of each cell of a grid of `size`, (h, w) long; 255 where the cell has no labelled pixel."""
    height, width = label.shape
    rows = np.minimum(np.arange(height) * size[0] // height, size[0] - 1)
    columns = np.minimum(np.arange(width) * size[1] // width, size[1] - 1)
    cell = rows[:, None] * size[1] + columns[None]
    kept = label != IGNORE
    counts = np.bincount(
        cell[kept] * num_classes + label[kept].astype(np.int64), minlength=size[0] * size[1] * num_classes
    ).reshape(-1, num_classes)
    result = np.where(counts.sum(axis=1) > 0, counts.argmax(axis=1), IGNORE)
    return torch.from_numpy(result).reshape(size)


class UperNetReadout(nn.Module):
    """
    transformers' UperNet on the encoder alone, all of it fine-tuned on random crops and flips. A batch of crops without
    a labelled pixel has the loss 0.
    """

    trains_encoder = True

    def __init__(self, encoder: Encoder, data: LabelledImages, recipe: EvaluationRecipe):
        super().__init__()
        self.encoder_info, self.data, self.recipe = (encoder,), data, recipe
        if len(data.classes) < 2:
            raise ValueError(f"readout upernet needs at least 2 classes, {data.name} has {len(data.classes)}")
        try:
            config = four_stages(encoder.model.config.backbone_config)
        except ValueError as error:
            raise ValueError(f"readout upernet: {error}") from None
        channels = AutoBackbone.from_config(config, trust_remote_code=False).channels
        labels = encoder.model.config
        self.model = UperNetForSemanticSegmentation(
            UperNetConfig(
                backbone_config=config,
                hidden_size=min(512, channels[-1]),
                auxiliary_in_channels=channels[-2],
                auxiliary_channels=min(256, channels[-2]),
                loss_ignore_index=IGNORE,
                id2label=labels.id2label,
                label2id=labels.label2id,
            )
        )
        missing, unexpected = self.model.backbone.load_state_dict(
            encoder.model.poodle.encoder.state_dict(), strict=False
        )
        wrong = not_of_maps((*missing, *unexpected))
        if wrong:
            raise ValueError(f"readout upernet cannot take this encoder's weights: {wrong[0]} does not fit")
        backbone = self.model.backbone.eval()
        self.multiple = stage_stride(backbone)  # of stage4, the coarsest of the maps that are read
        freeze_idle(backbone, backbone(torch.zeros(1, 3, 224, 224)).feature_maps)

    def prepare(self, examples: list[Example]) -> None:
        pass

    def batch(self, examples: list[Example], generator: torch.Generator) -> dict:
        encoder = self.encoder_info[0]
        height, width = self.recipe.crop_size
        images, labels = [], []
        for example in examples:
            image = encoder.normalise(self.data.image(example))[0]
            label = torch.from_numpy(self.data.label(example).astype(np.int64)).to(image.device)
            # Smaller images are padded; the padding is not counted.
            pad = (0, max(width - image.shape[2], 0), 0, max(height - image.shape[1], 0))
            image, label = F.pad(image, pad), F.pad(label, pad, value=IGNORE)
            top, left, flip = (
                int(torch.randint(limit, (1,), generator=generator))
                for limit in (image.shape[1] - height + 1, image.shape[2] - width + 1, 2)
            )
            image = image[:, top : top + height, left : left + width]
            label = label[top : top + height, left : left + width]
            images.append(image.flip(2) if flip else image)
            labels.append(label.flip(1) if flip else label)
        seed = int(torch.randint(2**31, (1,), generator=generator))
        pixel_values, labels = resize_up(torch.stack(images), self.multiple), torch.stack(labels)
        if pixel_values.shape[2:] != labels.shape[1:]:
            labels = F.interpolate(labels[:, None].float(), size=pixel_values.shape[2:], mode="nearest-exact")[
                :, 0
            ].long()
        return {"pixel_values": pixel_values, "labels": labels, "seed": seed}

    def forward(self, pixel_values: Tensor, labels: Tensor, seed: int) -> Tensor:
        # Stochastic depth (Swin, BEiT) draws from the global generator; seeded by the step, so that an interrupted fit
        # goes on bit for bit.
        torch.manual_seed(seed)
        # The model's own mean over no pixel would be 0/0; of any labels instead it is a number, which counts nothing.
        labelled = (labels != IGNORE).any()
        loss = self.model(pixel_values=pixel_values, labels=torch.where(labelled, labels, 0)).loss
        return loss * labelled

    @torch.no_grad()
    def predict(self, image: np.ndarray) -> np.ndarray:
        self.eval()
        logits = self.model(pixel_values=resize_up(self.encoder_info[0].normalise(image), self.multiple)).logits
        return upsample(logits, image.shape[:2]).argmax(dim=1)[0].byte().cpu().numpy()

    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        processor_of(self.encoder_info[0]).save_pretrained(folder)


READOUTS = {"linear": LinearReadout, "knn": KnnReadout, "upernet": UperNetReadout}
