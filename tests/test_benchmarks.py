"""The benchmarks: every script runs and counts what it claims to. No test asserts a time. Their baseline is tested in test_reference.py."""

import copy
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked_scripts import forked
from test_reference import TINY
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks/ is not installed

from benchmarks import contenders, cost, step
from benchmarks.common import Clock, OurStep, benchmark_parser, medians, step_flops, step_recipe
from modeling_poodle.configuration_poodle_flow import PoodleFlowConfig
from modeling_poodle.modeling_poodle_flow import PoodleFlowModel
from training.assembly import build_optimizer, prepared
from training.flow import DisFlow
from training.pretrain import PretrainingRun
from training.recipe import Recipe
from training.street import Street
from training.street_files import write_video, write_videos
from training.video_index import index_video

REPOSITORY = Path(__file__).resolve().parent.parent
FLOW_NETWORK = {"num_levels": 3, "stem_size": 4, "hidden_size": 6, "decoder_sizes": [8], "correlation_radius": 1}
SMALL = [
    *("--crop_size", "64", "64", "--subcrop_size", "32", "--num_subcrops", "2"),
    *("--per_device_train_batch_size", "2", "--model", json.dumps(TINY)),
]


def test_what_runs_on_a_gpu_needs_no_video_library():
    """Machines with a GPU are often offline and have only torch, transformers and OpenCV."""
    needed = "step cost raft processes memory"
    script = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("av", "datasets", "evaluate", "torchdata", "pyarrow"):
            raise ModuleNotFoundError(name)

import transformers, accelerate  # these look for what there is
sys.meta_path.insert(0, Missing())
for name in "{needed}".split():
    __import__(f"benchmarks.{{name}}")
    print(name)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY, timeout=300)
    assert done.stdout.split() == needed.split(), done.stderr


def test_flops_are_counted_by_part():
    class Step:
        device, clock = torch.device("cpu"), Clock(torch.device("cpu"))

        def estimate_flow(self):
            return torch.ones(2, 3) @ torch.ones(3, 4)

        def __call__(self):
            self.estimate_flow()
            F.conv2d(torch.ones(1, 3, 8, 8), torch.ones(5, 3, 3, 3), padding=1)

    assert step_flops(Step()) == {"flow": 2 * 2 * 3 * 4, "model": 2 * 64 * 5 * 3 * 9}
    assert medians([{"a": 1.0}, {"a": 5.0}, {"a": 2.0}]) == {"a": 2.0}


def test_counting_flops_leaves_what_is_compiled_compiled():
    """torch 2.11 never uses a compiled module again once it has run below a FlopCounterMode."""
    runs = []

    def backend(graph, _):
        return lambda *inputs: (runs.append(1), graph(*inputs))[1]

    class Network(torch.nn.Linear):  # torch 2.9 compiles no module of its own that is called by itself
        def forward(self, values):
            return super().forward(values)

    class Step:
        def __init__(self):
            self.network = Network(3, 5)
            self.network.compile(backend=backend, fullgraph=True, dynamic=False)

        def estimate_flow(self):
            return self.network(torch.ones(2, 3))

        def __call__(self):
            self.network(self.network.weight.new_ones(4, 3))

    measured = Step()
    measured()
    measured.estimate_flow()
    assert len(runs) == 2
    flops = step_flops(measured)
    assert flops == {"flow": 2 * 2 * 3 * 5, "model": 2 * 4 * 3 * 5 - flops["flow"]} and len(runs) == 2
    measured()
    measured.estimate_flow()
    assert len(runs) == 4


@pytest.mark.parametrize(
    ("flow", "reference", "message"),
    [
        (["exact"], False, "--flow exact is of a loader's videos, here are frames alone"),
        (["precomputed", "--flow_dir", "x"], True, "--flow precomputed is of a loader's videos"),
        (["unflow", "--flow_model", "x"], True, "--flow unflow: the reference estimates flow by RAFT"),
    ],
)
def test_flows_that_a_step_cannot_estimate_are_refused(capsys, flow, reference, message):
    with pytest.raises(SystemExit) as ended:
        step_recipe(benchmark_parser(""), ["--flow", *flow, *SMALL], reference)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_the_step_is_guarded_as_a_run_s_and_takes_its_flow_network(tmp_path, fresh_accelerator):
    """As in a run, a gradient that is not finite changes no weight."""
    PoodleFlowModel(PoodleFlowConfig(**FLOW_NETWORK)).save_pretrained(tmp_path / "model")
    flags, threads = ["--flow", "unflow", "--flow_model", str(tmp_path / "model"), *SMALL], torch.get_num_threads()
    step = OurStep(step_recipe(benchmark_parser(""), flags))
    torch.set_num_threads(threads)
    assert step.estimate_flow().shape == (2, 2, 2, 64, 64)
    student = dict(step.model.student.named_parameters())
    before = {name: value.detach().clone() for name, value in student.items()}
    handle = next(iter(student.values())).register_hook(lambda gradient: gradient * float("nan"))
    step()
    assert all(torch.equal(value, before[name]) for name, value in student.items())
    handle.remove()
    step()
    assert not any(torch.equal(value, before[name]) for name, value in student.items() if value.ndim > 1)


