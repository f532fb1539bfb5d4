"""
Scripts run in forks of a process that has already imported the modules that take seconds.

Otherwise they run as by `python FILE ARGUMENTS`, `python -m MODULE ARGUMENTS` or `torchrun`, with these differences: modules imported
already need no path, all ranks have the same hash seed, and no launcher sums up how they ended. tests/test_cli.py, tests/test_faults_ranks.py and
tests/test_benchmarks.py also start scripts as users do.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
ENVIRONMENT = dict(os.environ)  # before any test changes it
# Below the ports that the system assigns, which the servers of other tests may take meanwhile. Each pytest-xdist worker has a hundred ports.
FIRST_PORT = 20_000 + 100 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
SECONDS_TO_END = 30  # for the other ranks, once one has failed, as in torchrun


class ForkedScripts:
    """
    The process from which scripts fork; the first script starts it.

    It must hold no tensor and start no thread of PyTorch, because a fork would hang after that.

    Args:
        imports: modules to import. Environment variables that a module reads when it is imported have the values with which the tests
            began, whatever is given to a script.
    """

    def __init__(self, *imports: str):
        self.imports, self.process, self.port = imports, None, FIRST_PORT

    def __call__(
        self, script: Path | str, *arguments, ranks: int = 0, timeout: int = 400, environment=None, **variables
    ):
        """
        Run a script in the repository's folder and return its CompletedProcess.

        Args:
            script: a file, or a module's name.
            ranks: number of processes, which can talk to each other; 0 for one process that knows of no others.
            timeout: seconds, after which the processes are killed.
            environment: replaces the environment of this process.
            variables: added to the environment.
        """
        if self.process is None or self.process.poll() is not None:
            command, pipe = [sys.executable, __file__, *self.imports], subprocess.PIPE
            self.process = subprocess.Popen(
                command, cwd=REPOSITORY, env=ENVIRONMENT, stdin=pipe, stdout=pipe, text=True
            )
        environment = {**(os.environ if environment is None else environment), **variables}
        with tempfile.TemporaryDirectory() as folder:
            stdout, stderr = (Path(folder, name) for name in ("stdout", "stderr"))
            task = {"script": str(script), "arguments": list(map(str, arguments)), "stdout": str(stdout), "stderr": str(stderr),
                    "environments": [{**environment, **of_rank} for of_rank in self._of_ranks(ranks)], "timeout": timeout}  # fmt: skip
            self._send(task)
            answer = self.process.stdout.readline()
            assert answer, "the process from which scripts fork has ended"
            assert json.loads(answer) is not None, f"not finished within {timeout} s: {stderr.read_text()}"
            return subprocess.CompletedProcess(
                [str(script), *task["arguments"]], json.loads(answer), stdout.read_text(), stderr.read_text()
            )

    def close(self) -> None:
        """End the process by a line. Closing its input would not do, because a process that a test forked and left may hold it open."""
        if self.process is None or self.process.poll() is not None:
            return
        self._send(None)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _send(self, task: dict | None) -> None:
        print(json.dumps(task), file=self.process.stdin, flush=True)

    def _of_ranks(self, ranks: int) -> list[dict]:
        """Return the environment variables that torchrun sets for each of `ranks` processes."""
        if ranks == 0:
            return [{}]
        while True:
            self.port = FIRST_PORT + (self.port + 1 - FIRST_PORT) % 100
            with socket.socket() as taken, suppress(OSError):
                taken.bind(("127.0.0.1", self.port))
                break
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}  # fmt: skip
        return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


forked = ForkedScripts(
    "benchmarks.step", "evaluation.detect", "evaluation.propagate", "evaluation.segment", "training.flow_writer", "training.pretrain"
)  # fmt: skip
# For scripts that talk to a Hub: huggingface_hub, which reads the address and cache when it is imported, is not imported yet.
forked_before_hub = ForkedScripts(
    "torch._dynamo", "torch.distributed.tensor", "torchvision", "scipy.optimize", "aiohttp", "httpx", "pandas", "av", "cv2", "jinja2"
)  # fmt: skip


def serve(imports: list[str]) -> None:
    """Read tasks from stdin until `null`, fork for each task, and print what [`attend`] returns."""
    gc.disable()
    for name in imports:
        __import__(name)
    gc.freeze()  # otherwise each fork searches all imports for garbage as it ends, which copies memory and takes 2 s
    gc.enable()
    running: set[int] = set()
    try:
        while (task := json.loads(sys.stdin.readline() or "null")) is not None:
            for environment in task["environments"]:
                pid = os.fork()
                if pid == 0:
                    running.clear()
                    sys.exit(run(task, environment))  # not os._exit, so that exit handlers run
                os.setpgid(pid, pid)  # its own group, to end it with all that it starts
                running.add(pid)
            print(json.dumps(attend(running, task["timeout"])), flush=True)
    finally:
        end(running, signal.SIGKILL)


def attend(running: set[int], seconds: int) -> int | None:
    """
    Wait for all processes to end. Once one has failed, the others are terminated.

    Returns:
        The exit code of the first that failed, or 0; `None` if time was up.
    """
    code, late = 0, False

    def time_is_up(*_) -> None:
        nonlocal late
        late = code == 0
        end(running, signal.SIGKILL)

    signal.signal(signal.SIGALRM, time_is_up)
    signal.alarm(seconds)
    while running:
        pid, status = os.wait()
        running.discard(pid)
        if status and not code and not late:
            code = os.waitstatus_to_exitcode(status)
            end(running, signal.SIGTERM)
            signal.alarm(SECONDS_TO_END)
    signal.alarm(0)
    return None if late else code


def end(groups: set[int], number: int) -> None:
    for group in list(groups):
        with suppress(ProcessLookupError):
            os.killpg(group, number)


def run(task: dict, environment: dict) -> int:
    """Run the script in this process and return its exit code."""
    import torch

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    gc.disable()  # until run_script, for the remaining imports
    for number, path in ((0, os.devnull), (1, task["stdout"]), (2, task["stderr"])):
        file = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # to be found anew in this environment
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    script, is_file = task["script"], task["script"].endswith(".py")
    sys.argv = [script, *task["arguments"]]
    folder = str(Path(script).parent if is_file else REPOSITORY)
    sys.path[:2] = [folder, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    try:
        if is_file:
            runpy.run_path(script, run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
    except SystemExit as last:
        if not isinstance(last.code, str):
            return last.code or 0
        print(last.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        atexit.unregister(gc.unfreeze)  # registered by run_script
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))  # before tests/
    serve(sys.argv[1:])
