"""What the recipes of all runs have in common: fields, checks, and how they are read from YAML and flags."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from modeling_poodle.recipe_files import CheckedRecipe, described, did_you_mean, is_finite, read_command_line, shown
from training.addresses import without_secrets
from training.hub import check_repo_id
from training.street_cameras import street_camera

TRACKERS = ("none", "tensorboard", "wandb", "trackio")
# Most pairs of a video: half of PAIRS_HELD in training/video_stream.py, so that at least two videos are interleaved.
MOST_PAIRS = 32
# Fields that may change when a run is resumed, because they change neither the batches nor the arithmetic.
FREE_ON_RESUME = frozenset(
    (
        "output_dir",
        "resume_from_checkpoint",
        "resume_inexact",
        "ddp_timeout",
        "save_steps",
        "save_total_limit",
        "panel_steps",
        "probe",
        "probe_steps",
        "report_to",
        "push_to_hub",
        "hub_model_id",
        "hub_private_repo",
    )
)
# Fields that may also change with resume_inexact, for a run that went wrong or is to be longer. From there on the pairs differ (as many a
# step as before), or the arithmetic, or the schedules.
FREE_ON_INEXACT_RESUME = frozenset(
    (
        "dataloader_num_workers",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "flow_epochs",
        "max_steps",
        "num_train_epochs",
        "learning_rate",
        "min_learning_rate",
        "teacher_momentum",
        "bf16",
        "gradient_checkpointing",
        "torch_compile",
    )
)
# Fields that belong to one flow estimator: those of a recipe file are dropped if --flow names another one.
_OF_A_FLOW = ("flow_weights", "flow_model", "flow_dir", "flow_epochs")
# Fields that must be integers of at least 1.
_AT_LEAST_ONE = (
    "pairs_per_video",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "ddp_timeout",
)


@dataclass
class RunRecipe(CheckedRecipe):
    """
    The recipe of any run that trains on videos.

    Fields that transformers' `TrainingArguments` has too are named as there. `model` holds the fields of `config_class`.
    """

    config_class = None

    videos: list[str] = described(
        ["street"],
        "Files, folders, globs, URLs, hf:// paths, tars; or 'street', the embedded drive, also 'street:walking' and others.",
    )
    output_dir: str = described(
        "runs/poodle", "Folder of the run: config, metrics, panels, checkpoints, and the model to load."
    )

    # Pairs
    frame_gap_seconds: list[float] = described(
        [0.5, 1.5],
        "Range of the time between the two frames of a pair, seconds; a video without such frames (give or take one frame, 0.1 to 1 s) is skipped.",
    )
    crop_size: list[int] = described([128, 256], "Height and width of the crop that both frames share, pixels.")
    frame_size: list[int] | None = described(
        None,
        "Height and width of a frame at scale 1, turned for portrait videos; unset: the smallest size, aspect kept, in which the crop fits.",
    )
    frame_scale: list[float] = described([1.0, 1.5], "Range of the frame's scale before the crop.")
    pairs_per_video: int = described(
        4,
        f"Pairs taken from a video each time it is opened (the method's repeat_sample), at most {MOST_PAIRS}. A worker decodes them together; "
        "the pairs of a batch come from different videos while batch size times this is at most 64.",
    )

    # Model
    model: dict[str, Any] | str = described(
        {},
        "Fields of the model's config. On the command line JSON, which changes these fields and keeps the recipe's others.",
    )

    # Optimisation
    max_steps: int = described(
        -1, "Optimizer steps; above 0 it overrides num_train_epochs, unless that alone is given as a flag."
    )
    num_train_epochs: float = described(
        100,
        "Epochs; in one, each video gives pairs_per_video pairs. As a flag it overrides a recipe file's max_steps.",
    )
    per_device_train_batch_size: int = described(16, "Pairs per process and micro-step.")
    gradient_accumulation_steps: int = described(1, "Micro-steps per optimizer step.")
    learning_rate: float = described(5e-4, "Peak learning rate.")
    min_learning_rate: float = described(0.0, "Learning rate at the end of the cosine.")
    warmup_steps: float = described(0.02, "Steps of linear warm-up; below 1 a share of all steps.")
    weight_decay: float = described(1e-2, "AdamW weight decay; none on biases and one-dimensional parameters.")
    adam_beta1: float = described(0.9, "AdamW beta 1.")
    adam_beta2: float = described(0.999, "AdamW beta 2.")
    adam_epsilon: float = described(1e-6, "AdamW epsilon.")
    bf16: bool = described(
        False, "Autocast to bfloat16. On x86 CPUs without AVX-512 BF16 two to ten times as slow as float32."
    )
    torch_compile: bool = described(
        False, "Compile the model, and the network that estimates flow, with torch.compile."
    )
    seed: int = described(0, "Seed of weights, batches and draws.")

    # Running
    dataloader_num_workers: int = described(1, "Decoding processes a rank.")
    logging_steps: int = described(10, "Steps between lines of metrics.jsonl.")
    save_steps: int = described(500, "Steps between checkpoints.")
    save_total_limit: int = described(2, "Checkpoints to keep.")
    panel_steps: int = described(
        500, "Steps between panels: pictures with frames of the videos. 0 writes none, and pushes hold none."
    )
    report_to: str = described("none", f"Tracker through Accelerate: {', '.join(TRACKERS)}.")
    resume_from_checkpoint: str | None = described(None, "'latest' or the path of a checkpoint.")
    resume_inexact: bool = described(
        False,
        "Allow resuming with another number of processes or workers, batch size or accumulation (a step has as many pairs, but other ones than "
        "without the stop), or with another flow_epochs, max_steps, num_train_epochs, learning_rate, min_learning_rate, teacher_momentum, bf16, gradient_checkpointing or torch_compile.",
    )
    ddp_timeout: int = described(
        1800, "Seconds that a process waits for the others before the run ends with an error."
    )
    push_to_hub: bool = described(False, "Send the model to the Hub at each checkpoint, in the background.")
    hub_model_id: str | None = described(
        None, "Name on the Hub, org/name; a model with decoder or dilation goes to org/name-sdm."
    )
    hub_private_repo: bool = described(False, "Make repositories that are new private.")

    def __post_init__(self):
        name = self.config_class.__name__
        if isinstance(self.model, str):
            try:
                self.model = json.loads(self.model)
            except (ValueError, RecursionError) as error:  # ValueError: not JSON, or a number of more than 4300 digits
                raise ValueError(
                    f"model must be a JSON mapping of {name}'s fields, got {shown(self.model)}: {error}"
                ) from None
        if not isinstance(self.model, dict):
            raise ValueError(f"model must be a mapping of {name}'s fields, got {shown(self.model)}")
        self.need_declared()
        self._check()

    def _check(self) -> None:
        self.need_integers(*_AT_LEAST_ONE)
        self.need(
            self.pairs_per_video <= MOST_PAIRS,
            "pairs_per_video",
            f"at most {MOST_PAIRS} (all are decoded at once, and a batch would be of one video); more epochs give more pairs",
        )
        for name in ("crop_size", "frame_size"):
            value = getattr(self, name)
            good = value is None or (len(value) == 2 and min(value) >= 1)
            self.need(good, name, "two positive integers, height and width, for example 256 512")
        self._need_range("frame_gap_seconds", "0.5 1.5")
        self._need_range("frame_scale", "1 1.5", above_zero=True)
        self.need(
            self.frame_size is not None or self.frame_scale[0] >= 1,
            "frame_scale",
            "at least 1 where frame_size is unset (below 1 the crop would be larger than the frame)",
        )
        self.need(bool(self.videos) and all(self.videos), "videos", "at least one source")
        for source in self.videos:
            street_camera(source)  # raises if the street has no such camera
        self.need(
            self.report_to in TRACKERS,
            "report_to",
            f"one of {', '.join(TRACKERS)}{did_you_mean(self.report_to, TRACKERS)}",
        )
        named = not self.push_to_hub or self.hub_model_id is not None
        self.need(named, "hub_model_id", "org/name where push_to_hub is true")
        if self.hub_model_id is not None:
            for name in (
                self.hub_model_id,
                f"{self.hub_model_id}-sdm",
            ):  # the model with the decoder is pushed to the second name
                check_repo_id(name, "hub_model_id")
        self.need(
            self.max_steps == -1 or self.max_steps >= 1, "max_steps", "at least 1, or -1 to go by num_train_epochs"
        )
        self.need(
            is_finite(self.num_train_epochs) and self.num_train_epochs > 0,
            "num_train_epochs",
            "a finite number above 0",
        )
        self.need(is_finite(self.learning_rate) and self.learning_rate > 0, "learning_rate", "a finite number above 0")
        self.need(
            0 <= self.min_learning_rate <= self.learning_rate, "min_learning_rate", "between 0 and learning_rate"
        )
        for name in ("warmup_steps", "weight_decay"):
            self.need(
                is_finite(getattr(self, name)) and getattr(self, name) >= 0, name, "a finite number of at least 0"
            )
        for name in ("adam_beta1", "adam_beta2"):
            self.need(0 <= getattr(self, name) < 1, name, "in [0, 1)")
        self.need(is_finite(self.adam_epsilon) and self.adam_epsilon > 0, "adam_epsilon", "a finite number above 0")
        self.need_integers("dataloader_num_workers", "seed", "panel_steps", low=0)
        self.need_output_dir()

    def model_config(self):
        """
        Return `model` as a `config_class`.

        Raises:
            ValueError: a field is unknown or has a wrong value.
        """
        try:
            return self.config_class(**self.model)
        except ValueError as error:  # some errors of transformers name no field
            raise ValueError(f"model: {error}") from error
        # transformers', of its own fields.
        except (TypeError, AttributeError, KeyError, StrictDataclassError) as error:
            raise ValueError(f"model holds a value that its config cannot have: {error}") from error

    @property
    def pairs_per_process(self) -> int:
        """Number of pairs that a process sees in an optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def _need_range(self, name: str, example: str, above_zero: bool = False) -> None:
        value = getattr(self, name)
        good = len(value) == 2 and all(is_finite(v) for v in value)
        low, bound = (1e-6, "both above 0 (at least 0.000001)") if above_zero else (0, "not negative")
        self.need(
            good and low <= value[0] <= value[1],
            name,
            f"two numbers, the smaller first, {bound}, for example {example}",
        )