def test_the_timed_step_is_that_of_a_run(tmp_path, fresh_accelerator):
    """On the same frames with the same draws, both give the same student and teacher bit for bit."""
    flags = ["--flow", "dis", "--warmup_steps", "0", "--teacher_momentum", "0.996", "--output_dir", str(tmp_path)]
    threads = torch.get_num_threads()
    step = OurStep(step_recipe(benchmark_parser(""), [*flags, *SMALL]))
    torch.set_num_threads(threads)
    model = copy.deepcopy(step.model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = PretrainingRun(
        step.accelerator, step.recipe, model, build_optimizer(step.recipe, model), None, None, max_steps=10, probe=None
    )
    run.wrapped = prepared(step.accelerator, model.train())
    run.train_step(iter([{"frames": step.frames, "flow": step.estimate_flow(), "video": ["a", "b"], "skipped": []}]))
    step.generator.manual_seed(run.generator.initial_seed())
    step()
    after, timed = model.state_dict(), step.model.state_dict()
    assert after.keys() == timed.keys() and all(torch.equal(after[name], timed[name]) for name in after)
    for network in ("student", "teacher"):
        name = f"{network}.encoder.embedder.embedder.convolution.weight"
        assert not torch.equal(after[name], before[name])


def test_a_step_does_not_wait_for_the_copy_of_a_loader_s_frames():
    """
    The copy must not block, as in a run.

    It waits for the step before it. A host that waited too could not start work ahead of the device.
    """
    step, device, copies = object.__new__(OurStep), torch.device("meta"), []
    step.device, step.clock = device, Clock(device)

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default:
                copies.append(kwargs.get("non_blocking", False))
            return function(*args, **(kwargs or {}))

    # The call ends at the flow, which follows the copy and is refused.
    step.recipe, step.flow_module, step.pair_flow = None, None, DisFlow()
    with Copies(), pytest.raises(ValueError, match="frames must be"):
        step({"frames": torch.zeros(1, 2, 3, 64, 64)})
    assert copies == [True]


def run(script: str, *arguments: str) -> str:
    """Return the output of a benchmark that is run as a user runs it."""
    result = forked(REPOSITORY / "benchmarks" / script, *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_step_beside_the_reference(tmp_path):
    command = ("--reference", "--kernels", "--steps", "5", "--warmup", "1", "--json", str(tmp_path / "f.json"))
    text = run("step.py", *command, *SMALL)
    figures = json.loads((tmp_path / "f.json").read_text())
    assert "times as fast" in text and figures["command"].startswith("python ")
    assert figures["ours"]["model_gflops_a_pair"] == pytest.approx(
        figures["reference"]["model_gflops_a_pair"], rel=0.1
    )
    assert figures["speed_ratio"] == pytest.approx(
        figures["reference"]["ms_a_step"] / figures["ours"]["ms_a_step"], rel=1e-6
    )
    for name in ("ours", "reference"):
        assert figures[name]["peak_gib"] > figures[name]["step_gib"] > 0
    parts = figures["ours"]["parts_ms"]
    assert set(parts) == {"flow", "augmentation", "forward", "teacher", "backward", "optimizer", "ema"}
    assert all(value > 0 for value in parts.values())
    kernels = figures["ours"]["kernels_ms"]
    assert kernels.pop("compiled") == 0 and all(value > 0 for value in kernels.values())
    tflops = 2 * figures["ours"]["model_gflops_a_pair"] / 1000  # a step has two pairs
    took = figures["ours"]["kernels_ms"]["convolutions"] / 1000
    assert figures["ours"]["convolutions_tflops_per_second"] == pytest.approx(tflops / took, rel=1e-6)
    assert figures["ours"]["model_tflops_per_second"] > 0


def test_a_reference_that_does_not_fit_leaves_our_figures(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from benchmarks import contenders, step\nstep.ReferenceStep = lambda recipe: 1 / 0\ncontenders.ceiling = lambda *_: 1e12\nstep.main()"
    )
    command = ("--reference", "--steps", "1", "--warmup", "1", "--json", tmp_path / "f.json")
    result = forked(script, *command, *SMALL)
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "f.json").read_text())
    assert "without the reference: the process of this contender ended" in result.stdout
    assert figures["ours"]["ms_a_step"] > 0 and "reference" not in figures


