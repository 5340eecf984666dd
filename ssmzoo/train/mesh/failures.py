"""What a process of a job says when it, or another one, has failed."""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from ssmzoo.screen import say
from ssmzoo.train.checkpoint import checkpoints
from ssmzoo.train.interrupt import Interrupted


class ProcessGoneError(ConnectionError):
    """Another process of the job has ended, so that this one cannot go on."""


@contextlib.contextmanager
def telling(run: Path, where: Callable[[], str], command: str, finish: Callable[[], None]) -> Iterator[None]:
    """Errors say on which process and at which step they came, and how the run goes on.

    Args:
        run: the run's folder.
        where: tells process and step.
        command: goes on with the run.
        finish: called in the end, also of a run that was asked to stop.

    Raises:
        ProcessGoneError: another process is gone.
        Exception: what was raised inside, once that has been told.
    """
    try:
        yield
        finish()
    except Interrupted:
        finish()
        raise
    except Exception as error:
        saved = checkpoints(run)
        way = f"continue from {saved[-1].name} with: {command}" if saved else "start it again"
        if is_gone(error):
            raise ProcessGoneError(
                f"{where()}: another process of the job is gone; its own message, or torchrun's, says why. {way}"
            ) from error
        reason = " ".join(str(error).split())
        told = "" if command in reason else f"; {way}"
        say(f"{where()}: {type(error).__name__}: {reason:.500}{told}", sys.stderr)
        raise


def is_gone(error: Exception) -> bool:
    """Whether an error is of communication with a process that has ended."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


@contextlib.contextmanager
def telling_files() -> Iterator[None]:
    """What PyTorch raises where processes cannot write or read a checkpoint, no Exception and full of tracebacks, is
    the first error of one of them.

    Raises:
        OSError: with the process, and its reason.
    """
    try:
        yield
    except CheckpointException as error:
        rank, (reason, _) = min(error.failures.items())
        cause = _file_error(reason)
        number = cause.errno if cause is not None and cause.errno is not None else errno.EIO
        text = str(reason) if cause is None else cause.strerror or str(cause)
        raise OSError(number, f"process {rank}: {' '.join(text.split())}") from None


def _file_error(error: BaseException | None) -> OSError | None:
    """The error of the file system that is behind another."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
