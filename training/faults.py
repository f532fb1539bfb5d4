"""Faults of the run's own processes and disk, in words: what happened, and what to do."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from training.workers import Workers

GO_ON = "then go on with --resume_from_checkpoint latest"


@contextmanager
def faults_in_words(recipe, workers: Workers) -> Iterator[None]:
    """
    Around the run: errors of the disk, of torch's loader and of its process groups become errors that say what to do.

    Args:
        recipe: of the run. workers: of its loader, ended by then.

    Raises:
        ChildProcessError: a loader worker was killed or crashed. MemoryError: no shared memory left.
        ConnectionError: another process of the run is gone or stands still. OSError: output_dir or another file cannot be written or read, or nobody reads
            the run's output any more.
    """
    try:
        yield
    except BrokenPipeError as error:
        raise OSError(f"the program that read this run's output has ended (a closed pipe); {GO_ON}") from error
    except (EOFError, ConnectionError) as error:
        if isinstance(error, ConnectionError) and error.errno is None:  # in words already
            raise
        raise fault_of(error, workers.died_at, recipe.ddp_timeout) from error
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is None:  # in words already
            raise
        file = getattr(error, "filename", None)  # a full disk names none
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
    The fault that an error of torch's stands for; `None` where it is none of these.

    Args:
        died_at: "video (signal)" of workers that have died. go_on: what to do once the cause is mended.
    """
    # A worker hands over a batch by a connection to itself: one that died before it was fetched leaves these.
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
    if re.search(r"gloo|NCCL|ProcessGroup|Connection (closed|reset)|Timed out waiting|Socket Timeout", message):
        slow = re.search(r"[Tt]imed? ?out|[Tt]imeout", message)
        what = f"did not answer for {ddp_timeout} s (ddp_timeout)" if slow else "is gone"
        return ConnectionError(
            f"another process of the run {what}; the cause stands in its own output, or it was killed. Once that is mended, {go_on}. "
            f"torch says: {' '.join(message.split())[:500]}"
        )
    return None
