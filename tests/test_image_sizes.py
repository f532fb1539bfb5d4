"""Encoders that read images of one size alone, and those whose config does not tell what a cell of their map covers."""

import numpy as np
import pytest
import torch
import transformers
from transformers import FocalNetConfig, HieraConfig, HieraModel

from evaluation.encoders import Encoder, build
from evaluation.labelled_images import Example, LabelledImages
from evaluation.readouts import UperNetReadout
from evaluation.recipe import EvaluationRecipe
from modeling_poodle import PoodleConfig, PoodleForSemanticSegmentation, PoodleModel

ALONE = "(a saved readout reads images of that size alone)"


def test_networks_of_one_image_size_are_read_in_windows_of_it():
    pytest.importorskip("timm")
    encoder = build("random:timm/swin_tiny_patch4_window7_224", 3)
    assert encoder.inference.startswith("sliding window of 224") and encoder.inference.endswith(ALONE)
    image = torch.rand(1, 3, 224, 320)
    with torch.no_grad():
        ours = encoder(image)
        left, right = (encoder.model.features(image[..., x : x + 224]) for x in (0, 96))
    assert ours.shape == (1, 768, 7, 10)
    torch.testing.assert_close(ours[..., :3], left[..., :3])
    torch.testing.assert_close(ours[..., 7:], right[..., 4:])


@pytest.fixture
def hiera(tmp_path) -> str:
    config = HieraConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], image_size=[64, 64])
    HieraModel(config).save_pretrained(tmp_path)
    return str(tmp_path)


def test_transformers_hiera_is_read_in_windows(hiera):
    encoder = build(hiera, 3)
    assert encoder.inference.startswith("sliding window of 64") and encoder.inference.endswith(ALONE)
    assert encoder(torch.rand(1, 3, 90, 100)).shape[2:] == (3, 4)


def test_timm_s_swin_has_its_channels_first_in_poodle():
    """It gives them last. The SDM and the pooled objective read them as all others'."""
    pytest.importorskip("timm")
    timm = {
        "model_type": "timm_backbone",
        "backbone": "swin_tiny_patch4_window7_224",
        "out_indices": [-4, -3, -2, -1],
    }
    model = PoodleModel(PoodleConfig(backbone_config=timm)).eval()
    with torch.no_grad():
        output = model(torch.rand(1, 3, 224, 224), output_hidden_states=True)
    assert [tuple(features.shape[1:]) for features in output.hidden_states] == [
        *((96 << stage, 56 >> stage, 56 >> stage) for stage in range(4)),
        (768, 28, 28),
    ]
    assert output.pooler_output.shape == (1, 768) and output.last_hidden_state.shape == (1, 768, 28, 28)


def test_a_cell_s_size_is_measured_where_a_config_does_not_tell(tmp_path):
    if not hasattr(transformers, "PPLCNetConfig"):
        pytest.skip("this version of transformers has no PP-LCNet")
    transformers.PPLCNetConfig().save_pretrained(tmp_path)
    encoder = build(f"random:{tmp_path}", 3)
    assert encoder.multiple == 32 and encoder(torch.rand(1, 3, 200, 300)).shape[2:] == (7, 10)


def test_cells_that_do_not_fill_a_window_are_refused():
    """LeViT's map of 224 pixels is one of 4 x 4 cells."""
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match="timm/levit_128 has a map of 3x6 cells .* in windows of 224"):
        build("random:timm/levit_128", 3)


def test_upernet_refuses_a_network_of_one_image_size(hiera):
    """It reads whole images."""
    image, label = np.zeros((64, 96, 3), np.uint8), np.zeros((64, 96), np.uint8)
    labelled = Example("a", lambda: image, lambda: label)
    data = LabelledImages("x", ("a", "b", "c"), (labelled,), (labelled,))
    with pytest.raises(ValueError, match=f"readout upernet: {hiera} reads images of one size alone"):
        UperNetReadout(build(hiera, 3), data, EvaluationRecipe(model=["x"], readout="upernet"))


def test_a_map_of_other_channels_than_the_config_says_is_refused(tmp_path):
    FocalNetConfig(embed_dim=8, depths=[1] * 4, hidden_sizes=[16, 32, 64, 128]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has a map of 64 channels, but its config says 128"):
        build(f"random:{tmp_path}", 3)


def test_an_encoder_that_fails_is_named(monkeypatch, tmp_path):
    model = PoodleForSemanticSegmentation(
        PoodleConfig(
            backbone_config={"model_type": "resnet", "depths": [1] * 4, "hidden_sizes": [8] * 4, "embedding_size": 8}
        )
    ).eval()
    monkeypatch.setattr(model, "features", lambda pixels: pixels[..., :1000].reshape(7, 7))
    with pytest.raises(ValueError, match="org/name reads no image of 96x64 pixels .*invalid for input"):
        Encoder("org/name", model).check()
