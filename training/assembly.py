"""Build the accelerator, the model and the optimizer of a run from its recipe."""

import logging
import platform
import warnings
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, set_seed
from torch import nn

from modeling_poodle import PoodleConfig, PoodleForPreTraining, PoodleModel
from modeling_poodle.cpu import share_cpu
from modeling_poodle.loading_poodle import from_pretrained_whole, load_encoder, read_config, required_keys
from modeling_poodle.preprocessing import IMAGENET, preprocessing_of
from modeling_poodle.processes import log_plainly, refuse_sharding, sums_in_one_order
from training.batch_norm import EqualSyncBatchNorm2d, for_compilation
from training.recipe import Recipe, check_crop_size
from training.run_recipe import RunRecipe

logger = logging.getLogger("poodle")


def make_accelerator(recipe: RunRecipe) -> Accelerator:
    """
    Set up Accelerate for a recipe: device, precision, tracker and seed.

    Raises:
        ValueError: the tracker of `report_to` is not installed (Accelerate would only warn and continue without it), or Accelerate is
            configured for FSDP or similar sharding, or this PyTorch is too old for the device.
    """
    if recipe.report_to not in ("none", *(tracker.value for tracker in get_available_trackers())):
        raise ValueError(
            f"report_to {recipe.report_to}: not installed; pip install {recipe.report_to}, or leave it out"
        )
    refuse_sharding()
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    accelerator = Accelerator(
        # Without this flag, Accelerate does not see the other processes that torchrun started on CPUs.
        cpu=not torch.accelerator.is_available(),
        mixed_precision="bf16" if recipe.bf16 else "no",
        # The recipe's torch_compile decides. `accelerate config` would compile a second time, and no file of the run would say so.
        dynamo_backend="no",
        log_with=None if recipe.report_to == "none" else recipe.report_to,
        project_dir=recipe.output_dir,
        # The timeout after which the other processes fail if one has died or hangs.
        kwargs_handlers=[ddp, InitProcessGroupKwargs(timeout=timedelta(seconds=recipe.ddp_timeout))],
    )
    refuse_sharding(accelerator)
    check_torch_of(accelerator.device)
    # The environment may set another value. The training loop divides the loss itself, so Accelerate must not divide it again.
    accelerator.gradient_accumulation_steps = 1
    if accelerator.device.type == "cpu":
        share_cpu(accelerator.num_processes)
    else:
        # Compute matrix products in TF32, as cuDNN does for convolutions by default. The heads are 1x1 convolutions that are computed as
        # matrix products. In float32 they would take seven times as long by the data sheets (67 and 494 TFLOP/s), and they are more than
        # half of a step.
        torch.set_float32_matmul_precision("high")
    log_plainly(accelerator)
    if recipe.bf16 and accelerator.device.type == "cpu" and not computes_in_bfloat16():
        logger.warning(
            "bf16: this processor has no AVX-512 BF16 and computes bfloat16 two to ten times as slowly as float32; give --bf16 false"
        )
    if (
        recipe.bf16
        and accelerator.device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        logger.warning("bf16: this GPU does not compute it, and emulates it slowly; give --bf16 false")
    # Accelerate and torchdata still call deprecated functions of torch.
    warnings.filterwarnings("ignore", message=".*set_vital.*")
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")
    set_seed(recipe.seed)  # the same weights on every rank
    return accelerator


def check_torch_of(device: torch.device) -> None:
    """
    Refuse versions of PyTorch that cannot train on Apple GPUs.

    Before 2.13, the gradient of `grid_sample` is missing there, and the fused AdamW does not heed the flag by which an update is skipped.

    Raises:
        ValueError: the device is an Apple GPU and PyTorch is older.
    """
    if device.type == "mps" and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        raise ValueError(
            f"torch {torch.__version__} cannot train on an Apple GPU (mps), which needs 2.13 or newer: upgrade torch and torchvision, or "
            "train on the CPU (accelerate launch --cpu, or ACCELERATE_USE_CPU=true)"
        )


def computes_in_bfloat16() -> bool:
    """
    Return whether bfloat16 convolutions are no slower than float32 ones on this CPU. `True` on processors other than x86, where no one looked.

    On x86 with AVX-512 but without its BF16 instructions, oneDNN emulates them: a step takes 1.8 times as long as in float32. Below
    AVX-512 oneDNN has no bfloat16 convolutions, and with ATen's own it takes nine times as long. (Street and ResNet-50, one core of an EPYC
    with AVX-512 BF16 that was told to use less, 2026-12-01.)
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    # The capability is what ATen uses; the variable ATEN_CPU_CAPABILITY sets it lower than the processor's.
    return torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2") and torch.cpu._is_avx512_bf16_supported()


def build_model(
    accelerator: Accelerator,
    recipe: Recipe,
    model_class: type[PoodleForPreTraining] = PoodleForPreTraining,
    checkpoint: Path | None = None,
) -> PoodleForPreTraining:
    """
    Build the network that a recipe describes, on the accelerator's device.

    Args:
        checkpoint: from which the run resumes. It replaces all weights, so `init_encoder`, which may be gone by then, is not read.

    Raises:
        ValueError: `init_encoder` cannot be loaded or does not fit, the encoder does not fit the sizes of crops and subcrops, or the
            recipe's `model` is not the checkpoint's.
    """
    config, weights = recipe.model_config(), None
    if recipe.init_encoder is not None and checkpoint is not None:
        config = _resumed(recipe, config, checkpoint)
    elif recipe.init_encoder is not None:
        config, weights = _pretrained(recipe, config)
    check_crop_size(config, recipe.crop_size)
    model = model_class(config)
    if weights is not None:
        load_into(model.student, weights, recipe.init_encoder)
        warn_of_statistics(model, recipe.init_encoder)
        model.reset_teacher()
    if recipe.gradient_checkpointing:
        student = model.student
        # transformers 5.24 renamed this method and will remove the old name.
        renamed = hasattr(student, "activation_checkpointing_enable")
        (student.activation_checkpointing_enable if renamed else student.gradient_checkpointing_enable)()
    if accelerator.num_processes > 1 and accelerator.device.type != "cpu":  # PyTorch synchronises none on CPUs
        model = synchronise_batch_norm(model, recipe.torch_compile)
    # Channels-last takes half the time of the default layout for small ResNets on a CPU, and bf16 convolutions on a GPU prefer it.
    model = model.to(accelerator.device, memory_format=torch.channels_last)
    _try_sizes(model, recipe)
    return model


# Fields of PoodleConfig that a PooDLe model brings with its weights, besides `backbone_config`.
SDM_FIELDS = (
    "output_stride",
    "num_decoder_blocks",
    "decoder_reduction",
    "decoder_laterals",
    "decoder_lateral_depth",
    "decoder_top_down",
)


def _resumed(recipe: Recipe, config: PoodleConfig, checkpoint: Path) -> PoodleConfig:
    """
    Read the config of a checkpoint of a run that began at `init_encoder`.

    Usually the run's config.yaml was compared before. If it is lost, other values of `model` must not pass unnoticed.

    Args:
        config: that of the recipe alone.

    Raises:
        ValueError: a field of the recipe's `model` has another value.
    """
    found = type(config).from_pretrained(checkpoint)
    # Those of the SDM may be the encoder's own. Without a dense objective the model has set others itself.
    own = {"backbone_config", *SDM_FIELDS, *(["readout_stage"] if found.dense_weight == 0 else [])}
    for field in recipe.model:
        if field not in own and getattr(found, field) != getattr(config, field):
            raise ValueError(
                f"the checkpoint {checkpoint} is one of another configuration: model.{field} is {getattr(found, field)!r}, "
                f"not {getattr(config, field)!r}"
            )
    return found


def _pretrained(recipe: Recipe, config: PoodleConfig) -> tuple[PoodleConfig, dict[str, torch.Tensor]]:
    """
    Read `init_encoder`, a plain encoder or a PooDLe model with its SDM.

    Args:
        config: that of the recipe alone.

    Returns:
        The config of the network to build, and weights for its student.

    Raises:
        ValueError: the model is not found or cannot be loaded.
    """
    name, kind = recipe.init_encoder, None
    try:
        if Path(name).exists() or not name.startswith("timm/"):
            own = read_config(name)
            kind = own.model_type
        if kind == "poodle":
            weights = from_pretrained_whole(PoodleModel, name, config=own).state_dict()
    except (OSError, ValueError) as error:
        raise ValueError(f"init_encoder {name!r} is no encoder that can be loaded: {error}") from error
    if kind != "poodle":
        try:
            encoder_config, state = load_encoder(name, timm_stages=4)
        except ValueError as error:
            raise ValueError(f"init_encoder {error}") from error
        if "backbone_config" not in recipe.model:
            config = type(config)(**recipe.model, backbone_config=encoder_config)
        return config, {f"encoder.{key}": value for key, value in state.items()}
    brought = {field: getattr(own, field) for field in SDM_FIELDS}
    for field, value in brought.items():
        if recipe.model.get(field, value) != value:
            logger.warning(
                "init_encoder %s brings its own SDM: %s is %r, not %r", name, field, value, recipe.model[field]
            )
    config = type(config)(**{"backbone_config": own.backbone_config, **recipe.model, **brought})
    if config.dense_weight == 0:  # the network has no decoder then
        weights = {key: value for key, value in weights.items() if not key.startswith("decoder.")}
    return config, weights


def warn_of_statistics(model: PoodleForPreTraining, name: str) -> None:
    """Warn if an encoder was trained on images of another mean and deviation than ImageNet's, which a run and its exports use."""
    if name.startswith("timm/") and not Path(name).exists():
        noted = model.student.encoder._backbone.pretrained_cfg
        own = tuple(noted["mean"]), tuple(noted["std"])
    else:
        try:
            own = preprocessing_of(name, "init_encoder")[:2]
        except ValueError as error:  # a run does not need it, and the Hub may be out of reach
            logger.warning("%s", error)
            return
    if not torch.allclose(torch.tensor(own), torch.tensor(IMAGENET), atol=1e-3):
        logger.warning(
            "init_encoder %s was trained on images of mean %s and deviation %s; this run and its exports use ImageNet's",
            name,
            *own,
        )


@torch.no_grad()
def _try_sizes(model: PoodleForPreTraining, recipe: Recipe) -> None:
    """
    Run the encoder once on images of each of the recipe's sizes.

    Raises:
        ValueError: the encoder cannot take a size, its feature map does not cover the whole crop in square cells of whole pixels, or it does
            not read the last pixels of a subcrop.
    """
    student, config = model.student.eval(), model.config
    sizes = {"crop_size": recipe.crop_size} if config.dense_weight else {}
    sizes |= {"subcrop_size": [recipe.subcrop_size] * 2} if config.pooled_weight else {}
    for field, size in sizes.items():
        images = torch.zeros(1, 3, *size, device=model.device).contiguous(memory_format=torch.channels_last)
        images[:, :, -1] = torch.nan  # reaches every value that depends on these pixels, also through a ReLU
        try:
            maps = list(student.encode(images).values())[-1]
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, AssertionError, IndexError) as error:
            kind = config.backbone_config.model_type
            raise ValueError(f"{field} {size} does not fit the {kind} encoder: {str(error)[:300]}") from error
        if field == "subcrop_size" and not maps.isnan().any():
            kind = config.backbone_config.model_type
            raise ValueError(
                f"subcrop_size {size[0]}: the {kind} encoder would not read the last row; take a multiple of its stride or patch size"
            )
        height, width = maps.shape[-2:]
        cell = size[0] / height
        if field == "crop_size" and not (cell == size[1] / width == int(cell)):
            raise ValueError(
                f"crop_size {size} gives a map of {height}x{width} cells, which are no squares of whole pixels: take multiples of the encoder's stride"
            )
    student.train()


