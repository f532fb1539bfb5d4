"""Encoders of any kind, read in the same way."""

import hashlib
import os
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from labelled_shapes import RESNET
from PIL import Image
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    ConvNextConfig,
    ConvNextForImageClassification,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTModel,
)

from evaluation import detect as detect_script
from evaluation import segment
from evaluation.boxes import BoxExample, BoxImages
from evaluation.detection import DetectionReadout, DetectorConfig, build_detector, detect, load_detector
from evaluation.detection_recipe import DetectionRecipe
from evaluation.detection_report import COLUMNS, write_detection_html
from evaluation.encoders import Encoder, build, calibrate_batch_norm, look_up
from evaluation.labelled_images import Example, LabelledImages
from evaluation.readouts import UperNetReadout, processor_of
from evaluation.recipe import EvaluationRecipe
from modeling_poodle import PoodleConfig, PoodleForSemanticSegmentation, PoodleModel
from modeling_poodle.loading_poodle import load_encoder
from training.checkpoints import write_folders
from training.flow import UnFlow

# --- encoders ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_are_measured_in_single(tmp_path, dtype):
    """
    Also inside a PooDLe model, whose config then has the dtype of the checkpoint it began with.

    The readouts that rebuild the encoder do the same.
    """
    resnet = ResNetForImageClassification(ResNetConfig(**RESNET)).to(dtype)
    resnet.save_pretrained(tmp_path / "half")
    encoder = build(str(tmp_path / "half"), 3)
    assert encoder.weights_sha256 == hashlib.sha256((tmp_path / "half" / "model.safetensors").read_bytes()).hexdigest()
    assert build(f"random:{tmp_path / 'half'}", 3).weights_sha256 is None
    assert {value.dtype for value in encoder.state_dict().values() if value.is_floating_point()} == {torch.float32}
    assert encoder(torch.rand(1, 3, 64, 64)).dtype == torch.float32
    embedder = encoder.model.poodle.encoder.embedder.embedder.convolution.weight
    assert torch.equal(embedder, resnet.resnet.embedder.embedder.convolution.weight.float())
    config = PoodleConfig(backbone_config=ResNetConfig.from_pretrained(tmp_path / "half"), decoder_reduction=2)
    assert {parameter.dtype for parameter in PoodleModel(config).parameters()} == {torch.float32}
    PoodleModel(config).to(dtype).save_pretrained(tmp_path / "poodle")
    whole = PoodleModel.from_pretrained(tmp_path / "poodle", dtype=dtype)
    assert {parameter.dtype for parameter in whole.parameters()} == {dtype}
    assert build(str(tmp_path / "poodle"), 3)(torch.rand(1, 3, 64, 64)).dtype == torch.float32
    (tmp_path / "images").mkdir()
    Image.new("RGB", (96, 64)).save(tmp_path / "images" / "a.png")
    image, label = (np.zeros((64, 96, *channels), np.uint8) for channels in ((3,), ()))
    labelled = Example("a", lambda: image, lambda: label)
    data = LabelledImages("x", ("a", "b", "c"), (labelled,), (labelled,))
    boxed = BoxExample(
        "a",
        tmp_path / "images" / "a.png",
        (64, 96),
        np.float32([[2, 2, 40, 40]]),
        *map(np.array, ([0], [False], [1444.0])),
    )
    boxes = BoxImages("x", ("a", "b", "c"), (boxed,), (boxed,))
    for folder in (tmp_path / "half", tmp_path / "poodle"):
        encoder = build(str(folder), 3)
        weight = encoder.model.poodle.encoder.embedder.embedder.convolution.weight
        upernet = UperNetReadout(encoder, data, EvaluationRecipe(model=["x"], readout="upernet", crop_size=[64, 96]))
        detectors = [
            DetectionReadout(encoder, boxes, DetectionRecipe(model=["x"], detector=name)) for name in ("c4", "fpn")
        ]
        for readout in (upernet, *detectors):
            assert {parameter.dtype for parameter in readout.parameters()} == {torch.float32}
            assert any(torch.equal(weight, parameter) for parameter in readout.parameters())
        assert upernet.predict(image).shape == (64, 96)
        for detector in detectors:
            detector.save(tmp_path / "detector")
            saved = load_detector(tmp_path / "detector")
            assert {parameter.dtype for parameter in saved.parameters()} == {torch.float32}
            assert detect(saved, image)["boxes"].shape[1] == 4


