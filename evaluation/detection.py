"""Faster R-CNN on any encoder with stages: building, fitting, saving and loading it."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from transformers import AutoBackbone, AutoConfig

from evaluation.boxes import BoxExample, BoxImages
from evaluation.detection_recipe import DETECTORS, DetectionRecipe
from evaluation.encoders import Encoder, four_stages, freeze_idle
from evaluation.engine import FittedReadout
from modeling_poodle.config_checks import check_config
from modeling_poodle.encoder_poodle import refuse_giant
from modeling_poodle.loading_poodle import required_keys

# Sides in pixels of the anchors, and of a box that the FPN reads at stride 16, for images with a shorter side of SHORT_SIDE pixels.
# For other images they are scaled in proportion (Lin et al. 2017, arXiv 1612.03144, section 4).
ANCHORS, CANONICAL, SHORT_SIDE = (32, 64, 128, 256, 512), 224, 800
LEAST_ANCHOR = 2.0  # pixels; a flat anchor of this size, 1.4 high, still gets two rows
WORKING = (
    "c4 works with ResNets (transformers' and timm's, PooDLe's among them), fpn with encoders of four stages at the strides "
    "4, 8, 16 and 32 (ResNet, ConvNeXt, Swin and the like)"
)


@dataclass(frozen=True)
class DetectorConfig:
    """
    Everything that is needed to rebuild a detector; saved beside its weights.

    Args:
        detector: c4 or fpn.
        backbone_config: the encoder's config, as a dict.
        classes: names by id.
        image_mean, image_std: the encoder's preprocessing.
        image_size: shorter and longer side that images are resized to, `None` for their own size.
        short_side: shorter side of the images as the network sees them, pixels; anchors are in proportion to it.
    """

    detector: str
    backbone_config: dict
    classes: list[str]
    image_mean: list[float]
    image_std: list[float]
    image_size: list[int] | None
    short_side: int


class OwnSizeTransform(GeneralizedRCNNTransform):
    """Normalises and batches images without resizing. (torchvision's own `_skip_resize` applies only in training.)"""

    def resize(self, image: Tensor, target: dict | None = None) -> tuple[Tensor, dict | None]:
        return image, target


class PyramidBackbone(nn.Module):
    """Encoder with an FPN: maps of stage1 to stage4, and a fifth at half of stage4's resolution for the largest anchors."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder
        self.out_channels = max(8, min(256, encoder.channels[-1]) // 8 * 8)
        self.fpn = FeaturePyramidNetwork(
            encoder.channels, self.out_channels, extra_blocks=LastLevelMaxPool(), norm_layer=group_norm
        )

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        maps = self.encoder(pixel_values).feature_maps
        return self.fpn({str(level): features for level, features in enumerate(maps)})


class Stage3Backbone(nn.Module):
    """A ResNet up to stage3, stride 16."""

    def __init__(self, encoder: nn.Module, channels: int):
        super().__init__()
        self.encoder, self.out_channels = encoder, channels

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.encoder(pixel_values).feature_maps[-1]


class Stage4Head(nn.Module):
    """A ResNet's stage4 as the box head: (R, C3, 14, 14) -> (R, C4)."""

    def __init__(self, stage: nn.Module, channels: int):
        super().__init__()
        self.stage, self.norm = stage, group_norm(channels)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.norm(self.stage(pooled)).mean(dim=(2, 3))


def group_norm(channels: int) -> nn.GroupNorm:
    """
    Return the normalisation of new layers.

    Features of a self-supervised encoder differ in scale from supervised ones, so learning rates chosen for these do not fit without
    normalisation (He et al. 2020, arXiv 1911.05722, section 4.2). BatchNorm, which that paper uses, needs more than 2 images a process.
    """
    return nn.GroupNorm(channels // 8 if channels % 8 == 0 else 1, channels)


def build_detector(config: DetectorConfig, encoder_weights: dict[str, Tensor] | None = None) -> FasterRCNN:
    """
    Build torchvision's Faster R-CNN with its published settings.

    Args:
        encoder_weights: the encoder's state dict, with the key names of its backbone; `None` for random weights.

    Returns:
        A model that maps images (3, H, W) in [0, 1], in training with targets, to detections, in training to losses.

    Raises:
        ValueError: the encoder lacks the stages that the detector reads, or the weights belong to another encoder.
    """
    if config.detector not in DETECTORS:
        raise ValueError(f"unknown detector {config.detector!r}: one of {', '.join(DETECTORS)}")
    encoder = build_backbone(config)
    if encoder_weights is not None:
        missing, unexpected = encoder.load_state_dict(encoder_weights, strict=False)
        wrong = required_keys((*missing, *unexpected))
        if wrong:
            raise ValueError(f"detector {config.detector} cannot take this encoder's weights: {wrong[0]} does not fit")
    scale = config.short_side / SHORT_SIDE
    # torchvision rounds the corners of anchors to pixels; a smaller anchor would have no width, and the box loss would be infinite.
    sizes = [max(size * scale, LEAST_ANCHOR) for size in ANCHORS]
    if config.detector == "fpn":
        backbone = PyramidBackbone(encoder)
        anchors = AnchorGenerator(tuple((size,) for size in sizes), ((0.5, 1.0, 2.0),) * len(sizes))
        pool = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, sampling_ratio=2, canonical_scale=CANONICAL * scale)
        heads = {"num_classes": len(config.classes) + 1}
    else:
        channels = encoder.channels
        head = Stage4Head(take_stage4(encoder), channels[3])
        backbone = Stage3Backbone(encoder, channels[2])
        anchors = AnchorGenerator((tuple(sizes),), ((0.5, 1.0, 2.0),))
        pool = MultiScaleRoIAlign(["0"], 14, sampling_ratio=2)
        heads = {"box_head": head, "box_predictor": FastRCNNPredictor(channels[3], len(config.classes) + 1)}
    normalisation = {"image_mean": config.image_mean, "image_std": config.image_std}
    least, most = config.image_size or (0, 0)
    model = FasterRCNN(
        backbone,
        min_size=least,
        max_size=most,
        rpn_anchor_generator=anchors,
        box_roi_pool=pool,
        **normalisation,
        **heads,
    )
    if config.image_size is None:
        model.transform = OwnSizeTransform(0, 0, **normalisation)
    model.config = config
    return model


def build_backbone(config: DetectorConfig) -> nn.Module:
    """
    Build the encoder with random weights and its four stages as feature maps.

    Raises:
        ValueError: the encoder has no four stages at the strides 4, 8, 16 and 32.
    """
    kind = config.backbone_config.get("model_type")
    try:
        backbone_config = four_stages(type(AutoConfig.for_model(kind)).from_dict(dict(config.backbone_config)))
    except ValueError as error:
        raise ValueError(f"detector {config.detector}: {error}; {WORKING}") from None
    refuse_giant(backbone_config, lambda: AutoBackbone.from_config(backbone_config, trust_remote_code=False))
    encoder = AutoBackbone.from_config(backbone_config, trust_remote_code=False)
    try:
        maps = encoder.eval()(torch.zeros(1, 3, 128, 128)).feature_maps
    except (AssertionError, RuntimeError, ValueError) as error:  # timm's ViTs that accept a single image size
        raise ValueError(f"detector {config.detector} does not fit a {kind!r} encoder: {error}; {WORKING}") from None
    sizes = [tuple(features.shape[2:]) for features in maps]
    if sizes != [(side, side) for side in (32, 16, 8, 4)]:
        strides = ", ".join(f"{128 / max(side, 1):.3g}" for side, _ in sizes)
        raise ValueError(
            f"detector {config.detector} does not fit a {kind!r} encoder with strides {strides}; {WORKING}"
        )
    freeze_idle(encoder, maps)
    return encoder


def take_stage4(encoder: nn.Module) -> nn.Module:
    """Remove stage4 from a ResNet and return it. Only the box head uses stage4; the encoder then ends with stage3."""
    kind = encoder.config.model_type
    if kind == "resnet":
        encoder.out_features = ["stage3"]
        return encoder.encoder.stages.pop(3)
    if kind == "timm_backbone" and "layer4" in encoder._backbone:
        return encoder._backbone.pop("layer4")
    name = encoder.config.backbone if kind == "timm_backbone" else kind
    raise ValueError(f"detector c4 needs a ResNet, whose stage4 reads single boxes, not a {name!r}; {WORKING}")


class DetectionReadout(FittedReadout):
    """Faster R-CNN, fine-tuned as a whole except for the statistics of the encoder's BatchNorms. Images are flipped at random."""

    trains_encoder = True

    def __init__(self, encoder: Encoder, data: BoxImages, recipe: DetectionRecipe):
        super().__init__()
        self.data = data
        sides = sorted(min(example.size) for example in data.train)
        config = DetectorConfig(
            detector=recipe.detector,
            backbone_config=encoder.model.config.backbone_config.to_dict(),
            classes=list(data.classes),
            image_mean=list(encoder.mean),
            image_std=list(encoder.std),
            image_size=recipe.image_size,
            short_side=recipe.image_size[0] if recipe.image_size else sides[len(sides) // 2],
        )
        self.model = build_detector(config, encoder.model.poodle.encoder.state_dict())
        self.model.roi_heads.fg_bg_sampler.batch_size_per_image = recipe.boxes_per_image

    def train(self, mode: bool = True) -> "DetectionReadout":
        super().train(mode)
        # 2 images a process and step are too few for BatchNorm statistics. As is usual in detection, those of pretraining are kept.
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def read(self, example: BoxExample) -> tuple[np.ndarray, BoxExample]:
        return self.data.image(example), example

    def batch(self, read: list[tuple[np.ndarray, BoxExample]], generator: torch.Generator) -> dict:
        device = next(self.model.parameters()).device
        images, targets = [], []
        for pixels, example in read:
            image = as_tensor(pixels, device)
            boxes = torch.from_numpy(example.boxes[~example.crowd])
            if torch.randint(2, (1,), generator=generator):
                image = image.flip(2)
                boxes = boxes[:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1]) + torch.tensor(
                    [image.shape[2], 0, image.shape[2], 0]
                )
            images.append(image)
            labels = torch.from_numpy(example.labels[~example.crowd]) + 1  # 0 is torchvision's background
            targets.append({"boxes": boxes.to(device), "labels": labels.to(device)})
        seed = int(torch.randint(2**31, (1,), generator=generator))
        return {"images": images, "targets": targets, "seed": seed}

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]], seed: int) -> Tensor:
        """Return the sum of the four losses: objectness and boxes of the proposals, classes and boxes of the head."""
        # torchvision samples the anchors and proposals of the loss with the global generator. It is seeded anew in each step, so that
        # an interrupted fit resumes bit for bit.
        torch.manual_seed(seed)
        return sum(self.model(images, targets).values())

    def predict(self, image: np.ndarray) -> dict[str, np.ndarray]:
        self.eval()
        return detect(self.model, image)

    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        state = {key: value.detach().cpu().contiguous() for key, value in self.model.state_dict().items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(
            json.dumps(dataclasses.asdict(self.model.config), indent=1), encoding="utf-8"
        )


def as_tensor(image: np.ndarray, device) -> Tensor:
    """Convert an image (H, W, 3) uint8 to a tensor (3, H, W) in [0, 1]."""
    return torch.from_numpy(image.copy()).permute(2, 0, 1).to(device).float() / 255


@torch.no_grad()
def detect(model: FasterRCNN, image: np.ndarray) -> dict[str, np.ndarray]:
    """
    Detect objects in an image (H, W, 3) uint8.

    Returns:
        `boxes` (M, 4) in xyxy pixels, `scores` (M,) in falling order, and `labels` (M,), class ids from 0.
    """
    (found,) = model([as_tensor(image, next(model.parameters()).device)])
    found = {key: value.cpu().numpy() for key, value in found.items()}
    return {"boxes": found["boxes"], "scores": found["scores"], "labels": found["labels"] - 1}


def load_detector(folder: str | Path) -> FasterRCNN:
    """
    Load a saved `detector/` in evaluation mode; its `config` names the classes.

    Raises:
        ValueError: the folder or a file in it is missing, a file is damaged, or the weights do not fit the config.
    """
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no detector: {name} is missing")
    try:
        config = DetectorConfig(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
        check_config(dataclasses.asdict(config), "it")
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder / 'config.json'} is no detector's: {error}") from None
    model = build_detector(config)
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except SafetensorError as error:
        raise ValueError(
            f"{folder}: model.safetensors cannot be read ({error}); it is damaged or half copied"
        ) from error
    except RuntimeError as error:
        raise ValueError(f"{folder}: the weights do not fit config.json: {error}") from None
    return model.eval()


__all__ = ["DetectionReadout", "DetectorConfig", "build_detector", "detect", "load_detector"]
