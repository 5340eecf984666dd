"""What CONTRIBUTING promises: a model is one YAML file, a mixer one Python file, an op one folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ssmzoo
from ssmzoo import config, mixers, registry

ROOT = Path(__file__).parent.parent

MODEL = """
description: two layers
d_model: 32
n_layers: 2
pattern: [mamba, local]
mixers:
  local: {kind: attention, head_dim: 16, window: 8}
vocab_size: 256
"""

MIXER = '''
"""A mixer in a file."""

from torch import nn

from ssmzoo.mixer import Mixer
from ssmzoo.registry import register_mixer


@register_mixer("shift")
class Shift(Mixer):
    """Every token sees the one before it."""

    has_state = False

    def __init__(self, d_model: int, *, bias: bool = False):
        super().__init__(d_model)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)

    def mix(self, x, state, cu_seqlens):
        return self.out_proj(nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]), None
'''

OP = '''
"""An op in a folder."""

import torch

from ssmkernels.core.dispatch import Op

__all__ = ["doubled"]


def doubled(x, *, implementation=None):
    """Twice x."""
    return _DOUBLED(implementation, x=x)


_DOUBLED = Op("doubled", __name__, ("reference",), fake=lambda x: torch.empty_like(x))
'''

OP_REFERENCE = """
from torch import Tensor


def doubled(x: Tensor) -> Tensor:
    return 2 * x
"""


def test_a_model_is_one_yaml_file(tmp_path, monkeypatch):
    (tmp_path / "own.yaml").write_text(MODEL)
    by_path = ssmzoo.build(tmp_path / "own.yaml")
    assert by_path(torch.zeros(1, 5, dtype=torch.long)).shape == (1, 5, 256)
    monkeypatch.setattr(config.catalogue, "configs_folder", lambda: tmp_path)  # as if it lay in configs/
    assert ssmzoo.list_models() == ["own"]
    assert ssmzoo.build("own").config == by_path.config


@pytest.fixture
def forget_shift():
    yield
    registry._registered.pop("shift", None)
    sys.modules.pop("ssmzoo.mixers.shift", None)


@pytest.mark.usefixtures("forget_shift")
def test_a_mixer_is_one_file(tmp_path, monkeypatch):
    (tmp_path / "shift.py").write_text(MIXER)
    monkeypatch.setattr(mixers, "__path__", [*mixers.__path__, str(tmp_path)])  # as if it lay in ssmzoo/mixers/
    info = ssmzoo.list_mixers()["shift"]
    assert (info.summary, info.options) == ("Every token sees the one before it.", {"bias": False})
    assert ssmzoo.build_mixer("shift", 8, bias=True)(torch.zeros(1, 3, 8)).shape == (1, 3, 8)
    model = ssmzoo.build("transformer++-tiny", pattern=["shift", "attention"])
    assert model(torch.zeros(1, 5, dtype=torch.long)).shape == (1, 5, 256)


def test_an_op_is_one_folder(tmp_path):
    copy = tmp_path / "ssmkernels"
    shutil.copytree(ROOT / "kernels" / "ssmkernels", copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "ops" / "doubled").mkdir()
    (copy / "ops" / "doubled" / "__init__.py").write_text(OP)
    (copy / "ops" / "doubled" / "reference.py").write_text(OP_REFERENCE)
    code = "import torch, ssmkernels; print(ssmkernels.doubled(torch.ones(1)), ssmkernels.OPS['doubled'].names)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert result.stdout == "tensor([2.]) ('reference',)\n", result.stderr
