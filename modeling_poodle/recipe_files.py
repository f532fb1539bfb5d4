"""Recipes: dataclasses read from YAML and overridden by flags. Shared by training/ and evaluation/, and independent of any model."""

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
    """Make a dataclass field with a help text and further settings for argparse. List and dict defaults are copied for each instance."""
    metadata = {"help": help, **flag}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def cache_root() -> Path:
    """
    Create and return the folder of the rendered street: $POODLE_CACHE, else poodle/ in $XDG_CACHE_HOME, else ~/.cache/poodle.

    Raises:
        OSError: the folder cannot be created.
    """
    own, caches = os.environ.get("POODLE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    root = Path(own) if own else Path(caches or Path.home() / ".cache") / "poodle"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # for example in a container whose user has no home
        raise OSError(
            f"{root}, where the rendered street is kept, cannot be made ({error.strerror}): name another folder with the environment variable POODLE_CACHE"
        ) from error
    return root


def is_finite(value) -> bool:
    """Whether `value` is a number that a float can represent: not NaN, infinity or an integer of 400 digits."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


_SHORT = {
    "lr": "learning_rate",
    "min_lr": "min_learning_rate",
    "wd": "weight_decay",
    "betas": "adam",
    "K": "num_subcrops",
}


def did_you_mean(name: str, names) -> str:
    """The text ` (did you mean 'x'?)` for the nearest of `names`, or an empty string if none is near."""
    names = list(names)
    name = _SHORT.get(str(name), name)
    words = set(str(name).split("_"))
    # `workers` means dataloader_num_workers, though their spellings are far apart. A word that occurs in many names gives no hint.
    having = [known for known in names if words <= set(known.split("_")) or known.startswith(str(name))]
    close = having if 1 <= len(having) <= 3 else difflib.get_close_matches(str(name), names, n=1)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


class CheckedRecipe:
    """Base class of the recipe dataclasses, with checks whose errors name the field, and YAML output."""

    def need(self, condition: bool, name: str, expected: str) -> None:
        """Raise ValueError for the field `name` unless `condition` is true."""
        if not condition:
            raise ValueError(f"{name} must be {expected}, got {shown(getattr(self, name))}")

    def need_declared(self) -> None:
        """Check that each value has the declared type of its field."""
        # Not dataclasses.fields, because HfArgumentParser changes the types there.
        for name, kind in get_type_hints(type(self)).items():
            self.need(fits(getattr(self, name), kind), name, type_in_words(kind))

    def need_integers(self, *names: str, low: int = 1) -> None:
        for name in names:
            value = getattr(self, name)
            self.need(value >= low, name, f"an integer of at least {low}")
            self.need(value < 1 << 31, name, "an integer below 2^31")

    def need_models(self) -> None:
        """Check that `model` names at least one model and none twice, because each model has one result and one folder."""
        self.need(bool(self.model) and all(self.model), "model", "a list of one or more models")
        self.need(len(set(self.model)) == len(self.model), "model", "a list that names each model once")

    def need_output_dir(self) -> None:
        # A shell turns an unset variable into "", which would mean the current folder.
        self.need(bool(self.output_dir.strip()), "output_dir", "the name of a folder")
        self.output_dir = os.path.expanduser(self.output_dir)  # no shell has expanded ~ in a recipe file

    def to_yaml(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)

    def flat(self) -> dict[str, bool | int | float | str]:
        """Return the fields as trackers compare them: those of mappings under dotted names, lists and `None` as text."""

        def fields(values: dict, prefix: str = ""):
            for name, value in values.items():
                if isinstance(value, dict) and value:
                    yield from fields(value, f"{prefix}{name}.")
                else:
                    plain = isinstance(value, (bool, int, float, str))
                    yield prefix + name, value if plain else json.dumps(value)

        return dict(fields(dataclasses.asdict(self)))


def shown(value) -> str:
    """Format a value for an error message, shortened if it is long."""
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
    """Name a declared type in words, for error messages."""
    if isinstance(kind, UnionType):
        return " or ".join(type_in_words(part) for part in get_args(kind))
    if get_origin(kind) is list:
        return f"a list, each {type_in_words(get_args(kind)[0])}"
    return _WORDS[get_origin(kind) or kind]


def fits(value, kind) -> bool:
    """Whether a value has a declared type. Integers also count as floats; True and False do not count as numbers."""
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
    """Whether a value consists only of types that both JSON and YAML can hold."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float))


class _PlainLoader(yaml.SafeLoader):
    """
    YAML loader that refuses aliases and duplicate keys.

    A few lines of aliases can expand to more values than fit into memory, and no recipe needs them.
    """

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
    Read a YAML file that holds a mapping. Aliases are refused, and so are tags other than YAML's own, which could create objects.

    Raises:
        ValueError: the file is not valid YAML, or not a mapping.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date, or not UTF-8
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of recipe fields, got {type(values).__name__}")
    return values


def read_recipe_file(kind: type, path: str | Path, folder: Path) -> dict[str, Any]:
    """
    Read a recipe file as a mapping of fields of the dataclass `kind`. A bare name is looked up among the recipes in `folder`.

    Raises:
        ValueError: there is no such file, it is not YAML, or it has an unknown field (the nearest name is suggested).
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
    """Convert a YAML value to the type of its field: YAML reads 1e-4 as a string, and 'videos: a.mp4' as a string rather than a list."""
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
    Read the recipe file of a command line, and the flags that override it.

    Args:
        kind: the recipe dataclass.
        arguments: the command line; `None` reads `sys.argv`.
        description: text of `--help`, which shows the values of the recipe as defaults.
        folder: folder of the package's recipes.
        default_config: returns the recipe to use if `--config` is not given, depending on the flags. If it returns `None`, the
            dataclass's own values are used.
        json_fields: fields that hold mappings, given as JSON on the command line.

    Returns:
        The values of the recipe file, and those of the flags, both by field name.

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
            action.type = str  # parsed by the dataclass, which raises a better error
    parser.error = _raise  # argparse would print all flags before the error, and end the process
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
    """Print the flags with their default values, and end the process."""
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
    """Format a value as it is typed on the command line."""
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, list):
        return " ".join(map(_typed, value)) or "none"
    return "unset" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def run_script(main) -> None:
    """
    Run `main()`. Wrong input, faults of the run and Ctrl-C end with one sentence instead of a stack trace (POODLE_TRACEBACK=1 shows it).
    """
    if not gc.isenabled():
        # Imported objects live until the end, so garbage collection can skip them. The collection at exit must include them: otherwise
        # libraries that look for leftover objects when Python ends (nanobind, in triton 3.9) print a page of leaks.
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)
    try:
        main()
    # FloatingPointError: a run that no longer learns (other ArithmeticErrors are bugs). OSError: disk faults, and processes that are gone.
    except (ValueError, FloatingPointError, OSError, MemoryError) as error:
        if os.environ.get("POODLE_TRACEBACK"):
            raise
        # A MemoryError may have an empty message.
        raise SystemExit(f"error: {str(error) or type(error).__name__}") from None
    except KeyboardInterrupt:
        # Raised again, because Python then ends by the signal itself, which also stops a shell's loop around the command.
        if not os.environ.get("POODLE_TRACEBACK"):
            sys.excepthook = lambda *_: print("\ninterrupted", file=sys.stderr)
        raise
