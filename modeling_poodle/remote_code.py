"""Stores the code of PooDLe's architectures beside their weights. `trust_remote_code=True` runs it if this package is not installed."""

import json
import shutil
from pathlib import Path

_CODE = Path(__file__).resolve().parent
# The code files that a folder of weights holds, by model type.
CODE_FILES = {
    "poodle": (
        "config_checks.py",
        "configuration_poodle.py",
        "decoder_poodle.py",
        "encoder_poodle.py",
        "modeling_poodle.py",
    ),
    "poodle_flow": (
        "config_checks.py",
        "configuration_poodle.py",
        "configuration_poodle_flow.py",
        "geometry_poodle.py",
        "modeling_poodle_flow.py",
    ),
}
_CONFIGS = {"poodle": "configuration_poodle.PoodleConfig", "poodle_flow": "configuration_poodle_flow.PoodleFlowConfig"}
# Classes for the Auto classes to load. One checkpoint serves the network, the backbone, and a readout to be fitted on it.
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
    Copy the code of an architecture into its folder of weights, and name the code in config.json. Folders of transformers' own
    architectures are left unchanged.

    Args:
        folder: folder of the weights and config.json.
        shown: name of the folder in error messages; `folder` by default.

    Returns:
        The values of config.json afterwards.

    Raises:
        ValueError: the architecture is one of PooDLe's that is not published, such as PoodleForPreTraining.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = config.get("model_type")
    if kind not in CODE_FILES:
        return config
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in _AUTO_MAPS:
        raise ValueError(
            f"{shown or folder}/config.json: architectures must be one of {list(_AUTO_MAPS)}, got {names!r}"
        )
    config = {**config, "auto_map": {"AutoConfig": _CONFIGS[kind], **_AUTO_MAPS[names[0]]}}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in CODE_FILES[kind]:
        shutil.copyfile(_CODE / file, folder / file)
    return config
