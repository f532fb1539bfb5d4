"""Model cards, which say only what was done and measured."""

import csv
import dataclasses
import html
import json
import re
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from training.addresses import dataset_of, hub_id, public_source
from training.card_code import LOADING, lines_to_load
from training.run_recipe import FREE_ON_RESUME
from training.street_cameras import street_camera

HUB_ID = "ORG/NAME"  # placeholder in a card until it is published
NOT_MEASURED = "Nothing was measured yet."
# Recipe fields that describe this machine rather than the training. Cards leave them out.
_PRIVATE_FIELDS = FREE_ON_RESUME | {
    "videos",
    "flow_weights",
    "flow_dir",
    "flow_model",
    "init_encoder",
    "logging_steps",
    "dataloader_num_workers",
}
_CITATION = """```bibtex
@inproceedings{wang2025poodle,
  title = {{PooDLe}: Pooled and dense self-supervised learning from naturalistic videos},
  author = {Wang, Alex N. and Hoang, Christopher and Xiong, Yuwen and LeCun, Yann and Ren, Mengye},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year = {2025},
  eprint = {2408.11208},
  archivePrefix = {arXiv}
}
```"""


@dataclasses.dataclass(frozen=True)
class Facts:
    """
    What a card says about a training run.

    Args:
        step: optimizer steps done.
        network: "teacher" or "student"; "network" for a run of train_flow.py.
        hardware: in words.
        num_processes: of the run.
        output_dir: of the run. The time comes from its `metrics.jsonl`, the carbon from CodeCarbon's `emissions.csv` if there is one.
    """

    step: int
    network: str
    hardware: str
    num_processes: int
    output_dir: Path


class Markdown(str):
    """Text that is already Markdown. Names from outside in it must have gone through [`code`] or [`plain`]."""


def run_card(part: str, config: dict, recipe: dict, facts: Facts) -> str:
    """
    Return the card of `encoder/` or `model/` of a run.

    Args:
        part: "encoder" or "model".
        config: of the PoodleModel.
        recipe: the fields of the run's recipe.
    """
    kind = config["backbone_config"]["model_type"]
    sources = [public_source(source) for source in recipe["videos"]]
    emissions = _emissions(facts.output_dir / "emissions.csv")
    data = _data(
        kind,
        _task(part, kind),
        datasets=sorted({name for source in sources if (name := dataset_of(source))}) or None,
        base_model=hub_id(recipe["init_encoder"]),
        co2_eq_emissions=emissions and {**emissions, "hardware_used": facts.hardware, "training_type": "pre-training"},
    )
    rows = {
        **_rows(recipe, facts),
        "Carbon": emissions and f"{emissions['emissions']:.3g} g CO2eq, by {emissions['source']}",
        "Started from": "random weights" if recipe["init_encoder"] is None else data.base_model or "a local encoder",
    }
    what = (
        f"{_part_in_words(part, kind, config)} Weights of the {_NETWORKS[facts.network]} after {facts.step} steps of self-supervised\n"
        "pretraining on video with PooDLe ([arXiv 2408.11208](https://arxiv.org/abs/2408.11208)): a dense loss that makes\n"
        "features equivariant to optical flow, and a pooled loss on subcrops that follow the flow."
    )
    return _card(data, f"PooDLe {kind}: {part}", what, lines_to_load(part, kind, config), _training(rows, recipe))


def _rows(recipe: dict, facts: Facts) -> dict:
    pairs = recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] * facts.num_processes
    return {
        "Videos": _sources_in_words([public_source(source) for source in recipe["videos"]]),
        "Steps": f"{facts.step} of {pairs} pairs",
        "Hardware": facts.hardware,
        "Time": _time(facts, recipe),
    }


def _training(rows: dict, recipe: dict) -> str:
    shown = {name: value for name, value in recipe.items() if name not in _PRIVATE_FIELDS and value is not None}
    recipe_text = yaml.safe_dump(shown, sort_keys=False, default_flow_style=None)
    recipe_text = recipe_text.replace("```", "~~~")  # a value may contain the fence, which would end the block
    return f"{_table(rows)}\n\n<details><summary>Recipe</summary>\n\n```yaml\n{recipe_text}```\n</details>"


_NETWORKS = {"teacher": "momentum teacher", "student": "student"}


def converted_card(part: str, config: dict, source: str, network: str | None) -> str:
    """
    Return the card of a folder converted from a checkpoint. It names no licence, because none is known here.

    Args:
        network: student or teacher; `None` if the checkpoint is not PooDLe's.
    """
    kind = config["backbone_config"]["model_type"]
    data = _data(kind, _task(part, kind), license=None)
    title, origin = f"PooDLe {kind}: {part}, converted", f"the checkpoint {code(source)}."
    if network is None:
        title, data.tags = f"{kind}: {part}, converted", [kind, "vision"]
    else:
        origin = f"the released checkpoint {code(source)}: weights of its {_NETWORKS[network]}."
    what = f"{_part_in_words(part, kind, config)} Converted from {origin}"
    return _card(
        data,
        title,
        what,
        lines_to_load(part, kind, config),
        "See the publication of the checkpoint.",
    )


