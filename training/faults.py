"""Explain faults of the run's own processes and disk: what happened, and what to do."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from modeling_poodle.processes import lost_process
from training.workers import Workers

GO_ON = "then go on with --resume_from_checkpoint latest"


@contextmanager
def faults_in_words(recipe, workers: Workers) -> Iterator[None]:
    """
    Turn errors of the disk, of torch's loader and of its process groups into errors that say what to do. The block is the whole run.

    Args:
        recipe: of the run.
        workers: of its loader. The block must have ended them when an error leaves it.

    Raises:
        ChildProcessError: a loader worker was killed or crashed.
        MemoryError: no shared memory is left.
        ConnectionError: another process of the run has died or does not respond.
        OSError: output_dir or another file cannot be written or read, a library of torch_compile is not whole, or the program that read the
            run's output has ended.
    """
    try:
        yield
    except BrokenPipeError as error:
        raise OSError(
            f"the program that read this run's output has ended (a closed pipe): {GO_ON.removeprefix('then ')}"
        ) from error
    except (EOFError, ConnectionError) as error:
        if isinstance(error, ConnectionError) and error.errno is None:  # in words already
            raise
        raise fault_of(error, workers.died_at, recipe.ddp_timeout) from error
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is None:  # in words already
            raise
        file = getattr(error, "filename", None)  # a full disk gives no name
        elsewhere = (
            isinstance(file, (str, bytes))
            and Path(recipe.output_dir).resolve() not in Path(os.fsdecode(file)).resolve().parents
        )
        where = "" if elsewhere else f"output_dir {recipe.output_dir}: "
        raise OSError(
            f"{where}{error}. Checkpoints up to the last save are kept; mend the disk or the folder, {GO_ON}"
        ) from error
    except RuntimeError as error:
        fault = fault_of(error, workers.died_at, recipe.ddp_timeout)
        if fault is None:
            raise
        raise fault from error


def fault_of(error: Exception, died_at: list[str], ddp_timeout: int, go_on: str = GO_ON) -> Exception | None:
    """
    Return the fault that an error of torch stands for, or `None` if it is not one of the known faults.

    Args:
        died_at: "video (signal)" of each worker that has died.
        ddp_timeout: in seconds, for the message.
        go_on: what to do once the cause is fixed.
    """
    # Batches are fetched through a connection to their worker. If the worker died before that, one of these errors is raised.
    died = isinstance(error, (EOFError, ConnectionError))
    message = "DataLoader worker exited unexpectedly" if died else str(error)
    inexactly = " (and add --resume_inexact true)" if go_on == GO_ON else ""
    if re.search(
        r"shared memory\(shm\)|shared memory object|out of shared memory\. Please|Bus error|</torch_\d", message
    ):
        return MemoryError(
            "the loader's workers are out of shared memory (/dev/shm): give them more (docker run --shm-size 8g), or lower "
            f"--dataloader_num_workers or --per_device_train_batch_size{inexactly}, {go_on}"
        )
    killed = re.search(r"DataLoader worker .*?(?:(killed by signal: [\w ]+)|exited unexpectedly)", message)
    if killed:
        how = f"was {killed[1].strip()}" if killed[1] else "exited unexpectedly"
        videos = f" while it read {', '.join(died_at)}" if died_at else ""
        return ChildProcessError(
            f"a loader worker {how}{videos}. SIGKILL is mostly the system, out of "
            f"memory: lower --dataloader_num_workers{inexactly}. SIGSEGV or SIGABRT is the decoder at that video: put an "
            f"empty file in its place, which is skipped; {go_on}"
        )
    # A signal to the process group also ends the compiler, and torch takes what it had written for a whole library from then on.
    library = re.search(r"(\S+\.so): (?:file too short|invalid ELF header)", message)
    if library:
        return OSError(
            f"torch_compile: {library[1]} is not a whole library, since its compiler was stopped: remove this file, {go_on}"
        )
    return lost_process(error, f"did not answer for {ddp_timeout} s (ddp_timeout)", go_on)
