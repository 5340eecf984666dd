"""What a command says that was stopped amid its work, of which something is kept."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import typer

from ssmzoo.screen import say


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """Tells how a run goes on that was stopped inside, and ends with status 130."""
    from ssmzoo.train import Interrupted

    try:
        yield
    except Interrupted as interrupted:
        raise stopped(str(interrupted)) from None


def stopped(told: str) -> typer.Exit:
    """Says what is kept and how to go on; what to raise then."""
    try:
        say(f"\n{told}")
    except OSError:  # nobody reads: the reader of a pipe or the terminal has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        with contextlib.suppress(OSError):
            say(told, sys.stderr)
    return typer.Exit(130)
