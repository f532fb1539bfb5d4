"""The code of PooDLe's own architectures, beside their weights: what `trust_remote_code=True` runs where this package is not installed."""

import json
import shutil
from pathlib import Path

_CODE = Path(__file__).resolve().parent
# By model type: the code that a folder holds, and its config's class.
CODE_FILES = {
    "poodle": ("config_checks.py", "configuration_poodle.py", "encoder_poodle.py", "modeling_poodle.py"),
    "poodle_flow": (
        "config_checks.py",
        "configuration_poodle.py",
        "configuration_poodle_flow.py",
        "geometry_poodle.py",
        "modeling_poodle_flow.py",
    ),
}
_CONFIGS = {"poodle": "configuration_poodle.PoodleConfig", "poodle_flow": "configuration_poodle_flow.PoodleFlowConfig"}
# What the Auto classes find. One checkpoint serves the network, the backbone, and a readout that is to be fitted on it.
_POODLE = {
    "AutoModel": "modeling_poodle.PoodleModel",
    "AutoBackbone": "modeling_poodle.PoodleBackbone",
    "AutoModelForSemanticSegmentation": "modeling_poodle.PoodleForSemanticSegmentation",
}
_AUTO_MAPS = {  # by architecture
    "PoodleModel": _POODLE,
    "PoodleForSemanticSegmentation": _POODLE,
    "PoodleFlowModel": {"AutoModel": "modeling_poodle_flow.PoodleFlowModel"},
}


def add_code(folder: Path, shown: Path | None = None) -> dict:
    """
    Copy the code of the architecture of a folder of weights there, and name it in its config.json; nothing where the architecture is
    transformers' own.

    Args:
        shown: what errors call the folder.

    Returns:
        What its config.json then says.

    Raises:
        ValueError: its architecture is not one of those that are shared.
    """
    config = json.loads((folder / "config.json").read_text())
    kind = config.get("model_type")
    if kind not in CODE_FILES:
        return config
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in _AUTO_MAPS:
        raise ValueError(
            f"{shown or folder}/config.json: architectures must be one of {list(_AUTO_MAPS)}, got {names!r}"
        )
    config = {**config, "auto_map": {"AutoConfig": _CONFIGS[kind], **_AUTO_MAPS[names[0]]}}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in CODE_FILES[kind]:
        shutil.copyfile(_CODE / file, folder / file)
    return config
