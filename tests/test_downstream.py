"""The models as others use them: loaded as each other's classes, fine-tuned, replicated, saved with only the code beside the weights."""

import copy
import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from test_modeling_pretraining import config, gradient_checkpointing_enable, inputs
from torch import nn
from torch.nn import functional as F
from transformers import ResNetBackbone, Trainer, TrainingArguments, VitMatteConfig, VitMatteForImageMatting

from modeling_poodle import (
    PoodleBackbone,
    PoodleConfig,
    PoodleForPreTraining,
    PoodleForSemanticSegmentation,
    PoodleModel,
)
from modeling_poodle.geometry_poodle import crop_boxes
from modeling_poodle.remote_code import add_code

DINOV2 = {
    "model_type": "dinov2",
    "hidden_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 4,
    "image_size": 56,
}

# transformers 5.24 has renamed the argument.
GRADIENT_CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    values = other.state_dict()
    return all(torch.equal(value, values[name]) for name, value in one.state_dict().items())


def test_a_readout_is_loaded_as_the_network_and_the_backbone_below_it(tmp_path):
    torch.manual_seed(0)
    readout = PoodleForSemanticSegmentation(config(num_labels=3))
    readout.save_pretrained(tmp_path)
    backbone = PoodleBackbone.from_pretrained(
        pretrained_model_name_or_path=tmp_path, out_features=["stage2", "decoder"]
    )
    assert equal(backbone.encoder, readout.poodle.encoder) and equal(backbone.decoder, readout.poodle.decoder)
    assert equal(PoodleModel.from_pretrained(tmp_path), readout.poodle)
    with pytest.raises(
        ValueError, match="holds a PoodleForSemanticSegmentation; PoodleForPreTraining begins with its"
    ):
        PoodleForPreTraining.from_pretrained(tmp_path)
    plain = PoodleForSemanticSegmentation.from_pretrained(tmp_path, num_decoder_blocks=0, ignore_mismatched_sizes=True)
    assert equal(plain.poodle.encoder, readout.poodle.encoder)
    assert equal(PoodleModel.from_pretrained(tmp_path, num_decoder_blocks=0).encoder, readout.poodle.encoder)
    # Without a folder, transformers takes a config and a state dict.
    given = PoodleModel.from_pretrained(None, config=readout.config, state_dict=readout.poodle.state_dict())
    assert equal(given, readout.poodle)


def test_a_plain_encoder_is_not_taken_for_the_model_around_it(tmp_path):
    """Otherwise `PoodleModel.from_pretrained("runs/mine/encoder")` would return a ResNet-50 with random weights."""
    ResNetBackbone(config().backbone_config).save_pretrained(tmp_path)
    for kind in (PoodleModel, PoodleBackbone, PoodleConfig):
        with pytest.raises(
            ValueError, match="the config of a 'resnet' network, no PoodleConfig: load it by its own class"
        ):
            kind.from_pretrained(tmp_path)


def test_stages_of_a_backbone_are_chosen_also_once_it_is_built():
    backbone = PoodleBackbone(config(out_features=["decoder"])).eval()
    whole = PoodleBackbone(config(out_features=["stage1", "stage3", "decoder"])).eval()
    whole.load_state_dict(backbone.state_dict())
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = whole(image).feature_maps
        for choose in ({"out_features": ["stage1", "stage3", "decoder"]}, {"out_indices": whole.out_indices}):
            for name, value in choose.items():
                setattr(backbone, name, value)
            maps = backbone(image).feature_maps
            assert len(maps) == 3 and all(map(torch.equal, maps, expected))
            assert backbone.channels == whole.channels == [m.shape[1] for m in maps]


