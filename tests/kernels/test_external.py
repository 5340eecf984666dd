"""The packages mamba_ssm and causal_conv1d as implementations, with stand-ins that have their signatures and refusals.

The packages themselves need a GPU. What is tested is all around them: layouts, dtypes, gradients, refusals, dispatch.
"""

from __future__ import annotations

import importlib.machinery
import sys

import pytest
import torch
import torch.nn.functional as F

import ssmkernels
from ssmkernels import causal_conv1d, explain, selective_scan
from ssmkernels.bench.peers import peers_of
from ssmkernels.check.running import is_real_or_complex, with_gradients
from ssmkernels.check.spec import spec_of, tensors_of
from ssmkernels.testing import check

HALF = (torch.float16, torch.bfloat16)


def selective_scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):
    """mamba_ssm's, with what its CUDA code demands; no gradient goes through the last state."""
    (b, d, l), n = u.shape, A.shape[1]
    assert u.dtype in (torch.float32, *HALF)
    assert delta.dtype == u.dtype
    assert A.dtype in (torch.float32, torch.complex64)
    assert all(t is None or (t.dtype == torch.float32 and t.shape == (d,)) for t in (D, delta_bias))
    assert z is None or (z.dtype == u.dtype and z.shape == u.shape)
    groups = B.shape[1] if B.ndim == 4 else 1
    for t in (B, C):
        assert t.dtype == (A.dtype if t.ndim == 2 else u.dtype)
        assert t.shape == ((d, n) if t.ndim == 2 else (b, groups, n, 2 * l if A.is_complex() else l))

    def each_step(t):  # (b d n l)
        if t.ndim == 2:
            return t[None, ..., None].expand(b, d, n, l)
        t = t.float().repeat_interleave(d // groups, dim=1)
        return torch.view_as_complex(t.unflatten(-1, (l, 2)).contiguous()) if A.is_complex() else t

    B, C = each_step(B), each_step(C)
    x, step = u.float(), delta.float()
    step = step if delta_bias is None else step + delta_bias[:, None]
    step = F.softplus(step) if delta_softplus else step
    h, ys = torch.zeros(b, d, n, dtype=A.dtype), []
    for t in range(l):
        h = torch.exp(step[..., t, None] * A) * h + (step[..., t] * x[..., t])[..., None] * B[..., t]
        y = (h * C[..., t]).sum(-1)
        ys.append(2 * y.real if A.is_complex() else y)
    y = torch.stack(ys, dim=-1)
    y = y if D is None else y + D[:, None] * x
    y = (y if z is None else y * F.silu(z.float())).to(u.dtype)
    return (y, h.detach()) if return_last_state else y


def causal_conv1d_fn(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    """causal_conv1d's, with what its CUDA code demands of a layout with the channels last."""
    (b, d, l), w = x.shape, weight.shape[1]
    assert x.dtype in (torch.float32, *HALF)
    assert x.stride(1) == 1
    assert x.stride(2) > 1
    assert d % 8 == 0
    assert x.stride(0) % 8 == 0
    assert x.stride(2) % 8 == 0
    assert x.data_ptr() % 16 == 0
    assert b * x.stride(0) + l * x.stride(2) < 2**32
    assert 2 <= w <= 4
    assert bias is None or bias.dtype == weight.dtype
    assert not return_final_states
    before = torch.zeros(b, d, w - 1) if initial_states is None else initial_states
    if initial_states is not None:
        assert initial_states.dtype == x.dtype
        assert initial_states.shape == (b, d, w - 1)
        assert initial_states.stride(1) == 1
    inputs = torch.cat([before, x.float()], dim=2).unfold(2, w, 1)  # (b d l w)
    if seq_idx is not None:
        assert seq_idx.dtype == torch.int32
        assert seq_idx.shape == (b, l)
        numbers = torch.cat([torch.full((b, w - 1), -1), seq_idx], dim=1).unfold(1, w, 1)
        inputs = torch.where((numbers == seq_idx[..., None])[:, None], inputs, 0)
    y = (inputs * weight.float()[:, None]).sum(-1)
    y = y if bias is None else y + bias.float()[:, None]
    return (F.silu(y) if activation in ("silu", "swish") else y).to(x.dtype)


@pytest.fixture
def packages(gpu, stand_in, monkeypatch):
    interface = stand_in("mamba_ssm.ops.selective_scan_interface", selective_scan_fn=selective_scan_fn)
    for module in (
        stand_in("mamba_ssm"),
        stand_in("mamba_ssm.ops"),
        interface,
        stand_in("causal_conv1d", causal_conv1d_fn=causal_conv1d_fn),
    ):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for op, package in OPS.items():
        assert ssmkernels.OPS[op].why_not(package) == ""  # and remembered
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # what else asks for a GPU shall not find one


OPS = {"selective_scan": "mamba_ssm", "causal_conv1d": "causal_conv1d"}
BOTH = pytest.mark.parametrize(("op", "package"), OPS.items())
# Rows of the spec, as far as the package can do them: it does other widths, and multiples of eight channels alone.
ROWS = {
    "selective_scan": None,
    "causal_conv1d": [
        {"d": 8, "state": False, **row}
        for row in (
            {},
            {"w": 2},
            {"w": 3, "activation": None},
            {"bias": False},
            {"l": 1},
            {"l": 2},
            {"b": 1, "packed": True, "l": 21},
            {"layout": "strided"},
            {"layout": "far", "b": 1, "l": 3},
            {"d": 24},
            {"state": True},
            {"state": True, "l": 1},
        )
    ],
}


@BOTH
def test_it_passes_the_whole_check(op, package, packages):
    report = check(op, package, cases=ROWS[op], quick=True)
    assert report.checks
    assert {case for case, dtype, why in report.skipped if dtype == "float64"}  # refused, and told


@pytest.mark.parametrize(("op", "package"), [("selective_scan", "mamba_ssm"), ("causal_conv1d", "causal_conv1d")])
def test_a_second_derivative_is_refused(op, package, packages):
    spec = spec_of(op)
    row = {"b": 1, "l": 5, "d": 8, "state": False}
    arguments = with_gradients(spec.inputs(spec.case(row), torch.float32, "cpu", 0))
    y = tensors_of(spec.function()(**arguments, implementation=package))[0]
    leaves = [value for value in arguments.values() if is_real_or_complex(value)]
    torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    with pytest.raises(RuntimeError, match=f"{package}'s kernels have no second derivative"):
        torch.autograd.grad(y.sum(), leaves, create_graph=True)


def test_what_was_checked(packages):
    """The check is not quiet because everything was skipped."""
    maps = {"g", "complex", "fixed"}
    rows = [
        {**row, "state": False} for row in spec_of("selective_scan").rows if maps & set(row) and "packed" not in row
    ]
    assert maps <= {key for row in rows for key in row}
    report = check("selective_scan", "mamba_ssm", cases=rows, dtypes=[torch.float32])
    assert {why for *_, why in report.skipped} <= {"groups of `C` beside a fixed `B`"}
    assert check("causal_conv1d", "causal_conv1d", cases=ROWS["causal_conv1d"], dtypes=[torch.float32]).skipped == []


def scan_arguments(randn, dtype=torch.float32, l=7):
    return {
        "u": randn(2, l, 6, dtype=dtype),
        "delta": randn(2, l, 6, dtype=dtype),
        "A": -randn(6, 3, dtype=torch.float32).abs(),
        "B": randn(2, l, 2, 3, dtype=dtype),
        "C": randn(2, l, 3, dtype=dtype),
        "delta_softplus": True,
    }


def conv_arguments(randn, dtype=torch.float32, l=7):
    return {"x": randn(1, l, 8, dtype=dtype), "weight": randn(8, 4, dtype=dtype), "bias": randn(8, dtype=torch.float32)}


def test_groups_of_one_map_beside_another_without(packages, randn, run, assert_same):
    made = scan_arguments(randn)
    found, expected = (
        run(lambda **a: selective_scan(**a, return_final_state=True, implementation=name), **made)  # noqa: B023
        for name in ("mamba_ssm", "reference")
    )
    assert_same(found, expected)


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_channels_out_of_a_wider_tensor(offset, packages, randn):
    made = conv_arguments(randn)
    made["x"] = randn(2, 7, 20, dtype=torch.float32)[..., offset : offset + 8]
    found = causal_conv1d(**made, implementation="causal_conv1d")
    torch.testing.assert_close(found, causal_conv1d(**made, implementation="reference"))


@pytest.mark.parametrize("op", [selective_scan, causal_conv1d])
def test_it_compiles(op, packages, randn, assert_compiles):
    made = scan_arguments(randn) if op is selective_scan else conv_arguments(randn)
    name = OPS[op.__name__]
    assert_compiles(lambda **a: op(**a, return_final_state=True, implementation=name), **made)


@BOTH
def test_its_place_in_the_order(op, package, packages, randn, monkeypatch):
    made = (scan_arguments if op == "selective_scan" else conv_arguments)(randn)
    assert explain(op, **made).chosen == "cpu"
    monkeypatch.setenv("SSMZOO_DISABLE", "cpu")
    assert explain(op, **made).chosen == package
    function = getattr(ssmkernels, op)
    assert torch.equal(function(**made), function(**made, implementation=package))


REFUSED = {
    "initial state": ("selective_scan", lambda r: {"initial_state": r(2, 6, 3, dtype=torch.float32)}),
    "float64": ("selective_scan", lambda r: scan_arguments(r, torch.float64) | {"A": r(6, 3)}),
    "more than 256 states": (
        "selective_scan",
        lambda r: dict(zip("ABC", (r(s, 257, dtype=torch.float32) for s in (6, 6, 6)), strict=True)),
    ),
    "empty inputs": ("selective_scan", lambda r: scan_arguments(r, l=0)),
    "`B` or `C` in another precision than `u`": (
        "selective_scan",
        lambda r: scan_arguments(r, torch.bfloat16) | {"C": r(2, 7, 3, dtype=torch.float32)},
    ),
    "groups of `C` beside a fixed `B`": (
        "selective_scan",
        lambda r: {"B": r(6, 3, dtype=torch.float32), "C": r(2, 7, 2, 3, dtype=torch.float32)},
    ),
    "widths but 2, 3 and 4": ("causal_conv1d", lambda r: {"weight": r(8, 5, dtype=torch.float32)}),
    "channels that are no multiple of 8": (
        "causal_conv1d",
        lambda r: {"x": r(1, 7, 6).float(), "weight": r(6, 4).float(), "bias": None},
    ),
    "float32 states beside half precision": (
        "causal_conv1d",
        lambda r: conv_arguments(r, torch.float16) | {"initial_state": r(1, 3, 8, dtype=torch.float32)},
    ),
    "initial states of packed sequences": (
        "causal_conv1d",
        lambda r: {"initial_state": r(2, 3, 8).float(), "cu_seqlens": torch.tensor([0, 3, 7], dtype=torch.int32)},
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_it_cannot_express_is_told_and_goes_elsewhere(why, packages, randn, monkeypatch):
    op, change = REFUSED[why]
    made = (scan_arguments if op == "selective_scan" else conv_arguments)(randn) | change(randn)
    explanation = explain(op, **made)
    assert explanation.reasons[OPS[op]] == why
    assert explanation.chosen not in OPS.values()


def test_packed_scans_are_refused(packages, randn):
    made = {k: v[:1] if isinstance(v, torch.Tensor) and v.ndim > 2 else v for k, v in scan_arguments(randn).items()}
    made["cu_seqlens"] = torch.tensor([0, 3, 7], dtype=torch.int32)
    assert explain("selective_scan", **made).reasons["mamba_ssm"] == "packed sequences"


def test_what_32_bits_cannot_reach_is_refused():
    x, weight = torch.empty(4, 2**20, 1024, device="meta"), torch.empty(1024, 4, device="meta")
    Scan, Conv = (ssmkernels.OPS[op].declared.Arguments for op in OPS)
    a = Conv(x, weight, None, None, None, None)
    scan, conv = (importlib.import_module(f"ssmkernels.ops.{op}.external_{package}") for op, package in OPS.items())
    assert conv.lacking(a) == "inputs of more than 2³¹ elements"
    assert conv.lacking(a._replace(x=x[:1])) is None
    a = Scan(x, x, weight, x[..., :4], x[..., :4], None, None, None, False, None, None)
    assert scan.lacking(a) is None
    a = a._replace(u=torch.cat([x] * 4), A=weight.new_empty(1024, 256))
    assert scan.lacking(a) == "records of more than 2³¹ numbers"


@BOTH
def test_without_the_package(op, package, randn):
    made = (scan_arguments if op == "selective_scan" else conv_arguments)(randn)
    if package not in sys.modules and importlib.machinery.PathFinder.find_spec(package) is None:
        assert explain(op, **made).reasons[package] == f"package {package} is not installed"
    with pytest.raises(ValueError, match=f"implementation '{package}' .* cannot run this call"):
        getattr(ssmkernels, op)(**made, implementation=package)


@BOTH
def test_a_broken_package_is_told_and_passed_over(op, package, gpu, tmp_path, monkeypatch, randn):
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("raise OSError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, package, raising=False)
    made = (scan_arguments if op == "selective_scan" else conv_arguments)(randn)
    explanation = explain(op, **made)
    assert explanation.reasons[package] == (
        f"package {package} is installed but does not import (undefined symbol): install it again"
    )


@BOTH
def test_our_own_module_under_the_packages_name_does_not_call_itself(op, package, gpu, monkeypatch, randn):
    ours = importlib.import_module(f"ssmkernels.compat.{package}")
    monkeypatch.setitem(sys.modules, package, ours)
    made = (scan_arguments if op == "selective_scan" else conv_arguments)(randn)
    assert explain(op, **made).reasons[package] == f"the name {package} stands for ssmkernels.compat.{package} here"


@BOTH
def test_the_peer_is_the_same_call(op, package, packages):
    (peer,) = (p for p in peers_of(op, "cuda") if p.name == package)
    row = {"state": False} if op == "selective_scan" else {"state": False, "d": 8}
    assert check(op, peer.function, cases=[row], dtypes=[torch.float32], gradients=False).checks


def test_a_package_of_the_ops_name_leaves_the_ops_function_in_its_place():
    for op, package in OPS.items():
        ssmkernels.OPS[op].implementation(package)
        assert getattr(importlib.import_module(f"ssmkernels.ops.{op}"), op) is getattr(ssmkernels, op)
