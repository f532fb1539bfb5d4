"""Readouts that predict a map of class ids: linear on frozen features, k-NN without fitting, and fine-tuned UperNet."""

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
# Number of pixels of an image at which the loss is computed. They are drawn anew in each step, so that their mean is an unbiased estimate
# of the mean over all pixels. Measured on CamVid with a ResNet-50 (benchmarks/readout.py, 2 cores under other load): a step of 8 images
# takes 75 ms, at all pixels 768 ms; mIoU after 20 steps is 13.6 and 13.3 %. A whole readout takes 5 minutes with stored features, 77 with
# recomputed ones.
POINTS = 8192


def upsample(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize scores (1, K, h, w) bilinearly to the label's size, (1, K, H, W)."""
    # In channels_last the classes of a pixel lie together. 150 classes at 1500x2000 on one CPU thread, with the argmax that follows, take
    # 1.1 s instead of 2.4.
    scores = scores.contiguous(memory_format=torch.channels_last)
    return F.interpolate(scores, size=size, mode="bilinear", align_corners=False)


def processor_of(encoder: Encoder) -> SegformerImageProcessor:
    """Return the image processor that a saved readout needs in a pipeline: the encoder's mean and deviation, without resizing."""
    return SegformerImageProcessor(
        do_convert_rgb=True, do_resize=False, image_mean=list(encoder.mean), image_std=list(encoder.std)
    )


class LinearReadout(FittedReadout):
    """
    A 1x1 convolution on frozen features; the encoder, with its BatchNorm statistics, does not change.

    Each channel of the features is standardised with the statistics of the first 32 training images, so that the readout fits equally fast
    on features of any scale. The statistics are folded into the convolution when it is saved, so it remains a 1x1 convolution.
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
        """Compute the features' statistics from the first training images, which are the same on all ranks."""
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
        """Store the features of this rank's `examples`, as many as there is room for."""
        reads = read_ahead(self.data.both, examples)  # reads labels too, to check that their sizes fit
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
        """Return an example's stored features, or its image if they are not stored, and its label."""
        if example.name in self.store:
            return self.store[example.name], self.data.label(example)
        return self.data.both(example)

    def batch(self, read: list[tuple], generator: torch.Generator) -> dict:
        """Return the features, and the points and their labels at which the loss is computed."""
        device = self.encoder.model.device
        # Recomputed features are rounded like stored ones: a fit resumed on another disk, which may store fewer, must see the same numbers.
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
        """Return the cross entropy of the bilinearly upsampled logits, averaged over the labelled points; 0 if there are none."""
        sampled = []
        for feature, where in zip(features, points):
            logits = self.classifier(feature[None])
            # Beyond the outermost cell centres, `interpolate` does the same as border padding.
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
    Dense nearest neighbours, without fitting.

    The nearest cells of the training images (by cosine) vote for the class of each cell, weighted by exp(similarity / 0.07) (Wu et al.
    2018). The votes are upsampled like logits. Features are resized to a grid of stride 8; a cell's label is the most frequent one of its
    pixels.
    """

    STRIDE, TEMPERATURE, CHUNK = 8, 0.07, 2048

    def __init__(self, encoder: Encoder, data: LabelledImages, recipe: EvaluationRecipe):
        super().__init__()
        self.encoder, self.data, self.recipe = encoder.eval().requires_grad_(False), data, recipe

    def prepare(self, accelerator: Accelerator | None = None) -> None:
        """
        Collect about `max_reference_cells` reference cells: their number for each training image is rounded up.

        Each process computes the features of its share of the images. Afterwards all processes have all cells, in the order of the images.

        Raises:
            ValueError: an image and its label differ in size, or no image has a labelled cell. The error is raised on all processes.
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
        """Return the cells' features (N, C) of this process' images, and for each image of all processes the classes of its cells."""
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
            # Drawn for all images on each process, so that the cells are the same for any number of processes.
            kept = kept[torch.randperm(len(kept), generator=generator)[:share]]
            labels.append(found[kept])
            if image is not None:
                features.append(self._cells(image)[0].flatten(1).t()[kept.to(device)])
        return torch.cat(features), labels

    def _size(self, image: tuple[int, int]) -> tuple[int, int]:
        """Return the size (h, w) of the grid of cells of an image (H, W)."""
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
    """
    Gather the rows of all processes in the order of the images.

    Args:
        own: rows of this process' images; of n processes, each has every n-th image.
        counts: number of rows of each image.
    """
    processes = accelerator.num_processes
    of_rank = [sum(counts[rank::processes]) for rank in range(processes)]
    padded = own.new_zeros(max(of_rank), own.shape[1])
    padded[: len(own)] = own
    gathered = accelerator.gather(padded).split(max(of_rank))
    parts = [rows[:count].split(counts[rank::processes]) for rank, (rows, count) in enumerate(zip(gathered, of_rank))]
    return torch.cat([parts[number % processes][number // processes] for number in range(len(counts))])


def majority(label: np.ndarray, size: tuple[int, int], num_classes: int) -> Tensor:
    """Return the most frequent class of each cell of a grid of `size`, an integer tensor (h, w); 255 for cells without a labelled pixel."""
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
    transformers' UperNet on the encoder without the SDM, fine-tuned as a whole on random crops and flips.

    The loss of a batch of crops without a labelled pixel is 0.
    """

    trains_encoder = True

    def __init__(self, encoder: Encoder, data: LabelledImages, recipe: EvaluationRecipe):
        super().__init__()
        # The encoder is not a submodule of this readout: UperNet has its own copy, which is fitted, saved and moved.
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
        self.multiple = stage_stride(backbone)  # the stride of stage4, the coarsest map that is read
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
        # Stochastic depth (Swin, BEiT) draws from the global generator. It is seeded anew in each step, so that an interrupted fit resumes
        # bit for bit.
        torch.manual_seed(seed)
        # Without a labelled pixel the model's mean loss would be 0/0. With all labels 0 it is a finite number, which is multiplied by 0.
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