@pytest.mark.parametrize("encoder", [None, DINOV2])
def test_trainer_s_gradient_checkpointing(encoder, tmp_path):
    """With checkpointing, two steps give the same weights and store less. It can be turned off again."""
    torch.manual_seed(0)
    plain = PoodleForSemanticSegmentation(config(num_labels=3, **({"backbone_config": encoder} if encoder else {})))
    saving = copy.deepcopy(plain)
    side = 56 if encoder else 64
    data = [{"pixel_values": torch.randn(3, side, side), "labels": torch.randint(3, (side, side))} for _ in range(4)]
    calls = []
    layers = [m for m in saving.modules() if hasattr(m, "gradient_checkpointing")]
    for layer in layers:
        within = next(m for m in layer.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
        within.register_forward_hook(lambda *_: calls.append(1))
    for model in (plain, saving):
        arguments = TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no"
        )
        setattr(arguments, GRADIENT_CHECKPOINTING, model is saving)
        Trainer(model, arguments, train_dataset=data).train()
    for (name, value), other in zip(saving.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, msg=name)
    assert len(calls) == 2 * 2 * len(layers) and all(m.gradient_checkpointing for m in layers)
    getattr(saving, "activation_checkpointing_disable", saving.gradient_checkpointing_disable)()
    assert not any(m.gradient_checkpointing for m in layers)


def test_gradient_checkpointing_is_refused_where_the_encoder_has_none():
    timm = {"model_type": "timm_backbone", "backbone": "resnet18", "use_pretrained_backbone": False}
    model = PoodleModel(PoodleConfig(backbone_config=timm, num_decoder_blocks=0))
    with pytest.raises(ValueError, match="gradient_checkpointing is not available for a 'timm_backbone' encoder"):
        gradient_checkpointing_enable(model)


