"""training/train_flow.py as a whole: a run learns, resumes, is published and feeds pretraining; and the measure of flow."""

import json
import shutil

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from loopback_hub import Interpreter
from published import REPOSITORY, WITHOUT_THE_PACKAGE, flags, publish
from safetensors.torch import load_file, save_file

from modeling_poodle import PoodleFlowConfig, PoodleFlowModel
from training.flow_objectives import known_motion_loss
from training.flow_quality import build_estimator, held_out_pairs, measure
from training.flow_quality import main as flow_quality
from training.flow_recipe import FLOW_RECIPES, FlowRecipe, parse_flow_recipe
from training.pretrain import main as pretrain
from training.train_flow import main as train_flow

TINY = {"num_levels": 3, "stem_size": 4, "hidden_size": 8, "decoder_sizes": [16], "correlation_radius": 2}
STEPS = 5


pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def flow_flags(videos, output_dir, *more) -> list[str]:
    """Flags of a run through every phase: one step of known motion at half size, two photometric, then occlusion, then self-supervision."""
    return [
        "--config", "flow_street", "--videos", str(videos), "--output_dir", str(output_dir), "--model", json.dumps(TINY),
        "--crop_size", "48", "96", "--max_steps", str(STEPS), "--per_device_train_batch_size", "2", "--crop_border", "8",
        "--known_motion_share", "0.2", "--half_size_share", "0.3", "--occlusion_start", "0.5", "--self_supervision_start", "0.7",
        "--warmup_steps", "1", "--logging_steps", "1", "--save_steps", "2", "--save_total_limit", "9", "--panel_steps", "5",
        "--dataloader_num_workers", "0", "--seed", "2", *more,
    ]  # fmt: skip


def train(drives, output_dir, *more) -> None:
    """Train inside the videos' folder: pairs depend on the videos' names, and full paths of test folders differ each time."""
    AcceleratorState._reset_state(True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(drives)
        train_flow(flow_flags(".", output_dir, *more))
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def flow_run(drives, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flow") / "run"
    train(drives, folder)
    return folder


def lines_of(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_every_phase_has_its_losses_and_the_run_its_files(flow_run):
    lines = lines_of(flow_run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["photometric_loss"] > 0 for line in lines] == [False, True, True, True, True]
    assert [line["self_supervision_loss"] > 0 for line in lines] == [False, False, False, False, True]
    assert all(0 < line["loss"] < 10 and 0 <= line["valid_fraction"] <= 1 for line in lines)
    assert sorted(path.name for path in flow_run.iterdir() if path.name != ".lock") == [
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "model",
        "panels",
    ]
    assert "step-000005.png" in {path.name for path in (flow_run / "panels").iterdir()}
    last = load_file(flow_run / "checkpoints" / "step-5" / "model.safetensors")
    model = PoodleFlowModel.from_pretrained(flow_run / "model")
    assert all(torch.equal(value, last[name]) for name, value in model.state_dict().items())
    card = (flow_run / "model" / "README.md").read_text()
    assert "after 5 steps of training on video without labels" in card and "optical-flow" in card


def test_a_resumed_run_is_bit_for_bit_an_uninterrupted_one(flow_run, drives, tmp_path):
    whole, weights = lines_of(flow_run), load_file(flow_run / "model" / "model.safetensors")
    shutil.copytree(flow_run, tmp_path / "run")
    for name in ("step-4", "step-5"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / name)
    train(drives, tmp_path / "run", "--resume_from_checkpoint", "latest")
    timed = {"pairs_per_second", "data_wait"}
    for ours, theirs in zip(lines_of(tmp_path / "run"), whole, strict=True):
        assert {k: v for k, v in ours.items() if k not in timed} == {k: v for k, v in theirs.items() if k not in timed}
    resumed = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in resumed.items())


def test_known_motion_is_learned():
    torch.manual_seed(0)
    model = PoodleFlowModel(PoodleFlowConfig(**TINY))
    frames = torch.nn.functional.interpolate(torch.rand(4, 3, 8, 12), (32, 48), mode="bicubic").clamp(0, 1)
    frames = frames.unflatten(0, (2, 2))
    optimizer, generator = torch.optim.Adam(model.parameters(), 3e-3), torch.Generator().manual_seed(0)
    losses = []
    for _ in range(80):
        loss = known_motion_loss(model, frames, generator).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:5])


