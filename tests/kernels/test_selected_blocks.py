"""Which blocks queries select: sum by sum, in the native kernel and in PyTorch."""

import math

import pytest
import torch

from ssmkernels import native, use
from ssmkernels.ops.selected_attention import selection
from ssmkernels.ops.selected_attention.selection import Sizes, by_kernel, by_pytorch, pooled, select_blocks

WAYS = [by_pytorch, *([by_kernel] if native.missing() is None else [])]

# b, l, h, h_kv, d, and sizes: stretches that overlap or not, few tokens, parts of a sequence, tiles' and pieces' ends.
CASES = {
    "whole": ((2, 40, 4, 2, 8), Sizes(40, 4, 2, 4, 3, 1, 1)),
    "published": ((1, 300, 4, 1, 64), Sizes(1300, 32, 16, 64, 16, 1, 2)),
    "three overlap": ((2, 5, 6, 3, 7), Sizes(100, 6, 2, 8, 5, 0, 1)),
    "one token": ((1, 1, 2, 1, 5), Sizes(77, 1, 1, 3, 9, 2, 2)),
    "many heads": ((1, 30, 100, 1, 4), Sizes(200, 4, 2, 4, 8, 1, 2)),
    "nothing is compressed yet": ((1, 3, 2, 1, 4), Sizes(3, 4, 4, 4, 2, 0, 1)),
    "forced ones alone": ((1, 20, 2, 1, 4), Sizes(20, 4, 2, 4, 3, 2, 1)),
    "no query": ((1, 0, 2, 1, 4), Sizes(30, 4, 2, 4, 3, 1, 1)),
    "no sequence": ((0, 4, 2, 1, 4), Sizes(4, 4, 4, 4, 2, 0, 1)),
}


def inputs(shape, sizes, dtype=torch.float64):
    b, l, h, h_kv, d = shape
    generator = torch.Generator().manual_seed(0)
    n = max(0, (sizes.length - sizes.stretch) // sizes.stride + 1)
    q = torch.randn(b, l, h, d, generator=generator, dtype=torch.float64)
    return (2 * q).to(dtype), torch.randn(b, n, h_kv, d, generator=generator, dtype=torch.float64).to(dtype)


def scores(q, k, sizes, t, group):
    """Of each block that token t may select: every sum of equation 9 is a loop over compressed keys that exist."""
    ends = [i * sizes.stride + sizes.stretch - 1 for i in range(k.shape[1])]
    there = [i for i, end in enumerate(ends) if end <= t]
    weights = dict.fromkeys(there, 0.0)
    heads = q.shape[2] // k.shape[2]
    for h in range(group * heads, (group + 1) * heads):
        row = q[0, t - sizes.length + q.shape[1], h]
        for i, p in zip(there, (k[0, there, group] @ row / math.sqrt(q.shape[3])).softmax(0).tolist(), strict=True):
            weights[i] += p
    per, overlap = sizes.block_size // sizes.stride, sizes.stretch // sizes.stride
    return [
        sum(weights.get(per * j + m - n, 0.0) for m in range(per) for n in range(overlap))
        for j in range(t // sizes.block_size + 1)
    ]


@pytest.mark.parametrize("way", WAYS)
def test_query_by_query(way):
    shape, sizes = (1, 30, 4, 2, 8), Sizes(44, 6, 2, 4, 4, 1, 2)
    q, k = inputs(shape, sizes)
    found = way(q, k, sizes)
    for i in range(30):
        t = i + 14
        own = t // 4
        for group in range(2):
            of_block = scores(q, k, sizes, t, group)
            forced = {0, own, max(0, own - 1)}
            rest = sorted(set(range(own + 1)) - forced, key=lambda j: -of_block[j])
            chosen = forced | set(rest[: 4 - len(forced)])
            assert sorted(j for j in found[0, i, group].tolist() if j >= 0) == sorted(chosen)


@pytest.mark.skipif(len(WAYS) < 2, reason="needs the native library")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_both_ways_select_the_same(case, dtype):
    shape, sizes = CASES[case]
    q, k = inputs(shape, sizes, dtype)
    found, wanted = (way(q, k, sizes) for way in (by_kernel, by_pytorch))
    assert found.shape == wanted.shape == (*shape[:2], shape[3], sizes.n_selected)
    assert torch.equal(found.sort(-1).values, wanted.sort(-1).values)


@pytest.mark.skipif(len(WAYS) < 2, reason="needs the native library")
def test_queries_of_any_strides():
    shape, sizes = CASES["whole"]
    q, k = inputs(shape, sizes)
    strided = torch.cat([q, q], dim=3)[..., :8].transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(by_kernel(strided, k, sizes), by_kernel(q, k, sizes))
    apart = torch.stack([q, torch.zeros_like(q)], dim=4)[..., 0]
    assert torch.equal(by_kernel(apart, k, sizes), by_kernel(q, k, sizes))


@pytest.mark.parametrize("way", WAYS)
def test_earlier_ones_among_equals(way):
    """Where all keys are alike, blocks within the compressed tokens have equal scores."""
    sizes = Sizes(64, 4, 4, 4, 6, 1, 1)
    q, k = torch.ones(1, 64, 2, 4), torch.ones(1, 16, 1, 4)
    assert way(q, k, sizes)[0, -1, 0].tolist() == [0, 15, 1, 2, 3, 4]


@pytest.mark.parametrize("way", WAYS)
def test_first_and_latest_blocks_where_scores_are_nan(way):
    """A key of NaN leaves queries that see it the blocks that are selected in any case, and others as they were."""
    sizes = Sizes(64, 4, 4, 4, 6, 1, 2)
    q, k = inputs((1, 64, 2, 1, 4), sizes)
    clean = way(q, k, sizes)
    k[:, 9] = torch.nan
    found = way(q, k, sizes)
    assert torch.equal(found[:, :39], clean[:, :39])
    assert found[0, 39:, 0].sort(-1).values.tolist() == [[-1] * 3 + [0, t // 4 - 1, t // 4] for t in range(39, 64)]


def test_pooling_counts_shared_tokens():
    """A weight counts once for each stride's worth of tokens that its stretch and the block have in common."""
    for overlap, per_block in ((1, 1), (2, 2), (2, 4), (3, 2)):
        n = 7
        blocks = -(-(n + overlap - 1) // per_block)
        found = pooled(torch.eye(n, dtype=torch.float64), blocks, overlap, per_block)
        for i in range(n):
            for j in range(blocks):
                common = set(range(i, i + overlap)) & set(range(j * per_block, (j + 1) * per_block))
                assert found[i, j] == len(common)


def test_pytorch_selects_in_pieces(monkeypatch):
    shape, sizes = CASES["whole"]
    q, k = inputs(shape, sizes)
    whole = by_pytorch(q, k, sizes)
    monkeypatch.setattr(selection, "SCORES", 500)
    assert torch.equal(by_pytorch(q, k, sizes).sort(-1).values, whole.sort(-1).values)


def test_a_forced_implementation_selects_in_pytorch(monkeypatch):
    shape, sizes = CASES["whole"]
    q, k = inputs(shape, sizes)
    monkeypatch.setattr(selection, "by_kernel", None)
    with use("reference"):
        assert torch.equal(select_blocks(q, k, *sizes), by_pytorch(q, k, sizes))
