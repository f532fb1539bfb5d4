"""Linear, k-NN and UperNet readouts."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import REPOSITORY
from forked_scripts import forked
from torch.nn import functional as F

from evaluation import feature_store
from evaluation.data import load_dataset
from evaluation.encoders import build
from evaluation.engine import fingerprint, fit
from evaluation.feature_store import FeatureStore
from evaluation.readouts import KnnReadout, LinearReadout, UperNetReadout, _in_order, majority
from evaluation.recipe import EvaluationRecipe
from modeling_poodle import PoodleForSemanticSegmentation

# --- readouts ---


def recipe(**values) -> EvaluationRecipe:
    return EvaluationRecipe(model=["x"], **values)


def batch_of(readout, examples, seed: int = 0) -> dict:
    return readout.batch([readout.read(example) for example in examples], torch.Generator().manual_seed(seed))


def test_the_points_loss_is_the_cross_entropy_of_the_upsampled_logits(shapes, poodle):
    data = load_dataset("folder", str(shapes))
    readout = LinearReadout(build(str(poodle), 3), data, recipe())
    readout.prepare()
    batch = batch_of(readout, data.train[:2])
    torch.nn.init.normal_(readout.classifier.weight)
    estimates = [readout(**batch_of(readout, data.train[:2], seed)).item() for seed in range(8)]
    full = []
    for features, example in zip(batch["features"], data.train[:2]):
        logits = F.interpolate(readout.classifier(features[None]), size=(64, 96), mode="bilinear", align_corners=False)
        label = torch.from_numpy(data.label(example).astype(np.int64))[None]
        full.append(F.cross_entropy(logits, label, ignore_index=255).item())
    assert np.mean(estimates) == pytest.approx(np.mean(full), rel=0.01)


@pytest.mark.parametrize("kind", [LinearReadout, UperNetReadout])
def test_a_batch_without_a_labelled_pixel_counts_nothing_and_others_as_ever(shapes, poodle, kind):
    """A batch of void alone does not end the fit; the loss of other batches is torch's own mean, bit for bit."""
    data = load_dataset("folder", str(shapes))
    void = dataclasses.replace(data.train[0], label=lambda: np.full((64, 96), 255, np.uint8))
    readout = kind(build(str(poodle), 3), data, recipe(crop_size=[32, 32]))
    readout.prepare()
    readout.keep([void, *data.train])
    torch.nn.init.normal_(readout.trained()[-2])
    readout.train(readout.trains_encoder)

    def loss_and_gradients(forward, examples) -> list[torch.Tensor]:
        loss = forward(**batch_of(readout, examples))
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


PARTS_OF_THE_BANK = """
import dataclasses, json, sys
from types import SimpleNamespace
import numpy as np
from accelerate import Accelerator
from evaluation import readouts
from evaluation.engine import over_test_images
from safetensors import SafetensorError
from test_readouts import knn_of_odd_images
def read(example):
    if example == "bad":
        raise ValueError("no image")
    return (example,)
data = SimpleNamespace(test=["good", "bad", "good"])
accelerator, counted = Accelerator(cpu=True), []
cells = readouts.KnnReadout._cells
readouts.KnnReadout._cells = lambda self, image: (counted.append(image.shape[:2]), cells(self, image))[1]
readout = knn_of_odd_images(*sys.argv[1:3])
train = readout.data.train
flat = dataclasses.replace(train[1], label=lambda: np.zeros((64, 90), np.uint8))
readout.data = dataclasses.replace(readout.data, train=(train[0], flat))  # the second process' image
told = []
for action in (lambda: readout.prepare(accelerator), lambda: over_test_images(accelerator, data, read, len, "")):
    try:
        action()
    except ValueError as error:
        told.append(str(error))
readout.data = dataclasses.replace(readout.data, train=train)
readout.prepare(accelerator)
own = {"told": told, "images": counted, "labels": readout.labels.tolist(), "bank": readout.bank.tolist()}
with open(f"{sys.argv[3]}/{accelerator.process_index}.json", "w") as file:
    json.dump(own, file)
accelerator.end_training()
"""


def knn_of_odd_images(shapes, poodle) -> KnnReadout:
    """A k-NN readout of five images: two have no labelled pixel and one has half the size, so the processes get unequal shares."""
    data = load_dataset("folder", str(shapes)).limit(5, 1)
    void = [dataclasses.replace(e, label=lambda: np.full((64, 96), 255, np.uint8)) for e in data.train[1:3]]
    image, label = data.both(data.train[3])
    small = dataclasses.replace(data.train[3], image=lambda: image[:32].copy(), label=lambda: label[:32].copy())
    data = dataclasses.replace(data, train=(data.train[0], *void, small, data.train[4]))
    torch.manual_seed(0)
    return KnnReadout(build(str(poodle), 3), data, recipe(max_reference_cells=200))


