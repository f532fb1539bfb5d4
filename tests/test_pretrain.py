"""The training loop in this process: recipe fields, trackers, and ranks."""

import re
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from accelerate.utils import LoggerType
from forked_scripts import forked
from safetensors.torch import load_file
from small_runs import MODEL, flags, train

from modeling_poodle import PoodleConfig, PoodleForPreTraining
from training import video_loader, video_stream
from training.assembly import computes_in_bfloat16, make_accelerator
from training.panels import COLOURS, GAP, TILE_HEIGHT, TITLE, make_panel, pca_rgb
from training.pretrain import main
from training.recipe import Recipe
from training.run import Run
from training.schedules import teacher_momentum
from training.video_stream import PairLoader

REPOSITORY = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def test_the_teacher_moves_once_an_optimizer_step(drives, tmp_path, monkeypatch):
    momenta, original = [], PoodleForPreTraining.update_teacher
    monkeypatch.setattr(
        PoodleForPreTraining, "update_teacher", lambda self, m: (momenta.append(m), original(self, m))[-1]
    )
    lines = train(drives, tmp_path / "run", "--gradient_accumulation_steps", "3")
    assert momenta == [teacher_momentum(step, 3, 0.96) for step in range(3)]
    # A step has 2 x 3 pairs, an epoch has 8.
    assert [line["epoch"] for line in lines] == [step * 6 / 8 for step in (1, 2, 3)]


def test_accumulated_gradients_are_the_mean_of_their_parts(drives, tmp_path, monkeypatch):
    """With two micro-steps of two pairs, the loss reported is their mean, and no tensor of the first stays in memory for the second."""
    losses, features, original = [], [], PoodleForPreTraining.forward

    def forward(self, *args, **kwargs):
        assert not features or features[-1]() is None
        output = original(self, *args, **kwargs)
        losses.append(output.loss.item())
        features.append(weakref.ref(output.dense_features))
        return output

    monkeypatch.setattr(PoodleForPreTraining, "forward", forward)
    (line,) = train(drives, tmp_path / "run", "--gradient_accumulation_steps", "2", steps=1)
    assert len(losses) == 2 and line["loss"] == pytest.approx(sum(losses) / 2, rel=1e-6)


def test_a_warm_up_longer_than_the_run_and_the_network_are_told(drives, tmp_path, caplog):
    caplog.set_level("INFO")
    train(drives, tmp_path / "run", "--warmup_steps", "8", "--learning_rate", "1e-3", steps=2)
    told = "the learning rate rises over warmup_steps = 8, of which the run has 2: it ends at 2.5e-04 instead of learning_rate = 1.0e-03"
    assert told in caplog.messages
    assert any(
        re.match(r"resnet encoder and heads of 0\.\d million parameters, 2 steps of", m) for m in caplog.messages
    )
    AcceleratorState._reset_state(True)
    caplog.clear()
    train(drives, tmp_path / "other", "--warmup_steps", "2", steps=2)
    assert "warmup_steps" not in caplog.text


def test_gradient_checkpointing_changes_no_figure(drives, tmp_path):
    plain = train(drives, tmp_path / "plain")
    AcceleratorState._reset_state(True)
    saving = train(drives, tmp_path / "saving", "--gradient_checkpointing", "true")
    for ours, theirs in zip(saving, plain):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_bf16_follows_fp32(drives, tmp_path):
    plain = train(drives, tmp_path / "plain")
    AcceleratorState._reset_state(True)
    half = train(drives, tmp_path / "half", "--bf16", "true")
    assert half[0]["loss"] != plain[0]["loss"]
    assert half[0]["loss"] == pytest.approx(plain[0]["loss"], rel=0.05)
    state = load_file(tmp_path / "half" / "model" / "model.safetensors")
    assert all(value.dtype in (torch.float32, torch.int64) for value in state.values())


# Inductor's C++ takes minutes to compile on a slow core; aot_eager tests the same code of the run with the graphs alone.
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_torch_compile_follows_eager(drives, tmp_path, monkeypatch, backend):
    compile_module, used = torch.nn.Module.compile, []
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda m, **options: used.append(m) or compile_module(m, backend=backend, **options),
    )
    # Dynamo would take three times as long for the whole model.
    model = {**MODEL, "num_decoder_blocks": 0, "pooled_weight": 0.0} if backend == "aot_eager" else MODEL
    plain = train(drives, tmp_path / "plain", model=model, steps=2)
    AcceleratorState._reset_state(True)
    assert used == []
    compiled = train(drives, tmp_path / "compiled", "--torch_compile", "true", model=model, steps=2)
    assert len(used) == 1
    for ours, theirs in zip(compiled, plain):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    names = load_file(tmp_path / "compiled" / "model" / "model.safetensors").keys()
    assert not any("_orig_mod" in name for name in names)


