"""A pretraining recipe: one dataclass, read from YAML, overridden by flags."""

import dataclasses
import difflib
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from modeling_poodle import PoodleConfig

RECIPES = Path(__file__).parent / "recipes"
FLOWS = ("dis", "raft_large", "raft_small", "exact")
TRACKERS = ("none", "tensorboard", "wandb", "trackio")
# May differ between a run and its resumption: they change neither the batches nor the arithmetic.
FREE_ON_RESUME = frozenset(
    (
        "output_dir",
        "resume_from_checkpoint",
        "logging_steps",
        "save_steps",
        "save_total_limit",
        "panel_steps",
        "report_to",
    )
)


def _of(default, help: str):
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class Recipe:
    """Everything that a run depends on. Fields that transformers' `TrainingArguments` has are called as there."""

    videos: list[str] = _of(
        ["street"], "Files, folders, globs, URLs, hf:// paths, tars; or 'street', the embedded drive."
    )
    output_dir: str = _of(
        "runs/poodle", "Folder of the run: config, metrics, panels, checkpoints, encoder/ and model/."
    )

    # Pairs (METHOD section 1, step 1)
    frame_gap_seconds: list[float] = _of([0.5, 1.5], "Range of the time between the two frames of a pair.")
    crop_size: list[int] = _of([128, 256], "Height and width of the crop that both frames share, pixels.")
    frame_size: list[int] | None = _of(
        None, "Height and width of a frame at scale 1; unset: the smallest size, aspect kept, in which the crop fits."
    )
    frame_scale: list[float] = _of([1.0, 1.5], "Range of the frame's scale before the crop.")
    pairs_per_video: int = _of(4, "Pairs taken from a video each time it is opened (the method's repeat_sample).")

    # Flow (step 3)
    flow: str = _of("dis", f"Estimator: {', '.join(FLOWS)}.")
    flow_updates: int = _of(24, "Iterations of RAFT.")
    flow_weights: str | None = _of(None, "RAFT weights: a .pth or .safetensors file; unset: torchvision's.")

    # Views and subcrops (steps 4 and 8)
    affine_views: bool = _of(True, "Rotate, scale and flip each network's view of each frame.")
    num_subcrops: int = _of(6, "Subcrop pairs a frame (K).")
    subcrop_area: list[float] = _of([0.05, 0.3], "Range of a subcrop's share of the frame.")
    subcrop_size: int = _of(64, "Side to which subcrops are resized, pixels.")
    subcrop_jitter: float = _of(0.1, "Jitter of the teacher's subcrop, share of the frame, both ways.")

    # Model (steps 5, 6, 9, 10)
    model: dict[str, Any] | str = _of({}, "PoodleConfig's fields, as a mapping (JSON on the command line).")
    init_encoder: str | None = _of(None, "Hub id or folder of an encoder to start from.")
    teacher_momentum: float = _of(0.996, "The teacher's momentum at the start; it rises to 1 on a cosine.")

    # Optimisation
    max_steps: int = _of(-1, "Optimizer steps; above 0 it overrides num_train_epochs.")
    num_train_epochs: float = _of(100, "Epochs; in one, each video gives pairs_per_video pairs.")
    per_device_train_batch_size: int = _of(16, "Pairs a process and micro-step.")
    gradient_accumulation_steps: int = _of(1, "Micro-steps an optimizer step.")
    learning_rate: float = _of(5e-4, "Peak learning rate.")
    min_learning_rate: float = _of(0.0, "Learning rate at the end of the cosine.")
    warmup_steps: float = _of(0.02, "Steps of linear warm-up; below 1 a share of all steps.")
    weight_decay: float = _of(1e-2, "AdamW weight decay; none on biases and one-dimensional parameters.")
    adam_beta1: float = _of(0.9, "AdamW beta 1.")
    adam_beta2: float = _of(0.999, "AdamW beta 2.")
    adam_epsilon: float = _of(1e-6, "AdamW epsilon.")
    bf16: bool = _of(False, "Autocast to bfloat16.")
    torch_compile: bool = _of(False, "Compile the model with torch.compile.")
    gradient_checkpointing: bool = _of(False, "Recompute activations in the backward pass.")
    seed: int = _of(0, "Seed of weights, batches and draws.")

    # Running
    dataloader_num_workers: int = _of(1, "Decoding processes a rank.")
    logging_steps: int = _of(10, "Steps between lines of metrics.jsonl.")
    save_steps: int = _of(500, "Steps between checkpoints.")
    save_total_limit: int = _of(2, "Checkpoints to keep.")
    panel_steps: int = _of(500, "Steps between panels.")
    report_to: str = _of("none", f"Tracker through Accelerate: {', '.join(TRACKERS)}.")
    resume_from_checkpoint: str | None = _of(None, "'latest' or the path of a checkpoint.")

    def __post_init__(self):
        if isinstance(self.model, str):
            try:
                self.model = json.loads(self.model)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"model must be a JSON mapping of PoodleConfig's fields, got {self.model!r}: {error}"
                ) from None
        if not isinstance(self.model, dict):
            raise ValueError(f"model must be a mapping of PoodleConfig's fields, got {self.model!r}")
        self._check()

    def _check(self) -> None:
        def need(condition: bool, name: str, expected: str) -> None:
            if not condition:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")

        for name in _AT_LEAST_ONE:
            need(_is_int(getattr(self, name)) and getattr(self, name) >= 1, name, "an integer of at least 1")
        for name in ("crop_size", "frame_size"):
            value = getattr(self, name)
            good = isinstance(value, list) and len(value) == 2 and all(_is_int(v) and v >= 1 for v in value)
            need(good or (name == "frame_size" and value is None), name, "two positive integers, height and width")
        for name, low in (("frame_gap_seconds", 0.0), ("frame_scale", 1e-6), ("subcrop_area", 1e-6)):
            value = getattr(self, name)
            good = isinstance(value, list) and len(value) == 2 and all(_is_finite(v) for v in value)
            need(good and low <= value[0] <= value[1], name, "two numbers, the smaller first, not negative")
        need(self.subcrop_area[1] <= 1, "subcrop_area", "shares of the frame, at most 1")
        need(
            self.frame_size is not None or self.frame_scale[0] >= 1,
            "frame_scale",
            "at least 1 where frame_size is unset (below 1 the crop would be larger than the frame)",
        )
        need(bool(self.videos) and all(isinstance(v, str) and v for v in self.videos), "videos", "at least one source")
        need(self.flow in FLOWS, "flow", f"one of {', '.join(FLOWS)}{_nearest(self.flow, FLOWS)}")
        need(
            self.report_to in TRACKERS,
            "report_to",
            f"one of {', '.join(TRACKERS)}{_nearest(self.report_to, TRACKERS)}",
        )
        need(self.max_steps == -1 or self.max_steps >= 1, "max_steps", "at least 1, or -1 to go by num_train_epochs")
        need(_is_finite(self.num_train_epochs) and self.num_train_epochs > 0, "num_train_epochs", "above 0")
        need(0 <= self.teacher_momentum <= 1, "teacher_momentum", "between 0 and 1")
        need(_is_finite(self.subcrop_jitter) and 0 <= self.subcrop_jitter <= 1, "subcrop_jitter", "between 0 and 1")
        need(_is_finite(self.learning_rate) and self.learning_rate > 0, "learning_rate", "above 0")
        need(0 <= self.min_learning_rate <= self.learning_rate, "min_learning_rate", "between 0 and learning_rate")
        for name in ("warmup_steps", "weight_decay"):
            need(_is_finite(getattr(self, name)) and getattr(self, name) >= 0, name, "not negative")
        for name in ("adam_beta1", "adam_beta2"):
            need(0 <= getattr(self, name) < 1, name, "in [0, 1)")
        need(self.adam_epsilon > 0, "adam_epsilon", "above 0")
        for name in ("dataloader_num_workers", "seed"):
            need(_is_int(getattr(self, name)) and getattr(self, name) >= 0, name, "an integer of at least 0")
        config = self.poodle_config()  # raises for each field that does not fit
        stride = 2 ** len(config.backbone_config.depths) * 2 if config.backbone_config.model_type == "resnet" else 1
        need(
            all(side % stride == 0 for side in self.crop_size),
            "crop_size",
            f"multiples of the encoder's stride {stride}",
        )
        if config.dense_weight == 0 and config.num_decoder_blocks:
            raise ValueError(
                "model.num_decoder_blocks must be 0 where dense_weight is 0: nothing would train the decoder"
            )

    def poodle_config(self) -> PoodleConfig:
        return PoodleConfig(**self.model)

    def to_yaml(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


_AT_LEAST_ONE = (
    "pairs_per_video",
    "flow_updates",
    "num_subcrops",
    "subcrop_size",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "panel_steps",
)


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _nearest(name: str, names) -> str:
    close = difflib.get_close_matches(str(name), list(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A recipe file as a mapping; a name without a folder is looked up among the recipes of the package."""
    path = Path(path)
    if not path.exists() and (RECIPES / f"{path.stem}.yaml").exists() and path.parent == Path("."):
        path = RECIPES / f"{path.stem}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise ValueError(f"--config: no such recipe file {path}; recipes of the package: {known}")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of recipe fields, got {type(values).__name__}")
    _refuse_unknown(values, str(path))
    return {name: _as_declared(name, value, str(path)) for name, value in values.items()}


def _refuse_unknown(names, where: str) -> None:
    known = [f.name for f in dataclasses.fields(Recipe)]
    for name in names:
        if name not in known:
            raise ValueError(f"{where}: unknown recipe field {name!r}{_nearest(name, known)}")


def _as_declared(name: str, value, where: str):
    """YAML reads 1e-4 as a string and 'videos: a.mp4' as no list; both are what a person meant."""
    kind = {f.name: f.type for f in dataclasses.fields(Recipe)}[name]
    if kind is float and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"{where}: {name} must be a number, got {value!r}") from None
    if kind == list[str] and isinstance(value, str):
        return [value]
    if kind in (int, bool) and type(value) is not kind:
        raise ValueError(f"{where}: {name} must be {'an integer' if kind is int else 'true or false'}, got {value!r}")
    return value


def parse_recipe(arguments: list[str] | None = None) -> Recipe:
    """
    Recipe from the command line: `--config FILE` first, then flags.

    Without `--config` the recipe is `street`, or `own_videos` where `--videos` names something else.

    Raises:
        ValueError: an unknown field (the nearest name is suggested), or a value out of range.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = HfArgumentParser(Recipe, description="Pretrain PooDLe on video.", allow_abbrev=False)
    parser.add_argument("--config", help="Recipe file, or the name of a recipe of the package.")
    # Defaults are taken away so that only flags that were given override the file.
    for action in parser._actions:
        if action.dest != "help":
            action.default = None
        if action.dest == "model":
            action.type = str  # JSON, read by the dataclass, whose error says what is wrong with it
    flags, rest = parser.parse_known_args(arguments)
    for argument in rest:
        if argument.startswith("--"):
            _refuse_unknown([argument[2:].split("=")[0].removeprefix("no_")], "command line")
        raise ValueError(f"command line: unexpected argument {argument!r}")
    given = {name: value for name, value in vars(flags).items() if value is not None}
    config = given.pop("config", None)
    if config is None:
        config = "street" if given.get("videos", ["street"]) == ["street"] else "own_videos"
    return Recipe(**{**read_yaml(config), **given})
