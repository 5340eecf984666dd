"""The folder of a run that was stopped or killed is put in order before the run goes on."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from ssmzoo import files
from ssmzoo.screen import say
from ssmzoo.train import checkpoint, lock, plot
from ssmzoo.train.checkpoint import FOLDER, LOG, Checkpoint
from ssmzoo.train.checks import BEGUN
from ssmzoo.train.log import rewind


def sweep(run: Path) -> None:
    """Removes the temporary files that killed processes have left."""
    files.sweep(run)
    files.sweep(run / FOLDER)


def clear(run: Path) -> None:
    """Removes what a run left that died before its first checkpoint: a log, or a tokenizer, of another start."""
    sweep(run)
    for name in BEGUN - {lock.FILE, FOLDER}:
        path = run / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def repair(run: Path, found: Checkpoint) -> None:
    """Sweeps, and gives the log the rows that it had at a checkpoint. Says so if they were damaged."""
    sweep(run)
    repaired = rewind(run / LOG, found.folder / LOG, found.step)
    if repaired is not None:
        say(f"note: {repaired}", sys.stderr)


def complete(run: Path, found: Checkpoint, keep: int, title: str) -> None:
    """Does what a run does after its last checkpoint, in case it was killed before."""
    repair(run, found)
    checkpoint.settle(run, found.folder, keep)
    if (found.folder / LOG).is_file():  # checkpoints of earlier versions have none
        plot.draw(run / LOG, run / plot.FILE, title)
