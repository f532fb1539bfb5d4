"""
The forward passes of training as a GPU runs them, tested without a GPU: on fake tensors with a shape, a type and a device, but no values.

On such tensors it is an error to read a value (the host would wait for the GPU) or to mix devices, and autocast follows CUDA's own lists
of types. Backward passes, optimizers and generators need a driver and are left out.
"""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from labelled_shapes import RESNET
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from modeling_poodle import PoodleConfig, PoodleFlowConfig, PoodleFlowModel, PoodleForPreTraining
from modeling_poodle import PoodleForSemanticSegmentation as Segmenter
from training import views
from training.flow import build_flow
from training.flow_objectives import flow_losses
from training.recipe import parse_recipe

GPU = torch.device("cuda", 0)
# As observed, PyTorch 2.14 runs these tests; 2.9 asks for a driver in the first convolution and ends the process.
pytestmark = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14),
    reason="tensors without numbers on a GPU need PyTorch 2.14",
)
SMALL = {"backbone_config": {"model_type": "resnet", **RESNET}}


class Gpu:
    """A fake GPU whose tensors have no values: `put` moves a module there, `run` calls a function there under bfloat16 autocast."""

    def __init__(self):
        self.mode = FakeTensorMode()

    def put(self, module: nn.Module) -> nn.Module:
        for part in module.modules():
            for name, value in part.named_parameters(recurse=False):
                part._parameters[name] = nn.Parameter(self._move(value), requires_grad=value.requires_grad)
            for name, value in part.named_buffers(recurse=False):
                part._buffers[name] = self._move(value)
        return module

    def _move(self, value: torch.Tensor) -> torch.Tensor:
        empty = self.mode.from_tensor(value.data)
        with self.mode:
            return empty.to(GPU)

    def run(self, function, *args, autocast: bool = True, **kwargs):
        with self.mode, torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            return function(*args, **kwargs)


@pytest.fixture
def gpu(monkeypatch):
    # Autocast checks for a driver.
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *args, **kwargs: True)
    return Gpu()


@pytest.fixture
def generator(monkeypatch):
    """Stand-in for a GPU's generator: draws on the GPU have only a shape, and draws on the host are real."""
    randperm = torch.randperm

    def on_the_host(*args, **kwargs):
        with unset_fake_temporarily():
            return randperm(*args, **kwargs)

    monkeypatch.setattr(torch, "randperm", on_the_host)
    monkeypatch.setattr(views, "uniform", lambda shape, *_: torch.rand(shape, device=GPU))
    return SimpleNamespace(device=GPU, initial_seed=lambda: 0)


def test_what_a_gpu_would_refuse_or_wait_for_is_an_error(gpu):
    images = gpu.run(torch.zeros, 2, 3, device=GPU)
    with pytest.raises(Exception, match="DataDependent|aten._local_scalar_dense"):
        gpu.run(lambda: images.sum().item())
    with pytest.raises(RuntimeError, match="two devices"):
        gpu.run(lambda: images + torch.zeros(2, 3))
    assert gpu.run(lambda: images.to(torch.bfloat16) @ torch.zeros(3, 2, device=GPU)).dtype == torch.bfloat16


