"""The files in training/launch/: Accelerate's configurations, and the SLURM script with stand-ins for SLURM's commands."""

import os
import subprocess

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from conftest import REPOSITORY

LAUNCH = REPOSITORY / "training" / "launch"


@pytest.mark.parametrize(
    ("name", "machines", "processes"), [("one_gpu", 1, 1), ("one_node", 1, 8), ("several_nodes", 4, 32)]
)
def test_configurations_are_what_accelerate_reads(name, machines, processes):
    config = load_config_from_file(str(LAUNCH / f"{name}.yaml"))
    assert (config.num_machines, config.num_processes) == (machines, processes)
    assert config.distributed_type == ("NO" if processes == 1 else "MULTI_GPU")
    assert config.mixed_precision == "no"


@pytest.fixture
def submit(tmp_path):
    """
    Run the script as sbatch would on two machines with two GPUs each, in a folder where `begun/` holds a run.

    The function returns the finished process; its output is the command of the second machine.
    """
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for name, text in {
        "scontrol": "seq -f node%g 20000",
        "srun": 'echo "cpus $SRUN_CPUS_PER_TASK" >&2; shift; SLURM_NODEID=1 exec "$@"',
    }.items():
        (stubs / name).write_text(f"#!/bin/bash\n{text}\n")
        (stubs / name).chmod(0o755)
    accelerate = tmp_path / ".venv" / "bin" / "accelerate"
    accelerate.parent.mkdir(parents=True)
    accelerate.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    accelerate.chmod(0o755)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").touch()
    slurm = {
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_CPUS_PER_TASK": "16",
        "SLURM_JOB_ID": "1230042",
    }
    slurm["HOME"] = str(tmp_path)
    slurm["PATH"] = f"{stubs}:{os.environ['PATH']}"

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command, environment = ["bash", str(LAUNCH / "slurm.sh"), *arguments], {**os.environ, **slurm}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    return run


def test_slurm_starts_a_launcher_on_each_machine(submit):
    done = submit("--config", "street", "--output_dir", "a new")
    assert "cpus 16" in done.stderr  # srun asks for as many cores as sbatch was given
    words = done.stdout.splitlines()
    assert words[-5:] == ["training/pretrain.py", "--config", "street", "--output_dir", "a new"]
    options = dict(zip(words[1:-5:2], words[2:-5:2]))
    assert options["--config_file"] == "training/launch/several_nodes.yaml"
    assert (options["--num_machines"], options["--num_processes"], options["--machine_rank"]) == ("2", "4", "1")
    assert (options["--main_process_ip"], options["--main_process_port"]) == ("node1", "20042")


def test_slurm_takes_the_launcher_of_the_path_if_there_is_no_venv(submit, tmp_path):
    (tmp_path / ".venv" / "bin" / "accelerate").rename(tmp_path / "bin" / "accelerate")
    assert "training/pretrain.py" in submit("--output_dir", "new").stdout.splitlines()


@pytest.mark.parametrize(
    ("arguments", "resumes"),
    [
        (["--output_dir", "begun"], True),
        (["--output-dir=begun", "--seed", "1"], True),
        (["--output_dir=~/begun"], True),
        (["--output_dir", "new"], False),
        (["--output_dir=begun", "--resume_from_checkpoint", "begun/checkpoints/step-5"], False),
        (["--output_dir=begun", "--resume_from_checkpoint", "begun/checkpoints/step-5", "REQUEUED"], True),
        (["--output_dir=new", "--resume_from_checkpoint", "begun/checkpoints/step-5", "REQUEUED"], False),
    ],
)
def test_a_job_of_slurm_that_is_submitted_again_or_requeued_goes_on(submit, arguments, resumes, monkeypatch):
    if "REQUEUED" in arguments:
        arguments = arguments[:-1]
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    words = submit(*arguments).stdout.splitlines()
    assert words[words.index("training/pretrain.py") + 1 :] == [
        *arguments,
        *(["--resume_from_checkpoint", "latest"] if resumes else []),
    ]


def test_a_job_of_slurm_without_a_shared_folder_is_refused(submit):
    done = submit("--config", "street")
    assert done.returncode == 2 and done.stderr == "give --output_dir, a folder that all machines share\n"
