"""The mean and deviation that images are normalised with."""

import json
import logging
import os
import shutil

import pytest
import torch
from labelled_shapes import RESNET
from published import python
from transformers import ResNetBackbone, ResNetConfig

from evaluation.encoders import build
from evaluation.explore_views import Readout
from modeling_poodle import PoodleConfig, PoodleForSemanticSegmentation
from modeling_poodle.preprocessing import IMAGENET, preprocessing_of

VALUES = {
    "image_processor_type": "ConvNextImageProcessor",
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
}


def resnet(folder, **values) -> str:
    torch.manual_seed(0)
    ResNetBackbone(ResNetConfig(**RESNET, out_features=["stage4"])).save_pretrained(folder)
    if values:
        (folder / "preprocessor_config.json").write_text(json.dumps({**VALUES, **values}))
    return str(folder)


def test_a_damaged_file_is_an_error_and_one_that_is_not_there_is_said(tmp_path, caplog):
    source = resnet(tmp_path)
    with caplog.at_level(logging.WARNING, logger="poodle"):
        encoder = build(source, 2)
    assert (encoder.mean, encoder.std) == IMAGENET
    assert f"{source} has no preprocessor_config.json: its images get ImageNet's mean and deviation" in caplog.text
    assert encoder.preprocessing["image_statistics_from"] == "ImageNet"
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(VALUES))
    assert build(source, 2).preprocessing == {
        "image_mean": VALUES["image_mean"],
        "image_std": VALUES["image_std"],
        "image_statistics_from": "preprocessor_config.json",
    }
    for damaged in (json.dumps(VALUES)[:-9], "[]", json.dumps({**VALUES, "image_mean": None})):
        file.write_text(damaged)
        with pytest.raises(ValueError, match=f"^--model {source}: its preprocessor_config.json cannot be read"):
            build(source, 2)
    # The numbers of a processor class from a later release are still used.
    file.write_text(json.dumps({**VALUES, "image_processor_type": "Unknown"}))
    assert build(source, 2).mean == (0.1, 0.2, 0.3)
    os.rename(file, tmp_path / "processor_config.json")
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": VALUES}))
    assert preprocessing_of(source) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "processor_config.json")


def test_images_are_normalised_as_the_file_says_or_it_is_refused(tmp_path):
    """This holds for an encoder that is evaluated and for a saved readout that is shown."""
    config = PoodleConfig(backbone_config={"model_type": "resnet", **RESNET}, num_decoder_blocks=0, num_labels=2)
    PoodleForSemanticSegmentation(config).save_pretrained(tmp_path / "readout")

    def both(**values) -> list:
        resnet(tmp_path / "encoder", **values)
        shutil.copy(tmp_path / "encoder" / "preprocessor_config.json", tmp_path / "readout")
        encoder, shown = build(str(tmp_path / "encoder"), 2), Readout(str(tmp_path / "readout"), torch.device("cpu"))
        return [(each.mean, each.std) for each in (encoder, shown.encoder)]

    assert both(do_rescale=True, rescale_factor=0.00392156862745098) == [((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))] * 2
    assert both(do_normalize=False) == [((0, 0, 0), (1, 1, 1))] * 2
    for values, factor in (({"rescale_factor": 1 / 127.5}, r"0\.0078"), ({"do_rescale": False}, "1")):
        with pytest.raises(
            ValueError, match=f"--model .*encoder: .*expected images rescaled by 1/255, .* for {factor}"
        ):
            both(**values)
        shutil.copy(tmp_path / "encoder" / "preprocessor_config.json", tmp_path / "readout")
        with pytest.raises(ValueError, match="readout cannot be loaded; .*expected images rescaled by 1/255"):
            Readout(str(tmp_path / "readout"), torch.device("cpu"))


ASKS = """
import sys
from modeling_poodle.preprocessing import preprocessing_of
for name in sys.argv[1:]:
    try:
        print(*preprocessing_of(name))
    except ValueError as error:
        print(str(error).splitlines()[0])
"""


def test_a_hub_that_does_not_answer_is_an_error_but_for_what_is_in_the_cache(own_hub, tmp_path):
    own_hub.add_dataset("org/with", {"preprocessor_config.json": json.dumps(VALUES).encode()}, "model")
    own_hub.add_dataset("org/without", {"config.json": b"{}"}, "model")

    def ask(*names, **variables) -> list[str]:
        done = python(own_hub, tmp_path, ASKS, *names, **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    found = "(0.1, 0.2, 0.3) (0.4, 0.5, 0.6) preprocessor_config.json"
    missing = f"{IMAGENET[0]} {IMAGENET[1]} ImageNet"
    assert ask("org/with", "org/without") == [found, missing]
    # Offline mode stands for a refused connection, which the client would retry for half a minute.
    kept, none, unknown = ask("org/with", "org/without", "org/other", HF_HUB_OFFLINE="1")
    assert (kept, none) == (found, missing)
    assert unknown.startswith("--model org/other: its preprocessor_config.json cannot be read (")
