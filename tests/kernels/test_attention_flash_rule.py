"""FlashAttention's own rule, over a grid like its own: errors beside those of plain PyTorch in the same dtype.

The output may be off by twice as much as PyTorch's, a gradient by three times as much.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from ssmkernels import attention, masks

DIMS = (32, 40, 59, 64, 96, 111, 128, 160, 192, 224, 256)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS = ((113, 203), (128, 217), (113, 211), (108, 256), (256, 128), (193, 193), (1, 239), (239, 64), (3, 799))
HEADS = ((6, 6), (6, 1), (6, 2))
OPTIONS = (
    {},
    {"causal": True},
    {"window": (37, 11)},
    {"window": (50, 0), "causal": True},
    {"causal": True, "softcap": 15.0},
    {"causal": True, "alibi_slopes": True},
    {"sinks": True, "window": (64, 64)},
    {"block_mask": "shared"},
    {"block_mask": "heads", "causal": True},
)
# Cycles of 9, 7 and 10 beside 11 dims: each dim and dtype meets other lengths, heads and options.
GRID = list(
    zip(
        itertools.product(DTYPES, DIMS),
        itertools.cycle(LENGTHS),
        itertools.cycle(HEADS * 2 + HEADS[:1]),
        itertools.cycle((*OPTIONS, OPTIONS[-1])),
        strict=False,
    )
)


def plain(q, k, v, seen, distance, scale, softcap=0.0, alibi_slopes=None, sinks=None):
    """Attention in plain PyTorch, every step in the dtype of its inputs."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    s = torch.einsum("blhk,bmhk->bhlm", q * scale, k)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if alibi_slopes is not None:
        s = s - (alibi_slopes[:, None, None] * distance.abs()).to(s.dtype)
    s = s.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        s = torch.cat([s, sinks.to(s.dtype)[:, None, None].expand(*s.shape[:3], 1)], -1)
    weights = torch.softmax(s, -1).nan_to_num(0)[..., : k.shape[1]]
    return torch.einsum("bhlm,bmhv->blhv", weights, v)


def with_gradients(function, inputs, gradient):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient.to(out.dtype))]


@pytest.mark.parametrize("implementation", ["tiled", None], ids=str)
@pytest.mark.parametrize(("dtype_and_dim", "lengths", "heads", "options"), GRID, ids=str)
def test_errors_beside_those_of_pytorch(implementation, dtype_and_dim, lengths, heads, options, randn):
    (dtype, dim), (l, m), (h, h_kv) = dtype_and_dim, lengths, heads
    q, k, v = (randn(2, length, n, dim, dtype=dtype) for length, n in ((l, h), (m, h_kv), (m, h_kv)))
    gradient = randn(2, l, h, dim, dtype=dtype)
    given = dict(options)
    for name in {"alibi_slopes", "sinks"} & given.keys():
        given[name] = randn(h, dtype=torch.float32).abs()
    distance = torch.arange(m) - (torch.arange(l) + m - l)[:, None]
    left, right = given.get("window", (-1, -1))
    right = 0 if given.get("causal") else right
    seen = ((distance >= -left) | torch.tensor(left < 0)) & ((distance <= right) | torch.tensor(right < 0))
    if "block_mask" in given:
        some = masks.random_blocks(l, m, count=2, heads=h if given["block_mask"] == "heads" else 1, block_size=64)
        given["block_mask"] = some | masks.from_function(lambda _, i, j: (i + j) % 5 == 0, l, m, block_size=64)
        seen = seen & given["block_mask"].dense()
    also = {name: given[name] for name in ("softcap", "alibi_slopes", "sinks") if name in given}
    wide = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in also.items()}
    scale = 1 / math.sqrt(dim)

    inputs = (q, k, v)
    found = with_gradients(lambda *x: attention(*x, **given, implementation=implementation), inputs, gradient)
    pytorch = with_gradients(lambda *x: plain(*x, seen, distance, scale, **also), inputs, gradient)
    exact = with_gradients(
        lambda *x: plain(*x, seen, distance, scale, **wide), [x.double() for x in inputs], gradient.double()
    )
    for what, times, ours, theirs, truth in zip("oqkv", (2, 3, 3, 3), found, pytorch, exact, strict=True):
        assert ours.dtype == dtype
        error, allowed = ((x.double() - truth).abs().max() for x in (ours, theirs))
        rounding = 4 * torch.finfo(torch.float32).eps * truth.abs().max()  # where PyTorch's happen to cancel
        assert error <= max(times * allowed, rounding), f"{what}: off by {error:.3g}, PyTorch by {allowed:.3g}"
    blind = ~seen.expand(h, l, m).any(-1).T if "sinks" not in given else torch.zeros(l, h, dtype=torch.bool)
    assert (found[0][:, blind] == 0).all()
    assert (found[1][:, blind] == 0).all()
