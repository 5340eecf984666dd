"""Backward passes of every implementation on a CPU: twice, inside of autocast, and of gradients of unusual kinds."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import ssmkernels
from ssmkernels.check.running import is_real_or_complex, with_gradients
from ssmkernels.check.spec import Draw, spec_of, tensors_of
from ssmkernels.core.dispatch import explain
from ssmkernels.core.names import OPS

# Changes of each op's base case: small, and together with all arguments that have gradients.
ROWS: dict[str, list[dict[str, Any]]] = {
    "attention": [
        {"l": 5, "k": 3},
        {"l": 5, "k": 3, "softcap": 2.0},
        {"l": 5, "k": 3, "lse": True, "softcap": 2.0, "alibi": True, "sinks": True, "window": (2, 0)},
        {"l": 4, "m": 7, "k": 3, "mask": "heads", "lse": True},
        {"b": 1, "l": 21, "k": 2, "packed": True, "window": (3, 0), "alibi": True},
    ],
    "causal_conv1d": [{"l": 5, "d": 2}, {"b": 1, "l": 21, "d": 2, "packed": True}],
    "decode_attention": [{"m": 5, "k": 3}],
    "diagonal_kernel": [
        {"length": 6, "d": 2},
        {"length": 6, "d": 2, "discretization": "dss", "decay": -1.0},
        {"length": 6, "d": 2, "complex": False},
    ],
    "dplr_kernel": [{"length": 6, "d": 2}, {"length": 6, "d": 2, "rank": 2, "complex": False}],
    "delta_rule": [
        {"l": 4, "h": 2, "g": 1, "k": 2, "v": 2},
        {"b": 1, "l": 21, "h": 2, "g": 1, "k": 2, "v": 2, "decay": "k", "packed": True},
        {"l": 4, "h": 2, "g": 1, "k": 2, "v": 2, "decay": "", "beta": 0.0},
        {"l": 4, "h": 2, "g": 1, "k": 2, "v": 2, "decay": "k", "beta": 2.0, "state": False},
        {"b": 1, "l": 21, "h": 2, "g": 1, "k": 2, "v": 2, "decay": "h", "packed": True, "beta": 2.0},
    ],
    "fft_conv": [
        {"l": 6, "d": 2, "l_k": 4, "l_r": 3, "gate": True},
        {"b": 1, "l": 21, "d": 2, "packed": True, "l_k": 4, "gate": True},
    ],
    "linear_attention": [
        {"l": 4, "h": 2, "g": 1, "k": 2, "v": 2},
        {"b": 1, "l": 21, "h": 2, "g": 1, "k": 2, "v": 2, "bonus": True, "decay": "token", "packed": True},
    ],
    "generalized_delta_rule": [
        {"l": 4, "h": 2, "k": 3, "v": 2},
        {"b": 1, "l": 21, "h": 1, "k": 2, "v": 2, "packed": True},
    ],
    "linear_recurrence": [
        {"l": 4, "d": 2},
        {"l": 4, "d": 2, "fixed": True, "log": True},
        {"l": 4, "d": 2, "complex": True, "decay": "complex", "log": True},
        {"b": 1, "l": 21, "d": 2, "packed": True, "log": True},
    ],
    "mamba3_scan": [
        {"l": 3, "h": 2, "g": 1, "p": 2, "n": 3, "a": 1, "r": 2},
        {"b": 1, "l": 21, "h": 1, "g": 1, "p": 2, "n": 2, "a": 1, "packed": True},
    ],
    "mlstm": [{"l": 3, "h": 1, "k": 2, "v": 3}, {"b": 1, "l": 21, "h": 1, "k": 2, "v": 2, "packed": True}],
    "quantized_linear": [
        {"k": 40, "o": 3},
        {"k": 40, "o": 3, "activations": "int8"},
        {"bits": "same", "zeros": False, "group_size": None, "k": 5, "o": 3},
    ],
    "rglru_gates": [{"l": 3, "h": 1, "p": 2}],
    "rms_norm": [
        {"shape": (2, 3, 4)},
        {"shape": (2, 3, 4), "before": False, "group_size": 2},
        {"shape": (2, 4), "gate": False, "residual": None},
    ],
    "selected_attention": [{"l": 9, "h": 2, "h_kv": 1, "g": 1, "k": 2, "lse": True}],
    "selective_scan": [
        {"l": 4, "d": 2, "n": 2},
        {"l": 4, "d": 2, "n": 2, "complex": True, "fixed": "BC"},
        {"b": 1, "l": 21, "d": 2, "n": 2, "packed": True},
    ],
    "slstm": [{"l": 3, "h": 1, "p": 2}, {"b": 1, "l": 21, "h": 1, "p": 2, "packed": True}],
    "ssd": [
        {"l": 4, "h": 2, "g": 1, "p": 2, "n": 2},
        {"b": 1, "l": 21, "h": 2, "g": 1, "p": 2, "n": 2, "D": "hp", "chunk": 4, "packed": True},
    ],
    "swiglu": [{"shape": (2, 3, 4)}, {"shape": (4,), "scale": 1.0}],
}

# PyTorch's own fused kernel has no second derivative and says so; with some masks PyTorch takes another one that has.
MAY_REFUSE = {("attention", "sdpa"), ("decode_attention", "sdpa")}

# Their backward passes are PyTorch's formulas, which follow the autocast that they run in as everywhere.
PYTORCH_S = {
    ("ssd", "tiled"),
    ("linear_attention", "tiled"),
    ("mamba3_scan", "tiled"),
    ("mlstm", "tiled"),
    ("dplr_kernel", "tiled"),
    ("dplr_kernel", "cauchy"),
    ("diagonal_kernel", "tiled"),
}


def _able() -> list[Any]:
    """Op, implementation and row, where the implementation can run the row with gradients on a CPU."""
    found = []
    for op in OPS:
        if not spec_of(op).differentiable:
            continue
        for row in ROWS[op]:
            able = explain(spec_of(op).function(), **with_gradients(_inputs(op, row))).able
            found += [pytest.param(op, name, row, id=f"{op}-{name}-{row}") for name in able]
    return found


def _inputs(op: str, row: Mapping[str, Any], dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    return spec_of(op).inputs(spec_of(op).case(row), dtype, "cpu", 0)


def _results(op: str, implementation: str, arguments: Mapping[str, Any]) -> list[Tensor]:
    returned = spec_of(op).function()(**arguments, implementation=implementation)
    return [t for t in tensors_of(returned) if t.requires_grad]


def _like(tensors: Sequence[Tensor], seed: int) -> list[Tensor]:
    draw = Draw(seed)
    return [(draw.complex_normal if t.is_complex() else draw.normal)(*t.shape).requires_grad_() for t in tensors]


@functools.cache
def _second(
    op: str, implementation: str, row: tuple[tuple[str, Any], ...], dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """The derivatives of a random sum of first derivatives, by every argument and by every incoming gradient."""
    arguments = with_gradients(_inputs(op, dict(row), dtype))
    leaves = {name: value for name, value in arguments.items() if is_real_or_complex(value)}
    results = _results(op, implementation, arguments)
    incoming = [g.detach().to(r.dtype).requires_grad_() for g, r in zip(_like(results, 1), results, strict=True)]
    first = torch.autograd.grad(results, list(leaves.values()), incoming, create_graph=True, allow_unused=True)
    reached = [g for g in first if g is not None and g.requires_grad]
    inputs = leaves | {f"incoming {i}": g for i, g in enumerate(incoming)}
    weights = [w.detach().to(g.dtype) for w, g in zip(_like(reached, 2), reached, strict=True)]
    second = torch.autograd.grad(reached, list(inputs.values()), weights, allow_unused=True)
    return {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(inputs.items(), second, strict=True)}


@pytest.mark.parametrize(("op", "implementation", "row"), _able())
def test_second_derivatives_are_the_reference_s_or_refused(op, implementation, row):
    key = tuple(row.items())
    wanted = _second(op, "reference", key)
    try:
        second = _second(op, implementation, key)
    except RuntimeError as refusal:
        if (op, implementation) in MAY_REFUSE and 'inside ssmkernels.use("reference") there is one' in str(refusal):
            return
        raise
    for name, found in second.items():
        torch.testing.assert_close(found, wanted[name], rtol=1e-7, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.op
@pytest.mark.slow
def test_second_derivatives_of_triton_s_kernels(interpret):
    """In float32, which all of them take."""
    program = f"""
