"""evaluation/segment.py as a user runs it: figures, files, interruptions, several processes, and wrong input."""

import dataclasses
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from forked_scripts import forked
from labelled_shapes import RESNET, squares
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_readouts import recipe
from transformers import (
    AutoImageProcessor,
    BeitConfig,
    BeitModel,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinModel,
    UperNetForSemanticSegmentation,
    pipeline,
)

from evaluation import data as data_module
from evaluation import segment
from evaluation.data import load_dataset
from evaluation.encoders import Encoder
from evaluation.readouts import LinearReadout, UperNetReadout
from evaluation.recipe import parse_recipe
from evaluation.segment import main
from modeling_poodle import PoodleConfig, PoodleForSemanticSegmentation, PoodleModel
from modeling_poodle.recipe_files import run_script
from training.street_labels import write_folder

# --- the script ---


def flags(shapes, output_dir, *models, readout="linear", **more):
    values = [item for key, value in more.items() for item in (f"--{key}", str(value))]
    named = [item for model in models for item in ("--model", str(model))]
    return [
        *named,
        "--dataset",
        "folder",
        "--data_dir",
        str(shapes),
        "--readout",
        readout,
        "--output_dir",
        str(output_dir),
        *values,
    ]


def test_linear_learns_is_reproducible_and_resumes(shapes, poodle, tmp_path, monkeypatch, capsys, caplog):
    caplog.set_level("INFO")
    options = {"num_train_epochs": 30, "save_steps": 7, "logging_steps": 5}
    (first,) = main(flags(shapes, tmp_path / "a", poodle, **options))
    assert first["miou"] > 0.5 and first["features"] == "decoder" and first["steps"] == 45
    saved = json.loads((tmp_path / "a" / "evaluation.json").read_text())
    assert saved["miou"] == first["miou"] and set(saved["versions"]) == {"python", "torch", "transformers"}
    config = json.loads((tmp_path / "a" / "readout" / "config.json").read_text())  # also loads without this package
    code = config["auto_map"]["AutoModelForSemanticSegmentation"]
    assert code == "modeling_poodle.PoodleForSemanticSegmentation"
    assert (tmp_path / "a" / "readout" / "modeling_poodle.py").is_file()
    report = (tmp_path / "a" / "report.html").read_text()
    assert "red &lt;b&gt;" in report and "red <b>" not in report and report.count("<img") == 3 and "polyline" in report
    (second,) = main(flags(shapes, tmp_path / "b", poodle, **options))
    assert second["per_class"] == first["per_class"]
    # The evaluation is interrupted after a save, then resumed.
    from evaluation import engine

    model = shutil.copytree(poodle, tmp_path / "model")

    original, calls = LinearReadout.forward, []

    def stop(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 24:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LinearReadout, "forward", stop)
    with pytest.raises(KeyboardInterrupt):
        main(flags(shapes, tmp_path / "c", model, **options))
    assert not (tmp_path / "c" / "evaluation.json").exists() and (tmp_path / "c" / "fit.safetensors").exists()
    monkeypatch.setattr(LinearReadout, "forward", original)
    with pytest.raises(ValueError, match="holds an interrupted evaluation"):
        main(flags(shapes, tmp_path / "c", model, **options))
    with pytest.raises(ValueError, match="is of another evaluation"):
        main(flags(shapes, tmp_path / "c", model, **{**options, "seed": 2}, resume_from_checkpoint="latest"))
    with safe_open(tmp_path / "c" / "fit.safetensors", "pt") as file:
        identity = file.metadata()["encoder"]
    with pytest.raises(
        ValueError,
        match=r"the fit of 45 steps on 1 process\(es\), this one is of 22 on 2: go on with 1 \(on CPUs by torchrun --nproc_per_node 1\)",
    ):
        engine.FitState(tmp_path / "c" / "fit.safetensors", identity, 22, 2, [], {}, None).load()
    starts = []
    load = engine.FitState.load
    monkeypatch.setattr(engine.FitState, "load", lambda state: (starts.append(load(state)), starts[-1])[1])
    free = {"feature_cache_gb": 0, "save_steps": 100}  # these may change: the disk may be full by now
    (third,) = main(flags(shapes, tmp_path / "c", model, **{**options, **free}, resume_from_checkpoint="latest"))
    assert starts[0][0] == 21 and third["per_class"] == first["per_class"]
    assert not (tmp_path / "c" / "fit.safetensors").exists()
    capsys.readouterr()
    # A job that always resumes finds the finished evaluation and does nothing,
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*")}
    (fourth,) = main(flags(shapes, tmp_path / "c", model, **options, resume_from_checkpoint="latest"))
    assert fourth == json.loads(json.dumps(third)) and len(starts) == 1
    assert "holds this evaluation, finished: evaluation.json, report.html, readout/" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*")} == before
    # unless the weights have changed since they were measured.
    weights = model / "model" / "model.safetensors"
    state = load_file(weights)
    save_file(
        {
            **state,
            "encoder.embedder.embedder.convolution.weight": -state["encoder.embedder.embedder.convolution.weight"],
        },
        weights,
    )
    (fifth,) = main(flags(shapes, tmp_path / "c", model, **options, resume_from_checkpoint="latest"))
    assert fifth["built_sha256"] != fourth["built_sha256"] and len(starts) == 2 and starts[1][0] == 0