def test_recipes_read_and_say_how_to_launch_them():
    assert {path.stem for path in FLOW_RECIPES.glob("*.yaml")} == {"flow_street", "flow_videos"}
    for path in FLOW_RECIPES.glob("*.yaml"):
        head = path.read_text()
        assert "Launch:" in head and "Hardware:" in head
    assert parse_flow_recipe([]) == parse_flow_recipe(["--config", "flow_street"])
    ours = parse_flow_recipe(["--videos", "clips"])
    # UFlow's values (arXiv 2006.04902), as far as the size of the frames allows.
    assert (ours.crop_size, ours.learning_rate, ours.smoothness_weight, ours.self_supervision_weight) == (
        [256, 512],
        1e-4,
        2.0,
        0.6,
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"crop_size": [100, 256]}, "crop_size must be multiples of 32, the network's stride"),
        (
            {"crop_size": [96, 256], "half_size_share": 0.5},
            "crop_size must be multiples of 64, twice the network's stride",
        ),
        ({"crop_border": 10}, "crop_border must be a multiple of 4 and of 16"),
        ({"crop_border": 64, "crop_size": [128, 256]}, "crop_border must be .* less than half of the frame"),
        ({"smoothness_weight": -1}, "smoothness_weight must be a finite number of at least 0"),
        ({"occlusion_start": 1.5}, "occlusion_start must be a share between 0 and 1"),
        ({"model": {"num_leves": 3}}, "Did you mean 'num_levels'"),
        ({"crop_size": [128]}, "crop_size must be two positive integers"),
    ],
    ids=str,
)
def test_wrong_values_name_their_field(values, message):
    with pytest.raises(ValueError, match=message):
        FlowRecipe(**{"crop_size": [256, 512], **values})


def test_pretraining_takes_the_flow(flow_run, drives, tmp_path):
    # After five steps the two directions may agree nowhere; with zero weights the flow is zero and agrees everywhere.
    model = PoodleFlowModel.from_pretrained(flow_run / "model")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.save_pretrained(tmp_path / "still")
    pretrain(flags(drives, tmp_path / "run", "--flow", "unflow", "--flow_model", str(tmp_path / "still"), steps=1))
    (line,) = lines_of(tmp_path / "run")
    assert line["dense_loss"] > 0 and 0.5 <= line["valid_fraction"] <= 1  # only points outside the views are left out


def test_measure_of_known_flows():
    pairs = held_out_pairs(1, 48, 96, 0.25)
    (frames, exact, visible), *_ = pairs
    assert frames.shape == (2, 3, 48, 96) and exact.shape == (2, 2, 48, 96) and visible.shape == (2, 48, 96)
    perfect = measure(lambda _: exact, pairs)
    assert perfect["epe_mean"] == perfect["epe_median"] == perfect["wrong"] == 0 and 0.3 < perfect["kept"] < 1
    of_the_name = measure(build_estimator("exact"), pairs)
    assert {**of_the_name, "ms": 0} == {**perfect, "ms": 0}
    off = measure(lambda _: exact + np.float32([[[4.0]], [[0.0]]]), pairs)
    assert off["epe_mean"] == pytest.approx(4, rel=1e-4) and off["wrong"] == off["wrong_seen"] == 1
    zero, lengths = measure(lambda _: 0 * exact, pairs), np.linalg.norm(exact, axis=1)
    assert zero["epe_mean"] == pytest.approx(lengths[visible].mean(), rel=1e-4)
    assert zero["epe_median"] == pytest.approx(np.median(lengths[visible]), rel=1e-4)
    assert zero["kept"] == 1 and zero["wrong"] == pytest.approx((lengths > 3).mean())
    assert zero["hidden"] == pytest.approx(1 - visible.mean())
    assert zero["wrong_seen"] == pytest.approx((lengths[visible] > 3).mean()) and zero["wrong_seen"] != zero["wrong"]
    # The flow is wrong only at hidden points: all its errors are occlusion.
    there_and_back = np.zeros_like(exact)
    there_and_back[:, 0] = np.float32([[[4]], [[-4]]])
    occluded = measure(lambda _: there_and_back, [(frames, there_and_back * visible[:, None], visible)])
    assert occluded["wrong"] == occluded["hidden"] > 0 and occluded["wrong_seen"] == 0
    # No pixel of this flow is kept, so there is no share of wrong ones.
    none = measure(lambda frames: np.full((2, 2, *frames.shape[-2:]), 1e4, np.float32), pairs)
    assert none["kept"] == 0 and none["wrong"] is none["hidden"] is none["wrong_seen"] is None
    assert occluded["motion"] == pytest.approx(4) and occluded["not_affine"] < 1e-5
    assert zero["not_affine"] > 1


