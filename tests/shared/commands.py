"""Calls of the command line in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from ssmzoo import cli


def calling(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *command: str
) -> Callable[..., tuple[int, str, str]]:
    """``ssmzoo`` with these words and those that it is called with → exit status, standard output and error."""
    monkeypatch.delenv("SSMZOO_DEBUG", raising=False)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ssmzoo", *command, *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return call