def test_a_gpu_s_own_generator_is_seeded_with_every_micro_step(monkeypatch):
    """Encoders that drop paths draw from the GPU's generator, whose state is not in the checkpoints."""
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed", seeds.append)
    accelerator = SimpleNamespace(device=torch.device("cuda"), process_index=1, num_processes=2)
    recipe = SimpleNamespace(gradient_accumulation_steps=2, seed=3)
    for step in (5, 6, 5):
        run = SimpleNamespace(accelerator=accelerator, recipe=recipe, step=step, generator=torch.Generator())
        for micro_step in range(2):
            Run.seed(run, micro_step)
            # The views need another seed: otherwise the jitter of a frame and its dropped paths would be correlated.
            assert run.generator.initial_seed() not in seeds
    assert seeds[:2] == seeds[4:] and len(set(seeds)) == 4


def test_a_checkpoint_s_path_does_not_overwrite_another_run(drives, tmp_path):
    train(drives, tmp_path / "a", "--save_steps", "1", steps=1)
    AcceleratorState._reset_state(True)
    train(drives, tmp_path / "b", "--seed", "1", steps=1)
    AcceleratorState._reset_state(True)
    with pytest.raises(ValueError, match="holds another run than"):
        train(
            drives, tmp_path / "b", "--resume_from_checkpoint", str(tmp_path / "a" / "checkpoints" / "step-1"), steps=1
        )
    # The command that started run b from a checkpoint of run a is given again.
    config = (tmp_path / "b" / "config.yaml").read_text()
    began = ("--resume_from_checkpoint", str(tmp_path / "a" / "checkpoints" / "step-1"))
    (tmp_path / "b" / "config.yaml").write_text(
        config.replace("resume_from_checkpoint: null", f"resume_from_checkpoint: {began[1]}")
    )
    with pytest.raises(ValueError, match="b holds a run already, which began at .*: go on with it by .* latest"):
        train(drives, tmp_path / "b", *began, steps=1)
    # The values are compared even if the checkpoint is given as a link.
    (tmp_path / "best").symlink_to(began[1])
    with pytest.raises(ValueError, match="another configuration .*seed: 0 in the run, 1 now"):
        train(drives, tmp_path / "c", "--seed", "1", "--resume_from_checkpoint", str(tmp_path / "best"), steps=1)
    # Like a copy without config.yaml, or a folder that training.convert has written.
    (tmp_path / "b" / "config.yaml").unlink()
    before = {path: path.read_bytes() for path in (tmp_path / "b").rglob("*") if path.is_file()}
    for more in ((), ("--resume_from_checkpoint", str(tmp_path / "a" / "checkpoints" / "step-1"))):
        AcceleratorState._reset_state(True)
        with pytest.raises(ValueError, match="holds encoder, model, metrics.jsonl, checkpoints/step-1, but no config"):
            train(drives, tmp_path / "b", *more, steps=1)
    assert {path: path.read_bytes() for path in (tmp_path / "b").rglob("*") if path.is_file()} == before


def test_a_loss_that_is_not_finite_stops_the_run(drives, tmp_path):
    with pytest.raises(FloatingPointError, match=r"not finite at step 2; videos of that batch .*drive-") as stopped:
        train(drives, tmp_path / "run", "--learning_rate", "1e30", "--save_steps", "1", "--warmup_steps", "0", steps=4)
    assert "checkpoints" in str(stopped.value)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-1"]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_video_that_cannot_be_used_is_counted_once_and_named_at_the_end(drives, tmp_path, caplog):
    folder, output_dir = tmp_path / "videos", tmp_path / "run"
    shutil.copytree(drives, folder)
    (folder / "broken.mp4").write_bytes(b"no video")
    arguments = ("--save_steps", "3", "--pairs_per_video", "1")
    lines = train(folder, output_dir, *arguments, steps=6)
    assert lines[-1]["skipped_videos"] == 1 and lines[-1]["epoch"] > 3  # it was met more than once
    named = f"skipped {folder / 'broken.mp4'}: cannot be opened as a video (Invalid data found when processing input)"
    assert caplog.messages.count(named) == 2 and caplog.messages[-1] == named  # at the first attempt and at the end
    shutil.rmtree(output_dir / "checkpoints" / "step-6")
    resumed = train(folder, output_dir, *arguments, "--resume_from_checkpoint", "latest", steps=6)
    assert [line["skipped_videos"] for line in resumed] == [line["skipped_videos"] for line in lines]
    assert [line["loss"] for line in resumed] == [line["loss"] for line in lines]


