"""What a command says whose training was stopped."""

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
        try:
            say(f"\n{interrupted}")
        except OSError:  # nobody reads: the reader of a pipe or the terminal has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            with contextlib.suppress(OSError):
                say(interrupted, sys.stderr)
        raise typer.Exit(130) from None
