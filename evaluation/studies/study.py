"""
A study: what its recipe says, the runs that follow from it, and what was measured of them.

A recipe (recipes/NAME.yaml) has

    order, title, question, finding     for the page
    seeds                        of the pretraining and of the readout
    budgets                      NAME: {about, change} beyond what budgets.yaml has by that name: {about, base (a pretraining recipe), change}
    variants                     NAME: what is changed; {untrained: NAME} for that variant's encoder as it was drawn, {measure: …}
                                 for fields of the measures that differ
    measures                     NAME: fields of evaluation/segment.py's recipe, with `model` as the run's own folder
    commands                     NAME: a list of words that write a JSON file, for figures that need no pretraining
    plot, per_class, cost        how the page shows it

`change` and variants are mappings of a pretraining recipe's fields; `model.num_decoder_blocks` reaches into a mapping. `${NAME}` in a value
stands for the environment variable.
"""

import copy
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from modeling_poodle.folders import sha256_of, write_aside
from modeling_poodle.recipe_files import did_you_mean

HERE = Path(__file__).parent
RECIPES, RESULTS = HERE / "recipes", HERE / "results"
PRETRAINING_RECIPES = HERE.parent.parent / "training" / "recipes"


@dataclass(frozen=True)
class Run:
    """
    One pretraining. `key` is made of what its recipe says and of the seed, so that studies share what they have in common; not of the code's
    defaults, for which there is the commit in each entry. `weights` is the digest of the flow network that it reads, which `${NAME}` may point to.
    """

    variant: str
    seed: int
    recipe: dict[str, Any]
    untrained: bool
    measure: dict[str, Any]

    @property
    def key(self) -> str:
        kept = {name: value for name, value in self.recipe.items() if name not in NOT_OF_THE_RUN}
        return _digest([kept, self.seed])

    @property
    def flow_words(self) -> list[str]:
        return [self.recipe.get("flow_model") or ""]

    @property
    def weights(self) -> str | None:
        return weights_of(self.flow_words)


def weights_of(words: list[str]) -> str | None:
    """
    Digest of the models in the folders that `${NAME}` leads to in `words` (`ESTIMATOR:${NAME}` too); None where it leads to none.

    Raises:
        ValueError: an unset variable.
    """
    folders = [Path(expanded(word).rpartition(":")[2]) for word in words if "${" in word]
    files = [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]
    return sha256_of(files)[:12] if files else None


# Fields that change neither the batches nor the arithmetic. The loader's workers do: each makes batches of its own videos.
NOT_OF_THE_RUN = ("output_dir", "save_steps", "save_total_limit", "panel_steps", "logging_steps")


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


@dataclass
class Study:
    """A recipe of recipes/, checked."""

    name: str
    order: int
    title: str
    question: str
    seeds: list[int] = field(default_factory=lambda: [0])
    budgets: dict[str, dict] = field(default_factory=dict)
    variants: dict[str, dict | None] = field(default_factory=dict)
    measures: dict[str, dict] = field(default_factory=dict)
    commands: dict[str, list[str]] = field(default_factory=dict)
    plot: dict[str, Any] | None = None
    per_class: bool = False
    cost: bool = False
    finding: str = ""

    @classmethod
    def read(cls, name: str) -> "Study":
        """
        Raises:
            ValueError: no such study, or a recipe that does not fit.
        """
        path = RECIPES / f"{name}.yaml"
        if not path.is_file():
            raise ValueError(f"study must be one of {', '.join(names())}, got {name!r}{did_you_mean(name, names())}")
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(
                f"{path} has the unknown field {unknown[0]!r}{did_you_mean(unknown[0], cls.__dataclass_fields__)}"
            )
        study = cls(name=name, **values)
        study.budgets = {budget: _with_shared(path, budget, own) for budget, own in study.budgets.items()}
        for budget in study.budgets:
            list(study.runs(budget, study.seeds[:1]))  # raises for what does not fit
        return study

    def runs(self, budget: str, seeds: list[int]) -> Iterator[Run]:
        """All runs of a budget, seed after seed, so that an interrupted study has whole rows."""
        if budget not in self.budgets:
            raise ValueError(f"budget of {self.name} must be one of {', '.join(self.budgets)}, got {budget!r}")
        chosen = self.budgets[budget]
        base = yaml.safe_load((PRETRAINING_RECIPES / f"{chosen['base']}.yaml").read_text(encoding="utf-8"))
        base = changed(base, chosen["change"], f"{self.name}: budgets.{budget}.change")
        for seed in seeds:
            for name, change in self.variants.items():
                change = dict(change or {})
                twin = change.pop("untrained", None)
                if twin is not None:
                    if twin not in self.variants:
                        raise ValueError(f"{self.name}: variants.{name}.untrained names no variant: {twin!r}")
                    change = {**(self.variants[twin] or {}), **change}
                measure = change.pop("measure", {})
                recipe = changed(base, change, f"{self.name}: variants.{name}")
                yield Run(name, seed, recipe, twin is not None, measure)


def _with_shared(path: Path, budget: str, own: dict) -> dict:
    shared = yaml.safe_load((HERE / "budgets.yaml").read_text(encoding="utf-8"))
    if budget not in shared:
        raise ValueError(
            f"{path}: budgets must be of {', '.join(shared)}, got {budget!r}{did_you_mean(budget, shared)}"
        )
    return {**shared[budget], **own, "change": {**shared[budget]["change"], **own.get("change", {})}}


def names() -> list[str]:
    return [path.stem for path in sorted(RECIPES.glob("*.yaml"))]


def changed(recipe: dict, change: dict, where: str) -> dict:
    """`recipe` with `change`; a dotted name reaches into a mapping, which is made where there is none."""
    recipe = copy.deepcopy(recipe)
    for name, value in change.items():
        *parents, last = name.split(".")
        place = recipe
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ValueError(f"{where}: {name} reaches into {parent}, which is no mapping")
        place[last] = value
    return recipe


def expanded(value):
    """`${NAME}` in strings replaced by the environment's; an unset name is a ValueError."""
    if isinstance(value, dict):
        return {key: expanded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [expanded(item) for item in value]
    if not isinstance(value, str):
        return value

    def look_up(match: re.Match) -> str:
        if match[1] not in os.environ:
            raise ValueError(f"{value} needs the environment variable {match[1]}")
        return os.environ[match[1]]

    return re.sub(r"\$\{(\w+)\}", look_up, value)


# --- what was measured ---


def measured_key(run: Run, measure: dict) -> str:
    """What a figure depends on: the run, whether it was trained, the measure."""
    return _digest([run.key, run.untrained, measure])


def read_results(folder: Path = RESULTS) -> dict[str, dict]:
    """All entries of all studies, by their key; of commands by `NAME of the study/NAME of the command`."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        found |= json.loads(path.read_text(encoding="utf-8"))
    return found


@contextmanager
def results_of(name: str, folder: Path = RESULTS) -> Iterator[dict[str, dict]]:
    """The entries of a study, to be changed: read, and written aside and renamed, under a lock, as two processes may share a study."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    with open(folder / f".{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        yield entries
        # A line an entry: small, and a change of one is a change of one line.
        lines = [f" {json.dumps(key)}: {json.dumps(entries[key])}" for key in sorted(entries)]
        write_aside(path, "{\n" + ",\n".join(lines) + "\n}\n")
