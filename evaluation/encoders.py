"""Any encoder, read in one way: image in, dense features out."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from evaluation.preprocessing import IMAGENET, preprocessing_of
from modeling_poodle import PoodleConfig, PoodleForSemanticSegmentation, PoodleModel
from modeling_poodle.config_checks import check_timm_name
from modeling_poodle.configuration_poodle import PLAIN_VITS
from modeling_poodle.folders import sha256_of
from modeling_poodle.loading_poodle import from_pretrained_whole, load_encoder, read_config, required_keys

CALIBRATION_IMAGES = 32  # that an untrained network's BatchNorm statistics are taken from
# Encoders trained at one size, that of their position embeddings. They could interpolate these, but larger images are read in windows of that size.
# (DINOv2 was trained at several sizes; DINOv3 and the convolutional ones have no such embeddings.)
WINDOWED = (*PLAIN_VITS, "beit")
WINDOWS = 16  # read at once: on a CPU a small ViT takes 0.8 of the time of one by one


class Encoder(nn.Module):
    """
    A frozen or trainable encoder with the map that a readout reads.

    Args:
        name: of the model, as the user gave it.
        model: a PoodleForSemanticSegmentation whose `poodle` is the encoder; its classifier is the readout.
        mean, std: of the model's own preprocessing.
        whole: read whole images also by an encoder of `WINDOWED`, with its position embeddings interpolated, because PooDLe pretrained it that
            way. Otherwise it is read in windows.
    """

    def __init__(
        self, name: str, model: PoodleForSemanticSegmentation, mean=IMAGENET[0], std=IMAGENET[1], whole: bool = False
    ):
        super().__init__()
        self.name, self.mean, self.std = name, tuple(mean), tuple(std)
        # As in training; a ResNet-50 reads 512x1024 on 2 CPU cores in 0.72 of the time of the default layout. (An UperNet on it gains nothing.)
        self.model = model.to(memory_format=torch.channels_last)
        self.weights_sha256: str | None = None  # of the files of a folder that was loaded
        self.statistics_from = "ImageNet"  # mean and std
        self.multiple = pixels_to_cover(model)
        windowed = model.config.backbone_config.model_type in WINDOWED and not whole
        self.window = own_size(model.poodle.encoder) if windowed else None
        self.one_size = False  # the network reads images of that size alone

    @property
    def features_name(self) -> str:
        """Which map is read: decoder, stage4, …"""
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
        """What the report adds where a readout builds the encoder from its own config, which knows no dilation (UperNet, detectors)."""
        own, trained = stage_stride(self.model.poodle.encoder), self.model.config.output_stride
        if trained is None or trained >= own:
            return ""
        return f"; the encoder at its own strides, up to {own}, without the dilation to {trained} that it was trained with"

    def normalise(self, image) -> Tensor:
        """(H, W, 3) uint8 array -> (1, 3, H, W) on the encoder's device."""
        device = self.model.device
        pixels = torch.from_numpy(image.copy()).to(device)  # bytes: a quarter of what floats would send
        mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (self.mean, self.std))
        return (pixels.permute(2, 0, 1)[None].float() / 255 - mean) / std

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (B, 3, H, W), any size -> features (B, C, h, w) of the whole image."""
        pixel_values = resize_up(pixel_values, self.multiple)
        if self.window is None:
            return self.model.features(pixel_values)
        return self._sliding(pixel_values)

    @torch.no_grad()
    def check(self) -> "Encoder":
        """
        Read a strip of pixels that is larger than the network's own images: a network of one size is read in windows of it from then on.

        Raises:
            ValueError: it reads no such images either way, or its map is not what its config says, or its cells are not square.
        """
        own = own_size(self.model.poodle.encoder)
        unit = -(-32 // self.multiple) * self.multiple  # a cell of an encoder's last stage, if not some
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
            self.multiple = height // rows  # now that it is known
        return self

    def _sliding(self, pixel_values: Tensor) -> Tensor:
        """Windows half overlapping, at multiples of the patch, their features averaged. Small images are padded to one window."""
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
                    cell = window // part.shape[-1]  # pixels: a patch, or the part of one that the SDM resolves
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
        """Pixels from one window to the next: half a window, in whole cells."""
        return max(self.window // 2 // self.multiple, 1) * self.multiple

    def _offsets(self, side: int) -> list[int]:
        last = side - self.window
        return [*range(0, last, self._step), last]


def own_size(encoder: nn.Module) -> int | None:
    """Side of the square images that a network was made for, pixels; `None` where it does not tell, or reads any."""
    if encoder.config.model_type == "timm_backbone":
        noted = encoder._backbone.pretrained_cfg
        return noted["input_size"][-1] if noted.get("fixed_input_size") else None
    size = getattr(encoder.config, "image_size", None)
    sides = {size} if isinstance(size, int) else set(size or ())
    return sides.pop() if len(sides) == 1 else None


def resize_up(pixel_values: Tensor, multiple: int) -> Tensor:
    """Images (B, 3, H, W) at the next multiples of `multiple` pixels; as they are where their sides are such."""
    height, width = pixel_values.shape[-2:]
    size = (height + -height % multiple, width + -width % multiple)
    if size == (height, width):
        return pixel_values
    # Resized rather than padded: readers of the map assume that it covers the image.
    return F.interpolate(pixel_values, size=size, mode="bilinear", align_corners=False)


def pixels_to_cover(model: PoodleForSemanticSegmentation) -> int:
    """
    What both sides of an image must be multiples of, pixels, for the map that is read to end where the image does. Of others ConvNeXt and
    ViTs leave out an edge, and the last cells of a ResNet or Swin reach beyond it.
    """
    config, encoder = model.config, model.poodle.encoder
    stage = config.readout_map
    if stage != "decoder":
        stride = stage_stride(encoder, stage)
    elif config.backbone_config.model_type == "resnet" and config.decoder_laterals and config.output_stride is None:
        # The SDM fits each of a ResNet's stages into the next finer one: its map ends where that of its last lateral does.
        stride = stage_stride(encoder) // 2**config.num_decoder_blocks
    else:
        stride = stage_stride(encoder)
    return min(stride, config.output_stride or stride)


def stage_stride(encoder: nn.Module, stage: str | None = None) -> int:
    """Pixels a cell of an encoder's stage, `None`: of its last, undilated; 1 where its config does not tell."""
    config = encoder.config
    if config.model_type == "timm_backbone":  # its network alone knows
        return max(encoder._backbone.feature_info.reduction())
    patch = getattr(config, "patch_size", None)
    if not getattr(config, "depths", None):  # a ViT, whose stages have one resolution
        return patch if isinstance(patch, int) else 1
    # Convolutional stems (ResNet's, BiT's, …) are of stride 4.
    first = (patch if isinstance(patch, int) else 4) * (
        2 if getattr(config, "downsample_in_first_stage", False) else 1
    )
    number = len(config.depths) if stage is None else int(stage.removeprefix("stage")) if stage != "stem" else 1
    return first * 2 ** (number - 1)


