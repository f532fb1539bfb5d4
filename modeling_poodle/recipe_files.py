"""Recipes: a dataclass read from YAML and overridden by flags. What training/ and evaluation/ both need; no model is in here."""

import argparse
import atexit
import dataclasses
import difflib
import gc
import json
import os
import reprlib
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from .config_checks import is_int


def described(default, help: str, **flag):
    """A dataclass field with a help text, and more for argparse; lists and mappings are copied for each instance."""
    metadata = {"help": help, **flag}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def cache_root() -> Path:
    """
    Where the rendered street is kept: $POODLE_CACHE, else poodle/ in $XDG_CACHE_HOME, else ~/.cache/poodle.

    Raises:
        OSError: it cannot be made.
    """
    own, caches = os.environ.get("POODLE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    root = Path(own) if own else Path(caches or Path.home() / ".cache") / "poodle"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a container's user without a home
        raise OSError(
            f"{root}, where the rendered street is kept, cannot be made ({error.strerror}): name another folder with the environment variable POODLE_CACHE"
        ) from error
    return root


def is_finite(value) -> bool:
    """True for numbers that a float holds: not for NaN, infinity and integers of 400 digits."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


_SHORT = {
    "lr": "learning_rate",
    "min_lr": "min_learning_rate",
    "wd": "weight_decay",
    "betas": "adam",
    "K": "num_subcrops",
}


def did_you_mean(name: str, names) -> str:
    """` (did you mean 'x'?)`, or nothing where no name is near."""
    names = list(names)
    name = _SHORT.get(str(name), name)
    words = set(str(name).split("_"))
    # `workers` is dataloader_num_workers, whose letters are far from it; a word that many names have tells nothing.
    having = [known for known in names if words <= set(known.split("_")) or known.startswith(str(name))]
    close = having if 1 <= len(having) <= 3 else difflib.get_close_matches(str(name), names, n=1)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


class CheckedRecipe:
    """What recipes, which are dataclasses, have in common: errors that name the field, and YAML."""

    def need(self, condition: bool, name: str, expected: str) -> None:
        """Raises ValueError unless `condition` holds of the field `name`."""
        if not condition:
            raise ValueError(f"{name} must be {expected}, got {shown(getattr(self, name))}")

    def need_declared(self) -> None:
        """Each value is of its field's declared type."""
        # Not by dataclasses.fields, whose types HfArgumentParser changes.
        for name, kind in get_type_hints(type(self)).items():
            self.need(fits(getattr(self, name), kind), name, type_in_words(kind))

    def need_integers(self, *names: str, low: int = 1) -> None:
        for name in names:
            value = getattr(self, name)
            self.need(value >= low, name, f"an integer of at least {low}")
            self.need(value < 1 << 31, name, "an integer below 2^31")

    def need_models(self) -> None:
        """`model` names at least one, and none twice: each has one result and one folder."""
        self.need(bool(self.model) and all(self.model), "model", "a list of one or more models")
        self.need(len(set(self.model)) == len(self.model), "model", "a list that names each model once")

    def need_output_dir(self) -> None:
        # "" is what a shell makes of a variable that is unset; it would be the current folder.
        self.need(bool(self.output_dir.strip()), "output_dir", "the name of a folder")
        self.output_dir = os.path.expanduser(self.output_dir)  # in a file no shell has

    def to_yaml(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


def shown(value) -> str:
    """A value in an error: whole where it is short, its beginning where not."""
    text = reprlib.Repr()
    text.maxstring = text.maxother = 200
    text.maxlong, text.maxlist = 60, 20
    return text.repr(value)


_WORDS = {
    str: "text",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    dict: "a mapping",
    NoneType: "unset",
}


def type_in_words(kind) -> str:
    """A declared type as errors have it."""
    if isinstance(kind, UnionType):
        return " or ".join(type_in_words(part) for part in get_args(kind))
    if get_origin(kind) is list:
        return f"a list, each {type_in_words(get_args(kind)[0])}"
    return _WORDS[get_origin(kind) or kind]


def fits(value, kind) -> bool:
    """The value is of a declared type; numbers that are whole are floats too, True and False are no numbers."""
    if isinstance(kind, UnionType):
        return any(fits(value, part) for part in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(fits(item, get_args(kind)[0]) for item in value)
    if get_origin(kind) is dict:  # what a model's config is made of
        return isinstance(value, dict) and all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if kind is float:
        return is_int(value) or isinstance(value, float)
    return is_int(value) if kind is int else isinstance(value, kind)


def _is_plain(value) -> bool:
    """What both JSON and YAML hold."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float))


class _PlainLoader(yaml.SafeLoader):
    """Without aliases: some lines of them stand for more values than there is memory, and no recipe needs them."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError("a recipe has no aliases (*name)", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key, count in Counter(keys).items() if count > 1]:
            raise yaml.MarkedYAMLError(f"{twice[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml_mapping(path: Path) -> dict:
    """
    A YAML file that holds a mapping. Tags other than YAML's own, which would make objects, and aliases are refused.

    Raises:
        ValueError: not YAML, or no mapping.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that there is not; not UTF-8
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of recipe fields, got {type(values).__name__}")
    return values


def read_recipe_file(kind: type, path: str | Path, folder: Path) -> dict[str, Any]:
    """
    A recipe file as a mapping of fields of the dataclass `kind`; a bare name is looked up among the recipes in `folder`.

    Raises:
        ValueError: no such file, not YAML, or an unknown field (the nearest name is suggested).
    """
    path = Path(path)
    if not path.is_file() and (folder / f"{path.stem}.yaml").exists() and path.parent == Path("."):
        path = folder / f"{path.stem}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in folder.glob("*.yaml"))
        raise ValueError(
            f"--config: no such recipe file {path}; recipes of the package: {', '.join(known)}{did_you_mean(path.stem, known)}"
        )
    values = read_yaml_mapping(path)
    _refuse_unknown(kind, values, str(path))
    return {name: _as_declared(kind, name, value, str(path)) for name, value in values.items()}


def _refuse_unknown(kind: type, names, where: str) -> None:
    known = [f.name for f in dataclasses.fields(kind)]
    for name in names:
        if name not in known:
            raise ValueError(f"{where}: unknown recipe field {name!r}{did_you_mean(name, known)}")


def _as_declared(kind: type, name: str, value, where: str):
    """YAML reads 1e-4 as a string and 'videos: a.mp4' as no list; both are what a person meant."""
    declared = get_type_hints(kind)[name]
    if isinstance(declared, UnionType):
        if value is None and NoneType in get_args(declared):
            return None
        declared = get_args(declared)[0]
    try:
        if declared is float and isinstance(value, str):
            return float(value)
        if declared == list[float] and isinstance(value, list):
            return [float(item) if isinstance(item, str) else item for item in value]
    except ValueError:
        what = "a number" if declared is float else "a list, each a number"
        raise ValueError(f"{where}: {name} must be {what}, got {shown(value)}") from None
    if declared == list[str] and isinstance(value, str):
        return [value]
    if declared in (int, bool) and type(value) is not declared:
        expected = "an integer" if declared is int else "true or false"
        raise ValueError(f"{where}: {name} must be {expected}, got {shown(value)}")
    return value


def read_command_line(
    kind: type,
    arguments: list[str] | None,
    description: str,
    folder: Path,
    default_config: Callable[[dict], str | Path | None],
    json_fields=(),
) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    The values of a recipe's file, and the flags that go before them, both by field name. `--help` shows the values of the recipe.

    Args:
        kind: the dataclass. folder: of the package's recipes.
        default_config: what stands for `--config` where it is not given, by the flags; `None`: the dataclass's own values.
        json_fields: mappings, as JSON on the command line.

    Raises:
        ValueError: an unknown flag or field (the nearest is suggested), or a file that cannot be read.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = HfArgumentParser(kind, description=description, allow_abbrev=False, add_help=False)
    parser.add_argument(
        "-h", "--help", action="store_true", help="Show this and end; with --config, that recipe's values."
    )
    named = "" if default_config({}) is None else ", or the name of a recipe of the package"
    parser.add_argument("--config", help=f"Recipe file{named}.")
    for action in parser._actions:
        # Only flags that were given override the file.
        action.default = argparse.SUPPRESS
        if action.dest in json_fields:
            action.type = str  # read by the dataclass, whose error says what is wrong with it
    parser.error = _raise  # argparse would print all that there is before its sentence, and end the process
    flags, rest = parser.parse_known_args(arguments)
    for argument in rest:
        if argument.startswith("--"):
            name = argument[2:].split("=")[0]
            _refuse_unknown(kind, [name.removeprefix("no_")], "command line")
            if name.startswith("no_"):
                raise ValueError(f"command line: unknown flag {argument}; give --{name[3:]} and its value")
        raise ValueError(f"command line: unexpected argument {argument!r}")
    given = vars(flags)
    wants_help = given.pop("help", False)
    config = given.pop("config") if "config" in given else default_config(given)
    values = {} if config is None else read_recipe_file(kind, config, folder)
    if wants_help:
        _show_help(parser, kind, values, config)
    return values, given


def _raise(message: str) -> None:
    raise ValueError(f"command line: {message}")


def _show_help(parser: HfArgumentParser, kind: type, values: dict, config) -> None:
    """Print what the flags are, with the values that stand where they are not given, and end."""
    own = {
        field.name: field.default_factory() if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(kind)
    }
    for action in parser._actions:
        if action.option_strings[0].startswith("--no_"):
            action.help = f"The same as --{action.dest} false."
        elif action.dest in own:
            value = _typed(values.get(action.dest, own[action.dest]))
            action.help = f"{action.help or ''} (default: {value})".strip().replace("%", "%%")
    if config is not None:
        parser.epilog = f"The defaults shown are those of the recipe {Path(config).stem}."
    parser.print_help()
    parser.exit()


def _typed(value) -> str:
    """A value as one would type it."""
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, list):
        return " ".join(map(_typed, value)) or "none"
    return "unset" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def run_script(main) -> None:
    """Run `main()`; wrong input, and faults of the run, end with a sentence, not a stack trace (POODLE_TRACEBACK=1 shows it)."""
    if not gc.isenabled():
        # What was imported stays: later searches for garbage do not look through it. The last one must: libraries that look for objects
        # left over as Python ends (nanobind, in triton 3.9) print a page of leaks otherwise.
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)
    try:
        main()
    # FloatingPointError: a run that no longer learns (other ArithmeticErrors are mistakes of the code). OSError: disks, and processes that are gone.
    except (ValueError, FloatingPointError, OSError, MemoryError) as error:
        if os.environ.get("POODLE_TRACEBACK"):
            raise
        # A MemoryError may be without words.
        raise SystemExit(f"error: {str(error) or type(error).__name__}") from None
