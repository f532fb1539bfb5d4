"""PooDLe for transformers: importing this package registers the model with the Auto classes."""

from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForPreTraining, AutoModelForSemanticSegmentation

from .configuration_poodle import PoodleConfig
from .modeling_poodle import PoodleBackbone, PoodleForSemanticSegmentation, PoodleModel, PoodlePreTrainedModel
from .modeling_poodle_pretraining import PoodleForPreTraining, PoodleForPreTrainingOutput

AutoConfig.register("poodle", PoodleConfig, exist_ok=True)
AutoModel.register(PoodleConfig, PoodleModel, exist_ok=True)
AutoBackbone.register(PoodleConfig, PoodleBackbone, exist_ok=True)
AutoModelForPreTraining.register(PoodleConfig, PoodleForPreTraining, exist_ok=True)
AutoModelForSemanticSegmentation.register(PoodleConfig, PoodleForSemanticSegmentation, exist_ok=True)

__all__ = [
    "PoodleBackbone",
    "PoodleConfig",
    "PoodleForPreTraining",
    "PoodleForPreTrainingOutput",
    "PoodleForSemanticSegmentation",
    "PoodleModel",
    "PoodlePreTrainedModel",
]