def flow_card(recipe: dict, facts: Facts) -> str:
    """Return the card of `model/` of a run of train_flow.py. `recipe` holds the fields of its recipe."""
    what = (
        f"Optical flow of both directions of a frame pair, after {facts.step} steps of training on video without labels (photometric loss,\n"
        "smoothness, self-supervision on crops and a forward-backward occlusion check, after "
        "[UFlow](https://arxiv.org/abs/2006.04902))."
    )
    return _flow_card(what, _training(_rows(recipe, facts), recipe))


def _flow_card(what: str, training: str, license: str | None = "apache-2.0") -> str:
    data = _data("optical-flow", None, license)  # the Hub has no name for this task
    return _card(
        data, "Optical flow without labels", what, LOADING["flow"], training, "RGB from 0 to 1, not normalised."
    )


def folder_card(config: dict, results: list[dict]) -> str:
    """
    Return a card for a folder without one.

    Args:
        config: the folder's config.json.
        results: of its `evaluation.json`. They describe a readout or detector; of encoders and flow models nothing else is known.
    """
    kind = config.get("model_type", "detector")
    if kind == "poodle_flow":
        return _flow_card("Optical flow of both directions of a frame pair.", "Nothing was recorded.", license=None)
    readout = kind == "detector" or any(name.endswith("ForSemanticSegmentation") for name in config["architectures"])
    if not readout:
        part = "model" if kind == "poodle" else "encoder"
        inner = config["backbone_config"]["model_type"] if kind == "poodle" else kind
        data = _data(inner, _task(part, inner), license=None)
        return _card(
            data,
            f"{inner}: {part}",
            _part_in_words(part, inner, config),
            lines_to_load(part, inner, config),
            "Nothing was recorded.",
        )
    result = results[0] if results else {}
    task = "object-detection" if kind == "detector" else "image-segmentation"
    # Weights with a digest come from a local folder, whose path may look like a Hub id.
    model = None if result.get("weights_sha256") else result.get("model")
    data = _data(kind, task, base_model=hub_id(model))
    if kind == "detector":
        data.library_name = None  # a torchvision model, which this project's own function loads
    name, dataset = result.get("detector") or result.get("readout") or "", result.get("dataset", "images")
    what = (
        f"A {plain(name)} {'detector' if kind == 'detector' else 'readout'} on {data.base_model or 'an encoder'}, "
        f"fitted on {plain(dataset)}."
    )
    load = LOADING["detector" if kind == "detector" else "poodle readout" if kind == "poodle" else "readout"]
    known = ("num_train_images", "steps", "seed", "features", "inference")
    rows = {name.replace("_", " "): result[name] for name in known if name in result}
    if kind != "detector":
        rows["labels"] = Markdown(
            "the ids of `id2label`; to train on with others, map pixels without one (such as CamVid's 11) to 255"
        )
    return _card(data, f"PooDLe: {plain(name)} on {plain(dataset)}", what, load, _table(rows))


def publishable_card(text: str, repo_id: str, results: list[dict], panel: bool) -> str:
    """
    Return a card ready to be sent: with the repository's name, the picture and the results.

    Raises:
        ValueError: the metadata is not valid.
    """
    try:
        card = ModelCard(text)
        if results:
            card.data.model_name = repo_id.split("/")[-1]
            card.data.eval_results = [entry for result in results for entry in eval_results(result)]
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"README.md: its metadata (between the two lines ---) cannot be read: {error}") from None
    card.text = card.text.replace(HUB_ID, repo_id)
    if results:
        lines = [result_line(result) for result in results]
        head = "| data set | readout | features | figures |\n|---|---|---|---|\n"
        card.text = card.text.replace(NOT_MEASURED, head + "\n".join(lines))
    if not panel:  # the folder may have had one in an earlier publication
        card.text = re.sub(r"^!\[[^\n]*\]\(panel\.png\)\n\n?", "", card.text, flags=re.MULTILINE)
    elif "(panel.png)" not in card.text:
        flow = "optical-flow" in (card.data.tags or [])
        shown = (
            "both flows, and what is not hidden"
            if flow
            else "subcrops, flow, valid mask, views, features and subcrop pairs"
        )
        picture = f"![Frames with {shown}](panel.png)"
        card.text = card.text.replace("\n## Training", f"\n{picture}\n\n## Training", 1)
    return str(card)


_METRICS = {
    "miou": ("mean_iou", "mIoU"), "accuracy": ("accuracy", "pixel accuracy"), "mean_accuracy": ("mean_accuracy", "mean accuracy"),
    "ap": ("mean_average_precision", "AP"), "ap50": ("ap50", "AP50"), "ap75": ("ap75", "AP75"),
}  # fmt: skip