def test_processes_share_the_images_of_k_nn_and_have_all_its_cells(shapes, poodle, tmp_path):
    alone = knn_of_odd_images(shapes, poodle)
    alone.prepare()
    (tmp_path / "script.py").write_text(PARTS_OF_THE_BANK)
    paths = f"{REPOSITORY}:{REPOSITORY / 'tests'}"
    done = forked(tmp_path / "script.py", shapes, poodle, tmp_path, ranks=2, PYTHONPATH=paths)
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    images = [[[64, 96]] * 3, [[64, 96], [32, 96]]]  # first, third and fifth on one process, the others on the other
    # If one process cannot use an image, both raise its error.
    assert all(len(of_rank["told"]) == 2 and of_rank["told"][1] == "no image" for of_rank in found)
    assert all("image (64, 96) and label (64, 90) differ in size" in of_rank["told"][0] for of_rank in found)
    assert [of_rank["images"][-len(own) :] for of_rank, own in zip(found, images)] == images
    assert len(alone.labels) > 60
    for of_rank in found:
        assert of_rank["labels"] == alone.labels.tolist() and torch.equal(torch.tensor(of_rank["bank"]), alone.bank)


def test_rows_of_more_processes_than_images_are_in_the_images_order():
    counts, processes = [2, 0, 3, 1, 2], 8
    rows = [torch.full((count, 4), float(number)) for number, count in enumerate(counts)]
    own = [torch.cat([torch.zeros(0, 4), *rows[rank::processes]]) for rank in range(processes)]
    padded = torch.cat([F.pad(of_rank, (0, 0, 0, 3 - len(of_rank)), value=9.0) for of_rank in own])
    for rank in range(processes):

        def gather(sent, rank=rank):
            assert torch.equal(sent[: len(own[rank])], own[rank]) and sent.shape == (3, 4)
            return padded

        accelerator = SimpleNamespace(num_processes=processes, gather=gather)
        assert torch.equal(_in_order(accelerator, own[rank], counts), torch.cat(rows))


def test_k_nn_refuses_a_training_label_of_another_size(shapes, poodle):
    data = load_dataset("folder", str(shapes)).limit(1, 1)
    flat = dataclasses.replace(data.train[0], label=lambda: np.zeros((64, 90), np.uint8))
    readout = KnnReadout(build(str(poodle), 3), dataclasses.replace(data, train=(flat,)), recipe())
    with pytest.raises(ValueError, match=r"image \(64, 96\) and label \(64, 90\) differ in size"):
        readout.prepare()


@pytest.mark.parametrize("kind", [LinearReadout, UperNetReadout])
@pytest.mark.parametrize("cache", [1.0, 0.0])
def test_a_fit_refuses_a_training_label_of_another_size(shapes, poodle, kind, cache):
    """Such a label may stand anywhere in a data set of the Hub. Crops of both would fit, but show different places."""
    data = load_dataset("folder", str(shapes))
    large = dataclasses.replace(data.train[1], label=lambda: np.zeros((128, 192), np.uint8))
    data = dataclasses.replace(data, train=(data.train[0], large, data.train[2]))
    data.check()
    readout = kind(build(str(poodle), 3), data, recipe(crop_size=[32, 32], feature_cache_gb=cache))
    readout.prepare()
    with pytest.raises(ValueError, match=r"image \(64, 96\) and label \(128, 192\) differ in size"):
        readout.keep(list(data.train))
        batch_of(readout, data.train)


def test_a_fit_goes_on_over_images_of_void_alone(shapes, poodle, tmp_path):
    data = load_dataset("folder", str(shapes)).limit(2, 1)
    void = dataclasses.replace(data.train[0], label=lambda: np.full((64, 96), 255, np.uint8))
    data = dataclasses.replace(data, train=(void, data.train[1]))
    data.check()
    values = recipe(per_device_train_batch_size=1, max_steps=4, logging_steps=1)
    readout = LinearReadout(build(str(poodle), 3), data, values)
    readout.prepare()
    curve = fit(Accelerator(cpu=True), readout, values, list(data.train), tmp_path, "x", resume=False)
    assert sorted(point["loss"] == 0 for point in curve) == [False, False, True, True]
    with pytest.raises(ValueError, match="folder: none of the 1 training images has a labelled pixel"):
        dataclasses.replace(data, train=(void,)).check()


def test_upernet_refuses_one_image_a_step_before_anything_is_read():
    """With one image, UperNet's pooling to one cell leaves BatchNorm one value per channel."""
    with pytest.raises(ValueError, match="per_device_train_batch_size must be at least 2 with readout upernet, got 1"):
        recipe(readout="upernet", per_device_train_batch_size=1)


