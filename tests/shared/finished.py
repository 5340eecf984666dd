"""A short training run that nothing disturbs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ssmzoo
from ssmzoo.train import finish, train


def finished_run(folder: Path, config: ssmzoo.ModelConfig, settings: dict[str, Any], sample: int) -> Path:
    """The run's folder, beside its text; it writes a sample of so many tokens at its end."""
    (folder / "text.txt").write_text("the cat sat on the mat, and the dog sat on the log\n" * 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "SAMPLE", sample)
        train(config, folder / "text.txt", settings, folder / "run", quiet=True)
    return folder / "run"
