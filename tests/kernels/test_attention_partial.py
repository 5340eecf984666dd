"""Gradients through some of the keys, where the output is over all of them: their sums are those of one call."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from ssmkernels import attention, native, use
from ssmkernels.ops.attention.partial import partial_gradients

pytestmark = pytest.mark.op("attention")

NATIVE = pytest.param("cpu", marks=pytest.mark.skipif(native.missing() is not None, reason=str(native.missing())))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("order", ["ascending", "any"])
@pytest.mark.parametrize("name", [NATIVE, "tiled"])
def test_parts_of_the_keys_add_up(name, order, dtype):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, h, 5, generator=generator).to(dtype) for n, h in ((19, 4), (23, 2), (23, 2)))
    q_positions, k_positions = (
        torch.stack([torch.randperm(n, generator=generator) for _ in range(2)]) for n in (19, 23)
    )
    if order == "ascending":
        q_positions, k_positions = q_positions.sort().values, k_positions.sort().values
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    options = {"causal": True, "q_positions": q_positions}
    with use(name):
        out, lse = attention(*leaves, k_positions=k_positions, return_lse=True, **options)
        d_out = torch.randn(out.shape, generator=generator).to(dtype)
        d_lse = torch.randn(lse.shape, generator=generator, dtype=lse.dtype)
        d_lse.masked_fill_(lse == -torch.inf, 0)
        expected = torch.autograd.grad((out, lse), leaves, (d_out, d_lse))
        # over a part, `out` comes in the precision of sums
        wide = attention(*(x.to(lse.dtype) for x in (q, k, v)), k_positions=k_positions, **options)
        found = []
        for part in (slice(0, 9), slice(9, 23)):
            these = partial_gradients(
                q, k[:, part], v[:, part], wide, lse.detach(), d_out, d_lse, k_positions=k_positions[:, part], **options
            )
            found.append([these[n] for n in "qkv"])
    dq = found[0][0] + found[1][0]
    dk, dv = (torch.cat([found[0][i], found[1][i]], 1) for i in (1, 2))
    bound = 1e-12 if dtype == torch.float64 else 2e-2
    for f, e in zip((dq, dk, dv), expected, strict=True):
        torch.testing.assert_close(f, e, rtol=bound, atol=bound, check_dtype=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [NATIVE, "tiled"])
def test_what_is_over_all_keys_may_have_any_strides(name, dtype):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, h, 5, generator=generator).to(dtype) for n, h in ((7, 4), (9, 2), (9, 2)))
    with use(name):
        out, lse = attention(q.float(), k.float(), v.float(), return_lse=True)
        d_out, d_lse = (torch.randn(x.shape, generator=generator) for x in (out, lse))
        given = out, lse, d_out.to(dtype), d_lse
        expected = partial_gradients(q, k, v, *given)
        found = partial_gradients(q, k, v, *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in given))
    for each in "qkv":
        torch.testing.assert_close(found[each], expected[each])


def test_nothing_outlives_a_backward_pass():
    """No cycle keeps what has been computed until a collection of garbage."""

    def gradients() -> weakref.ref:
        q, k, v, out, d_out = (torch.randn(1, 8, 2, 16) for _ in range(5))
        partial_gradients(q, k, v, out, torch.zeros(1, 2, 8), d_out, None)
        return weakref.ref(q)

    gc.collect()
    gc.disable()
    try:
        assert gradients()() is None
    finally:
        gc.enable()