def test_saved_linear_readout_predicts_alike_and_leaves_the_encoder(shapes, poodle, tmp_path):
    data = load_dataset("folder", str(shapes))
    encoder = build(str(poodle), 3, data.classes)
    before = fingerprint(encoder.model.poodle)
    readout = LinearReadout(encoder, data, recipe())
    readout.prepare()
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
    size = 32 * 8 * 12 * 2  # bytes of one image's features
    kept, some, anew = (
        LinearReadout(build(str(poodle), 3), data, recipe(feature_cache_gb=gb)) for gb in (1.0, 4.5e-9 * size, 1e-9)
    )
    for readout in (kept, some, anew):
        readout.prepare()
        readout.keep(list(data.train))
    names = [example.name for example in data.train]
    assert list(kept.store.places) == names and list(some.store.places) == names[:4] and not anew.store.places
    theirs = batch_of(anew, data.train[3:5])
    for readout in (kept, some):
        ours = batch_of(readout, data.train[3:5])
        assert torch.equal(ours["points"], theirs["points"]) and torch.equal(ours["targets"], theirs["targets"])
        for a, b in zip(ours["features"], theirs["features"]):
            assert torch.equal(a, b)


def test_a_disk_that_is_full_costs_the_cache_and_not_the_readout(shapes, poodle, tmp_path, caplog, monkeypatch):
    """If a disk reports room and then has none, all features are computed anew and the space already written is freed."""
    import resource

    data = load_dataset("folder", str(shapes))
    monkeypatch.setenv("POODLE_SCRATCH", str(tmp_path))
    readout = LinearReadout(build(str(poodle), 3), data, recipe())
    readout.prepare()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * 32 * 8 * 12, limits[1]))
    try:
        readout.keep(list(data.train))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not readout.store.places and list(tmp_path.iterdir()) == []
    assert f"features are not kept in {tmp_path}" in caplog.text
    assert batch_of(readout, data.train[:1])["features"][0].shape == (32, 8, 12)


def test_a_killed_process_leaves_no_features_on_the_disk(tmp_path, monkeypatch):
    """The cache file has no name, because a process that is killed could not remove a named file."""
    monkeypatch.setenv("POODLE_SCRATCH", str(tmp_path))
    store = FeatureStore(1e6)
    assert store.fill([("a", torch.ones(2, 3, 4)), ("b", torch.zeros(2, 3, 4))]) == 2
    assert list(tmp_path.iterdir()) == [] and store["a"].eq(1).all() and store["b"].eq(0).all()


def test_the_processes_of_a_machine_share_the_room_on_its_disk(monkeypatch):
    features = [(str(number), torch.ones(1, 10, 10)) for number in range(9)]
    monkeypatch.setattr(feature_store.shutil, "disk_usage", lambda folder: SimpleNamespace(free=8 * 200 / 0.9))
    assert FeatureStore(1e6).fill(features) == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert FeatureStore(1e6).fill(features) == 4


def test_what_half_precision_cannot_hold_is_kept_as_its_largest_number():
    """Such numbers occur when a channel hardly varies in the images that its deviation was measured on, but does in another image."""
    store = FeatureStore(1e6)
    assert store.fill([("a", torch.tensor([1e6, -1e6, 60000.0, 0.5])[:, None, None])]) == 1
    assert store["a"].flatten().tolist() == [65504, -65504, 60000, 0.5]


def test_knn_finds_the_training_images_themselves(shapes, poodle):
    data = load_dataset("folder", str(shapes))
    readout = KnnReadout(build(str(poodle), 3), data, recipe(num_neighbours=1))
    readout.prepare()
    example = data.train[0]
    predicted = majority(readout.predict(data.image(example)), (8, 12), 3)
    truth = majority(data.label(example), (8, 12), 3)
    assert (predicted == truth)[truth != 255].float().mean() > 0.97


def test_knn_votes_are_those_of_a_naive_twin(shapes, poodle):
    """The twin votes cell by cell in float64: the nearest references by cosine, weighted by exp(cosine / 0.07), then upsampled."""
    data = load_dataset("folder", str(shapes))
    readout = KnnReadout(build(str(poodle), 3), data, recipe(num_neighbours=7, max_reference_cells=300))
    readout.prepare()
    assert 280 < len(readout.labels) <= 300 + len(data.train)
    image = data.image(data.test[0])
    bank, labels = readout.bank.t().double().numpy(), readout.labels.numpy()
    cells = readout._cells(image)[0].double().numpy()
    votes = np.zeros((3, *cells.shape[1:]))
    for row in range(cells.shape[1]):
        for column in range(cells.shape[2]):
            cosines = [float(cells[:, row, column] @ reference) for reference in bank]
            for index in sorted(range(len(bank)), key=lambda i: -cosines[i])[:7]:
                votes[labels[index], row, column] += np.exp(cosines[index] / 0.07)
            votes[:, row, column] /= votes[:, row, column].sum()
    scores = F.interpolate(torch.from_numpy(votes)[None], size=image.shape[:2], mode="bilinear", align_corners=False)
    assert (readout.predict(image) == scores.argmax(1)[0].numpy()).mean() > 0.999