def test_quality_of_several_flows_in_one_table(flow_run, tmp_path, capsys):
    arguments = ["--flow", "zero", "--flow", "exact", "--flow", "dis", "--flow", f"unflow:{flow_run}"]
    arguments += ["--gaps", "0.25", "--drives", "2"]
    flow_quality([*arguments, "--size", "64", "128", "--json", str(tmp_path / "quality.json")])
    written = json.loads((tmp_path / "quality.json").read_text())
    zero, exact, dis, unflow = written["results"]
    assert [r["flow"] for r in written["results"]] == ["zero", "exact", "dis", "unflow"]
    assert exact["wrong"] == 0 < dis["wrong_seen"] < dis["wrong"]
    assert dis["epe_median"] < 0.5 * zero["epe_median"] and 0 <= unflow["kept"] < 1
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 6 and f"{dis['epe_mean']:.2f}" in table[4]
    assert "wrong of kept and seen, %" in table[0] and f"{100 * dis['wrong_seen']:.1f}" in table[4]
    with pytest.raises(ValueError, match="--flow unflow needs its model"):
        flow_quality(["--flow", "unflow"])
    with pytest.raises(ValueError, match="did you mean 'dis'"):
        flow_quality(["--flow", "diss"])
    with pytest.raises(ValueError, match="--camera must be one of driving, walking, static, aerial, got 'drone'"):
        flow_quality(["--flow", "dis", "--camera", "drone"])
    with pytest.raises(ValueError, match="--gaps 300: no point of a frame is seen that long after it"):
        flow_quality(["--flow", "zero", "--gaps", "300", "--camera", "aerial", "--drives", "1", "--size", "64", "128"])


def test_others_load_the_flow_from_the_hub(flow_run, bare_hub, tmp_path):
    """Without the package, the repository's code loads it; once the package is imported, no code of the repository is needed."""
    done = publish(bare_hub, flow_run, "--repo_id", "org/flow")
    assert done.returncode == 0, done.stderr
    code = {"config_checks.py", "configuration_poodle.py", "configuration_poodle_flow.py", "geometry_poodle.py"}
    code.add("modeling_poodle_flow.py")
    sent = set(bare_hub.repository("org/flow").commits[-1].files)
    assert sent == {".gitattributes", "README.md", "config.json", "model.safetensors", "panel.png"} | code
    frames = torch.rand(1, 2, 3, 48, 64)
    with torch.no_grad():
        flow = PoodleFlowModel.from_pretrained(flow_run / "model")(frames).flow
    save_file({"frames": frames, "flow": flow.contiguous()}, tmp_path / "expected.safetensors")
    process = Interpreter(bare_hub, tmp_path, WITHOUT_THE_PACKAGE)
    printed = process(
        tmp_path,
        f"""
import sys
import torch
from safetensors.torch import load_file
from transformers import AutoModel
expected = load_file("expected.safetensors")
for trusted in (True, False):
    if not trusted:
        sys.path.insert(0, {str(REPOSITORY)!r})
        import modeling_poodle
    model = AutoModel.from_pretrained("org/flow", trust_remote_code=trusted)
    with torch.no_grad():
        assert torch.equal(model(expected["frames"]).flow, expected["flow"])
    print(type(model).__module__.split(".")[0])
""",
    )
    process.close()
    assert printed.splitlines() == ["transformers_modules", "modeling_poodle"]