@pytest.mark.parametrize("building", [True, False])
def test_the_largest_batch_is_found_and_other_errors_are_none_of_its_size(monkeypatch, building):
    """At most three pairs fit in a step. Too little memory must be told apart from other errors."""

    class Step:
        device = torch.device("cpu")
        wrong = False

        def __init__(self, recipe):
            self.pairs = recipe.per_device_train_batch_size
            if building:
                self.compute()

        def compute(self):
            if self.wrong:
                raise ValueError("no weights")
            if self.pairs > 3:
                raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(step, "OurStep", Step)
    monkeypatch.setattr(contenders, "timed_steps", lambda made, steps: made.compute())
    recipe = step_recipe(benchmark_parser(""), SMALL)
    assert step.largest_batch(recipe) == 3
    Step.wrong = True
    with pytest.raises(RuntimeError, match="the process of this contender ended at 'run'"):
        step.largest_batch(recipe)


def test_the_loader_that_feeds_a_step(tmp_path):
    write_videos(tmp_path / "drives", num_videos=2, duration=1.5, fps=4, height=64, width=128, num_processes=1)
    flags = [
        "--config",
        "street",
        "--videos",
        str(tmp_path / "drives"),
        "--steps",
        "4",
        "--json",
        str(tmp_path / "f.json"),
    ]
    text = run("loader.py", *flags, *SMALL)
    figures = json.loads((tmp_path / "f.json").read_text())
    assert "data_wait" in text and 0 <= figures["data_wait"] < 1
    assert figures["pairs_per_second_alone"] > 0 and figures["pairs_per_second_with_step"] > 0
    assert all(figures[f"{name}_ms_a_pair"] > 0 for name in ("index", "decode", "flow")) and figures["peak_gib"] > 0


def test_the_loader_s_benchmark_takes_the_street_of_every_camera(tmp_path, monkeypatch):
    from benchmarks import loader

    (tmp_path / "own.mp4").write_bytes(b"")
    monkeypatch.setattr(loader, "street_videos", lambda camera: [f"{camera}.mp4"])
    recipe = Recipe(videos=["street", "street:walking", str(tmp_path)], output_dir="x")
    assert loader.videos_of(recipe) == ["driving.mp4", "walking.mp4", str(tmp_path / "own.mp4")]
    assert loader.videos_of(Recipe(videos=["street:aerial"], output_dir="x")) == ["aerial.mp4"]


def test_clips_have_the_groups_of_pictures_that_they_are_named_by(tmp_path):
    loader = runpy.run_path(str(REPOSITORY / "benchmarks" / "loader.py"))
    loader["write_clip"](tmp_path / "clip.mp4", gop=10, seconds=1.0, height=128, width=256)
    index = index_video(str(tmp_path / "clip.mp4"))
    assert (len(index.pts), index.height, index.width) == (30, 128, 256)
    assert list(index.keyframes) == [index.pts[0], index.pts[10], index.pts[20]]


def test_raft_beside_torchvision(tmp_path, monkeypatch):
    small = ["--variant", "raft_small", "--crop_size", "128", "128", "--updates", "3", "--repeats", "1"]
    # The script runs in this process and changes only what is restored here. Other benchmarks run in forks, but a process whose threads
    # have run must not fork.
    monkeypatch.setattr(sys, "argv", ["raft.py", *small, "--overfit", "3", "--json", str(tmp_path / "f.json")])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
    with torch.random.fork_rng():
        runpy.run_path(str(REPOSITORY / "benchmarks" / "raft.py"), run_name="__main__")
    torchvision, full = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert torchvision["max_px"] == 0 and full["max_px"] < 1e-3


