"""The gated products of transformers' MLPs on our op: the same numbers, and nobody's say is passed over."""

from __future__ import annotations

import importlib
import inspect
from types import SimpleNamespace

import pytest
import torch
from parity import close
from torch import nn

from ssmkernels import native
from ssmzoo.integrations.transformers import accelerate, gated_products
from ssmzoo.integrations.transformers.lookups import published
from ssmzoo.integrations.transformers.methods import METHODS

pytest.importorskip("transformers", reason="needs transformers, whose MLPs run here")
pytestmark = [
    pytest.mark.mixer(),
    pytest.mark.op("swiglu"),
    pytest.mark.skipif(bool(native.missing()), reason=f"needs the native CPU library: {native.missing()}"),
]
D = 24


def modeling(family):
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


KNOWN = {*published(), *METHODS}
MLPS = sorted(
    (family, owner)
    for families in gated_products.KINDS.values()
    for family, owner in families.items()
    if family in KNOWN and hasattr(modeling(family), owner)
)
EVERY = pytest.mark.parametrize(("family", "owner"), MLPS)


def made(family, owner, activation="silu"):
    torch.manual_seed(1)
    sizes = {"hidden_size": D, "intermediate_size": 2 * D, "shared_intermediate_size": 2 * D, "hidden_act": activation}
    config = SimpleNamespace(**sizes, mlp_bias=True, mlp_multipliers=[0.7, 1.3], add_bias_linear=True)
    kind = getattr(modeling(family), owner)
    wanted = inspect.signature(kind).parameters
    return kind(config, **({"intermediate_size": 2 * D} if "intermediate_size" in wanted else {})).float()


def activation_of(mlp):
    return "activation" if hasattr(mlp, "activation") else "act_fn"


def found(mlp, x):
    x = x.detach().requires_grad_()
    y = mlp(x)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    return y.detach(), *torch.autograd.grad((y * weight).sum(), [x, *mlp.parameters()])


@pytest.fixture
def calls(monkeypatch):
    made, ours = [], gated_products.swiglu
    monkeypatch.setattr(gated_products, "FEW", 0)
    monkeypatch.setattr(gated_products, "swiglu", lambda *args, **options: made.append(1) or ours(*args, **options))
    return made


def same(others, expected):
    for number, (one, other) in enumerate(zip(others, expected, strict=True)):
        close(f"result {number}", one, other)


@EVERY
def test_outputs_and_gradients(family, owner, calls):
    mlp, x = made(family, owner), torch.randn(2, 5, D)
    expected = found(mlp, x)
    with accelerate(family):
        same(found(mlp, x), expected)
        assert len(calls) == 1
    found(mlp, x)
    assert len(calls) == 1  # restored


@EVERY
def test_others_stay_with_transformers(family, owner, calls, monkeypatch):
    """Half precision, float64, other activations, autocast, compilers and few numbers."""
    x = torch.randn(2, 5, D)
    cases = [(made(family, owner).to(dtype), x.to(dtype)) for dtype in (torch.bfloat16, torch.float64)]
    cases.append((made(family, owner, "gelu"), x))
    expected = [found(*case) for case in cases]
    mlp = made(family, owner)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = mlp(x).detach()
    plain = mlp(x).detach()
    with accelerate(family):
        for case, results in zip(cases, expected, strict=True):
            assert all(map(torch.equal, found(*case), results))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(mlp(x), narrow)
        torch.compiler.reset()  # which gives up after a few classes with the same code
        assert torch.equal(torch.compile(mlp, backend="eager")(x), plain)
        monkeypatch.setattr(gated_products, "FEW", x.numel() + 1)
        assert torch.equal(mlp(x), plain)
    assert not calls


@EVERY
def test_maps_are_called_as_modules(family, owner, calls):
    mlp, x = made(family, owner), torch.randn(2, 5, D)
    seen = []
    maps = [module for module in mlp.modules() if isinstance(module, nn.Linear)]
    for module in maps:
        module.register_forward_hook(lambda module, _, y: seen.append(module) or 2 * y)
    expected = found(mlp, x)
    assert len(seen) == len(maps)
    with accelerate(family):
        same(found(mlp, x), expected)
    assert sorted(map(id, seen)) == sorted(2 * [*map(id, maps)])
    assert len(calls) == 1


@EVERY
@pytest.mark.parametrize("how", ["hook", "pre-hook", "hook on all modules", "forward", "another module", "class"])
def test_nobody_who_changes_the_activation_is_passed_over(family, owner, how, calls, monkeypatch):
    mlp, x = made(family, owner), torch.randn(2, 5, D)
    activation, handle = getattr(mlp, activation_of(mlp)), None
    if how == "hook":
        activation.register_forward_hook(lambda *given: 2 * given[-1])
    elif how == "pre-hook":
        activation.register_forward_pre_hook(lambda _, given: (given[0] + 1,))
    elif how == "hook on all modules":
        changed = lambda module, _, y: 2 * y if module is activation else y  # noqa: E731
        handle = nn.modules.module.register_module_forward_hook(changed)
    elif how == "forward":
        activation.forward = torch.tanh
    elif how == "another module":
        setattr(mlp, activation_of(mlp), nn.Tanh())
    else:
        monkeypatch.setattr(type(activation), "forward", lambda self, gate: torch.tanh(gate))
    try:
        expected = found(mlp, x)
        with accelerate(family):
            assert all(map(torch.equal, found(mlp, x), expected))
    finally:
        if handle is not None:
            handle.remove()
    assert not calls


@pytest.mark.parametrize("family", sorted(KNOWN))
def test_every_such_mlp_is_there(family):
    """Those whose classes gate one map by another, but Inkling's, which multiplies its result by a weight."""
    named = {owner for families in gated_products.KINDS.values() for f, owner in families.items() if f == family}
    try:
        module = modeling(family)
    except ImportError:
        return
    for name, kind in vars(module).items():
        if inspect.isclass(kind) and kind.__module__ == module.__name__ and family != "inkling":
            assert ("self.act_fn(self.gate_proj(x)" in inspect.getsource(kind)) <= (name in named), name
