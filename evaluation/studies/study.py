"""
A study: its recipe, the runs that follow from it, and their results.

A recipe (recipes/NAME.yaml) has

    order, title, question, finding     text and order of the page
    seeds                        of the pretraining and of the readout
    budgets                      NAME: {about, change}, merged over the entry NAME of budgets.yaml, which has about, change and base, the
                                 name of a pretraining recipe
    variants                     NAME: the changes; {untrained: NAME} for the untrained encoder of another variant, {measure: …} for
                                 fields of the measures that differ
    measures                     NAME: fields of evaluation/segment.py's recipe; `model` is the run's own folder
    commands                     NAME: the words of a command that writes a JSON file, for figures that need no pretraining
    plot, per_class, cost        how the page shows the results

`change` and the variants map fields of a pretraining recipe to values; a dotted name such as `model.num_decoder_blocks` sets a value in a
nested mapping. `${NAME}` in a value stands for the environment variable.
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
    One pretraining.

    `key` is derived from the recipe's values and the seed, so that studies share equal runs. It does not cover the code's defaults, for
    which each entry of the results has the commit. `weights` is the digest of the flow network that a `${NAME}` in the recipe points to.
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
    Return a digest of the weights in the folders that `${NAME}` or `ESTIMATOR:${NAME}` in `words` points to; `None` if there are none.

    Raises:
        ValueError: a variable is unset.
    """
    folders = [Path(expanded(word).rpartition(":")[2]) for word in words if "${" in word]
    files = [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]
    return sha256_of(files)[:12] if files else None


# Fields that change neither the batches nor the arithmetic. The number of the loader's workers is not among them, because each worker makes
# batches of its own videos.
NOT_OF_THE_RUN = ("output_dir", "save_steps", "save_total_limit", "panel_steps", "logging_steps")


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


@dataclass
class Study:
    """A checked recipe of recipes/."""

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
        Read and check the recipe of a study.

        Raises:
            ValueError: there is no such study, or its recipe is invalid.
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
            list(study.runs(budget, study.seeds[:1]))  # raises if a change does not fit
        return study

    def runs(self, budget: str, seeds: list[int]) -> Iterator[Run]:
        """Yield all runs of a budget, seed by seed, so that an interrupted study has all variants of the first seeds."""
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
    """Return a copy of `recipe` with `change` applied. A dotted name sets a value in a nested mapping, which is created if missing."""
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
    """
    Replace `${NAME}` in all strings of a value by the environment variable.

    Raises:
        ValueError: a variable is unset.
    """
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
    """Return the key of a figure, which covers the run, whether it is trained, and the measure."""
    return _digest([run.key, run.untrained, measure])


def read_results(folder: Path = RESULTS) -> dict[str, dict]:
    """Return all entries of all studies by key. The key of a command's entry is `STUDY/COMMAND`."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        found |= json.loads(path.read_text(encoding="utf-8"))
    return found


@contextmanager
def results_of(name: str, folder: Path = RESULTS) -> Iterator[dict[str, dict]]:
    """Read a study's entries to be changed, and write them back at the end; under a lock, because two processes may share a study."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    with open(folder / f".{name}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        yield entries
        # One line for each entry: the file stays small, and changing an entry changes one line.
        lines = [f" {json.dumps(key)}: {json.dumps(entries[key])}" for key in sorted(entries)]
        write_aside(path, "{\n" + ",\n".join(lines) + "\n}\n")
