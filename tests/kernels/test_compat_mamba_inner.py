"""``mamba_inner_fn`` on the inputs of mamba_ssm's own test, whose outputs are too large for its absolute tolerance."""

from __future__ import annotations

import pytest
import torch

from ssmkernels.compat.mamba_ssm import mamba_inner_fn, mamba_inner_ref

D, N, RANK, L = 768, 8, 48, 128


def wide(t):
    return None if t is None else t.to(torch.complex128 if t.is_complex() else torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("varies", [(False, False), (True, True)])
def test_it_is_no_further_off_than_the_reference(dtype, varies):
    torch.manual_seed(0)
    maps = RANK + sum(varies) * N * (2 if dtype.is_complex else 1)
    shapes = [(2, 2 * D, L), (D, 1, 3), (D,), (maps, D), (D, RANK), (D // 2, D)]
    given = [*(torch.randn(shape) for shape in shapes), None, -0.5 * torch.rand(D, N, dtype=dtype)]
    given += [None if varying else torch.randn(D, N, dtype=dtype) for varying in varies]
    given += [torch.randn(D), 0.5 * torch.rand(D)]

    def call(function, values):
        *arguments, bias = values
        return function(*arguments, delta_bias=bias, delta_softplus=True)

    exact = call(mamba_inner_ref, map(wide, given))
    ours, theirs = ((call(f, given) - exact).abs() for f in (mamba_inner_fn, mamba_inner_ref))
    assert exact.abs().max() > 1e5
    assert ours.max() <= 2 * theirs.max()
    assert ours.mean() <= 1.5 * theirs.mean()