def test_stages_that_an_encoder_has_no_norms_for_are_named():
    encoder = {"model_type": "convnext", "depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 32, 64]}
    backbone = PoodleBackbone(config(backbone_config=encoder, num_decoder_blocks=0, out_features=["stage2", "stage4"]))
    for choose in ({"out_features": ["stage1", "stage4"]}, {"out_indices": [1, 4]}):
        with pytest.raises(ValueError, match=r"built, \['stage2', 'stage4'\], not for 'stage1': give out_features to"):
            setattr(backbone, *next(iter(choose.items())))
        assert backbone.out_features == ["stage2", "stage4"]
    backbone.out_features = ["stage2"]
    assert [maps.shape for maps in backbone(torch.rand(1, 3, 64, 64)).feature_maps] == [(1, 16, 8, 8)]


def test_encoders_that_give_tokens_are_refused():
    with pytest.raises(ValueError, match="backbone_config.reshape_hidden_states must be true"):
        config(backbone_config={**DINOV2, "reshape_hidden_states": False})
    vitpose = {**DINOV2, "model_type": "vitpose_backbone", "image_size": 64, "patch_size": 16}
    tokens = PoodleModel(config(backbone_config=vitpose, num_decoder_blocks=0))
    with pytest.raises(ValueError, match=r"stage4 of a 'vitpose_backbone' encoder must be maps .*, got \(1, 16, 24\)"):
        tokens(torch.rand(1, 3, 64, 64))


def test_a_vit_s_patches_may_be_given_by_both_sides():
    vit = {**DINOV2, "model_type": "vit", "patch_size": [14, 28]}
    model = PoodleModel(config(backbone_config=vit, num_decoder_blocks=0))
    assert model(torch.rand(1, 3, 56, 56)).last_hidden_state.shape == (1, 24, 4, 2)


def test_attention_is_implemented_as_it_is_asked_for(tmp_path):
    PoodleModel(config(backbone_config=DINOV2)).save_pretrained(tmp_path)
    for asked in ("eager", "sdpa"):
        model = PoodleModel.from_pretrained(tmp_path, attn_implementation=asked)
        assert model.encoder.config._attn_implementation == asked
    # Also if the model makes a new config without the decoder, which `readout_stage` may name.
    given = config(backbone_config=DINOV2, dense_weight=0, readout_stage="decoder")
    given._attn_implementation = given.backbone_config._attn_implementation = "eager"
    pooled = PoodleForPreTraining(given)
    assert pooled.student.encoder.config._attn_implementation == "eager" and pooled.config.readout_stage is None


def test_replicas_do_not_read_each_other_s_weights():
    """Replicas as in `nn.DataParallel`, which Trainer uses by default on a machine with several GPUs."""
    torch.manual_seed(0)
    backbone = PoodleBackbone(config(out_features=["stage4", "decoder"])).eval()
    other = copy.deepcopy(backbone)
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    replicas = []
    for source in (backbone, other):
        replica = backbone._replicate_for_data_parallel()
        replica.encoder, replica.decoder = source.encoder, source.decoder
        replicas.append(replica)
    image, wrong = torch.randn(1, 3, 32, 32), []
    with torch.no_grad():
        expected = [source(image).feature_maps[1] for source in (backbone, other)]

    @torch.no_grad()
    def run(replica, of):
        wrong.extend(1 for _ in range(60) if not torch.equal(replica(image).feature_maps[1], of))

    threads = [threading.Thread(target=run, args=pair) for pair in zip(replicas, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not torch.equal(*expected) and wrong == []


class Few(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {
            "pixel_values": torch.randn(3, 32, 32, generator=generator),
            "labels": torch.randint(3, (32, 32), generator=generator),
        }


def test_trainer_divides_the_loss_of_accumulated_batches(tmp_path):
    torch.manual_seed(0)
    first = PoodleForSemanticSegmentation(config(num_labels=3))
    first.poodle.eval().requires_grad_(False)
    first.poodle.train = lambda mode=True: first.poodle
    moved = []
    for batch, accumulated in ((8, 1), (2, 4)):
        model = copy.deepcopy(first)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated, max_steps=1,
            learning_rate=0.1, max_grad_norm=0.0, lr_scheduler_type="constant", report_to="none", use_cpu=True, save_strategy="no",
        )  # fmt: skip
        optimizer = torch.optim.SGD(model.classifier.parameters(), lr=0.1)
        Trainer(model, arguments, train_dataset=Few(), optimizers=(optimizer, None)).train()
        moved.append(model.classifier.weight.detach() - first.classifier.weight.detach())
    assert moved[0].abs().max() > 1e-3
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-3, atol=1e-6)


def test_one_class_alone_has_the_loss_of_being_there_or_not():
    model = PoodleForSemanticSegmentation(config(num_labels=1)).eval()
    image, labels = torch.randn(2, 3, 32, 32), torch.randint(2, (2, 32, 32))
    labels[:, :4], labels[:, 4:8] = 255, -100
    with torch.no_grad():
        output = model(image, labels=labels)
    logits = F.interpolate(output.logits, size=(32, 32), mode="bilinear", align_corners=False)[:, 0]
    kept = (labels != 255) & (labels != -100)
    expected = F.binary_cross_entropy_with_logits(logits[kept], labels[kept].float())
    torch.testing.assert_close(output.loss, expected)
    void = labels.float().masked_fill(~kept, torch.nan)
    assert torch.equal(model(image, labels=void).loss, output.loss)
    model(image, labels=void).loss.backward()
    assert all(weight.grad.isfinite().all() for weight in model.classifier.parameters())
    shares = torch.rand(2, 32, 32)  # such as masks that were resized
    with torch.no_grad():
        found, logits = model(image, labels=shares).loss, logits.flatten()
    torch.testing.assert_close(found, F.binary_cross_entropy_with_logits(logits, shares.flatten()))


def test_labels_of_several_classes_that_are_no_integers_are_refused():
    """torchvision's ToTensor scales masks to [0, 1], where all of them would be class 0."""
    model = PoodleForSemanticSegmentation(config(num_labels=3)).eval()
    with pytest.raises(ValueError, match=r"labels must be integers, .*, got torch\.float32"):
        model(torch.randn(1, 3, 32, 32), labels=torch.rand(1, 32, 32))


def test_outputs_are_what_the_call_or_else_the_config_asks():
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        readout = PoodleForSemanticSegmentation(config(num_labels=3)).eval()
        hidden = readout(image, output_hidden_states=True).hidden_states
        assert readout(image).hidden_states is None
        assert all(map(torch.equal, hidden, [*readout.poodle.encode(image).values(), readout.features(image)]))
        assert len(hidden) == len(readout.poodle(image, output_hidden_states=True).hidden_states)
        for kind in (PoodleModel, PoodleBackbone, PoodleForSemanticSegmentation):
            assert isinstance(kind(config(return_dict=False)).eval()(image), tuple)
            assert not isinstance(kind(config(return_dict=False)).eval()(image, return_dict=True), tuple)
        pretraining = PoodleForPreTraining(config())
        found = pretraining(**inputs(), return_dict=False)
        assert isinstance(found, tuple) and found[0].ndim == 0
    assert readout.get_input_embeddings() is None


def test_boxes_beyond_the_frame_and_no_boxes_are_no_nan():
    frames = torch.randn(1, 1, 3, 32, 64)
    boxes = torch.tensor([[[4.0, 4, 40, 40], [-3, 4, 20, 20], [8, 8, 8, 16], [70, 4, 90, 20]]])
    crops = crop_boxes(frames, boxes, torch.zeros(1, 4, dtype=torch.long), 16)
    assert crops.isfinite().all() and not crops[0, 3].any()
    inner = crop_boxes(frames, torch.tensor([[[4.0, 4, 40, 32]]]), torch.zeros(1, 1, dtype=torch.long), 16)
    assert inner.isfinite().all() and inner.std() > 0.1
    batch = inputs()
    none = {name: batch[name][:, :, :0] for name in ("student_boxes", "teacher_boxes", "teacher_box_frames")}
    with pytest.raises(
        ValueError, match=r"student_boxes must be \(2, 2, K, 4\) to fit pixel_values, got \(2, 2, 0, 4\)"
    ):
        PoodleForPreTraining(config())(**{**batch, **none})


OUTSIDE = """
import sys, torch
from transformers import AutoModel, AutoModelForSemanticSegmentation
run, tuned = sys.argv[1:]
model = AutoModelForSemanticSegmentation.from_pretrained(run, trust_remote_code=True, num_labels=5).eval()
model.save_pretrained(tuned)
again = AutoModelForSemanticSegmentation.from_pretrained(tuned, trust_remote_code=True).eval()
image = torch.randn(1, 3, 64, 64)
with torch.no_grad():
    assert torch.equal(model(image).logits, again(image).logits) and again(image).logits.shape[1] == 5
AutoModel.from_pretrained(run, trust_remote_code=True).save_pretrained(tuned + "-network")
network = AutoModel.from_pretrained(tuned + "-network", trust_remote_code=True)
assert all(torch.equal(value, dict(model.poodle.named_parameters())[name]) for name, value in network.named_parameters())
assert "modeling_poodle" not in sys.modules
print("fine")
"""


def test_who_has_only_the_code_beside_the_weights_fine_tunes_saves_and_loads_again(tmp_path):
    PoodleModel(config()).save_pretrained(tmp_path / "run")
    add_code(tmp_path / "run")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", OUTSIDE, str(tmp_path / "run"), str(tmp_path / "tuned")],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    saved = json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert saved["auto_map"]["AutoModelForSemanticSegmentation"].endswith(
        "modeling_poodle.PoodleForSemanticSegmentation"
    )


def test_vitmatte_is_built_on_the_decoder_s_map():
    """
    ViTMatte reads the number of image channels from the backbone's config: four, as the trimap is one of them.

    Its stride is 16, so the decoder has one block.
    """
    encoder = {"model_type": "resnet", "layer_type": "basic", "depths": [1] * 4, "hidden_sizes": [8, 8, 16, 16], "embedding_size": 8}  # fmt: skip
    backbone = PoodleConfig(
        backbone_config={**encoder, "num_channels": 4},
        decoder_reduction=2,
        num_decoder_blocks=1,
        out_features=["decoder"],
    )
    assert backbone.num_channels == 4 and PoodleConfig().num_channels == 3
    sizes = {"hidden_size": 16, "convstream_hidden_sizes": [8, 16, 32], "fusion_hidden_sizes": [32, 16, 16, 8]}
    model = VitMatteForImageMatting(VitMatteConfig(backbone_config=backbone, **sizes))
    assert model(torch.rand(1, 4, 64, 64)).alphas.shape == (1, 1, 64, 64)