def eval_results(result: dict) -> list[EvalResult]:
    """Convert one model's result in an evaluation.json to the Hub's `model-index` entries. Values are not rescaled."""
    task = "object-detection" if "detector" in result else "image-segmentation"
    readout = result.get("detector") or result.get("readout")
    how = [readout, result.get("features"), f"{result['num_test_images']} test images", f"seed {result['seed']}"]
    if "num_train_images" in result:
        how.insert(2, f"{result['num_train_images']} training images")
    return [
        EvalResult(
            task_type=task,
            task_name=f"{task.replace('-', ' ').capitalize()}, {readout}",
            dataset_type=result["dataset"],
            dataset_name=f"{result['dataset']} ({result['num_test_images']} images)",
            # huggingface_hub merges entries of one task and data set unless their configs differ; names do not count.
            dataset_config=", ".join(part for part in how if part),
            metric_type=kind,
            metric_name=name,
            metric_value=result[key],
        )
        for key, (kind, name) in _METRICS.items()
        if result.get(key) is not None
    ]


def result_line(result: dict) -> str:
    figures = [
        f"{name} {100 * result[key]:.1f} %" for key, (_, name) in _METRICS.items() if result.get(key) is not None
    ]
    readout = result.get("detector") or result.get("readout")
    where = f"{result['dataset']}, {result['num_test_images']} test images"
    cells = (where, f"{readout}, seed {result['seed']}", result.get("features", ""), ", ".join(figures))
    return f"| {' | '.join(map(plain, cells))} |"


# --- sources ---


def _street_in_words(source: str) -> str | None:
    camera = street_camera(source)
    return camera and "the procedural street" + ("" if camera == "driving" else f" ({camera} camera)")


def _sources_in_words(sources: list[str | None]) -> Markdown:
    words = [_street_in_words(source) or code(source) for source in sources if source]
    local = sources.count(None)
    return Markdown(", ".join([*words, *([f"{local} local source{'s' if local > 1 else ''}"] if local else [])]))


# --- parts of a card ---


def _task(part: str, kind: str) -> str | None:
    """Return the Hub's name of the task, or `None` if transformers' pipeline of that name cannot load the folder."""
    return None if part == "encoder" and kind == "timm_backbone" else "image-feature-extraction"


def _part_in_words(part: str, kind: str, config: dict) -> str:
    stride = config.get("output_stride")
    if part == "encoder":
        dilated = (
            f" It was trained dilated to stride {stride}; this architecture runs the same weights undilated."
            if stride
            else ""
        )
        needed = "transformers and timm are" if kind == "timm_backbone" else "no code beyond transformers is"
        return f"The {kind} encoder alone, in its own architecture's format: {needed} needed.{dilated}"
    if config["num_decoder_blocks"]:
        return f"The {kind} encoder with PooDLe's spatial decoder of {config['num_decoder_blocks']} blocks."
    return f"The {kind} encoder" + (f", dilated to stride {stride}." if stride else ", without a decoder.")


def _data(kind: str, task: str | None, license: str | None = "apache-2.0", **more) -> ModelCardData:
    tags = ["poodle", kind, "self-supervised", "video", "vision"]
    return ModelCardData(library_name="transformers", license=license, pipeline_tag=task, tags=tags, **more)


_NORMALISED = "RGB, mean and deviation as in `preprocessor_config.json`."


def _card(data: ModelCardData, title: str, what: str, load: str, training: str, inputs: str = _NORMALISED) -> str:
    return f"""---
{data.to_yaml()}
---

# {title}

{what}

```python
{load}
```

Input: {inputs}

## Training

{training}

## Results

{NOT_MEASURED}

## Citation

{_CITATION}
"""


def _table(rows: dict) -> str:
    cells = {
        name: value.replace("|", "\\|") if isinstance(value, Markdown) else plain(value)
        for name, value in rows.items()
        if value is not None
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {cell} |" for name, cell in cells.items())])


def plain(value) -> str:
    """Return a value from outside (the name of a file or machine, a source) as one line that Markdown and HTML do not interpret."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    return text.translate({ord(character): f"&#{ord(character)};" for character in "|[]`"})


def code(value) -> str:
    """Return a value from outside as one line of inline code. Only backticks matter there: Markdown reads no HTML or entities in code."""
    return f"`{' '.join(str(value).split()).replace('`', chr(39))}`"


def _time(facts: Facts, recipe: dict) -> str | None:
    """Return the time spent in steps, computed from the logged speeds. Time between two parts of a run does not count."""
    path = facts.output_dir / "metrics.jsonl"
    if not path.exists():
        return None
    # The last line may be cut off if the run was killed.
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    pairs = recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] * facts.num_processes
    seconds, before = 0.0, 0
    for line in lines:
        if line["step"] <= facts.step:
            seconds += (line["step"] - before) * pairs / line["pairs_per_second"]
            before = line["step"]
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes" if seconds else None


def _emissions(path: Path) -> dict | None:
    """
    Return the grams of CO2eq from the file that CodeCarbon leaves in a run's folder, or `None` if there is no file.

    The file is in kilograms, one line for each measured part. Several lines with one `run_id` were written during one measurement: each
    includes the earlier ones, so only the last counts.
    """
    if not path.exists():
        return None
    with open(path, newline="", encoding="utf-8") as file:
        parts = {
            row.get("run_id") or number: float(row["emissions"]) for number, row in enumerate(csv.DictReader(file))
        }
    return {"emissions": sum(parts.values()) * 1000, "source": "CodeCarbon"}