@pytest.mark.parametrize(("flow", "small"), [("raft_large", None), ("raft_small", SMALL), ("dis", SMALL)])
def test_a_step_of_pretraining(gpu, generator, flow, small):
    changes = [] if small is None else ["--model", json.dumps(small)]
    recipe = parse_recipe(["--config", "bdd100k_r50", "--flow", flow, "--bf16", *changes])
    height, width = recipe.crop_size
    # On the CPU, as from a loader.
    batch = {"frames": gpu.run(torch.zeros, 2, 2, 3, height, width, dtype=torch.uint8)}
    estimate = None
    if flow == "dis":
        batch["flow"] = gpu.run(torch.zeros, 2, 2, 2, height, width, dtype=torch.float16)
    else:
        _, module = build_flow(flow, weights="random", num_updates=1)
        parts = [part for part in (module.raft.update_block, module.raft.mask_predictor) if part is not None]
        # The float16 copies are made before the move: a module on the fake device cannot be copied.
        halves = [gpu.put(copy.deepcopy(part).half()) for part in parts]
        module._cast = {(id(part), torch.float16, GPU): half for part, half in zip(parts, halves)}
        estimate = gpu.put(module)
    model = gpu.put(PoodleForPreTraining(recipe.model_config())).train()
    seen = set()
    for block in (*model.student.decoder, model.dense_projector):
        block.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))

    inputs = gpu.run(views.model_inputs, batch, recipe, generator, estimate)
    inputs.pop("matched")
    output = gpu.run(model, **inputs, subcrop_size=recipe.subcrop_size)

    assert {
        value.device for value in (*inputs.values(), output.loss, output.dense_features, output.pooled_features)
    } == {GPU}
    assert output.loss.dtype == output.dense_loss.dtype == output.pooled_loss.dtype == torch.float32
    # These are the widest maps: in float32 they would take most of a step's memory.
    assert seen == {torch.bfloat16}
    assert output.dense_features.dtype == torch.bfloat16
    assert output.dense_features.shape == (4, 2048 if small is None else 32, height // 8, width // 8)
    assert inputs["flow"].dtype == inputs["student_views"].dtype == inputs["student_boxes"].dtype == torch.float32


def test_a_step_of_flow_training(gpu):
    model = gpu.put(PoodleFlowModel(PoodleFlowConfig())).train()
    frames = gpu.run(torch.zeros, 2, 2, 3, 128, 256, device=GPU)
    losses = gpu.run(flow_losses, model, frames, 1.0, 1.0, 1.0, 16, occlusion=True)
    assert losses.loss.device == GPU and losses.loss.dtype == torch.float32


def test_a_step_of_segmentation(gpu):
    config = PoodleConfig(**SMALL, num_labels=3)
    model = gpu.put(Segmenter(config)).train()
    images = gpu.run(torch.zeros, 2, 3, 64, 128, device=GPU)
    labels = gpu.run(torch.zeros, 2, 64, 128, dtype=torch.long, device=GPU)
    output = gpu.run(model, images, labels=labels)
    assert output.loss.device == GPU and output.loss.dtype == torch.float32


def test_maps_stay_channels_last_through_student_teacher_and_heads(gpu):
    """In float16: without a driver, bfloat16 convolutions go to a library whose maps have another memory layout than a GPU's."""
    recipe = parse_recipe(["--config", "bdd100k_r50", "--flow", "dis"])
    model = PoodleForPreTraining(recipe.model_config()).train().to(memory_format=torch.channels_last)
    model = gpu.put(model)
    elsewhere, count = [], []

    def look(name):
        def hook(module, inputs, output):
            count.append(name)
            if isinstance(output, torch.Tensor) and not output.is_contiguous(memory_format=torch.channels_last):
                elsewhere.append(name)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)) or ".decoder." in name and name[-1].isdigit():
            module.register_forward_hook(look(name))
    pixels = gpu.run(torch.zeros, 1, 2, 3, 128, 256, device=GPU)
    flow = gpu.run(torch.zeros, 1, 2, 2, 128, 256, device=GPU)
    mask = gpu.run(torch.ones, 1, 2, 128, 256, dtype=torch.bool, device=GPU)
    view = gpu.run(lambda: torch.eye(2, 3, device=GPU).expand(1, 2, 2, 3))
    boxes = gpu.run(lambda: torch.tensor([0.0, 0, 64, 64], device=GPU).expand(1, 2, 3, 4))
    frames = gpu.run(torch.zeros, 1, 2, 3, dtype=torch.long, device=GPU)
    with gpu.mode, torch.autocast("cuda", dtype=torch.float16):
        model(pixels, flow, mask, view, view, boxes, boxes, frames, subcrop_size=64)
    assert len(count) > 200 and elsewhere == []
