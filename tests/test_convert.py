"""Released checkpoints, rebuilt from parts of torchvision and timm, compared with their conversions."""

import argparse
import pickle
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck
from transformers import AutoConfig, ResNetBackbone, ResNetConfig

from modeling_poodle import PoodleModel
from modeling_poodle.loading_poodle import load_encoder
from training import convert as converting
from training.convert import convert, main, read_checkpoint
from training.resnet_names import timm_architecture, to_torchvision

REPOSITORY = Path(__file__).resolve().parent.parent


class Released(nn.Module):
    """The published network in parts of torchvision: a ResNet, two upsampling bottlenecks (x2), two laterals, heads, flow model."""

    def __init__(self, block=Bottleneck, layers=(1, 2, 1, 1)):
        super().__init__()
        for prefix in ("", "teacher_"):
            backbone = torchvision.models.ResNet(block, list(layers))
            width = backbone.fc.in_features
            stages = [width // 2, width // 4]
            # 2048 -> 256 -> 2048: the inner width of torchvision's bottleneck is planes * base_width / 64.
            blocks = nn.ModuleList(Bottleneck(width, width // 4, base_width=32) for _ in stages)
            laterals = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in stages)
            setattr(self, f"{prefix}backbone", backbone)
            setattr(self, f"{prefix}decoder_blocks", blocks)
            setattr(self, f"{prefix}decoder_laterals", laterals)
            for name in ("dense_projector", "pooled_projector"):
                setattr(
                    self,
                    prefix + name,
                    nn.Sequential(nn.Conv2d(width, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)),
                )
        for name in ("dense_predictor", "pooled_predictor"):
            setattr(self, name, nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)))
        self.flow_model = nn.Conv2d(6, 2, 3)

    def features(self, image, prefix):
        """Return the maps of stages 1 to 4, and the decoder's map."""
        backbone = getattr(self, f"{prefix}backbone")
        x = backbone.maxpool(backbone.relu(backbone.bn1(backbone.conv1(image))))
        stages = []
        for layer in (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4):
            stages.append(x := layer(x))
        for block, lateral, stage in zip(
            getattr(self, f"{prefix}decoder_blocks"), getattr(self, f"{prefix}decoder_laterals"), stages[2::-1]
        ):
            x = F.interpolate(block(x), scale_factor=2, mode="bilinear", align_corners=False) + lateral(stage)
        return stages, x