import sys
import torch
sys.path.insert(0, {os.path.dirname(__file__)!r})
from ssmkernels import OPS
from test_double_backward import ROWS, _inputs, _second, explain, spec_of, with_gradients

checked = set()
for op, rows in ROWS.items():
    for row in rows:
        if "triton" in explain(spec_of(op).function(), **with_gradients(_inputs(op, row, torch.float32))).able:
            key = tuple(row.items())
            found, wanted = _second(op, "triton", key, torch.float32), _second(op, "reference", key)
            for name, value in found.items():
                exact = wanted[name]
                assert (value - exact).norm() <= 1e-4 * exact.norm() + 1e-6, (op, row, name, value, exact)
            checked.add(op)
able = {{op for op in ROWS if "triton" in OPS[op].names}}
assert checked == able - {{"decode_attention"}}, checked  # which has no gradient
"""
    interpret(program)


@pytest.mark.parametrize(("op", "implementation"), sorted({p.values[:2] for p in _able()} - MAY_REFUSE))
def test_gradgradcheck(op, implementation):
    arguments = with_gradients(_inputs(op, ROWS[op][0]))
    leaves = {name: value for name, value in arguments.items() if is_real_or_complex(value)}

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(_results(op, implementation, arguments | dict(zip(leaves, values, strict=True))))

    assert torch.autograd.gradgradcheck(function, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize(("op", "implementation", "row"), _able())
def test_gradients_that_are_batched_or_zero_or_carry_tangents(op, implementation, row):
    arguments = with_gradients(_inputs(op, row))
    leaves = [value for value in arguments.values() if is_real_or_complex(value)]
    results = _results(op, implementation, arguments)
    one, other = ([g.detach().to(r.dtype) for g, r in zip(_like(results, i), results, strict=True)] for i in (1, 2))

    def backward(incoming: Sequence[Tensor], batched: bool = False) -> list[Tensor]:
        options = {"retain_graph": True, "allow_unused": True, "is_grads_batched": batched}
        found = torch.autograd.grad(results, leaves, incoming, **options)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]

    wanted, along = backward(one), backward(other)
    together = backward([torch.stack(pair) for pair in zip(one, other, strict=True)], batched=True)
    for pair, first, second in zip(together, wanted, along, strict=True):
        if pair.ndim > first.ndim:  # else no result depends on it
            torch.testing.assert_close(pair, torch.stack([first, second]))
    for g in backward([torch._efficientzerotensor(r.shape, dtype=r.dtype) for r in results]):
        assert not g.any()
    with torch.autograd.forward_ad.dual_level():
        try:
            found = backward([torch.autograd.forward_ad.make_dual(*pair) for pair in zip(one, other, strict=True)])
        except NotImplementedError as refusal:  # PyTorch's formulas have no rule for silu's or its attention's gradient
            if re.search("silu_backward|scaled_dot_product", str(refusal)):
                return
            raise
        for g, exact in zip(found, along, strict=True):
            tangent = torch.autograd.forward_ad.unpack_dual(g).tangent
            torch.testing.assert_close(torch.zeros_like(exact) if tangent is None else tangent, exact)


@pytest.mark.parametrize("implementation", ["fft", "reference"])
def test_an_argument_that_is_computed_from_another(implementation):
    arguments = _inputs("fft_conv", ROWS["fft_conv"][0])

    def function(u: Tensor, kernel: Tensor) -> Tensor:
        gate = u.sin()
        return ssmkernels.fft_conv(u, kernel, gate=gate, implementation=implementation)

    leaves = [arguments[name].requires_grad_() for name in ("u", "kernel")]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_third_derivatives():
    arguments = _inputs("diagonal_kernel", ROWS["diagonal_kernel"][0])

    def derivative(implementation: str) -> Tensor:
        dt = arguments["dt"].clone().requires_grad_()
        y = ssmkernels.diagonal_kernel(**arguments | {"dt": dt}, implementation=implementation).sum()
        for _ in range(3):
            (y,) = torch.autograd.grad(y.sum(), dt, create_graph=True)
        return y.detach()

    torch.testing.assert_close(derivative("cpu"), derivative("reference"))


@pytest.mark.parametrize(("op", "implementation", "row"), _able())
def test_backward_inside_of_autocast(op, implementation, row):
    def gradients(autocast: bool) -> list[Tensor | None]:
        arguments = with_gradients(_inputs(op, row, torch.float32))
        leaves = [value for value in arguments.values() if is_real_or_complex(value)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            results = _results(op, implementation, arguments)
            incoming = [g.to(r.dtype) for g, r in zip(_like(results, 1), results, strict=True)]
            return list(torch.autograd.grad(results, leaves, incoming, allow_unused=True))

    for inside, outside in zip(gradients(True), gradients(False), strict=True):
        assert (inside is None) == (outside is None)
        if inside is not None:
            assert inside.dtype == outside.dtype
            if implementation in ("reference", "sdpa") or (op, implementation) in PYTORCH_S:
                assert (inside - outside).norm() <= 2**-6 * outside.norm()  # bfloat16 has 8 bits
            else:
                assert torch.equal(inside, outside)
