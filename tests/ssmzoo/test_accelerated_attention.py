"""Attention in transformers' layers by our kernel: the same numbers, where it is sooner."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from parity import close

from ssmkernels import native
from ssmzoo.integrations.transformers import accelerate, attentions
from ssmzoo.integrations.transformers.lookups import published
from ssmzoo.integrations.transformers.methods import METHODS

transformers = pytest.importorskip("transformers", reason="needs transformers, whose attention runs here")
pytestmark = [
    pytest.mark.mixer("attention"),
    pytest.mark.skipif(bool(native.missing()), reason=f"needs the native CPU library: {native.missing()}"),
]
HERE = sorted(attentions.FAMILIES & {*published(), *METHODS})
LONG = 2 * attentions.FEW
LAYER = SimpleNamespace(is_causal=True, num_key_value_groups=2)


def table(family="bamba"):
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}").ALL_ATTENTION_FUNCTIONS


def given(length=LONG, keys=None, values=16):
    torch.manual_seed(0)
    shapes = (1, 4, length, 16), (1, 2, keys or length, 16), (1, 2, keys or length, values)
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def shared():
    """Keys and values for all sequences of a batch."""
    q, k, v = given()
    return q.detach().repeat(2, 1, 1, 1).requires_grad_(), k, v


def found(q, k, v, mask=None, layer=LAYER, **options):
    y, _ = table().get_interface("sdpa", None)(layer, q, k, v, mask, **options)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    return y.detach(), *torch.autograd.grad((y * weight).sum(), (q, k, v))


@pytest.fixture
def calls(monkeypatch):
    made, ours = [], attentions.attention
    monkeypatch.setattr(attentions, "attention", lambda *args, **options: made.append(1) or ours(*args, **options))
    return made


@pytest.mark.parametrize("values", [16, 24])
@pytest.mark.parametrize("options", [{}, {"scaling": 0.3}, {"is_causal": True, "sliding_window": None}], ids=str)
def test_outputs_and_gradients(options, values, calls):
    tensors = given(values=values)
    expected = found(*tensors, **options)
    with accelerate("bamba"):
        close("y, dq, dk, dv", torch.cat([t.flatten() for t in found(*tensors, **options)]), _flat(expected))
    assert len(calls) == 1


def _flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


OTHERS = {
    "few tokens": (given(8), {}),
    "more keys than queries": (given(LONG, LONG + 3), {}),
    "keys for all sequences": (shared(), {}),
    "not causal": (given(), {"is_causal": False}),
    "a layer that is not causal": (given(), {"layer": SimpleNamespace(is_causal=False, num_key_value_groups=2)}),
    "a mask": (given(), {"mask": torch.ones(1, 1, LONG, LONG).tril().bool()}),
    "a bias": (given(), {"position_bias": torch.zeros(1, 4, LONG, LONG)}),
    "float64": ([t.detach().double().requires_grad_() for t in given()], {}),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_calls_stay_with_transformers(what, calls):
    tensors, options = OTHERS[what]
    expected = found(*tensors, **options)
    with accelerate("bamba"):
        assert all(map(torch.equal, found(*tensors, **options), expected))
    assert not calls


def test_dropout_and_compilers_stay_with_transformers(calls):
    q, k, v = given()
    with accelerate("bamba"):
        torch.manual_seed(1)
        one = found(q, k, v, dropout=0.5)[0]
        compiled = torch.compile(lambda *t: table().get_interface("sdpa", None)(LAYER, *t, None)[0], backend="eager")
        two = compiled(q, k, v)
    assert not calls
    assert not torch.allclose(one, two)


def test_other_implementations_are_what_they_were():
    def eager(*args):
        return None

    before = {name: table().get_interface(name, eager) for name in ("eager", "flex_attention", "sdpa")}
    with accelerate("bamba"):
        assert table().get_interface("eager", eager) is eager
        assert table().get_interface("flex_attention", eager) is before["flex_attention"]
        assert table().get_interface("sdpa", eager) is not before["sdpa"]
        assert table()["sdpa"] is before["sdpa"]
        with pytest.raises(KeyError, match="nothing"):
            table().get_interface("nothing", eager)
        other = importlib.import_module("transformers.models.llama.modeling_llama").ALL_ATTENTION_FUNCTIONS
        assert other.get_interface("sdpa", eager) is before["sdpa"]
    assert table().get_interface("sdpa", eager) is before["sdpa"]


def test_every_family_with_attention_is_known():
    there = set()
    for family in {*published(), *METHODS}:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        if re.search(r"\bALL_ATTENTION_FUNCTIONS\b", Path(module.__file__).read_text()):
            there.add(family)
    assert there == set(HERE)
