"""What a run is put together from: accelerator, model and optimizer of a recipe."""

import importlib.util
import logging
import warnings

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch import nn

from modeling_poodle import PoodleForPreTraining
from modeling_poodle.loading_poodle import load_encoder
from modeling_poodle.recipe_files import usable_cores
from training.recipe import Recipe


def make_accelerator(recipe: Recipe) -> Accelerator:
    """
    Raises:
        ValueError: the tracker of `report_to` is not installed. (Accelerate goes on without it, with a warning.)
    """
    if recipe.report_to != "none" and importlib.util.find_spec(recipe.report_to) is None:
        raise ValueError(
            f"report_to {recipe.report_to}: not installed; pip install {recipe.report_to}, or leave it out"
        )
    # Encoders other than ResNet can have parameters without use here (a ViT's mask token).
    plain = recipe.poodle_config().backbone_config.model_type == "resnet"
    ddp = DistributedDataParallelKwargs(
        broadcast_buffers=False, find_unused_parameters=not plain, gradient_as_bucket_view=True
    )
    accelerator = Accelerator(
        # Said outright: without it Accelerate overlooks the other processes that torchrun started on CPUs.
        cpu=not torch.accelerator.is_available(),
        mixed_precision="bf16" if recipe.bf16 else "no",
        log_with=None if recipe.report_to == "none" else recipe.report_to,
        project_dir=recipe.output_dir,
        kwargs_handlers=[ddp],
    )
    if accelerator.device.type == "cpu":
        # accelerate launch sets OMP_NUM_THREADS=1; the cores are there to be shared by the processes of this machine.
        torch.set_num_threads(max(1, usable_cores() // max(accelerator.num_processes, 1)))
    logging.basicConfig(format="%(message)s", level=logging.INFO if accelerator.is_main_process else logging.ERROR)
    for name in ("httpx", "httpx2"):  # the Hub client's, by its version
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*set_vital.*")  # torchdata calls what torch has deprecated
    transformers.utils.logging.disable_progress_bar()
    set_seed(recipe.seed)  # the same weights on every rank
    return accelerator


def build_model(accelerator: Accelerator, recipe: Recipe) -> PoodleForPreTraining:
    config, weights = recipe.poodle_config(), None
    if recipe.init_encoder is not None:
        try:
            encoder_config, weights = load_encoder(recipe.init_encoder)
        except ValueError as error:
            raise ValueError(f"init_encoder {error}") from error
        if "backbone_config" not in recipe.model:
            config = type(config)(**recipe.model, backbone_config=encoder_config)
    model = PoodleForPreTraining(config)
    if weights is not None:
        try:
            model.student.encoder.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(
                f"init_encoder {recipe.init_encoder} does not fit model.backbone_config; leave the latter out. {error}"
            ) from None
        model.reset_teacher()
    if recipe.gradient_checkpointing:
        model.student.checkpoint_gradients()
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    # Half the time of the default layout for small ResNets on a CPU, and what bf16 convolutions want on a GPU.
    return model.to(accelerator.device, memory_format=torch.channels_last)


def build_optimizer(accelerator: Accelerator, recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},  # biases and normalisations
    ]
    return torch.optim.AdamW(
        groups,
        lr=recipe.learning_rate,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_epsilon,
        fused=True,
    )
