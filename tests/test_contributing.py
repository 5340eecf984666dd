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

OP = """
"An exponential moving average."

from torch import Tensor

from ssmkernels.core.declare import op
from ssmkernels.core.steps import step_of

__all__ = ["smooth", "smooth_step"]


@op(
    shapes="x: b l d; decay: d; initial_state: s d",
    returns="y: b l d; final_state: s d: sums if return_final_state",
    wide="decay",
    implementations=("tiled", "reference"),
)
def smooth(
    x: Tensor,
    decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    "h_t = decay h_{t-1} + (1 - decay) x_t, which is also the output."


@step_of(smooth, implementations=("reference",))
def smooth_step(state: Tensor, x: Tensor, decay: Tensor, *, implementation: str | None = None) -> Tensor:
    "One token of smooth."
"""

OP_REFERENCE = """
from ssmkernels.core.recurrence import recurrence
from ssmkernels.core.validate import precision


@recurrence
def compute(h, x, decay):
    wide = precision(x)
    decay = decay.to(wide)
    h = decay * h + (1 - decay) * x.to(wide)
    return h, h
"""

OP_TILED = """
import torch

from ssmkernels.core.validate import precision


def unsupported(a):
    return None if a.cu_seqlens is None else "packed sequences"


def compute(a):
    "The sum over all earlier inputs at once, by a matrix of weights."
    wide, l = precision(a.x), a.x.shape[1]
    x, decay = a.x.to(wide), a.decay.to(wide)
    lag = torch.arange(l)[:, None] - torch.arange(l)  # (l l)
    weights = torch.where(lag[..., None] >= 0, decay ** lag.clamp(min=0)[..., None], 0) * (1 - decay)  # (l l d)
    y = torch.einsum("tsd,bsd->btd", weights, x)
    if a.initial_state is not None:
        y = y + decay ** torch.arange(1, l + 1)[:, None] * a.initial_state[:, None]
    first = torch.zeros_like(y[:, :0].sum(1)) if a.initial_state is None else a.initial_state.clone()
    return y.to(a.x.dtype), y[:, -1].clone() if l else first
"""

OP_SPEC = """
from ssmkernels.check.spec import Spec

BASE = {"b": 2, "l": 9, "d": 3, "state": True, "packed": False}


def make(case, draw):
    b, l, d = (case[key] for key in "bld")
    borders = draw.borders(l) if case["packed"] else None
    s = b if borders is None else len(borders) - 1
    return {
        "x": draw.normal(b, l, d),
        "decay": draw.uniform(0.5, 0.9, d),
        "initial_state": draw.normal(s, d) if case["state"] else None,
        "return_final_state": True,
        "cu_seqlens": borders,
    }


SPECS = (
    Spec(
        op="smooth",
        base=BASE,
        rows=({"l": 1}, {"state": False}, {"b": 1, "packed": True}),
        make=make,
        flops=lambda case: 3.0 * case["b"] * case["l"] * case["d"],
        bench={"l": 64},
        exact=(),
    ),
)
"""

# What a new op gets by being declared: the check, opcheck, torch.compile, autocast, and calls of random kinds.
OP_PROOF = """
import torch

import ssmkernels
from ssmkernels.check.spec import spec_of
from ssmkernels.check.ways import Calls
from ssmkernels.testing import check

for name in ("tiled", "reference"):
    report = check("smooth", name)
    assert len(report.checks) > 100, report

spec = spec_of("smooth")
arguments = spec.inputs(spec.case({}), torch.float32, "cpu", 0)
arguments["x"].requires_grad_()
for name in ("tiled", "reference"):
    y, h = ssmkernels.smooth(**arguments, implementation=name)
    implementation = ssmkernels.OPS["smooth"].implementation(name)
    takes = [arguments[key] for key in ssmkernels.OPS["smooth"].declared.takes]
    torch.library.opcheck(implementation.function.operator, takes)
    compiled = torch.compile(ssmkernels.smooth, fullgraph=True, backend="aot_eager")
    for result, expected in zip(compiled(**arguments, implementation=name), (y, h)):
        torch.testing.assert_close(result, expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ssmkernels.smooth(**arguments, implementation=name), (y, h), rtol=0, atol=0)

state = arguments["initial_state"].clone()
last = ssmkernels.smooth_step(state, arguments["x"][:, 0].detach(), arguments["decay"])
torch.testing.assert_close(last, ssmkernels.smooth(**arguments)[0][:, 0].detach())
try:
    ssmkernels.smooth(arguments["x"], arguments["decay"][:2])
except ValueError as error:
    assert str(error) == "smooth: `decay` must have shape (d) with d=3; got (2,)", error
print("proven")
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
    folder = copy / "ops" / "smooth"
    folder.mkdir()
    files = {"__init__": OP, "reference": OP_REFERENCE, "tiled": OP_TILED, "spec": OP_SPEC}
    for name, text in files.items():
        (folder / f"{name}.py").write_text("from __future__ import annotations\n" + text)
    result = subprocess.run(
        [sys.executable, "-c", OP_PROOF],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert result.stdout == "proven\n", result.stderr
