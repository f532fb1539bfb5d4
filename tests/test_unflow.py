"""The flow network and its config, and `--flow unflow` in pretraining."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel

from modeling_poodle import PoodleFlowConfig, PoodleFlowModel
from training.flow import UnFlow, build_flow
from training.flow_objectives import (
    flow_losses,
    photometric_loss,
    self_supervision_loss,
    smoothness_loss,
    visible_mask,
)
from training.recipe import Recipe

TINY = {"num_levels": 3, "stem_size": 4, "hidden_size": 6, "decoder_sizes": [8], "correlation_radius": 1}


@pytest.fixture(scope="module")
def model() -> PoodleFlowModel:
    torch.manual_seed(0)
    model = PoodleFlowModel(PoodleFlowConfig(**TINY))
    torch.nn.init.normal_(model.decoder.head.weight, std=0.02)  # a new network's flow is near zero
    return model


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """A folder like a run's, with the network in model/."""
    folder = tmp_path_factory.mktemp("run")
    model.save_pretrained(folder / "model")
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_give_flow_in_single(model, saved, dtype):
    frames = torch.rand(1, 2, 3, 64, 64)
    with torch.no_grad():
        flow = PoodleFlowModel.from_pretrained(saved / "model", dtype=dtype).eval()(frames.to(dtype)).flow
        expected = model.eval()(frames).flow
    assert flow.dtype == torch.float32 and (flow - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_level": 4}, "has no field 'num_level'. Did you mean 'num_levels'"),
        ({"num_levels": 1}, "num_levels must be an integer between 2 and 8, got 1"),
        ({"correlation_radius": 2.5}, "correlation_radius must be an integer between 1 and 16"),
        ({"hidden_size": True}, "hidden_size must be an integer"),
        ({"decoder_sizes": []}, "decoder_sizes must be a list of integers"),
        ({"decoder_sizes": [8, "8"]}, "decoder_sizes must be a list of integers"),
    ],
    ids=str,
)
def test_impossible_and_misspelt_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PoodleFlowConfig(**fields)


def test_config_survives_saving(tmp_path):
    config = PoodleFlowConfig(**TINY)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is PoodleFlowConfig and loaded.to_diff_dict() == config.to_diff_dict()
    assert {name: getattr(loaded, name) for name in TINY} == TINY


