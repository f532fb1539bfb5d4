"""What a run is assembled from, before its first step."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from modeling_poodle import PoodleConfig, PoodleModel
from training.assembly import prepared, synchronise_batch_norm


@pytest.mark.parametrize("name", ["regnety_002", "mobilenetv3_small_050", "resnet18"])
def test_batch_norm_over_processes_keeps_timm_s_activations(name):
    pytest.importorskip("timm")
    torch.manual_seed(0)
    encoder = {"model_type": "timm_backbone", "backbone": name, "out_indices": [1, 2, 3, 4]}
    model = PoodleModel(PoodleConfig(backbone_config=encoder, decoder_reduction=2)).eval()
    images = torch.randn(1, 3, 64, 64)
    expected = model(images).last_hidden_state
    spread = synchronise_batch_norm(model, compiled=False).eval()
    torch.testing.assert_close(spread(images).last_hidden_state, expected)
    kinds = {type(m) for m in spread.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert kinds and all(issubclass(kind, nn.SyncBatchNorm) for kind in kinds)


def test_what_a_step_keeps_is_not_copied_to_float32(fresh_accelerator):
    """As Accelerate does with all outputs under bf16."""

    class Halved(nn.Module):
        def forward(self, images):
            return images.bfloat16()

    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    images = torch.ones(2)
    assert accelerator.prepare_model(Halved())(images).dtype == torch.float32
    assert prepared(accelerator, Halved())(images).dtype == torch.bfloat16
