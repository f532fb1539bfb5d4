"""
Optical flow of both directions of a pair: (B, 2, 3, H, W) uint8 -> (B, 2, 2, H, W) in pixels, x then y; index 0 is earlier to later.

There are two kinds of estimators. A *pair flow* runs in the loader's workers on one sample; a *flow module* runs on the device on a batch.
"""

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import get_model, get_model_weights, optical_flow
from torchvision.utils import flow_to_image

from modeling_poodle import PoodleFlowConfig, PoodleFlowModel
from modeling_poodle.loading_poodle import config_values
from modeling_poodle.recipe_files import did_you_mean
from training.addresses import printable, video_name
from training.raft import GatedUnit, correlation_pyramid, update
from training.recipe import FLOWS, LEAST_SIDES
from training.street import Street


def _check_frames(frames: Tensor) -> None:
    """Check only shape and type, which are known without waiting for the device."""
    if frames.dtype != torch.uint8 or frames.ndim != 5 or frames.shape[1:3] != (2, 3):
        raise ValueError(f"frames must be (B, 2, 3, H, W) of torch.uint8, got {tuple(frames.shape)} of {frames.dtype}")


class DisFlow:
    """
    OpenCV's dense inverse search (Kroeger et al. 2016), the embedded default: no weights, no GPU.

    The preset is MEDIUM. Measured on one core:

    - smoothly warped CamVid frames (360x480, up to 24 px): mean end-point error 1.6 px at 31 ms a direction (FAST: 2.9 px at 6 ms,
      ULTRAFAST: 4.1 px at 3 ms);
    - the street at 128x256, 0.5 s apart: median end-point error 2.8 px at 3 ms (FAST: 5.3 px at 1 ms).

    At 512x1024 on a GPU machine use RAFT, which runs on the device.
    """

    def __init__(self):
        self._dis = None

    def __getstate__(self):
        return {"_dis": None}  # OpenCV's objects cannot be pickled; each worker makes its own

    def estimate(self, frames: np.ndarray) -> np.ndarray:
        """frames (2, 3, H, W) uint8 -> (2, 2, H, W) float32."""
        if self._dis is None:
            self._dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        earlier, later = (cv2.cvtColor(np.ascontiguousarray(f.transpose(1, 2, 0)), cv2.COLOR_RGB2GRAY) for f in frames)
        both = [self._dis.calc(earlier, later, None), self._dis.calc(later, earlier, None)]
        return np.stack(both).transpose(0, 3, 1, 2)

    def batch(self, frames: Tensor) -> Tensor:
        """frames (B, 2, 3, H, W) uint8 -> (B, 2, 2, H, W) float32 on their device; computed pair by pair on the CPU."""
        _check_frames(frames)
        if min(frames.shape[-2:]) < (least := LEAST_SIDES["dis"]):
            raise ValueError(
                f"dis needs frames of at least {least}x{least}, got {frames.shape[-2]}x{frames.shape[-1]}"
            )
        flows = [self.estimate(pair) for pair in frames.cpu().numpy()]
        return torch.from_numpy(np.stack(flows)).to(frames.device)

    def __call__(self, sample: dict) -> None:
        # Half precision halves what the worker hands over. Its resolution at 64 px is 1/16 px, far below the estimate's error.
        sample["flow"] = self.estimate(sample["frames"]).astype(np.float16)


class ExactFlow:
    """The street's own flow and visibility, computed from the sidecar file of each of its videos."""

    def __init__(self):
        self._streets: dict[str, Street] = {}

    def __call__(self, sample: dict) -> None:
        street = self._street(sample["video"])
        x0, y0, x1, y1 = sample["crop"]
        height, width = sample["frames"].shape[-2:]
        scale_x, scale_y = width / (x1 - x0), height / (y1 - y0)
        # Positions of the crop's pixel centres in the frame. remap takes indices, which are centres minus one half.
        map_x = np.tile(((np.arange(width) + 0.5) / scale_x + x0 - 0.5).astype(np.float32), (height, 1))
        map_y = np.tile(((np.arange(height) + 0.5) / scale_y + y0 - 0.5).astype(np.float32)[:, None], (1, width))
        earlier, later = sample["times"]
        flows, masks = [], []
        for begin, end in ((earlier, later), (later, earlier)):
            flow, visible = street.flow(begin, end)
            # Nearest neighbour: at the edge of a car, a mean of its flow and the road's would be wrong for both.
            nearest = cv2.remap(
                np.ascontiguousarray(flow.transpose(1, 2, 0)),
                map_x,
                map_y,
                cv2.INTER_NEAREST,
                borderMode=cv2.BORDER_REPLICATE,
            )
            seen = cv2.remap(
                visible.astype(np.uint8), map_x, map_y, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE
            )
            moved = (nearest * np.float32([scale_x, scale_y])).transpose(2, 0, 1)
            x = np.arange(width) + 0.5 + moved[0]
            y = np.arange(height)[:, None] + 0.5 + moved[1]
            inside = (x >= 0) & (x <= width) & (y >= 0) & (y <= height)
            flows.append(moved)
            masks.append(seen.astype(bool) & inside)
        sample["flow"] = np.stack(flows).astype(np.float16)
        sample["valid_mask"] = np.stack(masks)

    def _street(self, video: str) -> Street:
        if video not in self._streets:
            try:
                self._streets[video] = read_sidecar(video)
            except ValueError as error:  # `check_sidecars` accepted it, so it has changed since
                raise RuntimeError(str(error)) from None
        return self._streets[video]


