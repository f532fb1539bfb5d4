"""One interface to all encoders: image in, dense features out."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from modeling_poodle import PoodleConfig, PoodleForSemanticSegmentation, PoodleModel
from modeling_poodle.config_checks import check_timm_name
from modeling_poodle.configuration_poodle import PLAIN_VITS
from modeling_poodle.folders import sha256_of
from modeling_poodle.loading_poodle import from_pretrained_whole, load_encoder, read_config, required_keys
from modeling_poodle.preprocessing import IMAGENET, preprocessing_of

CALIBRATION_IMAGES = 32  # from which an untrained network's BatchNorm statistics are computed
# Encoders trained at one image size, the size of their position embeddings. They could interpolate the embeddings, but larger images are
# read in windows of that size instead. (DINOv2 was trained at several sizes; DINOv3 and convolutional encoders have no such embeddings.)
WINDOWED = (*PLAIN_VITS, "beit")
WINDOWS = 16  # windows in one forward pass; on a CPU a small ViT then takes 0.8 of the time that it takes one by one


class Encoder(nn.Module):
    """
    A frozen or trainable encoder, and the feature map that a readout reads.

    Args:
        name: the model's name as the user gave it.
        model: a PoodleForSemanticSegmentation whose `poodle` is the encoder and whose classifier is the readout.
        mean, std: normalisation of the model's own preprocessing.
        whole: read whole images, with interpolated position embeddings, even if the encoder's type is in `WINDOWED`. For encoders that
            PooDLe pretrained this way; others in `WINDOWED` are read in windows.
    """

    def __init__(
        self, name: str, model: PoodleForSemanticSegmentation, mean=IMAGENET[0], std=IMAGENET[1], whole: bool = False
    ):
        super().__init__()
        self.name, self.mean, self.std = name, tuple(mean), tuple(std)
        # The memory layout of training. A ResNet-50 reads 512x1024 on 2 CPU cores in 0.72 of the time of the default layout. (UperNet on
        # top of it gains nothing.)
        self.model = model.to(memory_format=torch.channels_last)
        self.weights_sha256: str | None = None  # hash of the weight files, if they lie in a folder
        self.statistics_from = "ImageNet"  # origin of mean and std
        self.multiple = pixels_to_cover(model)
        windowed = model.config.backbone_config.model_type in WINDOWED and not whole
        self.window = own_size(model.poodle.encoder) if windowed else None
        self.one_size = False  # whether the network accepts only images of its window's size

    @property
    def features_name(self) -> str:
        """Name of the map that is read: decoder, stage4, …"""
        config = self.model.config
        if config.backbone_config.model_type == "timm_backbone" and len(config.backbone_config.out_indices) == 1:
            return "last stage"
        return config.readout_map

    @property
    def channels(self) -> int:
        return self.model.classifier.in_channels

    @property
    def inference(self) -> str:
        """How images are read, for the report."""
        if self.window is None:
            return "whole image"
        saved = "images of that size alone" if self.one_size else "the whole image"
        return f"sliding window of {self.window}, stride {self._step} (a saved readout reads {saved})"

    @property
    def preprocessing(self) -> dict:
        """How images are normalised, for evaluation.json."""
        return {
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "image_statistics_from": self.statistics_from,
        }

    @property
    def undilated(self) -> str:
        """
        Text that the report adds if a readout uses the encoder without the dilation it was trained with; empty otherwise.

        UperNet and detectors build the encoder from its own config, which has no dilation.
        """
        own, trained = stage_stride(self.model.poodle.encoder), self.model.config.output_stride
        if trained is None or trained >= own:
            return ""
        return f"; the encoder at its own strides, up to {own}, without the dilation to {trained} that it was trained with"

    def normalise(self, image) -> Tensor:
        """Normalise an image: (H, W, 3) uint8 array -> (1, 3, H, W) on the encoder's device."""
        device = self.model.device
        pixels = torch.from_numpy(image.copy()).to(device)  # sent as bytes, a quarter of the size of floats
        mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (self.mean, self.std))
        return (pixels.permute(2, 0, 1)[None].float() / 255 - mean) / std

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Compute features (B, C, h, w) of whole images, pixel_values (B, 3, H, W) of any size."""
        pixel_values = resize_up(pixel_values, self.multiple)
        if self.window is None:
            return self.model.features(pixel_values)
        return self._sliding(pixel_values)

    @torch.no_grad()
    def check(self) -> "Encoder":
        """
        Check the encoder on a strip of pixels that is larger than the images it was made for.

        If the network accepts only images of its own size, it is read in windows of that size from then on.

        Raises:
            ValueError: the encoder cannot read such an image even in windows, its features are not finite, its map has other channels than
                the config says, or the map's cells are not whole squares of pixels.
        """
        own = own_size(self.model.poodle.encoder)
        unit = -(-32 // self.multiple) * self.multiple  # at least one cell of the last stage of most encoders
        height, width = 3 * unit, (-(-(own or 0) // unit) + 2) * unit
        try:
            features = self(torch.zeros(1, 3, height, width, device=self.model.device))
        except (AssertionError, IndexError, RuntimeError, ValueError) as error:
            if own is None or self.window is not None:
                raise ValueError(f"{self.name} reads no image of {height}x{width} pixels ({error})") from error
            self.window, self.one_size = own, True
            return self.check()
        channels, rows, columns = features.shape[1:]
        if not features.isfinite().all():
            raise ValueError(
                f"{self.name} gives features that are not finite: its weights are damaged, or it has diverged"
            )
        if channels != self.channels:
            raise ValueError(f"{self.name} has a map of {channels} channels, but its config says {self.channels}")
        if height * columns != width * rows or height % rows or (self.window or 0) % self.multiple:
            of = f"{height}x{width} pixels" + ("" if self.window is None else f" in windows of {self.window}")
            raise ValueError(f"{self.name} has a map of {rows}x{columns} cells for {of}, which are no whole squares")
        if self.features_name != "decoder":
            self.multiple = height // rows  # pixels a cell, now known
        return self

    def _sliding(self, pixel_values: Tensor) -> Tensor:
        """Read half-overlapping windows at multiples of the patch size and average their features. Small images are padded to one window."""
        window = self.window
        height, width = pixel_values.shape[-2:]
        pixel_values = F.pad(pixel_values, (0, max(window - width, 0), 0, max(window - height, 0)))
        tops, lefts = (self._offsets(side) for side in pixel_values.shape[-2:])
        corners = [(top, left) for top in tops for left in lefts]
        total = count = None
        for begin in range(0, len(corners), WINDOWS):
            some = corners[begin : begin + WINDOWS]
            windows = [pixel_values[..., top : top + window, left : left + window] for top, left in some]
            for (top, left), part in zip(some, self.model.features(torch.cat(windows)).split(len(pixel_values))):
                if total is None:
                    # Pixels a cell: a patch, or a part of it if the SDM refines the map.
                    cell = window // part.shape[-1]
                    size = [side // cell for side in pixel_values.shape[-2:]]
                    total = part.new_zeros(*part.shape[:2], *size)
                    count = part.new_zeros(1, 1, *size)
                rows = slice(top // cell, top // cell + part.shape[-2])
                columns = slice(left // cell, left // cell + part.shape[-1])
                total[..., rows, columns] += part
                count[..., rows, columns] += 1
        return (total / count)[..., : height // cell, : width // cell]

    @property
    def _step(self) -> int:
        """Pixels from one window to the next: half a window, rounded down to whole cells."""
        return max(self.window // 2 // self.multiple, 1) * self.multiple

    def _offsets(self, side: int) -> list[int]:
        last = side - self.window
        return [*range(0, last, self._step), last]


def own_size(encoder: nn.Module) -> int | None:
    """Return the side in pixels of the square images that a network was made for; `None` if unknown, or if it accepts any size."""
    if encoder.config.model_type == "timm_backbone":
        noted = encoder._backbone.pretrained_cfg
        return noted["input_size"][-1] if noted.get("fixed_input_size") else None
    size = getattr(encoder.config, "image_size", None)
    sides = {size} if isinstance(size, int) else set(size or ())
    return sides.pop() if len(sides) == 1 else None


def resize_up(pixel_values: Tensor, multiple: int) -> Tensor:
    """Resize images (B, 3, H, W) up to the next multiples of `multiple` pixels; images with such sides are returned as they are."""
    height, width = pixel_values.shape[-2:]
    size = (height + -height % multiple, width + -width % multiple)
    if size == (height, width):
        return pixel_values
    # Resized rather than padded, because readouts assume that the map covers the image.
    return F.interpolate(pixel_values, size=size, mode="bilinear", align_corners=False)


def pixels_to_cover(model: PoodleForSemanticSegmentation) -> int:
    """
    Return the number of pixels of which both image sides must be multiples, so that the map covers the image exactly.

    With other sides, ConvNeXt and ViTs leave out an edge of the image, and the last cells of a ResNet or Swin reach beyond it.
    """
    config, encoder = model.config, model.poodle.encoder
    stage = config.readout_map
    if stage != "decoder":
        stride = stage_stride(encoder, stage)
    elif config.backbone_config.model_type == "resnet" and config.decoder_laterals and config.output_stride is None:
        # The SDM fits each of a ResNet's stages into the next finer one, so its map ends where the map of its last lateral ends.
        stride = stage_stride(encoder) // 2**config.num_decoder_blocks
    else:
        stride = stage_stride(encoder)
    return min(stride, config.output_stride or stride)


def stage_stride(encoder: nn.Module, stage: str | None = None) -> int:
    """Return the stride in pixels of a stage, or of the last, undilated stage for `None`; 1 if the encoder's config does not tell."""
    config = encoder.config
    if config.model_type == "timm_backbone":  # only the network knows its strides
        return max(encoder._backbone.feature_info.reduction())
    patch = getattr(config, "patch_size", None)
    if not getattr(config, "depths", None):  # a ViT; all its stages have the same resolution
        return patch if isinstance(patch, int) else 1
    # Convolutional stems (ResNet's, BiT's, …) have stride 4.
    first = (patch if isinstance(patch, int) else 4) * (
        2 if getattr(config, "downsample_in_first_stage", False) else 1
    )
    number = len(config.depths) if stage is None else int(stage.removeprefix("stage")) if stage != "stem" else 1
    return first * 2 ** (number - 1)