def test_frames_in_turned_order_give_the_flows_in_turned_order(model):
    frames = torch.rand(2, 2, 3, 32, 48)
    encoded = []
    hook = model.encoder.register_forward_hook(lambda module, inputs, output: encoded.append(len(output)))
    with torch.no_grad():
        output, turned = model(frames), model(frames.flip(1))
        first_alone = model(frames[:1])
    hook.remove()
    assert encoded == [4, 4] * 2 + [2, 2]  # each image once per level
    assert output.flow.shape == (2, 2, 2, 32, 48) and output.flow.dtype == torch.float32
    assert [tuple(flow.shape) for flow in output.level_flows] == [(2, 2, 2, 8, 12), (2, 2, 2, 4, 6)]
    torch.testing.assert_close(turned.flow, output.flow.flip(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first_alone.flow, output.flow[:1], rtol=1e-4, atol=1e-4)
    assert (output.flow[:, 0] - output.flow[:, 1]).abs().max() > 0.1
    # The flow is that of the finest level, upsampled by four and scaled by four: bilinear reads keep the mean.
    mean = output.level_flows[0].mean(dim=(-1, -2))
    torch.testing.assert_close(output.flow.mean(dim=(-1, -2)), 4 * mean, rtol=1e-4, atol=1e-4)


def test_frames_of_half_size_pass_all_levels_but_the_finest(model):
    features = model.pyramid(torch.rand(1, 3, 64, 96) * 2 - 1)
    assert [tuple(f.shape[2:]) for f in features] == [(16, 24), (8, 12)]  # at most num_levels - 1
    images = torch.rand(1, 3, 32, 48)
    large = torch.nn.functional.interpolate(images, scale_factor=2, mode="nearest")
    torch.testing.assert_close(model.pyramid(large)[1], model.pyramid(images)[0])
    # The next level would be 3 cells high.
    assert [tuple(f.shape[2:]) for f in model.pyramid(torch.zeros(1, 3, 24, 64))] == [(6, 16)]


def test_frames_that_do_not_fit_are_refused(model):
    for shape in ((1, 2, 3, 32, 44), (1, 3, 3, 32, 32), (2, 3, 32, 32)):
        with pytest.raises(
            ValueError, match=r"frames must be pairs \(B, 2, 3, H, W\) with sides that are multiples of 8"
        ):
            model(torch.zeros(shape))


def test_auto_model_loads_what_was_saved(model, saved):
    loaded = AutoModel.from_pretrained(saved / "model")
    assert type(loaded) is PoodleFlowModel
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_the_losses_together_are_their_weighted_sum_and_reach_every_weight(model):
    torch.manual_seed(1)
    frames = torch.rand(2, 2, 3, 48, 64)
    losses = flow_losses(model, frames, 0.7, 2.0, 0.6, border=8, occlusion=True)
    output, student = model(frames), model(frames[..., 8:-8, 8:-8])
    visible = visible_mask(output.flow)
    assert 0 < visible.float().mean() < 1 and losses.valid_fraction == visible.float().mean()
    expected = torch.zeros(5)
    for earlier, later in ((0, 1), (1, 0)):  # one direction at a time; flow_losses takes both as one batch
        pair, flow, mask = (frames[:, earlier], frames[:, later]), output.flow[:, earlier], visible[:, earlier].float()
        assert mask.sum() > 0
        small = [torch.nn.functional.avg_pool2d(frame, 8) for frame in pair]
        counts = torch.nn.functional.avg_pool2d(mask, 8)
        images = torch.nn.functional.avg_pool2d(pair[0], 4)
        expected[2] += smoothness_loss(output.level_flows[0][:, earlier], images) / 2
        for index, loss_of in (
            (0, photometric_loss(*pair, flow, mask)),
            (1, photometric_loss(*small, output.level_flows[1][:, earlier], counts)),
        ):
            expected[index] += loss_of / 2
    sure = torch.nn.functional.avg_pool2d(visible[..., 8:-8, 8:-8].float(), 4) > 0.5
    learned = sure & ~(torch.nn.functional.avg_pool2d(visible_mask(student.flow).float(), 4) > 0.5)
    teacher = output.level_flows[0][..., 2:-2, 2:-2]
    expected[3] = self_supervision_loss(
        student.level_flows[0].flatten(0, 1), teacher.flatten(0, 1), learned.flatten(0, 1)
    )
    assert learned.any() and losses.self_supervision_loss.item() == pytest.approx(expected[3].item(), rel=1e-4)
    assert losses.smoothness_loss.item() == pytest.approx(expected[2].item(), rel=1e-4)
    # The loss weighs the directions by their visible pixels, the twin equally; the counts are nearly the same.
    assert losses.photometric_loss.item() == pytest.approx(expected[0].item(), rel=0.03)
    total = losses.photometric_loss + 0.7 * expected[1] + 2.0 * expected[2] + 0.6 * expected[3]
    assert losses.loss.item() == pytest.approx(total.item(), rel=0.03)
    model.zero_grad()
    losses.loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    assert flow_losses(model, frames, 0.7, 2.0, 0.0, border=8, occlusion=True).self_supervision_loss == 0


def test_unflow_pads_to_whole_cells_and_takes_bytes(model, saved, tmp_path, monkeypatch):
    frames = torch.randint(0, 256, (2, 2, 3, 29, 42), dtype=torch.uint8)
    pair_flow, unflow = build_flow("unflow", model=str(saved))
    assert pair_flow is None and not any(p.requires_grad for p in unflow.parameters())
    flow = unflow(frames)
    pairs = frames[..., :16, :32].float() / 255
    assert torch.equal(model(pairs, return_dict=False)[0], model(pairs).flow)
    images = torch.nn.functional.pad(frames.flatten(0, 1).float() / 255, (0, 6, 0, 3), mode="replicate")
    with torch.no_grad():
        expected = model(images.unflatten(0, (2, 2))).flow[..., :29, :42]
    torch.testing.assert_close(flow, expected)
    half = PoodleFlowModel.from_pretrained(saved / "model").bfloat16()
    half.save_pretrained(tmp_path / "half")
    assert UnFlow(str(tmp_path / "half"))(frames).dtype == torch.float32
    monkeypatch.setattr("training.flow.in_float16", torch.is_autocast_enabled)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reduced = UnFlow(str(saved / "model"))(frames)
    assert reduced.dtype == torch.float32
    assert 0 < (reduced - flow).norm(dim=2).mean() < 0.1 * flow.norm(dim=2).mean()


def test_models_that_are_none_of_flow_are_refused(poodle, tmp_path):
    with pytest.raises(ValueError, match="(?s)flow_model .*nowhere cannot be read.*--flow_model"):
        UnFlow(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="is of type 'poodle', expected 'poodle_flow'"):
        UnFlow(str(poodle))
    PoodleFlowConfig(**TINY).save_pretrained(tmp_path / "empty")
    with pytest.raises(ValueError, match="flow_model .*empty cannot be loaded"):
        UnFlow(str(tmp_path / "empty"))


@pytest.mark.parametrize("fields", [{"flow": "unflow"}, {"flow": "dis", "flow_model": "runs/flow"}], ids=str)
def test_a_recipe_names_a_flow_model_with_unflow_alone(fields):
    with pytest.raises(
        ValueError, match="flow_model must be a folder or Hub id with flow unflow, and unset with others"
    ):
        Recipe(**fields)
    assert Recipe(flow="unflow", flow_model="runs/flow").flow_model == "runs/flow"


def test_without_occlusion_every_pixel_counts_at_every_level(model):
    frames = torch.rand(2, 2, 3, 48, 64, generator=torch.Generator().manual_seed(1))
    losses = flow_losses(model, frames, 0.7, 0.0, 0.0, border=8, occlusion=False)
    output, images, others = model(frames), frames.flatten(0, 1), frames.flip(1).flatten(0, 1)
    expected = []
    for flow in (output.flow, *output.level_flows[1:]):
        small, small_others = (F.avg_pool2d(maps, 64 // flow.shape[-1]) for maps in (images, others))
        flow = flow.flatten(0, 1)
        expected.append(photometric_loss(small, small_others, flow, torch.ones_like(flow[:, 0])).item())
    assert len(expected) > 1 and losses.photometric_loss.item() == pytest.approx(expected[0], rel=1e-5)
    assert losses.loss.item() == pytest.approx(expected[0] + 0.7 * sum(expected[1:]), rel=1e-5)