def test_a_skipped_video_is_named_once_by_workers_of_many_spans(drives, tmp_path, caplog, monkeypatch):
    spans, original = [], PairLoader._make_loader
    monkeypatch.setattr(video_stream, "OPENINGS_PER_SPAN", 4)
    monkeypatch.setattr(video_stream, "OPENINGS_PER_LANE", 1)
    monkeypatch.setattr(PairLoader, "_make_loader", lambda self: spans.append(self.span) or original(self))
    folder, output_dir = tmp_path / "videos", tmp_path / "run"
    shutil.copytree(drives, folder)
    for name in ("a.mp4", "b.mp4"):
        (folder / name).write_bytes(b"no video")
    arguments = ("--save_steps", "6", "--pairs_per_video", "1", "--dataloader_num_workers", "2")
    assert train(folder, output_dir, *arguments, steps=12)[-1]["skipped_videos"] == 2
    assert max(spans) >= 3
    named = [
        f"skipped {folder / name}: cannot be opened as a video (Invalid data found when processing input)"
        for name in ("a.mp4", "b.mp4")
    ]
    # Each is named at the first attempt and at the end.
    assert [caplog.messages.count(line) for line in named] == [2, 2] and caplog.messages[-2:] == named
    AcceleratorState._reset_state(True)
    caplog.clear()
    shutil.rmtree(output_dir / "checkpoints" / "step-12")
    train(folder, output_dir, *arguments, "--resume_from_checkpoint", "latest", steps=12)
    assert [caplog.messages.count(line) for line in named] == [1, 1] and caplog.messages[-2:] == named


def test_tensorboard_through_accelerate(drives, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = train(drives, tmp_path / "run", "--report_to", "tensorboard")
    reader = EventAccumulator(str(tmp_path / "run" / "poodle"))  # Accelerate names the folder after the project
    reader.Reload()
    values = [event.value for event in reader.Scalars("loss")]
    assert values == pytest.approx([line["loss"] for line in lines], rel=1e-6)
    (noted,) = (tmp_path / "run" / "poodle").rglob("hparams.yml")
    fields = yaml.safe_load(noted.read_text())  # each by itself, so that runs can be sorted by them
    assert fields["learning_rate"] == 1e-3 and fields["model.projection_size"] == MODEL["projection_size"]
    assert fields["crop_size"] == "[64, 128]" and fields["init_encoder"] == "null"


@pytest.mark.parametrize(
    ("capability", "instructions", "slow"),
    [("AVX2", True, True), ("DEFAULT", False, True), ("AVX512", False, True), ("AVX512", True, False)],
)
def test_bfloat16_that_a_processor_does_not_have_is_a_warning(
    tmp_path, monkeypatch, caplog, capability, instructions, slow
):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: instructions)
    for bf16 in (True, False):
        caplog.clear()
        AcceleratorState._reset_state(reset_partial_state=True)
        make_accelerator(Recipe(output_dir=str(tmp_path), bf16=bf16))
        assert any("this processor has no AVX-512 BF16" in m for m in caplog.messages) == (bf16 and slow)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert computes_in_bfloat16()


