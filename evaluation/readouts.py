"""Readouts of an encoder: linear on frozen features, k-NN without fitting, UperNet fine-tuned. Each predicts a map of class ids."""

import logging
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoBackbone, SegformerImageProcessor, UperNetConfig, UperNetForSemanticSegmentation

from evaluation.encoders import Encoder, four_stages, freeze_idle, resize_up, stage_stride
from evaluation.engine import FittedReadout, Readout
from evaluation.feature_store import FeatureStore, as_kept
from evaluation.labelled_images import IGNORE, Example, LabelledImages, read_ahead
from evaluation.recipe import EvaluationRecipe
from modeling_poodle.loading_poodle import required_keys
from modeling_poodle.processes import on_all
from modeling_poodle.remote_code import add_code

logger = logging.getLogger("poodle")
# Pixels of an image on which the loss is computed, drawn anew each step: their mean is an unbiased estimate of that over all pixels.
# Measured on CamVid with a ResNet-50 (benchmarks/readout.py, 2 cores under other load): a step of 8 images 75 ms, at all pixels 768 ms; mIoU
# after 20 steps 13.6 and 13.3 %. Features kept in a file against computed anew: a whole readout in 5 minutes against 77.
POINTS = 8192


def upsample(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """(1, K, h, w) -> (1, K, H, W), bilinear: the label's own size."""
    # In channels_last, where the classes of a pixel lie together: 150 classes at 1500x2000 on one CPU thread, with the argmax behind it, 1.1 s instead of 2.4.
    scores = scores.contiguous(memory_format=torch.channels_last)
    return F.interpolate(scores, size=size, mode="bilinear", align_corners=False)


def processor_of(encoder: Encoder) -> SegformerImageProcessor:
    """Image processor that a saved readout needs in a pipeline: no resizing, the encoder's own mean and deviation."""
    return SegformerImageProcessor(
        do_convert_rgb=True, do_resize=False, image_mean=list(encoder.mean), image_std=list(encoder.std)
    )


class LinearReadout(FittedReadout):
    """
    A 1x1 convolution on frozen features; the encoder, BatchNorm statistics included, stays as it is.

    Features are standardised channel by channel with the statistics of the first 32 training images, which are folded into the
    convolution when it is saved: it fits as quickly on features of any scale and remains a 1x1 convolution.
    """

    def __init__(self, encoder: Encoder, data: LabelledImages, recipe: EvaluationRecipe):
        super().__init__()
        self.encoder, self.data, self.recipe = encoder, data, recipe
        encoder.eval().requires_grad_(False)
        self.classifier = encoder.model.classifier.requires_grad_(True)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)
        self.store = FeatureStore(recipe.feature_cache_gb * 1e9)

    def prepare(self, accelerator: Accelerator | None = None) -> None:
        """Statistics from the data set's first images (the same on all ranks)."""
        sums = torch.zeros(3, self.encoder.channels, dtype=torch.float64)
        for image in read_ahead(self.data.image, self.data.train[:32]):
            flat = self._raw(image).flatten(1).cpu().double()
            sums += torch.stack([flat.sum(1), flat.square().sum(1), torch.full_like(sums[2], flat.shape[1])])
        mean = sums[0] / sums[2]
        std = (sums[1] / sums[2] - mean.square()).clamp(min=0).sqrt()
        device = self.encoder.model.device
        self.mean = mean.float()[:, None, None].to(device)
        self.std = torch.where(std > 1e-6, std, 1.0).float()[:, None, None].to(device)

    def keep(self, examples: list[Example]) -> None:
        """Once, before the steps of a fit: the features of this rank's `examples`, as many as there is room for."""
        reads = read_ahead(self.data.both, examples)  # the label, so that it is told if it is of another size
        kept = self.store.fill((example.name, self._features(image)) for example, (image, _) in zip(examples, reads))
        if kept < len(examples):
            logger.info(
                "features of %d of %d images are kept (feature_cache_gb, and the disk of %s); others are computed anew each time",
                *(kept, len(examples), self.store.folder),
            )

    @torch.no_grad()
    def _raw(self, image: np.ndarray) -> Tensor:
        return self.encoder(self.encoder.normalise(image))[0].float()

    def _features(self, image: np.ndarray) -> Tensor:
        return (self._raw(image) - self.mean) / self.std

    def read(self, example: Example) -> tuple[Tensor | np.ndarray, np.ndarray]:
        """What a step needs of an example: its features where they are kept, else its image; and its label."""
        if example.name in self.store:
            return self.store[example.name], self.data.label(example)
        return self.data.both(example)

    def batch(self, read: list[tuple], generator: torch.Generator) -> dict:
        """Features and labels of what was `read`, and the points that the loss is taken at."""
        device = self.encoder.model.device
        # Computed anew or not, which depends on the disk: a fit that goes on elsewhere sees the same numbers.
        features = [
            (stored.to(device) if isinstance(stored, Tensor) else as_kept(self._features(stored))).float()
            for stored, _ in read
        ]
        points, targets = [], []
        for _, label in read:
            kept = torch.from_numpy(np.flatnonzero(label != IGNORE))
            chosen = kept[torch.randint(max(len(kept), 1), (POINTS,), generator=generator)] if len(kept) else None
            if chosen is None:
                targets.append(torch.full((POINTS,), IGNORE))
                points.append(torch.zeros(POINTS, 2))
                continue
            height, width = label.shape
            targets.append(torch.from_numpy(label.reshape(-1)[chosen.numpy()].astype(np.int64)))
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
        logits = upsample(self.classifier(self._features(image)[None]), image.shape[:2])
        return logits.argmax(dim=1)[0].byte().cpu().numpy()

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
        add_code(folder)
        self.classifier.weight.copy_(plain[0])
        self.classifier.bias.copy_(plain[1])