def build(name: str, num_labels: int, classes=None, features: str | None = None, seed: int = 0) -> Encoder:
    """
    Build the encoder that `--model` names.

    Args:
        name: a run's folder, a model folder, a Hub id, `timm/NAME`, or `random:` before any of them for an untrained copy.
        num_labels: number of the readout's outputs.
        classes: names of the outputs.
        features: the map to read; `None` for the SDM's in PooDLe and the last stage's in others.
        seed: seed of the readout's weights, and of all weights of an untrained copy.

    Raises:
        ValueError: the model does not exist or cannot be loaded, has no spatial features or no such map, cannot read images of any size,
            or its preprocessor_config.json cannot be read.
    """
    untrained, (source, model_type) = name.startswith("random:"), look_up(name)
    # Hashed right before the weights are read, because a run that is still training may replace the files.
    digest = None if untrained else _digest(Path(source))
    classes = [f"class {index}" for index in range(num_labels)] if classes is None else classes
    labels = {"id2label": dict(enumerate(classes)), "label2id": {label: k for k, label in enumerate(classes)}}
    if model_type == "poodle":
        config, weights = PoodleConfig.from_pretrained(source), None
        if not untrained:
            try:
                weights = from_pretrained_whole(PoodleModel, source).state_dict()
            except (OSError, RuntimeError, ValueError) as error:
                raise ValueError(
                    f"--model {name}: {source} cannot be loaded, or is a checkpoint of another architecture ({error})"
                ) from error
    else:
        # A timm network returns only the stages that it is built for.
        encoder_config, state = load_encoder(source, weights=not untrained, timm_stages=1 if features is None else 4)
        weights = None if untrained else {f"encoder.{key}": value for key, value in state.items()}
        config = PoodleConfig(backbone_config=encoder_config, num_decoder_blocks=0)
    values = {**config.to_dict(), **labels, "readout_stage": features}
    values.pop("architectures", None)
    torch.manual_seed(seed)
    try:
        model = PoodleForSemanticSegmentation(PoodleConfig.from_dict(values))
    except ValueError as error:
        raise ValueError(f"--features {features}: {error}") from error
    if weights is not None:
        own = model.poodle.state_dict()
        missing, _ = model.poodle.load_state_dict({k: v for k, v in weights.items() if k in own}, strict=False)
        if wrong := required_keys(missing):
            raise ValueError(f"--model {name}: the checkpoint has no {wrong[0]}")
    whole = model_type == "poodle" or _is_encoder_of_poodle(source)
    # A timm name has no preprocessor file. timm itself records the mean and deviation, which are not always ImageNet's.
    mean, std, origin = preprocessing_of(source) if model_type is not None else _timm_preprocessing(model)
    encoder = Encoder(name, model.eval(), mean, std, whole=whole).check()
    encoder.statistics_from = origin
    encoder.weights_sha256 = digest
    return encoder