def build(name: str, num_labels: int, classes=None, features: str | None = None, seed: int = 0) -> Encoder:
    """
    The encoder that `--model` names.

    Args:
        name: a run's folder, a model folder, a Hub id, `timm/NAME`, or `random:` before any of them for the untrained twin.
        num_labels: outputs of the readout. classes: their names.
        features: the map to read; `None`: the SDM's for PooDLe, the last stage's for others.
        seed: of the readout's and an untrained twin's weights.

    Raises:
        ValueError: nothing there, no spatial features, no such map, one that cannot be read on images of any size, or a
            preprocessor_config.json that cannot be read.
    """
    untrained, (source, model_type) = name.startswith("random:"), look_up(name)
    # Before the weights are read: a run that is still training may replace the files in between.
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
        # A network of timm's returns the stages that it is built for.
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
    # For timm's names there is no preprocessor file: timm itself notes mean and deviation, which are not always ImageNet's.
    mean, std, origin = preprocessing_of(source) if model_type is not None else _timm_preprocessing(model)
    encoder = Encoder(name, model.eval(), mean, std, whole=whole).check()
    encoder.statistics_from = origin
    encoder.weights_sha256 = digest
    return encoder


def look_up(name: str) -> tuple[str, str | None]:
    """
    The folder or id that a `--model` stands for, and its type; `None` for a name of timm's. Reads a config alone: scripts ask before their data.

    Raises:
        ValueError: there is no such model, or a folder has no weights.
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
    """SHA-256 of a folder's weights, for those who publish them with what was measured."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return sha256_of(files) if files else None


@torch.no_grad()
def calibrate_batch_norm(encoder: Encoder, images: Iterable[np.ndarray]) -> None:
    """An untrained network gets the BatchNorm statistics of these images, their plain average, or it would be handicapped for nothing."""
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
    A copy of an encoder's config whose backbone returns its last four stages.

    Raises:
        ValueError: the encoder has no stages.
    """
    config = type(config).from_dict(config.to_dict())
    # As in `build_encoder`: not the (half) precision that the encoder's own checkpoint is stored in.
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
    Freeze the parameters on which no feature map depends (Swin's last norm): they cannot be trained, and DistributedDataParallel would
    wait for their gradients. `maps` are the encoder's, of any image.
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
    """Whether it is the `encoder/` exported beside a PooDLe `model/`: any encoder by its config, but trained by PooDLe."""
    folder = Path(source).resolve()
    model = folder.with_name("model")
    if folder.name != "encoder" or not folder.is_dir() or not (model / "config.json").is_file():
        return False
    return _model_type(str(model)) == "poodle"


def _timm_preprocessing(model: PoodleForSemanticSegmentation) -> tuple:
    """Mean and deviation that timm notes of the weights of its name, also of a twin without them; nothing is fetched. And where they are from."""
    noted = model.poodle.encoder._backbone.pretrained_cfg
    return tuple(noted["mean"]), tuple(noted["std"]), "timm"
