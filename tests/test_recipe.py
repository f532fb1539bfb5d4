import json
import re

import pytest
from conftest import REPOSITORY
from forked_scripts import forked

from modeling_poodle import PoodleConfig
from training.recipe import RECIPES, Recipe, check_crop_size, parse_recipe, read_yaml
from training.schedules import count_steps

NAMES = {
    "street",
    "bdd100k_r50",
    "walking_tours_r50",
    "flowe_r50",
    "flowe_street",
    "ablation_r50",
    "supervised_init_r50",
    "own_videos",
}


def test_every_recipe_reads_and_says_how_to_launch_it():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == NAMES
    for path in RECIPES.glob("*.yaml"):
        assert Recipe(**read_yaml(path)).to_yaml()
        head = path.read_text()
        assert "Launch:" in head and "Hardware:" in head


def test_folders_named_as_recipes_are_no_recipes(tmp_path, monkeypatch):
    """The working folder may hold clips in `own_videos/` and a street rendered to `street/`."""
    found = [parse_recipe(flags) for flags in ([], ["--config", "street"], ["--videos", "own_videos"])]
    for name in ("street", "own_videos"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    again = [parse_recipe(flags) for flags in ([], ["--config", "street"], ["--videos", "own_videos"])]
    assert again == found
    (tmp_path / "street").rmdir()
    (tmp_path / "street").write_text("notes: of mine")  # a file that no flag names
    assert parse_recipe([]) == found[0]


@pytest.mark.parametrize("config", [[], ["--config", "street"], ["--config", "bdd100k_r50"]])
def test_the_encoder_to_start_from_goes_before_that_of_a_recipe_file(config):
    plain = parse_recipe([*config, "--videos", "clips"])
    recipe = parse_recipe([*config, "--videos", "clips", "--init_encoder", "converted/encoder"])
    assert "backbone_config" not in recipe.model
    assert recipe.model == {name: value for name, value in plain.model.items() if name != "backbone_config"}
    given = ["--model", '{"backbone_config": {"model_type": "resnet"}}']
    assert "backbone_config" in parse_recipe([*config, "--init_encoder", "converted/encoder", *given]).model


def test_fields_of_the_model_that_are_given_leave_the_others_of_the_recipe():
    """If the other fields fell back to PoodleConfig's defaults, the run would silently train a ResNet-50 with wide heads."""
    plain = parse_recipe([]).model
    changed = parse_recipe(["--model", '{"projection_size": 32}']).model
    assert changed == {**plain, "projection_size": 32} and plain["projection_size"] != 32
    deep = {"model_type": "resnet", "depths": [3, 4, 6, 3]}
    assert parse_recipe(["--model", json.dumps({"backbone_config": deep})]).model == {**plain, "backbone_config": deep}
    with pytest.raises(ValueError, match="model must be a JSON mapping of PoodleConfig's fields, got '{'"):
        parse_recipe(["--model", "{"])
    with pytest.raises(ValueError, match=r"transformers has no model_type 'resnt'\. Did you mean 'resnet'\?$"):
        parse_recipe(["--model", '{"backbone_config": {"model_type": "resnt"}}'])


def test_what_argparse_refuses_and_what_yaml_forgives_are_sentences(tmp_path):
    with pytest.raises(
        ValueError, match="^command line: argument --crop_size/--crop-size: invalid int value: '64x128'$"
    ):
        parse_recipe(["--crop_size", "64x128"])
    (tmp_path / "twice.yaml").write_text("max_steps: 5\nseed: 1\nmax_steps: 7\n")
    with pytest.raises(ValueError, match="twice.yaml is not valid YAML: 'max_steps' is given twice"):
        parse_recipe(["--config", str(tmp_path / "twice.yaml")])


def test_the_crop_fits_the_encoder_that_a_run_starts_from():
    recipe = Recipe(init_encoder="facebook/dinov2-small", crop_size=[252, 504])
    check_crop_size(PoodleConfig(backbone_config={"model_type": "dinov2", "patch_size": 14}), recipe.crop_size)
    with pytest.raises(ValueError, match=r"crop_size must be multiples of the resnet encoder's 32, got \[252, 504\]"):
        check_crop_size(PoodleConfig(), recipe.crop_size)
    with pytest.raises(ValueError, match="crop_size must be multiples of the resnet encoder's 32"):
        Recipe(crop_size=[252, 504])
    with pytest.raises(
        ValueError, match=r"crop_size must be at least 128x128 with flow raft_small .*dis.*, got \[96, 128\]"
    ):
        Recipe(crop_size=[96, 128], flow="raft_small")
    tiny = {"backbone_config": {"model_type": "dinov2", "patch_size": 8}}
    with pytest.raises(ValueError, match=r"crop_size must be at least 16x16 with flow dis, got \[8, 8\]"):
        Recipe(model=tiny, crop_size=[8, 8])


def test_weights_of_raft_are_not_passed_over_with_another_flow():
    with pytest.raises(
        ValueError, match="flow_weights must be unset with flow dis: the weights are RAFT's, got 'raft.pth'"
    ):
        Recipe(flow_weights="raft.pth")


def test_what_goes_with_the_file_s_flow_does_not_outlive_a_flag_for_another(tmp_path):
    (tmp_path / "r.yaml").write_text("flow: raft_large\nflow_weights: raft.pth\ncrop_size: [128, 256]\n")
    config = ["--config", str(tmp_path / "r.yaml")]
    assert parse_recipe([*config, "--flow", "dis"]).flow_weights is None
    assert parse_recipe([*config, "--flow", "raft_large"]).flow_weights == "raft.pth"
    assert parse_recipe([*config, "--flow", "raft_small", "--flow_weights", "small.pth"]).flow_weights == "small.pth"
    # FlowE's error bound applies to any estimator, but the exact flow comes with its own mask.
    flowe = ["--config", "flowe_r50", "--videos", "street", "--output_dir", "x"]
    assert parse_recipe([*flowe, "--flow", "dis"]).flow_max_error == 3.54
    assert parse_recipe([*flowe, "--flow", "exact"]).flow_max_error is None
    with pytest.raises(ValueError, match="flow_max_error must be unset with flow exact"):
        parse_recipe(["--flow", "exact", "--flow_max_error", "3"])
    (tmp_path / "r.yaml").write_text("flow_weights: raft.pth\ncrop_size: [128, 256]\n")  # this file names no flow
    assert parse_recipe([*config, "--flow", "raft_large"]).flow_weights == "raft.pth"


def test_files_are_read_the_same_before_and_after_a_command_line_is(tmp_path):
    """Needs a process that has parsed no command line: HfArgumentParser changes the types that dataclasses.fields reports."""
    (tmp_path / "r.yaml").write_text("flow_max_error: 1e0\nflow_weights: null\n")
    (tmp_path / "script.py").write_text(
        """
import sys
from training.recipe import parse_recipe, read_yaml

before = read_yaml(sys.argv[1])
parse_recipe([])
print(before == read_yaml(sys.argv[1]) == {"flow_max_error": 1.0, "flow_weights": None})
"""
    )
    done = forked(tmp_path / "script.py", tmp_path / "r.yaml", PYTHONPATH=str(REPOSITORY))
    assert done.stdout == "True\n", done.stderr


def test_bdd100k_has_the_papers_numbers():
    recipe = Recipe(**read_yaml("bdd100k_r50"))
    assert (recipe.crop_size, recipe.frame_size, recipe.frame_scale) == ([512, 1024], [1080, 1920], [0.75, 1.25])
    assert (recipe.learning_rate, recipe.weight_decay, recipe.num_train_epochs) == (5e-4, 1e-2, 100)
    assert (recipe.num_subcrops, recipe.subcrop_area, recipe.subcrop_size, recipe.subcrop_jitter) == (
        6,
        [0.05, 0.3],
        192,
        0.1,
    )
    config = recipe.model_config()
    assert (config.projection_hidden_size, config.projection_size, config.num_decoder_blocks) == (4096, 256, 2)
    flowe = Recipe(**read_yaml("flowe_r50")).model_config()
    assert (flowe.output_stride, flowe.num_decoder_blocks, flowe.pooled_weight) == (8, 0, 0)


def test_defaults_follow_the_videos_and_flags_override_the_file(tmp_path):
    assert parse_recipe([]) == Recipe(**read_yaml("street"))
    assert parse_recipe(["--videos", "a", "b"]).crop_size == [256, 512]
    file = tmp_path / "mine.yaml"
    file.write_text("learning_rate: 1e-4\nvideos: clips\nmax_steps: 5\nsubcrop_area: [5e-2, 3e-1]\n")
    recipe = parse_recipe(["--config", str(file), "--max_steps", "7", "--bf16", "--affine_views", "false"])
    assert (recipe.learning_rate, recipe.videos, recipe.max_steps, recipe.bf16, recipe.affine_views) == (
        1e-4,
        ["clips"],
        7,
        True,
        False,
    )
    assert recipe.subcrop_area == [0.05, 0.3]


@pytest.mark.parametrize(
    "flags, recipe",
    [([], "street"), (["--videos", "a.mp4"], "own_videos"), (["--config", "bdd100k_r50"], "bdd100k_r50")],
)
def test_the_help_shows_the_values_of_the_recipe(flags, recipe, capsys):
    with pytest.raises(SystemExit) as end:
        parse_recipe([*flags, "--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    values = Recipe(**read_yaml(recipe))
    shown = dict(
        re.findall(r"--([a-z_0-9]+)(?: (?:(?!--)[^()])*)?(?:, --\S+ (?:(?!--)[^()])*)?\(default: ([^()]*)\)", text)
    )
    assert shown["learning_rate"] == str(values.learning_rate) and shown["max_steps"] == str(values.max_steps)
    assert shown["crop_size"] == " ".join(map(str, values.crop_size)) and shown["flow"] == values.flow
    assert shown["bf16"] == str(values.bf16).lower() and shown["flow_weights"] == "unset"
    assert f"those of the recipe {recipe}." in text


@pytest.mark.parametrize(
    "config", [[], ["--config", "street"], ["--config", "own_videos"], ["--config", "flowe_street"]]
)
def test_epochs_that_are_given_as_a_flag_go_before_the_steps_of_a_recipe_file(config):
    recipe = parse_recipe([*config, "--num_train_epochs", "3"])
    assert (recipe.max_steps, recipe.num_train_epochs) == (-1, 3)
    assert count_steps(recipe, 1, 10 * recipe.per_device_train_batch_size) == 30
    assert parse_recipe(config).max_steps > 0
    both = parse_recipe([*config, "--num_train_epochs", "3", "--max_steps", "7"])
    assert (both.max_steps, both.num_train_epochs) == (7, 3)


def test_resolved_recipe_reads_back(tmp_path):
    recipe = parse_recipe(["--model", '{"num_decoder_blocks": 1}'])
    (tmp_path / "config.yaml").write_text(recipe.to_yaml())
    assert parse_recipe(["--config", str(tmp_path / "config.yaml")]) == recipe


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"flow": "diss"}, "did you mean 'dis'"),
        ({"frame_scale": [0.5, 1.0]}, "frame_scale must be at least 1 where frame_size is unset"),
        ({"frame_gap_seconds": [2.0, 1.0]}, "frame_gap_seconds must be two numbers"),
        (
            {"frame_gap_seconds": [-0.5, 1.0]},
            "frame_gap_seconds must be two numbers, the smaller first, not negative, for example 0.5 1.5, got",
        ),
        (
            {"frame_scale": [0.0, 1.0]},
            r"two numbers, the smaller first, both above 0 \(at least 0.000001\), for example 1 1.5, got \[0.0",
        ),
        (
            {"subcrop_area": [0, 0.3]},
            r"two numbers, the smaller first, both above 0 \(at least 0.000001\), for example 0.05 0.3, got \[0, ",
        ),
        ({"crop_size": [100, 200]}, "crop_size must be multiples"),
        ({"pairs_per_video": 33}, "pairs_per_video must be at most 32 .*; more epochs give more pairs, got 33"),
        ({"num_subcrops": 0}, "num_subcrops must be an integer of at least 1"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number above 0"),
        ({"adam_epsilon": float("inf")}, "adam_epsilon must be a finite number above 0, got inf"),
        ({"warmup_steps": float("inf")}, "warmup_steps must be a finite number of at least 0, got inf"),
        ({"output_dir": ""}, "output_dir must be the name of a folder, got ''"),
        ({"probe": "camvid:x"}, "probe must be street, street:CAMERA or folder:PATH, got 'camvid:x'"),
        ({"probe": "folder:"}, "probe must be street, street:CAMERA or folder:PATH"),
        ({"probe": "street:sea"}, "must be one of driving, walking"),
        ({"subcrop_area": [0.1, 1.5]}, "subcrop_area must be shares"),
        ({"model": "{"}, "model must be a JSON mapping"),
        ({"model": {"decoder_lateral": True}}, "Did you mean 'decoder_laterals'"),
        ({"report_to": "tensorbord"}, "did you mean 'tensorboard'"),
    ],
    ids=str,
)
def test_wrong_values_name_their_field(values, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**values)


def test_unknown_keys_suggest_the_nearest(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("subcrop_are: [0.1, 0.2]\n")
    with pytest.raises(ValueError, match="unknown recipe field 'subcrop_are' .did you mean 'subcrop_area'"):
        read_yaml(file)
    with pytest.raises(ValueError, match="did you mean 'max_steps'"):
        parse_recipe(["--max_step", "3"])
    file.write_text("subcrop_area: [0.1, much]\n")
    with pytest.raises(ValueError, match=r"subcrop_area must be a list, each a number, got \[0.1, 'much'\]"):
        read_yaml(file)


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--batch_size", "did you mean 'per_device_train_batch_size'"),
        ("--epochs", "did you mean 'num_train_epochs' or 'flow_epochs'"),
        ("--workers", "did you mean 'dataloader_num_workers'"),
        ("--gap", "did you mean 'frame_gap_seconds'"),
        ("--video", "did you mean 'videos' or 'pairs_per_video'"),
        ("--steps", "unknown recipe field 'steps'"),
        ("--no_seed", "unknown flag --no_seed; give --seed and its value"),
    ],
)
def test_a_part_of_a_name_suggests_the_name(flag, said):
    with pytest.raises(ValueError, match=said):
        parse_recipe([flag, "3"])
