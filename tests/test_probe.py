"""The probe of a network in training, and the table that compares several evaluations."""

import copy
import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from forked_scripts import forked
from PIL import Image
from test_faults_ranks import two_ranks

from evaluation.compare import main as compare
from evaluation.probe import Probe
from evaluation.segment import main as segment
from modeling_poodle import PoodleConfig, PoodleModel
from training.pretrain import main as pretrain
from training.street_files import write_videos

RESNET = {
    "model_type": "resnet", "layer_type": "basic", "depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16], "embedding_size": 8,
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    """A folder of labelled images with three classes that differ in colour."""
    folder = tmp_path_factory.mktemp("stripes")
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 3)):
        for name in ("images", "labels"):
            (folder / split / name).mkdir(parents=True)
        for number in range(count):
            label = np.repeat(rng.permutation(3), 32).astype(np.uint8)[:, None].repeat(64, axis=1)
            colours = np.array([[30, 160, 40], [200, 30, 30], [30, 60, 210]], np.float32)
            image = (colours[label] + rng.normal(0, 10, (*label.shape, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(image).save(folder / split / "images" / f"{number}.png")
            Image.fromarray(label).save(folder / split / "labels" / f"{number}.png")
    (folder / "classes.json").write_text(json.dumps(["grass", "brick", "water"]))
    return folder


def test_probe_gives_the_figure_of_segment_and_touches_nothing(stripes, tmp_path):
    torch.manual_seed(0)
    model = PoodleModel(PoodleConfig(backbone_config=RESNET, decoder_reduction=2)).train().requires_grad_(False)
    model.save_pretrained(tmp_path / "model")
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    figures = Probe(f"folder:{stripes}")(Accelerator(cpu=True), model)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    (result,) = segment(
        ["--model", str(tmp_path / "model"), "--dataset", "folder", "--data_dir", str(stripes), "--readout", "knn"]
        + ["--output_dir", str(tmp_path / "knn")]
    )
    assert figures["miou"] == result["miou"] and figures["accuracy"] == result["accuracy"]
    assert 0.4 < figures["miou"] < 1  # colour suffices; one class for all pixels gives 1/9


def test_a_run_logs_its_probe_and_is_not_changed_by_it(stripes, tmp_path):
    write_videos(tmp_path / "drives", num_videos=2, duration=1.5, fps=4, height=64, width=128, num_processes=1)
    model = {"backbone_config": RESNET, "decoder_reduction": 2, "projection_hidden_size": 16, "projection_size": 8}
    flags = [
        "--config", "street", "--videos", str(tmp_path / "drives"), "--model", json.dumps(model), "--crop_size", "64", "128",
        "--subcrop_size", "32", "--num_subcrops", "2", "--per_device_train_batch_size", "2", "--max_steps", "5", "--warmup_steps", "1",
        "--logging_steps", "1", "--save_steps", "100", "--panel_steps", "100", "--dataloader_num_workers", "0",
    ]  # fmt: skip
    pretrain([*flags, "--output_dir", str(tmp_path / "plain")])
    pretrain([*flags, "--output_dir", str(tmp_path / "probed"), "--probe", f"folder:{stripes}", "--probe_steps", "2"])
    probes = [json.loads(line) for line in (tmp_path / "probed" / "probe.jsonl").read_text().splitlines()]
    assert [probe["step"] for probe in probes] == [2, 4, 5]  # every second step, and the last
    (result,) = segment(
        ["--model", str(tmp_path / "probed"), "--dataset", "folder", "--data_dir", str(stripes), "--readout", "knn"]
        + ["--output_dir", str(tmp_path / "knn")]
    )
    assert probes[-1]["miou"] == pytest.approx(result["miou"], abs=0.01)  # another memory format rounds differently
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("plain", "probed")
    ]
    assert losses[0] == losses[1]


def test_a_network_of_one_image_size_is_probed_in_windows(stripes):
    """The probe reads it in windows, as an evaluation does, and leaves its statistics as they are."""
    encoder = {"model_type": "hiera", "embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4, "image_size": [32, 32]}
    model = PoodleModel(PoodleConfig(backbone_config=encoder, decoder_reduction=2)).train().requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    assert Probe(f"folder:{stripes}")(Accelerator(cpu=True), model)["miou"] > 0.2  # one class for all pixels gives 1/9
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_processes_with_statistics_of_their_own_measure_the_network_of_the_first(stripes, tmp_path):
    """The first process's network is the one that is exported; each process trains on with its own statistics."""
    script = """
import copy
from evaluation.probe import Probe
from modeling_poodle import PoodleModel

accelerator = Accelerator(cpu=True)
model = PoodleModel.from_pretrained(f"{sys.argv[1]}/{rank}").train().requires_grad_(False)
before = copy.deepcopy(model.state_dict())
figures = Probe(sys.argv[2])(accelerator, model)
assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
with open(f"{sys.argv[1]}/{rank}.json", "w") as file:
    json.dump(figures, file)
torch.distributed.destroy_process_group()
"""
    torch.manual_seed(0)
    model = PoodleModel(PoodleConfig(backbone_config=RESNET, decoder_reduction=2)).train()
    for rank in (0, 1):
        with torch.no_grad():
            for _ in range(20):  # in a run on CPUs each process sees other pairs
                model(torch.randn(2, 3, 64, 64) * (1 + 2 * rank) + rank)
        model.save_pretrained(tmp_path / str(rank))
    alone = [
        Probe(f"folder:{stripes}")(Accelerator(cpu=True), PoodleModel.from_pretrained(tmp_path / str(rank)))
        for rank in (0, 1)
    ]
    done = forked(two_ranks(tmp_path, script), tmp_path, f"folder:{stripes}", ranks=2)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second == pytest.approx(alone[0], abs=1e-6)
    assert alone[0]["miou"] != pytest.approx(alone[1]["miou"], abs=1e-3)


@pytest.mark.parametrize(
    "source, message",
    [
        (
            "streets",
            "probe must be one of street, street:walking, street:static, street:aerial, or folder:PATH, got 'streets'",
        ),
        ("folder:", "probe must be"),
        ("street:", "probe must be"),
    ],
)
def test_wrong_probes(source, message):
    with pytest.raises(ValueError, match=message):
        Probe(source)


def test_a_probe_of_a_folder_that_is_not_there():
    with pytest.raises(ValueError, match="^probe: nowhere: no such folder. Expected: images"):
        Probe("folder:nowhere")


def test_compare_prints_one_line_a_model_and_readout(tmp_path, capsys):
    result = {
        "model": "a", "dataset": "street", "readout": "knn", "features": "decoder", "steps": 0, "seed": 0, "miou": 0.25,
        "accuracy": 0.5, "mean_accuracy": None, "groups": {"small": 0.0, "large": 0.5},
    }  # fmt: skip
    both = {"results": [result | {"model": "b", "readout": "linear"}, result | {"model": "c"}]}
    (tmp_path / "one.json").write_text(json.dumps(result))
    (tmp_path / "two.json").write_text(json.dumps(both))
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / "evaluation.json").write_text(json.dumps(result))
    compare([str(tmp_path / "three")])
    of_folder = capsys.readouterr().out
    compare([str(tmp_path / "one.json")])
    assert capsys.readouterr().out == of_folder
    compare([str(tmp_path / "one.json"), str(tmp_path / "two.json"), "--markdown"])
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == [
        "model",
        "data",
        "readout",
        "features",
        "steps",
        "seed",
        "mIoU",
        "accuracy",
        "mean acc",
        "small",
        "large",
    ]
    assert [row[0] for row in cells[2:]] == ["a", "b", "c"]
    assert cells[3][2:] == ["linear", "decoder", "0", "0", "25.0", "50.0", "-", "0.0", "50.0"]
    assert len(lines) == 5
    others = [result | {"num_test_images": 2}, result | {"num_test_images": 3, "per_class": {"road": 0.5}}]
    (tmp_path / "other.json").write_text(json.dumps({"results": [*others, result | {"dataset": "camvid"}]}))
    compare([str(tmp_path / "other.json")])
    assert capsys.readouterr().err == "note: the results on street differ in their number of test images\n"
    others[0] |= {"per_class": {"car": 0.5}, "num_test_images": 3}
    (tmp_path / "other.json").write_text(json.dumps({"results": others}))
    compare([str(tmp_path / "other.json")])
    assert capsys.readouterr().err == "note: the results on street differ in their classes\n"
    fits = [
        result | {"readout": "linear", "num_processes": n, "protocol": {"learning_rate": rate, "max_steps": 9}}
        for n, rate in ((1, 0.1), (1, 0.1), (8, 0.2))
    ]
    (tmp_path / "other.json").write_text(json.dumps({"results": [*fits, result]}))  # the last is of an earlier version
    compare([str(tmp_path / "other.json")])
    said = "note: the linear readouts on street differ in learning_rate, num_processes\n"
    assert capsys.readouterr().err == said
    (tmp_path / "other.json").write_text(json.dumps({"results": fits[:2]}))
    compare([str(tmp_path / "other.json")])
    assert capsys.readouterr().err == ""
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no segmentation results"):
        compare([str(tmp_path / "other.json")])
    (tmp_path / "other.json").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ValueError, match="other.json cannot be read as an evaluation.json"):
        compare([str(tmp_path / "other.json")])


def test_a_probe_of_one_class_alone_is_refused(tmp_path):
    """With masks of 0 and 255, all its figures would be 100 %."""
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    mask = np.zeros((32, 32), np.uint8)
    mask[8:16] = 255
    for number in range(3):
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "images" / f"{number}.png")
        Image.fromarray(mask).save(tmp_path / "labels" / f"{number}.png")
    (tmp_path / "classes.json").write_text('["road", "car"]')
    with pytest.raises(ValueError, match="no training label has a pixel of car .* are the masks 0 and 255?"):
        Probe(f"folder:{tmp_path}")