def read_sidecar(video: str) -> Street:
    """
    Read the drive that a video of the street shows, from the sidecar file beside it.

    Raises:
        ValueError: there is no sidecar, or it is not the street's; says what is wrong with it.
    """
    sidecar, shown = Path(video).with_suffix(".json"), printable(video_name(video))
    if not sidecar.is_file():
        raise ValueError(f"flow exact exists only for the street, and {shown} has no sidecar. Use --flow dis")
    try:
        content = json.loads(sidecar.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not isinstance(content.get("street"), dict):
            raise ValueError("it has no mapping 'street'")
        return Street.from_json(content["street"])
    except (OSError, ValueError, TypeError, RecursionError) as error:  # TypeError: fields that a Street does not have
        raise ValueError(
            f"flow exact exists only for the street, and {printable(sidecar.name)} beside {shown} is no sidecar of it "
            f"({printable(str(error))}). Use --flow dis"
        ) from None


def check_sidecars(paths: Sequence[str]) -> None:
    """Raises ValueError if a video has no sidecar of the street beside it, from which exact flow is computed."""
    for path in paths:
        read_sidecar(path)


def in_float16(kind: str) -> bool:
    """Return whether a flow network computes in float16 on this kind of device: under autocast, except on CPUs, where float32 is faster."""
    return kind != "cpu" and torch.is_autocast_enabled(kind)


class RaftFlow(nn.Module):
    """
    torchvision's RAFT (Teed & Deng 2020) for both directions at once.

    The released code runs RAFT once for each order of the frames. Here each image passes the encoders once, and both directions go through
    the update block as one batch. What the updates share is computed once (training/raft.py), and only the last update is upsampled.

    Under autocast the network computes in float16 (on CPUs in float32), whatever autocast's own type. The reason is that flow enters the
    update block as numbers of up to 128 cells, of which bfloat16 keeps only 8 bits. Positions are always float32.

    Args:
        variant: "raft_large" or "raft_small".
        weights: a .pth or .safetensors file. `None` takes torchvision's own, downloaded or from its cache; "random" leaves it untrained.
        num_updates: number of iterations.
    """

    def __init__(self, variant: str = "raft_large", weights: str | None = None, num_updates: int = 24):
        super().__init__()
        self.num_updates = num_updates
        self.raft = get_model(variant, weights=None)
        if weights != "random":
            self._load(variant, weights)
        self.raft.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self._cast: dict[tuple, nn.Module] = {}
        self._one_update = update

    def compile(self, **options) -> None:
        """
        Compile only the update, which runs `num_updates` times: a graph of all updates would compile the same code that many times.

        On one core, 128x256 pairs take 1388 ms instead of 1755 (raft_large, 24 updates, float32). A compiled lookup writes only its
        result. Uncompiled, it also writes indices and windows, by count a third of all bytes that RAFT writes.
        """
        self._one_update = torch.compile(update, **{"fullgraph": True, "dynamic": False, **options})

    def _load(self, variant: str, weights: str | None) -> None:
        published = get_model_weights(variant).C_T_V2
        source = "torchvision's RAFT weights" if weights is None else f"flow_weights {weights}"
        advice = (
            f"Download {published.url} on a machine with internet and give the file with --flow_weights FILE, "
            "or use --flow dis, which needs no weights"
        )
        try:
            if weights is None:
                state = published.get_state_dict(
                    progress=False, check_hash=True, weights_only=True, map_location="cpu"
                )
            elif Path(weights).suffix == ".safetensors":
                state = load_file(weights)
            else:
                state = torch.load(weights, map_location="cpu", weights_only=True)
            state = {key.removeprefix("module."): value for key, value in state.items()}
        except (
            Exception
        ) as error:  # network, file system, unpickling and a file of something else raise different errors
            raise ValueError(f"{source} cannot be loaded ({type(error).__name__}: {error}). {advice}") from error
        if any(key.startswith("fnet.") for key in state):
            ported = get_model_weights(variant).C_T_V1.url
            raise ValueError(
                f"{source} has the keys of RAFT's original repository; give torchvision's port instead (of raft-things.pth or "
                f"raft-small.pth: {ported})"
            )
        try:
            self.raft.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{source} do not fit {variant}: {str(error)[:300]}. {advice}") from None

    @torch.no_grad()
    def forward(self, frames: Tensor) -> Tensor:
        """frames (B, 2, 3, H, W) uint8 -> (B, 2, 2, H, W) float32."""
        _check_frames(frames)
        b, _, _, height, width = frames.shape
        if min(height, width) < (least := LEAST_SIDES["raft_large"]):
            raise ValueError(
                f"RAFT needs frames of at least {least}x{least}, got {height}x{width}; use --flow dis for smaller ones"
            )
        images = frames.transpose(0, 1).flatten(0, 1).float() / 127.5 - 1  # (2B, 3, H, W): all earlier, then all later
        pad_h, pad_w = -height % 8, -width % 8
        padding = (pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2)
        images = F.pad(images, padding, mode="replicate")
        flow = self._both_directions(images)
        flow = flow[..., padding[2] : padding[2] + height, padding[0] : padding[0] + width]
        return flow.unflatten(0, (2, b)).transpose(0, 1).contiguous()

    def _both_directions(self, images: Tensor) -> Tensor:
        """(2B, 3, H, W) -> (2B, 2, H, W): first the flow from earlier to later, then the reverse."""
        raft, kind = self.raft, images.device.type
        reduced = in_float16(kind)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(kind, dtype=torch.float16, enabled=reduced):
            features, context = raft.feature_encoder(images), raft.context_encoder(images)
        with torch.autocast(kind, enabled=False):
            dtype = torch.float16 if reduced else torch.float32
            return self._update(features.to(dtype), context.to(dtype))

    def _update(self, features: Tensor, context: Tensor) -> Tensor:
        """Features and context (2B, C, h, w) of both images -> flow (2B, 2, 8h, 8w), float32."""
        earlier, later = features.chunk(2)
        pyramid = correlation_pyramid(features, torch.cat([later, earlier]), self.raft.corr_block.num_levels)
        block, predictor = (self._in(features, m) for m in (self.raft.update_block, self.raft.mask_predictor))
        hidden, context = context.split([block.hidden_state_size, context.shape[1] - block.hidden_state_size], dim=1)
        hidden, context = torch.tanh(hidden), F.relu(context)
        recurrent = block.recurrent_block
        units = [GatedUnit(u, context) for u in (recurrent.convgru1, recurrent.convgru2) if isinstance(u, nn.Module)]
        n, _, h, w = features.shape
        start = optical_flow._utils.make_coords_grid(n, h, w, device=features.device)
        # A clone, because torch.compile would compile a separate version for the first update if both arguments were the same tensor.
        points, radius = start.clone(), self.raft.corr_block.radius
        for _ in range(self.num_updates):
            points, hidden = self._one_update(block, units, pyramid, radius, start, points, hidden)
        mask = None if predictor is None else predictor(hidden).float()
        return optical_flow._utils.upsample_flow(flow=points - start, up_mask=mask)

    def _in(self, like: Tensor, module: nn.Module | None) -> nn.Module | None:
        """Return a frozen module in the type of `like`. The copy is kept, because autocast would cast the weights again in every update."""
        if module is None or like.dtype == torch.float32:
            return module
        key = id(module), like.dtype, like.device
        if key not in self._cast:
            self._cast[key] = copy.deepcopy(module).to(like.dtype)
        return self._cast[key]


class UnFlow(nn.Module):
    """
    The network that training/train_flow.py trains without labels, for both directions at once.

    Args:
        model: a run of train_flow.py, its `model/`, or a Hub id.

    Raises:
        ValueError: the model cannot be loaded, or it is not a flow model.
    """

    def __init__(self, model: str):
        super().__init__()
        inner = Path(model) / "model"
        folder = str(inner) if (inner / "config.json").is_file() else model
        advice = "give a run of training/train_flow.py, its model/, or a Hub id with --flow_model"
        try:
            kind = config_values(folder).get("model_type")
        except (OSError, ValueError) as error:
            raise ValueError(f"flow_model {model} cannot be read ({error}); {advice}") from error
        if kind != PoodleFlowConfig.model_type:
            raise ValueError(
                f"flow_model {model} is of type {kind!r}, expected {PoodleFlowConfig.model_type!r}; {advice}"
            )
        try:
            # In float32, even if the model was saved in half precision.
            self.model = PoodleFlowModel.from_pretrained(folder, dtype=torch.float32)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"flow_model {model} cannot be loaded ({str(error)[:300]}); {advice}") from error
        self.model.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, frames: Tensor) -> Tensor:
        """frames (B, 2, 3, H, W) uint8 -> (B, 2, 2, H, W) float32."""
        _check_frames(frames)
        height, width = frames.shape[-2:]
        stride = self.model.config.stride
        padding = (0, -width % stride, 0, -height % stride)
        images = F.pad(frames.flatten(0, 1).float() / 255, padding, mode="replicate").unflatten(0, (-1, 2))
        # float16, as for RAFT: bfloat16 is too coarse for flow (0.15 px off on average at 512x1024, float16 0.03).
        kind = frames.device.type
        with torch.autocast(kind, dtype=torch.float16, enabled=in_float16(kind)):
            flow = self.model(images).flow
        return flow[..., :height, :width].float().contiguous()


