"""Integers of every op: as large as Python has them, they give the right result or an error that names them."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch

import ssmkernels
from ssmkernels import masks
from ssmkernels.compat.causal_conv1d import causal_conv1d_varlen_states
from ssmkernels.core.names import OPS
from ssmkernels.ops.diagonal_kernel import diagonal_kernel
from ssmkernels.ops.dplr_kernel import dplr_kernel

HUGE = [2**31, 2**32 + 1, 2**63 - 1, 2**63, 2**64, 10**30, pytest.param(2**10000, id="2**10000")]


def package(op):
    return importlib.import_module(OPS[op].package)


def able(op, call):
    """The implementations that run the call here; the reference last."""
    return ssmkernels.explain(op, **call).able


def tensors(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def whole(window):
    q, k, v = tensors(*[(1, 9, 2, 8)] * 3)
    return {"q": q, "k": k, "v": v, "window": window}


def cached(window):
    q, k, v = tensors((1, 2, 2, 8), (1, 9, 2, 8), (1, 9, 2, 8))
    return {"q": q, "k_cache": k, "v_cache": v, "lengths": torch.tensor([7], dtype=torch.int32), "window": window}


@pytest.mark.parametrize("bound", [2**30 - 1, 2**30, 2**31 - 1, *HUGE])
@pytest.mark.parametrize(("op", "call"), [("attention", whole), ("decode_attention", cached)])
def test_a_window_beyond_any_length_is_no_bound(op, call, bound):
    run = getattr(package(op), op)
    for huge, same in (((bound, 0), (-1, 0)), ((bound, bound), (-1, -1)), ((2, bound), (2, -1))):
        expected = run(**call(same), implementation="reference")
        for name in able(op, call(huge)):
            torch.testing.assert_close(run(**call(huge), implementation=name), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bound", HUGE)
def test_a_mask_of_a_window_beyond_any_length(bound):
    assert torch.equal(
        masks.window(9, left=bound, right=0, block_size=8).dense(), masks.causal(9, block_size=8).dense()
    )


@functools.cache
def integers():
    """Name → (argument, call of one integer)."""
    A, B, C, P = tensors(*[(2, 4)] * 4)
    dt = torch.full((2,), 0.1)
    x, cu_seqlens = torch.randn(5, 3), torch.tensor([0, 5], dtype=torch.int32)
    weight = torch.ones(6)
    decode = package("decode_attention").decode_attention
    norm = package("rms_norm").rms_norm
    calls = {
        "varlen_states": ("state_len", lambda n: causal_conv1d_varlen_states(x, cu_seqlens, n)),
        "random_blocks": ("count", lambda n: masks.random_blocks(9, count=n, block_size=8)),
        "prefix": ("length", lambda n: masks.prefix(9, length=n, block_size=8)),
        "strided": ("stride", lambda n: masks.strided(9, stride=n, block_size=8)),
        "strided local": ("local", lambda n: masks.strided(9, stride=1, local=n, block_size=8)),
        "q_len": ("q_len", lambda n: masks.causal(n, 9, block_size=8)),
        "k_len": ("k_len", lambda n: masks.causal(9, n, block_size=8)),
        "heads": ("heads", lambda n: masks.strided(9, stride=1, heads=n, block_size=8)),
        "block_size": ("block_size", lambda n: masks.causal(9, block_size=(n, 8))),
    }
    for name in able("decode_attention", cached(None)):
        calls[f"decode_attention {name}"] = (
            "num_splits",
            lambda n, name=name: decode(**cached(None), num_splits=n, implementation=name),
        )
    for name in OPS["rms_norm"].names:
        calls[f"rms_norm {name}"] = (
            "group_size",
            lambda n, name=name: norm(torch.ones(2, 6), weight, group_size=n, implementation=name),
        )
    for name in able("diagonal_kernel", {"A": -A.exp(), "B": B, "C": C, "dt": dt, "length": 4}):
        calls[f"diagonal_kernel {name}"] = (
            "length",
            lambda n, name=name: diagonal_kernel(-A.exp(), B, C, dt, n, implementation=name),
        )
    for name in able("dplr_kernel", {"A": -A.exp(), "P": P, "Q": P, "B": B, "C": C, "dt": dt, "length": 4}):
        calls[f"dplr_kernel {name}"] = (
            "length",
            lambda n, name=name: dplr_kernel(-A.exp(), P, P, B, C, dt, n, implementation=name),
        )
    return calls


@pytest.mark.parametrize("value", [*HUGE, -1, -(2**63), -(2**64)])
def test_an_integer_beyond_what_kernels_count_in_is_refused_by_name(value):
    for argument, call in integers().values():
        with pytest.raises(ValueError, match=f"`{argument}`"):
            call(value)


@pytest.mark.parametrize("splits", [1, 7, 2**31 - 1])
def test_the_most_splits_are_as_one(splits):
    decode = package("decode_attention").decode_attention
    expected = decode(**cached(None), implementation="reference")
    for name in able("decode_attention", cached(None)):
        found = decode(**cached(None), num_splits=splits, implementation=name)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
