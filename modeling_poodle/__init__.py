"""PooDLe for transformers: importing this package registers the models with the Auto classes."""

from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForPreTraining, AutoModelForSemanticSegmentation
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES

from .configuration_poodle import PoodleConfig
from .configuration_poodle_flow import PoodleFlowConfig
from .modeling_poodle import PoodleBackbone, PoodleForSemanticSegmentation, PoodleModel, PoodlePreTrainedModel
from .modeling_poodle_flow import PoodleFlowModel, PoodleFlowOutput
from .modeling_poodle_pretraining import PoodleForPreTraining, PoodleForPreTrainingOutput

AutoConfig.register("poodle", PoodleConfig, exist_ok=True)
AutoModel.register(PoodleConfig, PoodleModel, exist_ok=True)
AutoBackbone.register(PoodleConfig, PoodleBackbone, exist_ok=True)
AutoModelForPreTraining.register(PoodleConfig, PoodleForPreTraining, exist_ok=True)
AutoModelForSemanticSegmentation.register(PoodleConfig, PoodleForSemanticSegmentation, exist_ok=True)
# pipeline("image-segmentation") looks the class up here, where `register` does not add it, and would log that it is not supported.
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES["poodle"] = "PoodleForSemanticSegmentation"
AutoConfig.register("poodle_flow", PoodleFlowConfig, exist_ok=True)
AutoModel.register(PoodleFlowConfig, PoodleFlowModel, exist_ok=True)

__all__ = [
    "PoodleBackbone",
    "PoodleConfig",
    "PoodleFlowConfig",
    "PoodleFlowModel",
    "PoodleFlowOutput",
    "PoodleForPreTraining",
    "PoodleForPreTrainingOutput",
    "PoodleForSemanticSegmentation",
    "PoodleModel",
    "PoodlePreTrainedModel",
]
