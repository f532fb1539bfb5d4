"""Images of any size: networks that read only one size, cell sizes that no config states, and the size that images are resized to."""

import numpy as np
import pytest
import torch
import transformers
from labelled_shapes import RESNET
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model, FocalNetConfig, HieraConfig, HieraModel

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
    """timm's Swin gives channels last; the SDM and the pooled objective need them first, as from all other encoders."""
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
    """LeViT gives a map of 4 x 4 cells for 224 pixels."""
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match="timm/levit_128 has a map of 3x6 cells .* in windows of 224"):
        build("random:timm/levit_128", 3)


def test_upernet_refuses_a_network_of_one_image_size(hiera):
    """UperNet reads whole images."""
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


def test_maps_of_images_off_the_patch_cover_the_whole_image(tmp_path):
    """The image is resized to whole patches, not padded, because readers assume that the map covers the image."""
    torch.manual_seed(0)
    Dinov2Model(
        Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, patch_size=14, image_size=56)
    ).save_pretrained(tmp_path)
    encoder = build(str(tmp_path), 3)
    image = torch.rand(1, 3, 60, 100)
    with torch.no_grad():
        features = encoder(image)
        resized = encoder(F.interpolate(image, size=(70, 112), mode="bilinear", align_corners=False))
    assert features.shape == (1, 24, 5, 8) and torch.equal(features, resized)


CONVNEXT = {"model_type": "convnext", "depths": [1] * 4, "hidden_sizes": [8, 8, 16, 24]}
SWIN = {"model_type": "swin", "embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4, "image_size": 64}
DINOV2 = {
    "model_type": "dinov2",
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "patch_size": 14,
}
POODLE_RESNET = {"model_type": "resnet", **RESNET}


@pytest.mark.parametrize(
    ("backbone", "values", "size"),
    [
        (POODLE_RESNET, {"num_decoder_blocks": 0}, (64, 128)),
        (POODLE_RESNET, {}, (64, 104)),
        (POODLE_RESNET, {"num_decoder_blocks": 1}, (64, 112)),
        (POODLE_RESNET, {"decoder_laterals": False}, (64, 128)),
        (POODLE_RESNET, {"readout_stage": "stage2"}, (64, 104)),
        (POODLE_RESNET, {"num_decoder_blocks": 0, "output_stride": 8}, (64, 104)),
        (POODLE_RESNET, {"output_stride": 16}, (64, 112)),
        ({**POODLE_RESNET, "downsample_in_first_stage": True}, {"num_decoder_blocks": 0}, (64, 128)),
        (CONVNEXT, {"num_decoder_blocks": 0}, (64, 128)),
        (CONVNEXT, {}, (64, 128)),
        (SWIN, {"num_decoder_blocks": 0}, (64, 128)),
        (DINOV2, {"num_decoder_blocks": 0}, (70, 112)),
    ],
)
def test_images_are_resized_to_what_the_map_that_is_read_covers(backbone, values, size):
    """To the next multiple of the stride: else ConvNeXt would leave out an edge, and a ResNet's last cells reach beyond the image."""
    torch.manual_seed(0)
    config = PoodleConfig(backbone_config=backbone, decoder_reduction=2, **values)
    encoder = Encoder("x", PoodleForSemanticSegmentation(config).eval())
    image = torch.rand(1, 3, 60, 100, requires_grad=True)
    features = encoder(image)
    with torch.no_grad():
        resized = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
        torch.testing.assert_close(features.detach(), encoder.model.features(resized), rtol=1e-4, atol=1e-5)
        street = torch.rand(1, 3, 64, 128)
        assert "dinov2" in backbone.values() or torch.equal(encoder(street), encoder.model.features(street))
    (gradient,) = torch.autograd.grad(features.square().sum(), image)
    assert gradient[..., -1, :].any() and gradient[..., -1].any()


@pytest.mark.parametrize(
    ("backbone", "size", "crop"), [(POODLE_RESNET, (64, 128), (64, 96)), (DINOV2, (70, 112), (42, 84))]
)
def test_upernet_resizes_images_and_crops_as_other_readouts_do(backbone, size, crop):
    """The labels of a crop are resized with it."""
    encoder = Encoder("x", PoodleForSemanticSegmentation(PoodleConfig(backbone_config=backbone, num_decoder_blocks=0)))
    image, label = np.zeros((60, 100, 3), np.uint8), np.zeros((60, 100), np.uint8)
    label[:, 50:] = 1
    labelled = Example("a", lambda: image, lambda: label)
    data = LabelledImages("x", ("a", "b"), (labelled,), (labelled,))
    readout = UperNetReadout(encoder, data, EvaluationRecipe(model=["x"], readout="upernet", crop_size=[40, 72]))
    seen = []
    readout.model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[2:]))
    assert readout.predict(image).shape == (60, 100) and seen == [size]
    batch = readout.batch(list(map(readout.read, [labelled, labelled])), torch.Generator().manual_seed(0))
    assert batch["pixel_values"].shape[2:] == batch["labels"].shape[1:] == crop
    assert batch["labels"].dtype == torch.int64 and batch["labels"].unique().tolist() == [0, 1]
    assert readout.train()(**batch).isfinite()