def test_the_fit_of_other_weights_is_not_gone_on_with(shapes, poodle, tmp_path, monkeypatch):

    folder = tmp_path / "model"
    config = PoodleConfig.from_pretrained(poodle / "model")
    torch.manual_seed(1)  # evaluations seed too, so that without this both models could be the same
    PoodleModel(config).save_pretrained(folder)
    monkeypatch.setattr(segment, "evaluate", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        main(flags(shapes, tmp_path / "run", folder, max_steps=2))
    assert (tmp_path / "run" / "fit.safetensors").is_file()  # the last step is saved too
    torch.manual_seed(2)
    PoodleModel(config).save_pretrained(folder)  # stands for training in between
    with pytest.raises(ValueError, match="is the fit of other weights"):
        main(flags(shapes, tmp_path / "run", folder, max_steps=2, resume_from_checkpoint="latest"))


def test_a_label_of_another_size_is_found_before_anything_is_fitted(tmp_path):
    squares(tmp_path, 9, 0)
    (tmp_path / "classes.json").write_text(json.dumps(["grass", "red", "blue"]))
    label = tmp_path / "labels" / "4.png"
    Image.open(label).resize((48, 32), Image.NEAREST).save(label)
    with pytest.raises(ValueError, match="4.png is 48x32, its image 4.png 96x64"):
        load_dataset("folder", str(tmp_path)).check()


def test_readout_runs_in_a_pipeline(shapes, poodle, tmp_path):
    main(flags(shapes, tmp_path / "run", poodle, num_train_epochs=30))
    segment = pipeline("image-segmentation", model=str(tmp_path / "run" / "readout"))
    found = segment(str(shapes / "val" / "images" / "0.png"))
    assert "grass" in {entry["label"] for entry in found}
    assert np.asarray(found[0]["mask"]).shape == (64, 96)


# The processes run the script, then fit an UperNet; each notes a fingerprint of the network that it predicts with.
TWO_EVALUATIONS = """
import pathlib, runpy, sys
from accelerate import Accelerator
knn, upernet = (part.split("|") for part in sys.argv[1:])
sys.argv[1:], ended = knn, Accelerator.end_training
Accelerator.end_training = lambda self: None  # which would part the processes
runpy.run_path("evaluation/segment.py", run_name="__main__")
Accelerator.end_training = ended
from evaluation import segment
from evaluation.engine import evaluate, fingerprint
def told(accelerator, predict, data):
    # To a file each: torchrun's processes write their lines unbuffered, in pieces that fall between those of others.
    pathlib.Path(__file__).with_name(f"network-{accelerator.process_index}").write_text(fingerprint(predict.__self__))
    return evaluate(accelerator, predict, data)
segment.evaluate = told
segment.main(upernet)
"""


def test_several_models_and_processes_give_the_figures_of_one(shapes, poodle, tmp_path):
    random = f"random:{poodle}"
    both = main(flags(shapes, tmp_path / "one", poodle, random, readout="knn"))
    assert [r["model"] for r in both] == [str(poodle), random] and both[0]["miou"] != both[1]["miou"]
    (tmp_path / "two.py").write_text(TWO_EVALUATIONS)
    upernet = flags(shapes, tmp_path / "fit", poodle, readout="upernet", max_steps=2, per_device_train_batch_size=2)
    two = (flags(shapes, tmp_path / "two", poodle, random, readout="knn"), [*upernet, "--crop_size", "64", "96"])
    done = forked(tmp_path / "two.py", *("|".join(arguments) for arguments in two), ranks=2)
    assert done.returncode == 0, done.stderr
    # The networks agree, including BatchNorm's statistics, which each process has computed for itself in the last step.
    networks = [(tmp_path / f"network-{rank}").read_text() for rank in (0, 1)]
    assert len(networks[0]) == 64 and networks[0] == networks[1]
    results = json.loads((tmp_path / "two" / "evaluation.json").read_text())["results"]
    assert [r["num_processes"] for r in (*results, *both)] == [2, 2, 1, 1]
    assert results[0]["protocol"] == {"num_neighbours": 20, "max_reference_cells": 50_000}
    fit = json.loads((tmp_path / "fit" / "evaluation.json").read_text())
    assert fit["protocol"]["max_steps"] == 2 and fit["protocol"]["crop_size"] == [64, 96]
    for ours, theirs in zip(results, both):  # 5 test images on 2 processes
        assert ours["per_class"] == pytest.approx(theirs["per_class"], abs=1e-3)
    assert results[0]["model"] in done.stdout and "mIoU" in done.stdout


def test_more_processes_than_training_images_are_refused_before_the_folder_is_begun(shapes, poodle, tmp_path):
    """Otherwise the folder would hold an interrupted evaluation, and the next command would be refused."""
    values = flags(shapes, tmp_path / "run", poodle, readout="knn", max_train_images=1)
    done = forked("evaluation/segment.py", *values, ranks=2)
    assert (
        done.returncode and "error: 2 processes have 1 training images, and each needs one: start fewer" in done.stderr
    )
    assert not (tmp_path / "run").exists()


def test_upernet_overfits_four_street_images(tmp_path):
    folder = tmp_path / "street"
    write_folder(folder / "train", 4, 64, 128, seed=3, num_processes=2)
    os.symlink(folder / "train", folder / "val")
    (folder / "classes.json").write_text((folder / "train" / "classes.json").read_text())
    for name in ("train",):  # only the four largest classes: a wall of three pixels proves nothing
        for path in (folder / name / "labels").iterdir():
            label = np.asarray(Image.open(path)).copy()
            label[~np.isin(label, [0, 2, 8, 10])] = 255
            Image.fromarray(label).save(path)
    ResNetForImageClassification(ResNetConfig(**RESNET)).save_pretrained(tmp_path / "resnet")
    arguments = flags(
        folder, tmp_path / "run", tmp_path / "resnet", readout="upernet", max_steps=120, learning_rate=3e-3,
        per_device_train_batch_size=4, weight_decay=0.0,
    )  # fmt: skip
    (result,) = main([*arguments, "--crop_size", "64", "128"])
    assert result["miou"] > 0.9, result["per_class"]
    model = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "run" / "readout")
    assert model.config.id2label[10] == "sky"
    assert list(AutoImageProcessor.from_pretrained(tmp_path / "run" / "readout").image_mean)