def test_a_tracker_that_is_not_installed_is_refused(drives, tmp_path, monkeypatch):
    monkeypatch.setattr("training.assembly.get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    with pytest.raises(ValueError, match="report_to trackio: not installed; pip install trackio"):
        main(flags(drives, tmp_path / "run", "--report_to", "trackio"))
    assert not (tmp_path / "run").exists()


def test_panels_are_written_and_show_something(drives, tmp_path):
    import cv2

    train(drives, tmp_path / "run", "--panel_steps", "2", steps=2)
    names = sorted(path.name for path in (tmp_path / "run" / "panels").iterdir())
    assert names == ["step-000001.png", "step-000002.png"]
    picture = cv2.imread(str(tmp_path / "run" / "panels" / names[-1]))
    assert picture.shape[0] > 64 and picture.shape[1] > 256 and picture.std() > 20


def test_no_panels_where_none_are_wanted(drives, tmp_path, caplog):
    with caplog.at_level("INFO", logger="poodle"):
        train(drives, tmp_path / "run", "--panel_steps", "0", steps=1)
    assert not (tmp_path / "run" / "panels").exists()
    assert "encoder/, model/, metrics.jsonl and checkpoints/ are there" in caplog.text


def test_subcrops_of_less_than_a_pixel_of_the_panel_end_no_run_by_their_picture():
    """`--subcrop_area 0.00001 0.3` draws such subcrops in frames of 512x1024, which the panel shows at a quarter of their size."""
    boxes = torch.tensor([10.0, 10.0, 13.0, 12.0]).expand(1, 2, 1, 4)
    views = torch.eye(2, 3).expand(1, 2, 2, 3)
    inputs = {"pixel_values": torch.zeros(1, 2, 3, 512, 1024), "flow": torch.zeros(1, 2, 2, 512, 1024)}
    inputs |= {"valid_mask": torch.ones(1, 2, 512, 1024).bool(), "student_views": views, "teacher_views": views}
    inputs |= {"student_boxes": boxes, "teacher_boxes": boxes, "teacher_box_frames": torch.zeros(1, 2, 1).long()}
    picture = np.asarray(make_panel(torch.zeros(1, 2, 3, 512, 1024, dtype=torch.uint8), inputs))
    assert (picture == COLOURS[0]).all(axis=-1)[:TILE_HEIGHT].any()


def test_both_boxes_of_a_subcrop_pair_are_drawn_on_the_frames_that_they_are_cut_from():
    """The student's box is solid, on its own frame; the teacher's is dashed, here on the other; in one colour. All four views appear."""
    height, width = TILE_HEIGHT, 2 * TILE_HEIGHT  # the panel shows the frames unscaled
    views = torch.eye(2, 3).expand(1, 2, 2, 3)
    inputs = {"pixel_values": torch.zeros(1, 2, 3, height, width), "flow": torch.zeros(1, 2, 2, height, width)}
    inputs |= {"valid_mask": torch.ones(1, 2, height, width).bool(), "student_views": views, "teacher_views": views}
    inputs["student_boxes"] = torch.tensor([[[[20.0, 10, 60, 40]], [[100.0, 50, 160, 100]]]])
    inputs["teacher_boxes"] = torch.tensor([[[[30.0, 20, 70, 60]], [[90.0, 40, 170, 110]]]])
    inputs["teacher_box_frames"] = torch.tensor([[[1], [0]]])
    picture = np.asarray(make_panel(torch.zeros(1, 2, 3, height, width, dtype=torch.uint8), inputs))
    earlier, later = (picture[TITLE : TITLE + height, x : x + width] for x in (GAP, width + 2 * GAP))
    for frame, own, other in ((earlier, 0, 1), (later, 1, 0)):
        for boxes, pair, share in (("student_boxes", own, 1.0), ("teacher_boxes", other, 0.5)):
            x0, y0, x1, y1 = inputs[boxes][0, pair, 0].int().tolist()
            drawn = (frame == COLOURS[pair]).all(axis=-1)
            for side in (drawn[y0, x0:x1], drawn[y1 - 1, x0:x1], drawn[y0:y1, x0], drawn[y0:y1, x1 - 1]):
                assert side.mean() == pytest.approx(share, abs=0.06)
    assert picture.shape[1] == 4 * width + 5 * GAP


def test_features_that_are_not_finite_end_no_run_by_their_picture():
    features = torch.randn(2, 4, 8, 8)
    features[0, 1, 2, 3] = torch.nan
    assert pca_rgb(features).shape == (2, 3, 8, 8)
    assert pca_rgb(torch.full((1, 4, 8, 8), torch.inf)).float().std() == 0


def test_more_workers_than_cores_are_told_in_one_sentence(drives, tmp_path, caplog, recwarn, monkeypatch):
    monkeypatch.setattr(video_loader, "usable_cores", lambda: 1)
    with caplog.at_level("WARNING", logger="poodle"):
        train(drives, tmp_path / "run", "--dataloader_num_workers", "2", steps=1)
    assert caplog.text.count("dataloader_num_workers 2: 2 workers on this machine's 1 CPU cores") == 1
    assert not [warning for warning in recwarn if "worker processes" in str(warning.message)]


# --- ranks ---


def two_ranks(tmp_path, script: str, *arguments: str) -> None:
    file = tmp_path / "two_ranks.py"
    file.write_text(script)
    done = forked(file, *arguments, ranks=2)
    assert done.returncode == 0, done.stderr


def test_all_ranks_hold_the_same_parameters(drives, tmp_path):
    script = """
import os, sys
from safetensors.torch import save_file
from training import pretrain
original = pretrain.Run.close
def close(self):
    parameters = {name: p.detach().contiguous() for name, p in self.model.named_parameters()}
    save_file(parameters, os.path.join(sys.argv[1], f"rank-{self.accelerator.process_index}.safetensors"))
    original(self)
pretrain.Run.close = close
pretrain.main(sys.argv[2:])
"""
    two_ranks(tmp_path, script, str(tmp_path), *flags(drives, tmp_path / "run", steps=4))
    first, second = (load_file(tmp_path / f"rank-{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys() and any(name.startswith("teacher.") for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_two_ranks_equal_one_with_the_doubled_batch(tmp_path):
    """Compares gradients through the script's own accelerator, with fixed BatchNorm statistics because on CPUs each rank has its own."""
    script = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from modeling_poodle import PoodleConfig, PoodleForPreTraining
from training.assembly import make_accelerator
from training.recipe import Recipe
folder = sys.argv[1]
config = PoodleConfig.from_pretrained(folder)
backbone_config = json.loads(json.dumps(config.to_dict()["backbone_config"]))
accelerator = make_accelerator(Recipe(model={"backbone_config": backbone_config}))
model = PoodleForPreTraining(config)
model.load_state_dict(load_file(folder + "/weights.safetensors"))
wrapped = accelerator.prepare_model(model.eval())
inputs = load_file(folder + "/inputs.safetensors")
mine = {name: value.chunk(2)[accelerator.process_index] for name, value in inputs.items()}
accelerator.backward(wrapped(**mine, subcrop_size=32).loss)
if accelerator.is_main_process:
    save_file({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, folder + "/gradients.safetensors")
accelerator.wait_for_everyone()
torch.distributed.destroy_process_group()  # or its threads may end the process by SIGABRT
"""
    from safetensors.torch import save_file

    from training.recipe import Recipe
    from training.views import model_inputs

    torch.manual_seed(0)
    config = PoodleConfig(**MODEL)
    model = PoodleForPreTraining(config).eval()
    flow = torch.randn(4, 2, 2, 64, 96)
    batch = {"frames": torch.randint(0, 256, (4, 2, 3, 64, 96), dtype=torch.uint8), "flow": flow}
    batch["valid_mask"] = torch.rand(4, 2, 64, 96) < 0.7
    recipe = Recipe(crop_size=[64, 96], num_subcrops=2, subcrop_size=32)
    inputs = model_inputs(batch, recipe, torch.Generator().manual_seed(0))
    inputs.pop("matched")
    config.save_pretrained(tmp_path)
    save_file({name: value.clone() for name, value in model.state_dict().items()}, tmp_path / "weights.safetensors")
    save_file({name: value.contiguous() for name, value in inputs.items()}, tmp_path / "inputs.safetensors")
    model(**inputs, subcrop_size=32).loss.backward()
    two_ranks(tmp_path, script, str(tmp_path))
    gradients = load_file(tmp_path / "gradients.safetensors")
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == own.keys()
    for name, value in own.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-4, atol=1e-6)


def test_a_batch_taken_twice_has_the_gradient_of_it_taken_once(drives, tmp_path, monkeypatch):
    next_batch, seed = Run.next_batch, Run.seed

    def same_batch(run, batches):
        run.held = getattr(run, "held", None) or next_batch(run, batches)
        return run.held

    monkeypatch.setattr(Run, "next_batch", same_batch)
    monkeypatch.setattr(Run, "seed", lambda run, micro_step: seed(run, 0))
    lines = []
    for number in (1, 2):
        AcceleratorState._reset_state(True)
        lines += train(drives, tmp_path / str(number), "--gradient_accumulation_steps", str(number), steps=1)
    for name in ("loss", "grad_norm"):
        assert lines[1][name] == pytest.approx(lines[0][name], rel=1e-5)