def synchronise_batch_norm(model: nn.Module, compiled: bool) -> nn.Module:
    """
    Return `model` with its BatchNorm layers synchronised over all processes.

    timm's BatchNorm layers contain the activation, which PyTorch's conversion would drop. timm's own conversion is used for them.

    Args:
        compiled: use operations that torch.compile captures in one graph (training/batch_norm.py). PyTorch's kernels are better without
            compilation.
    """
    if any(type(module).__module__.startswith("timm.") for module in model.modules()):
        from timm.layers import convert_sync_batchnorm as convert
    else:
        convert = nn.SyncBatchNorm.convert_sync_batchnorm
    if not compiled:
        return convert(model)
    for_compilation(model)
    # `convert` would replace these layers too, because they are BatchNorms.
    kept = {name: module for name, module in model.named_modules() if isinstance(module, EqualSyncBatchNorm2d)}
    model = convert(model)
    for name, module in kept.items():
        model.set_submodule(name, module)
    return model


def compile_modules(recipe: Recipe, *modules: nn.Module | None) -> None:
    """Compile the modules in place if the recipe asks for it."""
    for module in modules:
        if recipe.torch_compile and module is not None:
            module.compile(dynamic=False)  # there are few shapes, so each gets its own kernel


def prepared(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """
    Return `model` as Accelerate distributes it, but without Accelerate's conversion of all outputs to float32.

    In a bfloat16 step, the float32 copy of the dense features would take 128 MiB a pair when memory use peaks (ResNet-50, 512x1024). The
    losses are computed in float32 anyway, and the callers enter autocast themselves.
    """
    if accelerator.ddp_handler is not None:
        config = getattr(model, "config", None)
        idle = isinstance(config, PoodleConfig) and may_idle(config)
        accelerator.ddp_handler.find_unused_parameters = idle or sums_in_one_order(accelerator)
    wrapped = accelerator.prepare_model(model)
    # This changes `wrapped` in place: it removes the conversion to float32 from the module inside.
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False, keep_torch_compile=False)
    return wrapped


def may_idle(config: PoodleConfig) -> bool:
    """
    Return whether the encoder can have unused parameters, such as a ViT's mask token or stages after the last one that is read.

    Searching for them takes a walk through the graph at each step. A ResNet that is read to its last stage has none.
    """
    encoder = config.backbone_config
    return encoder.model_type != "resnet" or config.decoder_inputs[-1] != encoder.stage_names[-1]


def load_into(student: PoodleModel, weights: dict[str, torch.Tensor], name: str) -> None:
    """Load `weights` into `student`; a plain encoder has none for the decoder. Raises ValueError if they belong to another architecture."""
    try:
        missing, unexpected = student.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        missing, unexpected = [str(error)], []
    if not any(key.startswith("decoder.") for key in weights):
        missing = [key for key in missing if not key.startswith("decoder.")]
    wrong = required_keys(missing) + unexpected
    if wrong:
        raise ValueError(f"init_encoder {name} does not fit model.backbone_config; leave the latter out ({wrong[0]})")


def build_optimizer(recipe: RunRecipe, model: nn.Module) -> torch.optim.Optimizer:
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
