"""The Python code in model cards that loads each kind of folder."""

import json

from training.resnet_names import timm_architecture

# Code by the kind of folder. ORG/NAME stands for the repository id until the folder is published.
LOADING = {
    "encoder": """from transformers import AutoBackbone, AutoImageProcessor

processor = AutoImageProcessor.from_pretrained("ORG/NAME")
backbone = AutoBackbone.from_pretrained("ORG/NAME", out_features=FEATURES)
maps = backbone(**processor(image, return_tensors="pt")).feature_maps  # image: PIL, or (H, W, 3) uint8
pooled = maps[-1].mean(dim=(2, 3))  # POOLED (`pooler_output` of AutoModel may be another)
# UperNetConfig(backbone="ORG/NAME") and the like build the architecture without its weights; load these as well:
# upernet.backbone.load_state_dict(backbone.state_dict())""",
    "timm": """from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor

processor = AutoImageProcessor.from_pretrained("ORG/NAME")
# Not AutoBackbone.from_pretrained, which looks the name up in timm.
backbone = AutoBackbone.from_config(AutoConfig.from_pretrained("ORG/NAME"))
backbone.load_state_dict(load_file(hf_hub_download("ORG/NAME", "model.safetensors")))""",
    "plain vit": """from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("ORG/NAME")
model = AutoModel.from_pretrained("ORG/NAME", add_pooling_layer=False)
# Images of any size: positions are interpolated, as in pretraining.
output = model(**processor(image, return_tensors="pt"), interpolate_pos_encoding=True)  # image: PIL, or (H, W, 3) uint8
patches = output.last_hidden_state[:, SPECIAL:]
pooled = patches.mean(dim=1)  # POOLED, not the class token""",
    "model": """from transformers import AutoBackbone, AutoImageProcessor

# trust_remote_code runs the code in this repository; leave it out if the package modeling-poodle is installed and imported.
processor = AutoImageProcessor.from_pretrained("ORG/NAME")
backbone = AutoBackbone.from_pretrained("ORG/NAME", out_features=FEATURES, trust_remote_code=True)""",
    "flow": """import modeling_poodle  # the package modeling-poodle; without it give trust_remote_code=True, which runs the code in this repository
from transformers import AutoModel

model = AutoModel.from_pretrained("ORG/NAME")
flow = model(frames).flow  # frames (B, 2, 3, H, W) in [0, 1], sides multiples of model.config.stride -> (B, 2, 2, H, W) pixels""",
    "poodle readout": """from transformers import pipeline

segmenter = pipeline("image-segmentation", model="ORG/NAME", trust_remote_code=True)""",
    "readout": """from transformers import pipeline

segmenter = pipeline("image-segmentation", model="ORG/NAME")""",
    "detector": "\n".join(
        (
            "from huggingface_hub import snapshot_download",
            "",
            "from evaluation.detection import load_detector  # of the package modeling-poodle",
            "",
            'detector = load_detector(snapshot_download("ORG/NAME"))',
        )
    ),
}


def lines_to_load(part: str, kind: str, config: dict) -> str:
    """
    Return the Python code that loads a folder of weights from the Hub, for its model card.

    Args:
        part: "encoder" or "model".
        kind: the encoder's model type.
        config: the config of the PoodleModel, or of an encoder alone.
    """
    encoder = config.get("backbone_config", config)
    trained = config.get("pooled_weight", 0) > 0 and config.get("output_stride") is None
    pooled = "what the pooled loss has trained" if trained else "of the whole image"
    if part == "encoder" and kind in ("vit", "deit"):
        return LOADING["plain vit"].replace("SPECIAL", "2" if kind == "deit" else "1").replace("POOLED", pooled)
    if part == "encoder" and kind == "timm_backbone":
        return LOADING["timm"]
    names = config.get("stage_names") or []
    if part == "model":  # the last stage, and the decoder if there is one
        features = names[-2 if config["num_decoder_blocks"] else -1 :]
    else:
        stages = [name for name in names if name not in ("stem", "decoder")]
        features = stages[-3:-2] + stages[-1:]
    text = LOADING[part].replace("POOLED", pooled)
    if part == "encoder" and timm_architecture(encoder) is not None:
        text += '\n# or: timm.create_model("hf-hub:ORG/NAME", pretrained=True)'
    if not features:  # another architecture's config without stage names: its last stage is the default
        return text.replace(", out_features=FEATURES", "")
    return text.replace("FEATURES", json.dumps(features))