class KnnReadout(Readout):
    """
    Dense nearest neighbours; nothing is fitted. Each cell of the features takes the votes of its nearest cells (cosine) of the training
    images, weighted by exp(similarity / 0.07) (Wu et al. 2018); the votes are upsampled like logits.

    Features are read at a grid of stride 8, coarser ones upsampled to it; a cell's label is the most frequent one of its pixels.
    """

    STRIDE, TEMPERATURE, CHUNK = 8, 0.07, 2048

    def __init__(self, encoder: Encoder, data: LabelledImages, recipe: EvaluationRecipe):
        super().__init__()
        self.encoder, self.data, self.recipe = encoder.eval().requires_grad_(False), data, recipe

    def prepare(self, accelerator: Accelerator | None = None) -> None:
        """
        The reference cells: `max_reference_cells`, and up to one more a training image. Each process computes the features of its share of the
        images; all processes have all cells afterwards, in the images' order.

        Raises:
            ValueError: an image and its label differ in size, or no image has a labelled cell. On all processes, whichever has the image.
        """
        rank, processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
        bank, labels = on_all(accelerator, lambda: self._references(rank, processes))
        self.labels = torch.cat(labels).to(bank.device)
        if len(self.labels) == 0:
            raise ValueError("the training images have no labelled cell: k-NN has nothing to compare with")
        if processes > 1:
            bank = _in_order(accelerator, bank, [len(of_image) for of_image in labels])
        self.bank = bank.t().contiguous()

    def _references(self, rank: int, processes: int) -> tuple[Tensor, list[Tensor]]:
        """Features (N, C) of the cells of this process' images, one after the other, and the classes of the cells of each image of all."""
        generator = torch.Generator().manual_seed(self.recipe.seed)
        share = -(-self.recipe.max_reference_cells // len(self.data.train))
        device, labels = self.encoder.model.device, []
        features = [torch.zeros(0, self.encoder.channels, device=device)]

        def read(numbered: tuple[int, Example]):
            number, example = numbered
            mine = number % processes == rank
            return example.name, self.data.image(example) if mine else None, self.data.label(example)

        for name, image, label in read_ahead(read, enumerate(self.data.train)):
            if image is not None and image.shape[:2] != label.shape:
                raise ValueError(f"{name}: image {image.shape[:2]} and label {label.shape} differ in size")
            found = majority(label, self._size(label.shape), len(self.data.classes)).flatten()
            kept = (found != IGNORE).nonzero()[:, 0]
            # Drawn for the images of all processes: the same cells on any number of them.
            kept = kept[torch.randperm(len(kept), generator=generator)[:share]]
            labels.append(found[kept])
            if image is not None:
                features.append(self._cells(image)[0].flatten(1).t()[kept.to(device)])
        return torch.cat(features), labels

    def _size(self, image: tuple[int, int]) -> tuple[int, int]:
        """Of the grid of cells of an image of this (H, W)."""
        return max(image[0] // self.STRIDE, 1), max(image[1] // self.STRIDE, 1)

    @torch.no_grad()
    def _cells(self, image: np.ndarray) -> Tensor:
        features = self.encoder(self.encoder.normalise(image)).float()
        size = self._size(image.shape[:2])
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


def _in_order(accelerator: Accelerator, own: Tensor, counts: list[int]) -> Tensor:
    """Rows of all processes in the images' order. Args: own: rows of this process' images, every n-th; counts: rows of each image."""
    processes = accelerator.num_processes
    of_rank = [sum(counts[rank::processes]) for rank in range(processes)]
    padded = own.new_zeros(max(of_rank), own.shape[1])
    padded[: len(own)] = own
    gathered = accelerator.gather(padded).split(max(of_rank))
    parts = [rows[:count].split(counts[rank::processes]) for rank, (rows, count) in enumerate(zip(gathered, of_rank))]
    return torch.cat([parts[number % processes][number // processes] for number in range(len(counts))])


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


class UperNetReadout(FittedReadout):
    """
    transformers' UperNet on the encoder alone, all of it fine-tuned on random crops and flips. A batch of crops without
    a labelled pixel has the loss 0.
    """

    trains_encoder = True

    def __init__(self, encoder: Encoder, data: LabelledImages, recipe: EvaluationRecipe):
        super().__init__()
        # Not the encoder as a module of this one: UperNet has a copy of it, which is the one that is fitted, saved and moved.
        self.normalise, self.processor = encoder.normalise, processor_of(encoder)
        self.data, self.recipe = data, recipe
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
        wrong = required_keys((*missing, *unexpected))
        if wrong:
            raise ValueError(f"readout upernet cannot take this encoder's weights: {wrong[0]} does not fit")
        backbone = self.model.backbone.eval()
        self.multiple = stage_stride(backbone)  # of stage4, the coarsest of the maps that are read
        try:
            maps = backbone(torch.zeros(1, 3, 224, 288)).feature_maps  # whole images are read, of any size
        except (AssertionError, IndexError, RuntimeError, ValueError) as error:
            raise ValueError(f"readout upernet: {encoder.name} reads images of one size alone ({error})") from None
        freeze_idle(backbone, maps)

    def read(self, example: Example) -> tuple[np.ndarray, np.ndarray]:
        return self.data.both(example)

    def batch(self, read: list[tuple[np.ndarray, np.ndarray]], generator: torch.Generator) -> dict:
        height, width = self.recipe.crop_size
        images, labels = [], []
        for whole, whole_label in read:
            top, left, flip = (
                int(torch.randint(max(limit, 1), (1,), generator=generator))
                for limit in (whole.shape[0] - height + 1, whole.shape[1] - width + 1, 2)
            )
            image = self.normalise(whole[top : top + height, left : left + width])[0]
            label = torch.from_numpy(whole_label[top : top + height, left : left + width].astype(np.int64))
            # Smaller images are padded; the padding is not counted.
            pad = (0, width - image.shape[2], 0, height - image.shape[1])
            image, label = F.pad(image, pad), F.pad(label.to(image.device), pad, value=IGNORE)
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
        # A batch without a labelled pixel: the model's mean would be 0/0. With other labels in their place it is a number, multiplied by 0.
        labelled = (labels != IGNORE).any()
        loss = self.model(pixel_values=pixel_values, labels=torch.where(labelled, labels, 0)).loss
        return loss * labelled

    @torch.no_grad()
    def predict(self, image: np.ndarray) -> np.ndarray:
        self.eval()
        logits = self.model(pixel_values=resize_up(self.normalise(image), self.multiple)).logits
        return upsample(logits, image.shape[:2]).argmax(dim=1)[0].byte().cpu().numpy()

    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)


READOUTS = {"linear": LinearReadout, "knn": KnnReadout, "upernet": UperNetReadout}
