"""Inputs and outputs of the pretraining model: shapes, types, values that no view has, and the order of the outputs."""

import dataclasses
import re

import pytest
import torch
from test_modeling_pretraining import config, inputs

from modeling_poodle import PoodleForPreTraining, PoodleForPreTrainingOutput


def test_shapes_that_do_not_fit_are_refused():
    model, batch = PoodleForPreTraining(config()), inputs()
    with pytest.raises(ValueError, match="flow must be"):
        model(**{**batch, "flow": batch["flow"][:1]})
    with pytest.raises(ValueError, match="frame pairs"):
        model(**{**batch, "pixel_values": batch["pixel_values"][:, 0]})
    with pytest.raises(
        ValueError, match=r"pixel_values must be frame pairs \(B, 2, 3, H, W\), got \(2, 2, 1, 64, 96\)"
    ):
        model(**{**batch, "pixel_values": batch["pixel_values"][:, :, :1]})


def test_masks_and_indices_have_their_types():
    model, batch = PoodleForPreTraining(config()), inputs()
    for name, kind in (("valid_mask", "torch.bool"), ("teacher_box_frames", "integers")):
        with pytest.raises(ValueError, match=f"{name} must be of {kind}, got torch.float32"):
            model(**{**batch, name: batch[name].float()})


def test_the_output_s_order_is_the_declared_one():
    both = PoodleForPreTraining(config())
    output, order = both(**inputs()), [field.name for field in dataclasses.fields(PoodleForPreTrainingOutput)]
    assert list(output) == order
    assert all(torch.equal(output[name], value) for name, value in zip(order, output.to_tuple(), strict=True))
    without = PoodleForPreTraining(config(pooled_weight=0))(**inputs())
    assert list(without) == [name for name in order if not name.startswith("pooled")]


def test_views_without_an_inverse_count_no_point_and_crash_nothing():
    model, batch = PoodleForPreTraining(config()).train(), inputs()
    output = model(**{**batch, "student_views": torch.zeros_like(batch["student_views"])})
    output.loss.backward()
    assert output.valid_fraction == 0 and output.dense_loss == 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("name", "shape", "objective"),
    [
        ("flow", "2, 2, 2, 64, 96", "dense"),
        ("valid_mask", "2, 2, 64, 96", "dense"),
        ("student_views", "2, 2, 2, 3", "dense"),
        ("teacher_views", "2, 2, 2, 3", "dense"),
        ("student_boxes", "2, 2, (3|K), 4", "pooled"),
        ("teacher_boxes", "2, 2, 3, 4", "pooled"),
        ("teacher_box_frames", "2, 2, 3", "pooled"),
    ],
)
def test_inputs_of_each_objective_are_asked_for(name, shape, objective):
    both, batch = PoodleForPreTraining(config()), inputs()
    value = batch[name]
    for wrong in (
        None,
        value[:1],
        value[:, :1],
        value[..., :1],
        value[..., None],
        value.flatten(0, 1),
        value[:, :, :1],
    ):
        got = "None" if wrong is None else str(tuple(wrong.shape))
        if name == "student_boxes" and got == "(2, 2, 1, 4)":  # K is read from this shape, so any K fits
            continue
        with pytest.raises(ValueError) as error:
            both(**{**batch, name: wrong})
        expected = rf"{name} must be \({shape}\) to fit pixel_values, got {re.escape(got)}"
        assert re.fullmatch(expected, str(error.value))
    other = PoodleForPreTraining(
        config(dense_weight=0, num_decoder_blocks=0) if objective == "dense" else config(pooled_weight=0)
    )
    assert torch.isfinite(other(**{**batch, name: None}).loss)


@pytest.mark.parametrize("momentum", [-0.1, 1.5, float("nan"), None, "0.9"])
def test_a_momentum_is_a_share(momentum):
    with pytest.raises(ValueError, match="momentum must be a number from 0 to 1, got"):
        PoodleForPreTraining(config()).update_teacher(momentum)
