"""
Scripts in processes that fork from one which has imported what takes seconds; apart from that, as `python FILE ARGUMENTS`,
`python -m MODULE ARGUMENTS` and `torchrun` run them.
"""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


class ForkedScripts:
    """
    The process from which scripts fork, started by the first of them. It holds no tensor and starts no thread of PyTorch's: after these a
    fork would hang.

    Args:
        imports: modules. Variables that these read from the environment when they are imported are those of this process, whatever is
            given to a script.
    """

    def __init__(self, *imports: str):
        self.imports, self.process = imports, None

    def __call__(
        self, script: Path | str, *arguments, ranks: int = 0, timeout: int = 400, environment=None, **variables
    ):
        """
        The CompletedProcess of a script run in the repository's folder.

        Args:
            script: a file, or a module's name.
            ranks: of so many processes that can talk to each other; 0: one process that knows of no others.
            timeout: seconds, after which the processes are killed.
            environment: instead of this process'; variables: beside it.
        """
        if self.process is None:
            command, pipe = [sys.executable, __file__, *self.imports], subprocess.PIPE
            self.process = subprocess.Popen(command, cwd=REPOSITORY, stdin=pipe, stdout=pipe, text=True)
        environment = {**(os.environ if environment is None else environment), **variables}
        with tempfile.TemporaryDirectory() as folder:
            stdout, stderr = (Path(folder, name) for name in ("stdout", "stderr"))
            task = {"script": str(script), "arguments": list(map(str, arguments)), "stdout": str(stdout), "stderr": str(stderr),
                    "environments": [{**environment, **of_rank} for of_rank in _of_ranks(ranks)], "timeout": timeout}  # fmt: skip
            print(json.dumps(task), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
            assert answer, "the process from which scripts fork has ended"
            assert json.loads(answer) is not None, f"not finished within {timeout} s: {stderr.read_text()}"
            return subprocess.CompletedProcess(
                [str(script), *task["arguments"]], json.loads(answer), stdout.read_text(), stderr.read_text()
            )

    def close(self) -> None:
        if self.process is not None:
            self.process.stdin.close()  # it ends by itself, so that its coverage is counted
            self.process.wait()
            self.process.stdout.close()


forked = ForkedScripts(
    "benchmarks.step", "evaluation.detect", "evaluation.propagate", "evaluation.segment", "training.flow_writer", "training.pretrain"
)  # fmt: skip
# For scripts that talk to a Hub, whose address and cache huggingface_hub reads when it is imported.
forked_before_hub = ForkedScripts(
    "torch._dynamo", "torch.distributed.tensor", "torchvision", "scipy.optimize", "aiohttp", "httpx"
)


def _of_ranks(ranks: int) -> list[dict]:
    if ranks == 0:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}  # fmt: skip
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def serve(imports: list[str]) -> None:
    """Read tasks from stdin, fork for each, and answer with the first exit code that is not 0, or `null` where time was up."""
    for name in imports:
        __import__(name)
    running: set[int] = set()
    signal.signal(signal.SIGALRM, lambda *_: [os.kill(pid, signal.SIGKILL) for pid in running])
    for line in sys.stdin:
        task, code = json.loads(line), 0
        for environment in task["environments"]:
            pid = os.fork()
            if pid == 0:
                sys.exit(run(task, environment))  # not os._exit: what is registered for the end is done
            running.add(pid)
        signal.alarm(task["timeout"])
        while running:
            pid, status = os.wait()
            running.discard(pid)
            if status and not code:
                code = os.waitstatus_to_exitcode(status)
                for other in running:  # as torchrun does
                    os.kill(other, signal.SIGTERM)
        late = signal.alarm(0) == 0
        print(json.dumps(None if late else code), flush=True)


def run(task: dict, environment: dict) -> int:
    """The script's exit code, once it has run in this process."""
    import torch

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for number, path in ((0, os.devnull), (1, task["stdout"]), (2, task["stderr"])):
        file = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    script, is_file = task["script"], task["script"].endswith(".py")
    sys.argv = [script, *task["arguments"]]
    sys.path[0] = str(Path(script).parent if is_file else REPOSITORY)
    sys.path[1:1] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    try:
        if is_file:
            runpy.run_path(script, run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if not isinstance(end.code, str):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    serve(sys.argv[1:])