@pytest.mark.parametrize("kind", ["resnet", "timm", "swin"])
def test_upernet_reads_four_stages_and_trains_all_that_they_depend_on(shapes, tmp_path, kind):
    """DistributedDataParallel waits for the gradients of all parameters that require one."""
    if kind == "timm":
        pytest.importorskip("timm")
        encoder_config = {"backbone": "resnet18", "model_type": "timm_backbone"}
    elif kind == "swin":
        encoder_config = SwinConfig(
            embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2, image_size=64
        )
    else:
        encoder_config = {"model_type": "resnet", **RESNET}
    config = PoodleConfig(backbone_config=encoder_config, num_decoder_blocks=0, num_labels=3)
    data = load_dataset("folder", str(shapes))
    encoder = Encoder("x", PoodleForSemanticSegmentation(config))
    readout = UperNetReadout(encoder, data, recipe(crop_size=[64, 96])).train()
    assert len(readout.model.backbone.channels) == 4
    readout(**readout.batch(list(map(readout.read, data.train[:2])), torch.Generator().manual_seed(0))).backward()
    assert all(p.grad is not None for p in readout.trained())
    frozen = [name for name, p in readout.named_parameters() if not p.requires_grad]
    assert all("norm" in name for name in frozen) and bool(frozen) == (kind == "swin")
    with pytest.raises(ValueError, match="readout upernet needs at least 2 classes, folder has 1"):
        UperNetReadout(encoder, dataclasses.replace(data, classes=data.classes[:1]), recipe(crop_size=[64, 96]))