def test_precomputed_flow_says_when_it_pays(tmp_path, monkeypatch):
    benchmark = runpy.run_path(str(REPOSITORY / "benchmarks" / "precomputed.py"))
    row = benchmark["paying"]({"decode_ms": 9.0, "compute_ms": 8.0, "write_ms": 1.0, "read_ms": 2.0, "kib": 60.0})
    assert row["passes"] == 3  # 9 + 8 + 1 to write, then 2 a pass instead of 8: even after three passes
    assert row["mb_a_second"] == pytest.approx(60 * 1024 / 0.006 / 1e6)
    assert (
        benchmark["paying"]({"decode_ms": 9.0, "compute_ms": 1.0, "write_ms": 1.0, "read_ms": 2.0, "kib": 60.0})[
            "passes"
        ]
        is None
    )
    write_video(str(tmp_path / "drive.mp4"), {"street": Street(0, 128, 256).to_json(), "fps": 4, "num_frames": 6})
    flags = ["--videos", str(tmp_path / "drive.mp4"), "--crop_size", "128", "128", "--pairs", "4"]
    flags += ["--raft", "raft_small", "--flow_updates", "2", "--raft_pairs", "7", "--bf16", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["precomputed.py", *flags, "--json", str(tmp_path / "f.json")])
    benchmark["main"]()
    row, raft = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert (row["size"], row["flow"]) == ("128x128", "dis")
    assert min(row["decode_ms"], row["compute_ms"], row["read_ms"]) > 0
    assert 1 < row["kib"] < 4 * 128 * 128 * 2 / 1024  # packed: fewer bytes than as 16-bit numbers
    assert raft["flow"] == "raft_small, 2 updates, 7 pair(s) at once, bf16"
    assert (
        raft["compute_ms"] > 0 and raft["decode_ms"] == row["decode_ms"]
    )  # the weights are random, and the other figures are those of DIS


def test_memory_over_time_is_told_of_batches_and_steps(drives, tmp_path):
    counts = ("--batches", "10", "--steps", "10", "--json", tmp_path / "f.json")
    # Not a fork: a script that a user starts has only its own folder on the path and imports everything itself.
    command = [sys.executable, REPOSITORY / "benchmarks" / "memory.py", *counts, "--videos", drives, *SMALL]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert [(row["what"], row["memory"]) for row in rows] == [("10 batches", "cpu"), ("10 steps", "cpu")]
    for row in rows:
        assert len(row["held_mib"]) == 10 and all(50 < held < 5000 for held in row["held_mib"])
        assert row["growth_percent"] == pytest.approx(100 * (row["last_mib"] / row["first_mib"] - 1))
        assert f"{row['growth_percent']:+.2f}" in done.stdout


def test_every_benchmark_finds_the_repository_by_itself():
    """The packages are installed, but benchmarks/ is not."""
    scripts = [
        path for path in (REPOSITORY / "benchmarks").glob("*.py") if '__name__ == "__main__"' in path.read_text()
    ]
    assert len(scripts) >= 9
    for path in scripts:
        found = path.read_text().index("sys.path.insert(0, str(Path(__file__).resolve().parent.parent))")
        assert (
            found < re.search("^from (benchmarks|training|evaluation|modeling_poodle)", path.read_text(), re.M).start()
        )


def test_shares_and_times_are_of_what_they_say():
    assert step.has_the_peak("cuda (NVIDIA H200)") and step.has_the_peak("cuda (NVIDIA H100 80GB HBM3)")
    for other in ("cpu", "cuda (NVIDIA A100-SXM4-80GB)", "cuda (NVIDIA H100 PCIe)", "cuda (NVIDIA H200 NVL)"):
        assert not step.has_the_peak(other)
    rows = [{"step": 5.0, "flow": 4.5}, {"step": 3.0, "flow": 1.0}, {"step": 4.0, "flow": 3.0}]
    assert [cost.step_seconds(rows, flow_beside=beside) for beside in (False, True)] == [4.0, 1.0]


def test_cost_leaves_out_sizes_that_the_flow_cannot_take():
    recipe = Recipe(crop_size=[128, 256], flow="raft_small", flow_weights="random")
    assert [value for name, value, _ in cost.variants(recipe) if name == "crop_size"] == ["192x384", "256x512"]


def test_cost_names_what_it_changes(tmp_path):
    figures = ["--steps", "1", "--warmup", "1", "--json", str(tmp_path / "f.json")]
    run("cost.py", "--only", "dense_stride", *figures, *SMALL)
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert [row["to"] for row in rows] == ["as it is", "4", "1"]
    # More points in the loss cost no further products.
    assert rows[2]["gflops_a_pair"] == rows[1]["gflops_a_pair"] == rows[0]["gflops_a_pair"] > 0
    # With --count_only, the counts are the same and the times are missing.
    run("cost.py", "--only", "dense_stride", "--count_only", "--json", str(tmp_path / "g.json"), *SMALL)
    counted = json.loads((tmp_path / "g.json").read_text())["rows"]
    assert [row["gflops_a_pair"] for row in counted] == [row["gflops_a_pair"] for row in rows]
    assert rows[0].keys() - counted[0].keys() == {"ms_a_pair", "flow_ms"}