@pytest.mark.parametrize(
    ("model", "channels", "name"),
    [
        (lambda: ResNetForImageClassification(ResNetConfig(**RESNET)), 32, "stage4"),
        (
            lambda: ConvNextForImageClassification(ConvNextConfig(depths=[1] * 4, hidden_sizes=[8, 8, 16, 24])),
            24,
            "stage4",
        ),
        (lambda: SwinModel(SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, image_size=64)), 64, "stage4"),
        (lambda: Dinov2Model(Dinov2Config(hidden_size=24, num_hidden_layers=3, num_attention_heads=2)), 24, "stage3"),
        (
            lambda: ViTModel(
                ViTConfig(
                    hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, image_size=64
                )
            ),
            24,
            "stage3",
        ),
    ],
    ids=["resnet", "convnext", "swin", "dinov2", "vit"],
)
def test_any_encoder_gives_dense_features(tmp_path, model, channels, name):
    torch.manual_seed(5)  # not the seed of the untrained twin
    model = model().eval()
    model.save_pretrained(tmp_path)
    encoder = build(str(tmp_path), 5)
    assert (encoder.channels, encoder.features_name) == (channels, name)
    image = np.random.default_rng(0).integers(0, 256, (96, 150, 3), dtype=np.uint8)
    with torch.no_grad():
        features = encoder(encoder.normalise(image))
        again = build(str(tmp_path), 5, seed=9)(encoder.normalise(image))
        untrained = build(f"random:{tmp_path}", 5)(encoder.normalise(image))
    assert features.shape[:2] == (1, channels) and features.shape[2] >= 3
    assert torch.equal(features, again) and not torch.allclose(features, untrained)
    if name == "stage4" and channels == 32:
        with torch.no_grad():
            wide = F.interpolate(encoder.normalise(image), size=(96, 160), mode="bilinear", align_corners=False)
            whole = model.to(memory_format=torch.channels_last).resnet(wide).last_hidden_state
        assert torch.equal(features, whole)