def look_up(name: str) -> tuple[str, str | None]:
    """
    Resolve a `--model` to its folder or Hub id, and its model type (`None` for a timm name).

    Only the config is read, so that scripts can check names before they load data.

    Raises:
        ValueError: the model does not exist, or the folder has no weights.
    """
    source = name.removeprefix("random:")
    if Path(source).name == "config.json" and Path(source).is_file():
        source = str(Path(source).parent)
    if Path(source, "model", "config.json").is_file():  # the folder of a run
        source = str(Path(source, "model"))
    model_type = _model_type(source)
    files = (pattern for name in ("model*.safetensors", "pytorch_model*.bin") for pattern in Path(source).glob(name))
    if not name.startswith("random:") and Path(source).is_dir() and not any(files):
        raise ValueError(f"--model {name}: the folder holds no weights (no model.safetensors)")
    return source, model_type


def _digest(folder: Path) -> str | None:
    """Return the SHA-256 of a folder's weights, so that published figures can be matched to weights; `None` if there are none."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return sha256_of(files) if files else None


@torch.no_grad()
def calibrate_batch_norm(encoder: Encoder, images: Iterable[np.ndarray]) -> None:
    """
    Set the BatchNorm statistics of an untrained network to the plain average over some images; otherwise it would be needlessly handicapped.

    Raises:
        ValueError: an image is too small.
    """
    norms = [module for module in encoder.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    encoder.train()
    for image in images:
        try:
            encoder(encoder.normalise(image))
        except ValueError as error:
            raise ValueError(
                f"{encoder.name}: an image of {image.shape[0]}x{image.shape[1]} is too small for the statistics of its BatchNorms ({error})"
            ) from error
    encoder.eval()
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


def four_stages(config: PreTrainedConfig) -> PreTrainedConfig:
    """
    Return a copy of an encoder's config with which AutoBackbone returns the last four stages.

    Raises:
        ValueError: the encoder has no stages.
    """
    config = type(config).from_dict(config.to_dict())
    # As in `build_encoder`: not the (possibly half) precision in which the encoder's own checkpoint is stored.
    config.dtype = torch.get_default_dtype()
    if config.model_type == "timm_backbone":
        config.out_indices = [-4, -3, -2, -1]
    elif hasattr(config, "stage_names"):
        config.out_features = [name for name in config.stage_names if name != "stem"][-4:]
    else:
        raise ValueError(
            f"an encoder with stages is needed, which AutoBackbone builds; {config.model_type!r} has none"
        )
    return config


def freeze_idle(encoder: nn.Module, maps: tuple[Tensor, ...]) -> None:
    """
    Freeze the parameters on which no feature map depends, such as Swin's last norm.

    They cannot be trained, and DistributedDataParallel would wait for their gradients.

    Args:
        maps: the encoder's feature maps of any image.
    """
    parameters = list(encoder.parameters())
    gradients = torch.autograd.grad(sum(m.sum() for m in maps), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients):
        parameter.requires_grad_(gradient is not None)


def _model_type(source: str) -> str | None:
    if source.startswith("timm/") and not Path(source).exists():
        try:
            check_timm_name(source.removeprefix("timm/"))
        except ValueError as error:
            raise ValueError(f"--model {source}: no such model ({error})") from error
        return None
    try:
        return read_config(source).model_type
    except OSError as error:
        raise ValueError(f"--model {source}: no such model ({error})") from error
    except (ValueError, KeyError) as error:
        raise ValueError(f"--model {source}: no such model that can be loaded ({error})") from error


def _is_encoder_of_poodle(source: str) -> bool:
    """Whether `source` is the `encoder/` that PooDLe exports beside a `model/`. Its config alone does not show that PooDLe trained it."""
    folder = Path(source).resolve()
    model = folder.with_name("model")
    if folder.name != "encoder" or not folder.is_dir() or not (model / "config.json").is_file():
        return False
    return _model_type(str(model)) == "poodle"


def _timm_preprocessing(model: PoodleForSemanticSegmentation) -> tuple:
    """Return the mean and deviation that timm records for a name, even if untrained, and 'timm' as their origin. Nothing is fetched."""
    noted = model.poodle.encoder._backbone.pretrained_cfg
    return tuple(noted["mean"]), tuple(noted["std"]), "timm"
