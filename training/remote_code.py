"""The code of PooDLe's own architectures, beside their weights: what `trust_remote_code=True` runs where this package is not installed."""

import json
import shutil
from pathlib import Path

_CODE = Path(__file__).resolve().parent.parent / "modeling_poodle"
# By model type: the code that a folder holds, and its config's class.
_CODE_FILES = {
    "poodle": ("configuration_poodle.py", "modeling_poodle.py"),
    "poodle_flow": (
        "configuration_poodle.py",
        "configuration_poodle_flow.py",
        "geometry_poodle.py",
        "modeling_poodle_flow.py",
    ),
}
_CONFIGS = {"poodle": "configuration_poodle.PoodleConfig", "poodle_flow": "configuration_poodle_flow.PoodleFlowConfig"}
# By architecture, what the Auto classes find. One checkpoint serves PoodleModel and PoodleBackbone.
_AUTO_MAPS = {
    "PoodleModel": {"AutoModel": "modeling_poodle.PoodleModel", "AutoBackbone": "modeling_poodle.PoodleBackbone"},
    "PoodleFlowModel": {"AutoModel": "modeling_poodle_flow.PoodleFlowModel"},
    "PoodleForSemanticSegmentation": {
        "AutoModelForSemanticSegmentation": "modeling_poodle.PoodleForSemanticSegmentation"
    },
}


def add_code(folder: Path, config: dict, shown: str | Path) -> dict:
    """
    Copy the code of a config's architecture to `folder`; nothing where the architecture is transformers' own.

    Args:
        config: of the weights there. shown: what errors call its file's folder.

    Returns:
        The config with the `auto_map` that names the code; it is written to the folder as well.

    Raises:
        ValueError: its architecture is none of those that are shared.
    """
    kind = config.get("model_type")
    if kind not in _CODE_FILES:
        return config
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in _AUTO_MAPS:
        raise ValueError(f"{shown}/config.json: architectures must be one of {list(_AUTO_MAPS)}, got {names!r}")
    config = {**config, "auto_map": {"AutoConfig": _CONFIGS[kind], **_AUTO_MAPS[names[0]]}}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in _CODE_FILES[kind]:
        shutil.copyfile(_CODE / file, folder / file)
    return config
