"""The norms of transformers' layers on our op: the same numbers, where it is sooner."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest
import torch
from parity import close

from ssmzoo.integrations.transformers import accelerate, norms
from ssmzoo.integrations.transformers.acceleration import known_families

pytest.importorskip("transformers", reason="needs transformers, whose norms run here")
pytestmark = pytest.mark.mixer()


def modeling(family):
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


NORMS = sorted(
    (family, owner)
    for families in norms.KINDS.values()
    for family, owners in families.items()
    for owner in owners
    if family in known_families() and hasattr(modeling(family), owner)
)
EVERY = pytest.mark.parametrize(("family", "owner"), NORMS)
# Without weights, for a few states of every channel, or with dtypes that xLSTM chooses by its config
OTHERS = ("WeightlessRMSNorm", "UnweightedRMSNorm", "xLSTMRMSNorm")
D, GROUP = 24, 8


def made(family, owner, **options):
    torch.manual_seed(1)
    kind = getattr(modeling(family), owner)
    groups = {"group_size": GROUP, "n_groups": D // GROUP}
    known = inspect.signature(kind).parameters
    norm = kind(D, **{name: value for name, value in {**groups, **options}.items() if name in known})
    torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    return norm


def given(norm, x, gate):
    gated = "gate" in inspect.signature(norm.forward).parameters
    return (x, gate) if gated and gate is not None else (x,)


def found(norm, x, gate):
    leaves = [t.detach().clone().requires_grad_() for t in given(norm, x, gate)]
    y = norm(*leaves)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    return y.detach(), torch.autograd.grad((y * weight).sum(), [*leaves, norm.weight])


def never(*args, **kwargs):
    raise AssertionError("our op ran")


@EVERY
@pytest.mark.parametrize("shape", [(2, 5, D), (7, D), (2, 1, D)], ids=str)
@pytest.mark.parametrize("options", [{}, {"norm_before_gate": False}, {"activation": "sigmoid"}], ids=str)
def test_outputs_and_gradients(family, owner, shape, options, monkeypatch):
    norm = made(family, owner, **options)
    if not set(options) <= set(inspect.signature(type(norm)).parameters):
        return  # this norm has no such option
    x, gate = torch.randn(2, *shape)
    expected, gradients = found(norm, x, gate)
    calls = []
    ours = norms.rms_norm
    monkeypatch.setattr(norms, "FEW", 0)
    monkeypatch.setattr(norms, "rms_norm", lambda *args, **kwargs: calls.append(1) or ours(*args, **kwargs))
    with accelerate(family):
        y, others = found(norm, x, gate)
        strided = norm(*given(norm, x.mT.contiguous().mT, gate)).detach()
    alone = owner == "FalconH1RMSNormGated" and shape[-2] == 1  # whose result loses an axis in some versions
    assert len(calls) == (0 if alone else 2)
    close("y", y, expected)
    close("y of a view", strided, expected)
    for name, one, other in zip(("x", "gate or weight", "weight"), others, gradients, strict=False):
        close(f"the gradient of {name}", one, other)


@EVERY
def test_a_gate_may_be_missing_where_it_may_be_there(family, owner, monkeypatch):
    norm = made(family, owner)
    gate = inspect.signature(norm.forward).parameters.get("gate")
    if gate is None or gate.default is inspect.Parameter.empty:
        return
    x = torch.randn(2, 5, D)
    try:
        expected, _ = found(norm, x, None)
    except AttributeError as error:  # its gate has a default, and is needed
        expected = error
    monkeypatch.setattr(norms, "FEW", 0)
    with accelerate(family):
        if isinstance(expected, AttributeError):
            with pytest.raises(AttributeError, match=re.escape(str(expected))):
                found(norm, x, None)
        else:
            close("y", found(norm, x, None)[0], expected)


@EVERY
def test_small_and_other_tensors_stay_with_transformers(family, owner, monkeypatch):
    norm = made(family, owner)
    x, gate = torch.randn(2, 2, 5, D)
    expected, _ = found(norm, x, gate)
    narrow = made(family, owner).bfloat16()(*given(norm, x.bfloat16(), gate.bfloat16()))
    wide = made(family, owner).double()(*given(norm, x.double(), gate.double()))
    monkeypatch.setattr(norms, "rms_norm", never)
    with accelerate(family):
        assert torch.equal(found(norm, x, gate)[0], expected)  # few numbers
        monkeypatch.setattr(norms, "FEW", 0)
        assert torch.equal(made(family, owner).bfloat16()(*given(norm, x.bfloat16(), gate.bfloat16())), narrow)
        assert torch.equal(made(family, owner).double()(*given(norm, x.double(), gate.double())), wide)
        with pytest.raises(AssertionError, match="our op ran"):
            norm(*given(norm, x, gate))


def test_weights_of_other_types_stay_with_transformers(monkeypatch):
    class Spread(torch.Tensor):
        pass

    norm, x = made("bamba", "BambaRMSNorm"), torch.randn(2, 5, D)
    expected = norm(x)
    monkeypatch.setattr(norms, "FEW", 0)
    monkeypatch.setattr(norms, "rms_norm", never)
    with accelerate("bamba"):
        assert torch.equal(norm(x.as_subclass(Spread)), expected)
        compiled = torch.compile(norm, backend="eager")
        assert torch.equal(compiled(x), expected)


@pytest.mark.parametrize("family", sorted({family for family, _ in NORMS}))
def test_every_norm_of_a_family_is_there(family):
    there = {name for name, kind in vars(modeling(family)).items() if inspect.isclass(kind) and "RMSNorm" in name}
    there -= {name for name in there if getattr(modeling(family), name).__module__ != modeling(family).__name__}
    assert there - {name for name in there if name.endswith(OTHERS)} == {o for f, o in NORMS if f == family}