def parse(kind: type, arguments: list[str] | None, about: str, folder: Path, defaults: tuple[str, str]):
    """
    Make a recipe of `kind` from `--config` and flags.

    Args:
        folder: of the package's recipes.
        defaults: names of the default recipes, if all videos are the street's and otherwise.
    """

    def default_config(given: dict) -> Path:
        only_street = all(street_camera(source) is not None for source in given.get("videos", ["street"]))
        return folder / f"{defaults[0 if only_street else 1]}.yaml"

    try:
        of_file, given = read_command_line(kind, arguments, about, folder, default_config, json_fields=("model",))
        values = {**of_file, **given}
        own = of_file.get("model") or {}
        if given.get("init_encoder") is not None:  # the flag's encoder replaces the file's
            own = {name: value for name, value in own.items() if name != "backbone_config"}
        # The same holds for the fields that go with the file's flow estimator.
        if "flow" in of_file and given.get("flow", of_file["flow"]) != of_file["flow"]:
            dropped = {*_OF_A_FLOW, *(["flow_max_error"] if given["flow"] == "exact" else [])}
            values = {name: value for name, value in values.items() if name not in dropped or name in given}
        values["model"] = _changed(own, given.get("model"))
        if (
            "num_train_epochs" in given and "max_steps" not in given
        ):  # otherwise the file's max_steps would override the flag
            values["max_steps"] = -1
        return kind(**values)
    except ValueError as error:  # the text shows the wrong value, and YAML's errors the lines around it
        raise ValueError(without_secrets(str(error))) from None


def _changed(own: dict, given: str | None) -> dict | str:
    """Return a file's `model` with the fields of the flag; `backbone_config` is replaced as a whole."""
    if given is None:
        return own
    try:
        fields = json.loads(given)
    except (ValueError, RecursionError):
        return given  # the recipe reports what is wrong with it
    return {**own, **fields} if isinstance(fields, dict) else given