def build_flow(
    name: str,
    weights: str | None = None,
    num_updates: int = 24,
    folder: str | None = None,
    model: str | None = None,
) -> tuple[Callable[[dict], None] | None, nn.Module | None]:
    """
    Build the flow estimator with the given name.

    Args:
        weights, num_updates: of RAFT, see [`RaftFlow`].
        folder: of precomputed flow.
        model: of unflow, see [`UnFlow`].

    Returns:
        (pair flow for the workers, `None`) or (`None`, flow module for the device).

    Raises:
        ValueError: the name is unknown, or the weights cannot be loaded.
    """
    if name == "dis":
        return DisFlow(), None
    if name == "exact":
        return ExactFlow(), None
    if name == "precomputed":
        # Imported here because the module loads PyAV and datasets, which other estimators and the step itself do not need.
        from training.flow_files import FlowFiles

        return FlowFiles(folder), None
    if name in ("raft_large", "raft_small"):
        return None, RaftFlow(name, weights, num_updates)
    if name == "unflow":
        if model is None:
            raise ValueError("flow unflow needs its network: a run of training/train_flow.py, its model/, or a Hub id")
        return None, UnFlow(model)
    raise ValueError(f"flow must be one of {', '.join(FLOWS)}{did_you_mean(name, FLOWS)}, got {name!r}")