@pytest.mark.parametrize("kind", ["resnet", "swin"])
def test_an_interrupted_upernet_goes_on_bit_for_bit(shapes, tmp_path, monkeypatch, kind):
    """The state of a fit includes BatchNorm's statistics and the random draws by which Swin leaves out blocks."""
    if kind == "resnet":
        model = ResNetForImageClassification(ResNetConfig(**RESNET))
    else:
        sizes = {"embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4, "window_size": 2, "image_size": 64}
        model = SwinModel(SwinConfig(**sizes, drop_path_rate=0.5))
    model.save_pretrained(tmp_path / kind)

    def arguments(name):
        return [
            *flags(shapes, tmp_path / name, tmp_path / kind, readout="upernet", max_steps=4, save_steps=2),
            "--crop_size", "64", "96", "--per_device_train_batch_size", "2",
        ]  # fmt: skip

    main(arguments("whole"))
    original, count = UperNetReadout.forward, []

    def interrupted(self, *args, **kwargs):
        count.append(1)
        if len(count) == 4:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(UperNetReadout, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(arguments("parts"))
    monkeypatch.setattr(UperNetReadout, "forward", original)
    main([*arguments("parts"), "--resume_from_checkpoint", "latest"])
    whole, parts = (load_file(tmp_path / name / "readout" / "model.safetensors") for name in ("whole", "parts"))
    assert any("running_mean" in name for name in whole)
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_how_images_were_read_is_said_of_the_readout(shapes, tmp_path):
    """UperNet reads whole images, even with encoders that other readouts read in windows."""
    sizes = {"image_size": 32, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = BeitConfig(**sizes, intermediate_size=32, out_indices=[1, 2, 3, 4], use_absolute_position_embeddings=True)
    BeitModel(config).save_pretrained(tmp_path / "beit")
    few = {"max_train_images": 2, "max_test_images": 1}
    (knn,) = main(flags(shapes, tmp_path / "knn", tmp_path / "beit", readout="knn", **few))
    fitted = flags(shapes, tmp_path / "upernet", tmp_path / "beit", readout="upernet", max_steps=1, **few)
    (upernet,) = main([*fitted, "--crop_size", "32", "48", "--per_device_train_batch_size", "2"])
    assert knn["inference"].startswith("sliding window of 32") and knn["features"] == "stage4"
    assert upernet["inference"] == "whole image" and upernet["features"] == "all stages"


def test_wrong_input_ends_the_script_with_a_sentence(shapes, poodle, tmp_path, as_script):
    said = as_script("evaluation/segment.py", *flags(shapes, tmp_path / "run", poodle, "no/such-model"))
    assert re.search("error: .*(no such model|cannot be loaded)", said), said
    assert not (tmp_path / "run" / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--readout", "linar"], "did you mean 'linear'"),
        (["--learning_rat", "1"], "did you mean 'learning_rate'"),
        (["--dataset", "cityscapes"], "there is no folder .*leftImg8bit.* Expected"),
        (["--features", "stage7"], "--features stage7"),
    ],
)
def test_wrong_input_is_a_sentence(shapes, poodle, tmp_path, change, message):
    """Runs the script's code in the test's own process, because starting a new one takes seconds."""
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: main([*flags(shapes, tmp_path / "run", poodle), *change]))
    assert ended.value.code.startswith("error: ") and re.search(message, ended.value.code)
    assert not (tmp_path / "run" / "evaluation.json").exists()


def test_recipes_say_how_to_launch(tmp_path):
    for path in (REPOSITORY / "evaluation" / "recipes").glob("*.yaml"):
        assert "Launch:" in path.read_text() and "Hardware:" in path.read_text()
    assert parse_recipe(["--model", "a", "--model", "b", "c"]).model == ["a", "b", "c"]
    assert data_module.DRIVING_CLASSES[13] == "car"
