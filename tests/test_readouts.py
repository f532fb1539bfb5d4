"""Linear, k-NN and UperNet readouts."""

import dataclasses

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from evaluation.data import load_dataset
from evaluation.encoders import build
from evaluation.engine import draw, fingerprint, fit
from evaluation.readouts import FeatureStore, KnnReadout, LinearReadout, UperNetReadout, majority
from evaluation.recipe import EvaluationRecipe
from modeling_poodle import PoodleForSemanticSegmentation

# --- readouts ---


def recipe(**values) -> EvaluationRecipe:
    return EvaluationRecipe(model=["x"], **values)


def test_the_points_loss_is_the_cross_entropy_of_the_upsampled_logits(shapes, poodle):
    data = load_dataset("folder", str(shapes))
    readout = LinearReadout(build(str(poodle), 3), data, recipe())
    readout.prepare(list(data.train[:2]))
    batch = readout.batch(list(data.train[:2]), torch.Generator().manual_seed(0))
    torch.nn.init.normal_(readout.classifier.weight)
    estimates = [
        readout(**readout.batch(list(data.train[:2]), torch.Generator().manual_seed(s))).item() for s in range(8)
    ]
    full = []
    for features, example in zip(batch["features"], data.train[:2]):
        logits = F.interpolate(readout.classifier(features[None]), size=(64, 96), mode="bilinear", align_corners=False)
        label = torch.from_numpy(data.label(example).astype(np.int64))[None]
        full.append(F.cross_entropy(logits, label, ignore_index=255).item())
    assert np.mean(estimates) == pytest.approx(np.mean(full), rel=0.01)


@pytest.mark.parametrize("kind", [LinearReadout, UperNetReadout])
def test_a_batch_without_a_labelled_pixel_counts_nothing_and_others_as_ever(shapes, poodle, kind):
    """An image of void alone ends no fit; the loss of others is torch's own mean, bit for bit."""
    data = load_dataset("folder", str(shapes))
    void = dataclasses.replace(data.train[0], label=lambda: np.full((64, 96), 255, np.uint8))
    readout = kind(build(str(poodle), 3), data, recipe(crop_size=[32, 32]))
    readout.prepare([void, *data.train])
    torch.nn.init.normal_(readout.trained()[-2])
    readout.train(readout.trains_encoder)

    def loss_and_gradients(forward, examples) -> list[torch.Tensor]:
        loss = forward(**readout.batch(examples, torch.Generator().manual_seed(0)))
        return [loss.detach(), *torch.autograd.grad(loss, readout.trained())]

    def means(seed=0, **batch) -> torch.Tensor:
        if kind is UperNetReadout:
            torch.manual_seed(seed)
            return readout.model(**batch).loss
        logits = []
        for features, where in zip(batch["features"], batch["points"]):
            scores = readout.classifier(features[None])
            sampled = F.grid_sample(scores, where[None, None], padding_mode="border", align_corners=False)
            logits.append(sampled[0, :, 0])
        return F.cross_entropy(torch.stack(logits), batch["targets"], ignore_index=255)

    for value in loss_and_gradients(readout, [void, void]):
        assert not value.any()
    assert not loss_and_gradients(means, [void, void])[0].isfinite()
    for examples in (list(data.train[:3]), [void, data.train[1]]):
        ours, theirs = (loss_and_gradients(forward, examples) for forward in (readout, means))
        assert ours[0] > 0.5 and all(map(torch.equal, ours, theirs))


def test_a_fit_goes_on_over_images_of_void_alone(shapes, poodle, tmp_path):
    data = load_dataset("folder", str(shapes)).limit(2, 1)
    void = dataclasses.replace(data.train[0], label=lambda: np.full((64, 96), 255, np.uint8))
    data = dataclasses.replace(data, train=(void, data.train[1]))
    data.check()
    values = recipe(per_device_train_batch_size=1, max_steps=4, logging_steps=1)
    readout = LinearReadout(build(str(poodle), 3), data, values)
    readout.prepare(list(data.train))
    curve = fit(Accelerator(cpu=True), readout, values, list(data.train), tmp_path, "x", resume=False)
    assert sorted(point["loss"] == 0 for point in curve) == [False, False, True, True]
    with pytest.raises(ValueError, match="folder: none of the 1 training images has a labelled pixel"):
        dataclasses.replace(data, train=(void,)).check()


def test_upernet_refuses_one_image_a_step_before_anything_is_read():
    """Its pooling to one cell leaves BatchNorm one value a channel."""
    with pytest.raises(ValueError, match="per_device_train_batch_size must be at least 2 with readout upernet, got 1"):
        recipe(readout="upernet", per_device_train_batch_size=1)


def test_saved_linear_readout_predicts_alike_and_leaves_the_encoder(shapes, poodle, tmp_path):
    data = load_dataset("folder", str(shapes))
    encoder = build(str(poodle), 3, data.classes)
    before = fingerprint(encoder.model.poodle)
    readout = LinearReadout(encoder, data, recipe())
    readout.prepare(list(data.train))
    torch.nn.init.normal_(readout.classifier.weight)
    image = data.image(data.test[0])
    predicted = readout.predict(image)
    readout.save(tmp_path)
    assert (readout.predict(image) == predicted).all()  # saving changes nothing
    saved = PoodleForSemanticSegmentation.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        logits = saved(encoder.normalise(image)).logits
    again = F.interpolate(logits, size=(64, 96), mode="bilinear", align_corners=False).argmax(1)[0]
    assert (again.numpy() == predicted).mean() > 0.999
    assert fingerprint(saved.poodle) == before == fingerprint(encoder.model.poodle)


def test_feature_cache_holds_what_is_computed_and_keeps_its_limit(shapes, poodle):
    data = load_dataset("folder", str(shapes))
    kept, anew = (LinearReadout(build(str(poodle), 3), data, recipe(feature_cache_gb=g)) for g in (1.0, 1e-6))
    for readout in (kept, anew):
        readout.prepare(list(data.train))
    assert kept.cached and not anew.cached
    ours, theirs = (r.batch(list(data.train[3:5]), torch.Generator().manual_seed(0)) for r in (kept, anew))
    for a, b in zip(ours["features"], theirs["features"]):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)  # half precision


def test_what_half_precision_cannot_hold_is_kept_as_its_largest_number(shapes):
    """A channel that hardly varies in the images that the deviation is of gives such numbers in another."""
    example, store = load_dataset("folder", str(shapes)).train[0], FeatureStore(1e6)
    assert store.fill([example], lambda _: torch.tensor([1e6, -1e6, 60000.0, 0.5])[:, None, None])
    assert store[example].flatten().tolist() == [65504, -65504, 60000, 0.5]


def test_knn_finds_the_training_images_themselves(shapes, poodle):
    data = load_dataset("folder", str(shapes))
    readout = KnnReadout(build(str(poodle), 3), data, recipe(num_neighbours=1))
    readout.prepare([])
    example = data.train[0]
    predicted = majority(readout.predict(data.image(example)), (8, 12), 3)
    truth = majority(data.label(example), (8, 12), 3)
    assert (predicted == truth)[truth != 255].float().mean() > 0.97


def test_every_image_is_drawn_once_an_epoch():
    drawn = [index for step in range(6) for index in draw(8, 4, step, seed=1)]
    assert [sorted(drawn[k : k + 8]) for k in (0, 8, 16)] == [list(range(8))] * 3
    assert drawn[:8] != drawn[8:16]