def flow_function(name: str, device: str | torch.device = "cpu", **options) -> Callable[[Tensor], Tensor]:
    """
    Return an estimator that needs only the frames (dis, raft_large, raft_small, unflow) as one function.

    The function takes frames (B, 2, 3, H, W) uint8 and returns flow (B, 2, 2, H, W) float32 in pixels, x then y. Index 0 is earlier to
    later.

    Args:
        device: where networks compute; frames and flow are on this device too.
        options: see [`build_flow`].

    Raises:
        ValueError: as `build_flow`, or the flow belongs to videos (exact, precomputed).
    """
    if name in ("exact", "precomputed"):
        raise ValueError(f"flow {name} belongs to videos, it is not estimated from frames")
    pair_flow, module = build_flow(name, **options)
    return pair_flow.batch if module is None else module.to(device)


def flow_to_rgb(flow: Tensor) -> Tensor:
    """Flow (2, H, W) -> uint8 (3, H, W) on the colour wheel. Colours are full at the 99th percentile of the flow's length."""
    length = flow.float().square().sum(dim=0).sqrt()
    longest = torch.quantile(length.flatten()[:: max(length.numel() // 100_000, 1)], 0.99).clamp(min=1e-3)
    # flow_to_image scales by the longest vector, so one outlier would make all others pale.
    return flow_to_image(flow.float() * (longest / torch.maximum(length, longest)))


if __name__ == "__main__":  # python -m training.flow --out DIR
    from modeling_poodle.recipe_files import run_script
    from training.flow_writer import main

    run_script(main)