def randomise(model: nn.Module) -> nn.Module:
    """Give the BatchNorms statistics and affine parameters as after a training, so that none is the identity."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in ((module.running_mean, -0.2, 0.2), (module.running_var, 0.5, 1.5)):
                tensor.uniform_(low, high, generator=generator)
            for parameter, low, high in ((module.weight, 0.5, 1.0), (module.bias, -0.2, 0.2)):
                parameter.data.uniform_(low, high, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def released() -> Released:
    torch.manual_seed(0)
    return randomise(Released())


IMAGE = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("which", "prefix"), [("teacher", "teacher_"), ("student", "")])
@torch.no_grad()
def test_features_equal_the_released_network(released, tmp_path, which, prefix, capsys):
    state = {f"module.{key}": value for key, value in released.state_dict().items()}
    flags = argparse.Namespace(lr=1e-3)
    torch.save({"model": state, "optimizer": {"state": {}}, "epoch": 100, "args": flags}, tmp_path / "poodle_bdd.pth")
    main([str(tmp_path / "poodle_bdd.pth"), str(tmp_path / "out"), "--which", which])
    stages, dense = released.features(IMAGE, prefix)
    model = PoodleModel.from_pretrained(tmp_path / "out" / "model").eval()
    assert model.config.num_decoder_blocks == 2 and model.config.decoder_reduction == 8
    torch.testing.assert_close(model(IMAGE).last_hidden_state, dense, rtol=1e-5, atol=1e-5)
    encoder = ResNetBackbone.from_pretrained(tmp_path / "out" / "encoder").eval()
    assert encoder.config.depths == [1, 2, 1, 1] and encoder.channels == [256, 512, 1024, 2048]
    for ours, theirs in zip(encoder(IMAGE).feature_maps, stages, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    printed = capsys.readouterr().out
    counts = [int(line.split()[0]) for line in printed.splitlines() if " keys " in line]
    assert sum(counts) == len(state)  # every key is accounted for
    for reason in (
        "classifier",
        "a head of pretraining",
        "flow estimator",
        f"the {'student' if which == 'teacher' else 'teacher'};",
    ):
        assert reason in printed
    card = (tmp_path / "out" / "encoder" / "README.md").read_text()
    assert "`poodle_bdd.pth`" in card and "license" not in card and "Nothing was measured yet" in card


@torch.no_grad()
def test_a_basic_resnet_and_a_state_dict_alone(tmp_path):
    torch.manual_seed(0)
    network = randomise(torchvision.models.ResNet(BasicBlock, [1, 1, 2, 1]))
    model, notes = convert({f"backbone.{key}": value for key, value in network.state_dict().items()}, "student")
    assert model.config.num_decoder_blocks == 0 and notes["dropped: the encoder's classifier"] == 2
    pooled = network.avgpool(torch.nn.Sequential(*list(network.children())[:-2])(IMAGE)).flatten(1)
    torch.testing.assert_close(model(IMAGE).pooler_output, pooled, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["torchvision", "timm", "moco"])
def test_plain_resnets_of_other_projects(tmp_path, kind):
    torch.manual_seed(0)
    network = randomise(torchvision.models.ResNet(BasicBlock, [1, 1, 2, 1]))
    state, file, more = network.state_dict(), tmp_path / "plain.pth", []
    if kind == "timm":
        file = tmp_path / "plain.safetensors"
        save_file(state, file)
    elif kind == "moco":
        state = {f"module.encoder_q.{key}": value for key, value in state.items()}
        state |= {"module.encoder_k.conv1.weight": torch.zeros(2), "module.queue": torch.zeros(2)}
        torch.save({"state_dict": state, "epoch": 1}, file)
        with pytest.raises(ValueError, match=r"give what precedes a ResNet's keys by --prefix"):
            main([str(file), str(tmp_path / "out")])
        with pytest.raises(ValueError, match="--prefix encoder. leaves no plain ResNet .*begin with encoder_k.conv1"):
            main([str(file), str(tmp_path / "out"), "--prefix", "encoder."])
        more = ["--prefix", "encoder_q."]
    else:
        torch.save(state, file)
    main([str(file), str(tmp_path / "out"), *more])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["encoder"]
    config, weights = load_encoder(str(tmp_path / "out" / "encoder"))  # as --init_encoder and --model read it
    encoder = ResNetBackbone(config).eval()
    encoder.load_state_dict(weights)
    expected = torch.nn.Sequential(*list(network.children())[:-2])(IMAGE)
    torch.testing.assert_close(encoder(IMAGE).feature_maps[-1], expected, rtol=1e-5, atol=1e-5)
    card = (tmp_path / "out" / "encoder" / "README.md").read_text()
    assert f"Converted from the checkpoint `{file.name}`." in card and "- poodle" not in card
    # Back to torchvision's names, as README.md says.
    exported = load_file(tmp_path / "out" / "encoder" / "model.safetensors")
    report = network.load_state_dict({to_torchvision(key): value for key, value in exported.items()}, strict=False)
    assert report.missing_keys == ["fc.weight", "fc.bias"] and not report.unexpected_keys
    with pytest.raises(ValueError, match=f"{file.name} is a file: python -m training.convert"):
        load_encoder(str(file))


@torch.no_grad()
def test_flowe_with_timm_names_runs_dilated(tmp_path):
    torch.manual_seed(0)
    network = timm.models.resnet.ResNet(timm.models.resnet.Bottleneck, (1, 2, 2, 2), output_stride=8, num_classes=0)
    network = randomise(network)
    state = {
        f"{prefix}encoder.{key}": value + (prefix == "")
        for prefix in ("", "target_")
        for key, value in network.state_dict().items()
    }
    state |= {
        "projector.0.weight": torch.zeros(4, 4),
        "target_projector.0.weight": torch.zeros(4, 4),
        "predictor.0.weight": torch.zeros(4, 4),
    }
    torch.save({"state_dict": state}, tmp_path / "flowe.pth")
    main([str(tmp_path / "flowe.pth"), str(tmp_path / "out")])
    model = PoodleModel.from_pretrained(tmp_path / "out" / "model").eval()
    theirs = network.forward_features(IMAGE)
    assert theirs.shape[-2:] == (8, 12)
    torch.testing.assert_close(model(IMAGE).last_hidden_state, theirs, rtol=1e-5, atol=1e-5)
    assert AutoConfig.from_pretrained(tmp_path / "out" / "encoder").model_type == "resnet"
    assert "dilated to stride 8" in (tmp_path / "out" / "encoder" / "README.md").read_text()


def small(released) -> dict[str, torch.Tensor]:
    return dict(released.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s | {"memory.queue": torch.zeros(2)},
            "1 keys are not those of a released PooDLe checkpoint, such as memory.queue",
        ),
        (
            lambda s: {k: v for k, v in s.items() if k != "teacher_backbone.layer2.1.bn2.weight"},
            "missing encoder.encoder.stages.1.layers.1",
        ),
        (lambda s: {k: v for k, v in s.items() if not k.startswith("teacher_")}, "holds no teacher, only the student"),
        (lambda s: {k: v for k, v in s.items() if not k.startswith("teacher_backbone.layer4")}, "no whole layer4"),
        (
            lambda s: s | {"teacher_backbone.layer1.0.se.fc.weight": torch.zeros(2)},
            "is no parameter of a plain ResNet",
        ),
        (
            lambda s: s | {"teacher_backbone.layer1.0.conv1.weight": torch.zeros(128, 64, 1, 1)},
            r"has the shape \(128, 64, 1, 1\), expected",
        ),
        (
            lambda s: s | {"teacher_decoder_blocks.0.downsample.0.weight": torch.zeros(2)},
            "too many decoder.0.downsample",
        ),
        (lambda s: {"conv1.weight": torch.zeros(2)}, "no released checkpoint and no plain ResNet: of its keys"),
    ],
    ids=["unknown", "missing", "no teacher", "three stages", "no plain resnet", "wide", "too many", "another"],
)
def test_no_key_goes_by_unnoticed(released, change, message):
    with pytest.raises(ValueError, match=message):
        convert(change(small(released)))


def test_keys_dropped_on_request_are_counted(released):
    _, notes = convert(small(released) | {"memory.queue": torch.zeros(2)}, drop=["memory."])
    assert notes["dropped: as asked for by --drop"] == 1
    # Keys of the converted network can be dropped too, here of a layer that a ResNet lacks.
    beside = small(released) | {"teacher_backbone.attnpool.weight": torch.zeros(2)}
    assert convert(beside, drop=["teacher_backbone.attnpool."])[1] == notes


def test_timm_has_no_name_for_a_resnet_without_relus():
    """timm would load the weights into a network with ReLUs and silently give other features."""
    assert timm_architecture(ResNetConfig().to_dict()) == "resnet50"
    assert timm_architecture(ResNetConfig(hidden_act="gelu").to_dict()) is None


def test_timm_has_no_name_for_what_its_file_cannot_hold():
    """
    Such as bfloat16, which numpy lacks, and the names of a classifier.

    A config of an earlier transformers lacks some fields and still has a name.
    """
    plain = {"architectures": ["ResNetBackbone"], **ResNetConfig().to_dict()}
    for field in ("downsample_in_bottleneck", "downsample_in_first_stage"):
        del plain[field]
    plain["architectures"] = ["ResNetBackbone"]
    assert timm_architecture(plain) == "resnet50"
    for change in (
        {"dtype": "bfloat16"},
        {"torch_dtype": "bfloat16"},
        {"architectures": ["ResNetForImageClassification"]},
    ):
        assert timm_architecture({**plain, **change}) is None


def test_a_full_disk_is_a_sentence(released, tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    torch.save(small(released), tmp_path / "small.pth")
    monkeypatch.setattr(converting, "write_folders", full)
    with pytest.raises(OSError, match="out cannot be written: .*No space left on device"):
        main([str(tmp_path / "small.pth"), str(tmp_path / "out")])


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('this ran')",))


def test_files_that_are_not_read(tmp_path, as_script):
    torch.save({"model": {"backbone.conv1.weight": torch.zeros(1)}, "hook": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="holds more than tensors.*opening it could run code"):
        read_checkpoint(tmp_path / "evil.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps([1, 2, 3]))
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "numbers.pth")
    whole = (tmp_path / "list.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    for name, message in (
        ("none.pth", "no such file"), ("text.pth", "text.pth is no checkpoint: it is neither a zip nor a pickle"), ("pickle.pth", "pickle.pth"), ("cut.pth", "is no checkpoint that torch reads"),
        ("list.pth", "holds no state dict"), ("numbers.pth", "holds no state dict"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            read_checkpoint(tmp_path / name)
    assert as_script("training/convert.py", str(tmp_path / "evil.pth"), str(tmp_path / "out")).startswith("error: ")
    assert not (tmp_path / "out").exists()