def test_vits_are_read_by_sliding_windows(tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=64)
    vit = ViTModel(config, add_pooling_layer=False).eval()
    vit.save_pretrained(tmp_path)
    encoder = build(str(tmp_path), 3)
    assert encoder.inference == "sliding window of 64, stride 32 (a saved readout reads the whole image)"
    image = torch.rand(1, 3, 64, 112)
    with torch.no_grad():
        ours = encoder(image)
        total, count = torch.zeros(1, 24, 4, 7), torch.zeros(7)
        for left in (0, 32, 48):
            tokens = vit(image[..., left : left + 64]).last_hidden_state[:, 1:]
            total[..., left // 16 : left // 16 + 4] += tokens.transpose(1, 2).unflatten(2, (4, 4))
            count[left // 16 : left // 16 + 4] += 1
    torch.testing.assert_close(ours, total / count, rtol=1e-5, atol=1e-5)
    assert encoder(torch.rand(1, 3, 40, 50)).shape[2:] == (3, 4)  # images smaller than a window are padded


def test_a_vit_of_poodle_s_is_read_whole_as_it_was_pretrained_or_by_windows(tmp_path):
    """The decoder's map is finer than the patches."""
    torch.manual_seed(0)
    vit = ViTConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=64)
    model = PoodleModel(PoodleConfig(backbone_config=vit.to_dict(), num_decoder_blocks=1)).eval()
    model.save_pretrained(tmp_path)
    whole, image = build(str(tmp_path), 3), torch.rand(1, 3, 64, 112)
    assert whole.features_name == "decoder" and whole.inference == "whole image"
    with torch.no_grad():
        torch.testing.assert_close(whole(image), model.decode(model.encode(image)), rtol=1e-5, atol=1e-5)
        assert whole(torch.rand(1, 3, 40, 50)).shape[2:] == (6, 8)  # resized to 48x64
    encoder = Encoder("x", whole.model)
    assert encoder.inference.startswith("sliding window of 64, stride 32")
    with torch.no_grad():
        ours = encoder(image)
        total, count = torch.zeros(1, 24, 8, 14), torch.zeros(14)
        for left in (0, 32, 48):
            total[..., left // 8 : left // 8 + 8] += encoder.model.features(image[..., left : left + 64])
            count[left // 8 : left // 8 + 8] += 1
    torch.testing.assert_close(ours, total / count, rtol=1e-5, atol=1e-5)
    assert encoder(torch.rand(1, 3, 40, 50)).shape[2:] == (6, 8)  # as for 48x64, the size in whole patches


def test_the_exported_encoder_of_a_run_is_read_as_the_run_is(tmp_path, monkeypatch):
    """It is recognised by its place in the run, because its own config is that of any ViT."""
    vit = ViTConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=64)
    model = PoodleModel(PoodleConfig(backbone_config=vit.to_dict(), num_decoder_blocks=0)).eval()
    write_folders(model, tmp_path / "run", lambda part: "")
    run, encoder = build(str(tmp_path / "run"), 3), build(str(tmp_path / "run" / "encoder"), 3)
    assert encoder.inference == run.inference == "whole image"
    with torch.no_grad():
        image = torch.rand(1, 3, 64, 112)
        assert torch.equal(encoder(image), run(image))
    monkeypatch.chdir(tmp_path / "run" / "encoder")
    assert build(".", 3).inference == build("random:../encoder", 3).inference == "whole image"
    # In another place, or beside another kind of model, the encoder may come from anywhere.
    (tmp_path / "run" / "encoder").rename(tmp_path / "run" / "vit")
    assert build(str(tmp_path / "run" / "vit"), 3).inference.startswith("sliding window of 64")
    for name in ("encoder", "model"):
        shutil.copytree(tmp_path / "run" / "vit", tmp_path / "other" / name)
    assert build(str(tmp_path / "other" / "encoder"), 3).inference.startswith("sliding window of 64")
    shutil.rmtree(tmp_path / "other" / "model")
    assert build(str(tmp_path / "other" / "encoder"), 3).inference.startswith("sliding window of 64")


def test_timm(tmp_path):
    pytest.importorskip("timm")
    config = {"backbone": "resnet18", "out_indices": [4], "model_type": "timm_backbone"}
    model = PoodleForSemanticSegmentation(PoodleConfig(backbone_config=config, num_decoder_blocks=0, num_labels=4))
    encoder = Encoder("timm/resnet18", model.eval())
    assert encoder(torch.rand(1, 3, 64, 96)).shape == (1, 512, 2, 3)
    for number, channels in enumerate((64, 128, 256, 512)):
        encoder = build("random:timm/resnet18", 3, features=f"stage{number + 1}")
        assert encoder(torch.rand(1, 3, 64, 96)).shape == (1, channels, 16 >> number, 24 >> number)


def test_timm_s_pretrained_weights_are_read_and_its_vits_in_windows(monkeypatch):
    timm = pytest.importorskip("timm")
    original, made = timm.create_model, []

    def create(name, pretrained=False, **kwargs):  # stands for a download
        model = original(name, pretrained=False, **kwargs)
        if pretrained:
            made.append(model)
            for key, value in model.state_dict().items():
                if key.endswith("running_mean"):
                    value.fill_(0.25)
        return model

    monkeypatch.setattr(timm, "create_model", create)
    encoder = build("timm/resnet18", 4)
    ours = encoder.model.poodle.encoder._backbone.state_dict()
    assert len(made) == 1 and all(torch.equal(value, ours[key]) for key, value in made[0].state_dict().items())
    assert encoder.features_name == "last stage"
    build("random:timm/resnet18", 4)
    assert len(made) == 1  # the untrained twin asks for no weights
    vit = build("random:timm/vit_tiny_patch16_224", 4)
    assert vit.inference.startswith("sliding window of 224")
    assert vit(torch.rand(1, 3, 230, 240)).shape[2:] == (15, 15)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnetv2_50x1_bit", "resnet18"])
def test_timm_s_encoders_see_images_as_in_their_pretraining(tmp_path, name):
    """Mean and std come from the pretraining, also in the processor saved with a readout. Only some encoders use those of ImageNet."""
    timm = pytest.importorskip("timm")
    noted = timm.get_pretrained_cfg(name)
    encoder = build(f"random:timm/{name}", 4)
    assert (encoder.mean, encoder.std) == (noted.mean, noted.std) and (noted.mean == (0.5, 0.5, 0.5)) == (
        name != "resnet18"
    )
    processor_of(encoder).save_pretrained(tmp_path)
    saved = AutoImageProcessor.from_pretrained(tmp_path)
    assert (tuple(saved.image_mean), tuple(saved.image_std)) == (noted.mean, noted.std)


def test_earlier_stages_of_encoders_with_norms_for_each_map(tmp_path):
    """A checkpoint of ConvNeXt has norms only for the maps that were read. The norms of other maps begin as the identity."""
    config = ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
    ConvNextForImageClassification(config).save_pretrained(tmp_path)
    assert build(str(tmp_path), 3, features="stage2")(torch.rand(1, 3, 64, 96)).shape == (1, 16, 8, 12)


def test_what_leaves_out_the_dilation_says_so(monkeypatch, tmp_path):
    """UperNet and the detectors build the encoder from its own config, which has no dilation."""
    flowe = {"backbone_config": {"model_type": "resnet", **RESNET}, "num_decoder_blocks": 0, "output_stride": 8}
    PoodleModel(PoodleConfig(**flowe)).save_pretrained(tmp_path / "flowe")
    PoodleModel(PoodleConfig(**{**flowe, "output_stride": 32})).save_pretrained(tmp_path / "plain")
    said = "; the encoder at its own strides, up to 32, without the dilation to 8 that it was trained with"
    assert (build(str(tmp_path / "flowe"), 3).undilated, build(str(tmp_path / "plain"), 3).undilated) == (said, "")
    image, label = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8)
    labelled = Example("a", lambda: image, lambda: label)
    data = LabelledImages("x", ("a", "b"), (labelled,) * 2, (labelled,)).with_groups()
    recipe = EvaluationRecipe(
        model=["x"], readout="upernet", crop_size=[64, 64], per_device_train_batch_size=2, max_steps=1
    )
    result, _, _ = segment.measure(Accelerator(cpu=True), recipe, data, str(tmp_path / "flowe"), tmp_path)
    assert result["inference"] == f"whole image{said}"
    assert (result["image_mean"], result["image_statistics_from"]) == ([0.485, 0.456, 0.406], "ImageNet")
    Image.fromarray(image).save(tmp_path / "a.png")
    boxed = BoxExample(
        "a", tmp_path / "a.png", (64, 64), np.float32([[2, 2, 40, 40]]), *map(np.array, ([0], [False], [1444.0]))
    )
    boxes = BoxImages("x", ("a", "b"), (boxed,), (boxed,))
    recipe = DetectionRecipe(model=["x"], per_device_train_batch_size=1, max_steps=1, boxes_per_image=8)
    monkeypatch.setattr(detect_script, "coco_scores", lambda *_: dict.fromkeys(COLUMNS, 0.0) | {"per_class": {}})
    (tmp_path / "detection").mkdir()
    found, _, _ = detect_script.measure(
        Accelerator(cpu=True), recipe, boxes, str(tmp_path / "flowe"), tmp_path / "detection"
    )
    assert found["image_std"] == [0.229, 0.224, 0.225]
    assert found["inference"] == f"their own size{said}" and said in write_detection_html([found], {}, {})


@pytest.mark.parametrize("key", ["normalization.weight", "normalization.running_var"])
def test_a_batch_norm_is_part_of_the_weights_that_must_fit(tmp_path, monkeypatch, key):
    """Its name contains "norm", like the names of the norms that a checkpoint may lack."""
    ResNetForImageClassification(ResNetConfig(**RESNET)).save_pretrained(tmp_path)
    encoder = build(str(tmp_path), 3)
    network = encoder.model.poodle.encoder
    lacking = {name: value for name, value in network.state_dict().items() if not name.endswith(key)}
    assert len(lacking) < len(network.state_dict())
    monkeypatch.setattr(network, "state_dict", lambda: lacking)
    data = LabelledImages("x", ("a", "b", "c"), (), ())
    with pytest.raises(ValueError, match=f"readout upernet cannot take this encoder's weights: .*{key} does not fit"):
        UperNetReadout(encoder, data, EvaluationRecipe(model=["x"], readout="upernet"))
    config = DetectorConfig("fpn", network.config.to_dict(), ["a"], [0.5] * 3, [0.5] * 3, None, 64)
    with pytest.raises(ValueError, match=f"detector fpn cannot take this encoder's weights: .*{key} does not fit"):
        build_detector(config, lacking)


def test_wrong_models_are_named(tmp_path, poodle):
    with pytest.raises(ValueError, match="no such map|must be one of stem, stage1"):
        build(str(poodle), 3, features="stage9")
    with pytest.raises(
        ValueError, match="there is no folder runs/none/model"
    ):  # this cannot be a Hub id, so the Hub is not asked
        build("runs/none/model", 3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no model"):
        build(str(tmp_path / "empty"), 3)
    ResNetConfig(**RESNET).save_pretrained(tmp_path / "resnet")
    with pytest.raises(ValueError, match="--model .*/resnet: the folder holds no weights"):
        build(str(tmp_path / "resnet"), 3)
    assert look_up(f"random:{tmp_path / 'resnet'}") == (str(tmp_path / "resnet"), "resnet")
    assert look_up(f"random:{tmp_path / 'resnet' / 'config.json'}") == (str(tmp_path / "resnet"), "resnet")
    ResNetForImageClassification(ResNetConfig(**RESNET)).save_pretrained(tmp_path / "resnet")
    other = ResNetConfig(**{**RESNET, "depths": [2, 1, 1, 1]})
    other.save_pretrained(tmp_path / "resnet")  # the config no longer fits the weights
    with pytest.raises(ValueError, match="another architecture"):
        build(str(tmp_path / "resnet"), 3)
    from transformers import BertConfig, BertModel

    BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="is no encoder that can be loaded"):
        build(str(tmp_path / "bert"), 3)


@pytest.mark.parametrize("read", [load_encoder, lambda name: build(name, 3), UnFlow])
def test_a_path_that_could_be_a_name_on_the_hub_is_said_not_to_be_here(read):
    with pytest.raises(ValueError, match="there is no folder runs/mistyped, and on the Hub: "):
        read("runs/mistyped")


def test_the_folder_that_was_meant_is_named(tmp_path, monkeypatch):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mines.txt").touch()
    monkeypatch.chdir(tmp_path)
    for name, said in (("runs/mien", r" \(Did you mean 'mine'\?\)"), ("runs/other", "")):
        with pytest.raises(ValueError, match=f"there is no folder {name}{said}, and on the Hub: "):
            load_encoder(name)


def test_half_a_file_of_weights_is_named(poodle, tmp_path):
    shutil.copytree(poodle / "model", tmp_path / "model")
    ResNetForImageClassification(ResNetConfig(**RESNET)).save_pretrained(tmp_path / "encoder")
    for part in ("model", "encoder"):
        weights = tmp_path / part / "model.safetensors"
        os.truncate(weights, weights.stat().st_size // 2)
        with pytest.raises(ValueError, match=f"{part}: its weights cannot be read .*damaged or half copied"):
            build(str(tmp_path / part), 3)


def test_a_model_with_a_decoder_is_no_encoder_to_start_from(poodle):
    with pytest.raises(
        ValueError, match=r"it is a PooDLe model, with a decoder; give its plain encoder \(a run's encoder/\)"
    ):
        load_encoder(str(poodle / "model"))


def test_a_network_whose_features_are_not_finite_is_refused(tmp_path):
    """The largest class would be class 0 everywhere, and the figures would look like any others."""
    model = PoodleModel(PoodleConfig(backbone_config={"model_type": "resnet", **RESNET}, decoder_reduction=2))
    with torch.no_grad():
        next(model.decoder.parameters())[0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="gives features that are not finite: its weights are damaged, or it has diverged"
    ):
        build(str(tmp_path), 3)


def test_images_that_are_too_small_for_the_statistics_of_an_untrained_network_are_named(tmp_path):
    PoodleModel(
        PoodleConfig(backbone_config={"model_type": "resnet", **RESNET}, num_decoder_blocks=0)
    ).save_pretrained(tmp_path)
    encoder = build(f"random:{tmp_path}", 3)
    with pytest.raises(ValueError, match="an image of 32x32 is too small for the statistics of its BatchNorms"):
        calibrate_batch_norm(encoder, [np.zeros((32, 32, 3), np.uint8)])
