from __future__ import annotations

import dataclasses

import pytest
import torch

from ssmkernels import attention, masks
from ssmkernels.core import block_mask

pytestmark = pytest.mark.op("attention")

SIZES = pytest.mark.parametrize(("l", "m"), [(40, 40), (21, 53), (53, 21), (16, 32), (1, 9), (0, 9), (9, 0)], ids=str)
BLOCK = (8, 16)


def indices(l, m):
    """Numbers of queries and of keys, and positions of queries, as columns and rows."""
    i, j = torch.arange(l)[:, None], torch.arange(m)
    return i, j, i + m - l


def coarse(mask):
    """Which blocks of the grid have something visible in them, and which are visible as a whole."""
    seen = mask.dense()
    block_q, block_k = mask.block_size
    rows, columns = mask.grid_shape
    full, some = (torch.zeros(mask.heads, rows, columns, dtype=torch.bool) for _ in range(2))
    for h in range(mask.heads):
        for r in range(rows):
            for c in range(columns):
                block = seen[h, r * block_q : (r + 1) * block_q, c * block_k : (c + 1) * block_k]
                full[h, r, c], some[h, r, c] = block.all(), block.any()
    return full, some


def assert_tight(mask):
    """Nothing is listed that is hidden, and nothing kept as bits that is visible as a whole, or kept twice."""
    full, some = coarse(mask)
    grid = mask.grid()
    assert torch.equal(grid == -1, full)
    assert torch.equal(grid > -2, some)
    assert len(mask.bits.unique(dim=0)) == len(mask.bits)
    assert mask.patterns.unique().clamp(min=0).unique().numel() >= len(mask.bits)


@SIZES
@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 0), (20, 5), (-1, 2), (4, -1), (-1, -1), (99, 99)], ids=str)
def test_window(l, m, left, right):
    _, j, p = indices(l, m)
    mask = masks.window(l, m, left=left, right=right, block_size=BLOCK)
    seen = (j >= p - left) | torch.tensor(left < 0)
    assert torch.equal(mask.dense()[0], seen & ((j <= p + right) | torch.tensor(right < 0)))
    assert_tight(mask)


@SIZES
def test_causal(l, m):
    _, j, p = indices(l, m)
    mask = masks.causal(l, m, block_size=BLOCK)
    assert torch.equal(mask.dense()[0], j <= p)
    assert_tight(mask)


@SIZES
@pytest.mark.parametrize("length", [0, 5, 16, 99])
def test_prefix(l, m, length):
    _, j, p = indices(l, m)
    mask = masks.prefix(l, m, length=length, block_size=BLOCK)
    assert torch.equal(mask.dense()[0], (j < length) | (j <= p))
    assert_tight(mask)


@SIZES
def test_global_tokens(l, m):
    _, j, p = indices(l, m)
    mask = masks.global_tokens(l, m, tokens=min(3, m), block_size=BLOCK)
    assert torch.equal(mask.dense()[0], (j < 3) | ((p >= 0) & (p < 3)))
    assert_tight(mask)
    if m > 8:
        mask = masks.global_tokens(l, m, tokens=torch.tensor([1, 8]), block_size=BLOCK)
        assert torch.equal(mask.dense()[0], (j == 1) | (j == 8) | (p == 1) | (p == 8))
        assert_tight(mask)


@SIZES
@pytest.mark.parametrize("order", ["sorted", "mixed"])
def test_document(l, m, order):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randint(0, 4, (length,), generator=generator) for length in (l, m))
    if order == "sorted":
        q, k = q.sort().values, k.sort().values
    mask = masks.document(q, k, block_size=BLOCK)
    assert torch.equal(mask.dense()[0], q[:, None] == k)
    assert_tight(mask)


@SIZES
def test_strided(l, m):
    i, j, _ = indices(l, m)
    mask = masks.strided(l, m, stride=3, local=1, heads=2, block_size=BLOCK)
    last = ((i // 8 + 1) * 8 - 1).clamp(max=l - 1) + m - l
    own = last.div(16, rounding_mode="floor")
    for head in range(2):
        assert torch.equal(mask.dense()[head], ((j // 16) % 3 == head) | (j // 16 == own))
    assert_tight(mask)


def test_heads_of_strided_share_the_context():
    mask = masks.strided(64, stride=4, local=0, heads=4, block_size=8)
    assert torch.equal(mask.dense().sum(0), torch.ones(64, 64, dtype=torch.int64))


@SIZES
@pytest.mark.parametrize("causal", [False, True])
def test_random_blocks(l, m, causal):
    mask = masks.random_blocks(l, m, count=2, heads=3, seed=5, causal=causal, block_size=BLOCK)
    rows, columns = mask.grid_shape
    last = (torch.arange(1, rows + 1) * 8 - 1).clamp(max=max(0, l - 1)) + m - l
    open_to = (torch.arange(columns) * 16 <= last[:, None]).sum(1) if causal else torch.full((rows,), columns)
    assert torch.equal(mask.offsets.diff(dim=1), open_to.clamp(max=2).int().expand(3, -1))
    assert (mask.patterns == -1).all()
    assert_tight(mask)
    again = masks.random_blocks(l, m, count=2, heads=3, seed=5, causal=causal, block_size=BLOCK)
    assert torch.equal(mask.columns, again.columns)


def test_random_blocks_differ_by_head_row_and_seed():
    grid = masks.random_blocks(64, count=3, heads=2, block_size=8).grid()
    assert not torch.equal(grid[0], grid[1])
    assert not torch.equal(grid[0, 0], grid[0, 1])
    assert not torch.equal(grid, masks.random_blocks(64, count=3, heads=2, seed=1, block_size=8).grid())


@SIZES
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_random_blocks_beside_others(l, m, causal, heads):
    """As many as asked for, or as there are, of those blocks in which the other mask shows nothing."""
    if heads == 1:
        other = masks.window(l, m, left=9, right=2, block_size=BLOCK)
    else:
        other = masks.random_blocks(l, m, count=1, heads=heads, block_size=BLOCK)
    mask = masks.random_blocks(l, m, count=2, heads=3, causal=causal, beside=other, block_size=BLOCK)
    rows, columns = mask.grid_shape
    last = (torch.arange(1, rows + 1) * 8 - 1).clamp(max=max(0, l - 1)) + m - l
    left = (other.grid() == -2) & ((torch.arange(columns) * 16 <= last[:, None]) | torch.tensor(not causal))
    assert torch.equal(mask.offsets.diff(dim=1), left.sum(2).clamp(max=2).int().expand(3, -1))
    assert not (mask & other).columns.numel()
    assert_tight(mask)


@pytest.mark.parametrize(
    "other",
    [
        masks.causal(24, block_size=8),
        masks.causal(16, 24, block_size=8),
        masks.causal(16, block_size=16),
        masks.random_blocks(16, count=1, heads=2, block_size=8),
    ],
    ids=str,
)
def test_what_random_blocks_cannot_lie_beside(other):
    with pytest.raises(ValueError, match=r"random_blocks: `beside` must be for 16 queries and 16 keys in blocks of"):
        masks.random_blocks(16, count=1, heads=3, beside=other, block_size=8)


@SIZES
@pytest.mark.parametrize("heads", [1, 3])
def test_whole_blocks(l, m, heads):
    shape = heads, -(-l // BLOCK[0]), -(-m // BLOCK[1])
    visible = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.4
    mask = masks.whole_blocks(l, m, visible=visible, block_size=BLOCK)
    i, j, _ = indices(l, m)
    assert torch.equal(mask.dense(), visible[:, i // BLOCK[0], j // BLOCK[1]])
    assert_tight(mask)


@pytest.mark.parametrize(
    "visible", [torch.ones(1, 3, 4), torch.ones(3, 4).bool(), torch.ones(1, 4, 3).bool(), torch.ones(0, 3, 4).bool()]
)
def test_whole_blocks_refuse(visible):
    came = str(tuple(visible.shape)).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"`visible` must be bool \(heads, 3, 4\); got {visible.dtype} {came}"):
        masks.whole_blocks(17, 49, visible=visible, block_size=BLOCK)


def test_compiled_code_may_put_a_mask_together():
    """From members that it has got as tensors, whose values it cannot look at."""
    mask = masks.causal(40, block_size=8)

    def attend(q, *members):
        return attention(q, q, q, block_mask=masks.BlockMask(40, 40, *members))

    q = torch.randn(1, 40, 2, 4)
    members = mask.offsets, mask.columns, mask.patterns, mask.bits
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, *members), attention(q, q, q, causal=True))


@SIZES
def test_from_function(l, m, monkeypatch):
    monkeypatch.setattr(block_mask, "AT_ONCE", 300)  # so that it takes several turns
    i, j, _ = indices(l, m)
    mask = masks.from_function(lambda h, i, j: ((i // 8 + j // 5) % 3 == h) & (i != 3), l, m, heads=2, block_size=BLOCK)
    for head in range(2):
        assert torch.equal(mask.dense()[head], ((i // 8 + j // 5) % 3 == head) & (i != 3))
    assert_tight(mask)


def test_from_function_may_look_up():
    """Indices beyond the ends would be an error."""
    table = torch.rand(13, 21) < 0.5
    mask = masks.from_function(lambda h, i, j: table[i, j], 13, 21, block_size=8)
    assert torch.equal(mask.dense()[0], table)


def test_from_function_needs_bools():
    with pytest.raises(TypeError, match="`f` must return bool; got torch.int64"):
        masks.from_function(lambda h, i, j: i - j, 8)


@SIZES
def test_and_or(l, m):
    some = masks.random_blocks(l, m, count=2, heads=3, block_size=BLOCK)
    band = masks.window(l, m, left=12, right=3, block_size=BLOCK)
    odd = masks.from_function(lambda h, i, j: j % 2 == 1, l, m, block_size=BLOCK)
    for a, b in ((some, band), (band, some), (band, odd), (odd, some), (some & odd, band | odd)):
        assert torch.equal((a & b).dense(), a.dense() & b.dense())
        assert torch.equal((a | b).dense(), a.dense() | b.dense())
        assert_tight(a & b)
        assert_tight(a | b)


def test_halves_make_a_whole():
    even, odd = (masks.from_function(lambda h, i, j, rest=rest: j % 2 == rest, 20, block_size=8) for rest in (0, 1))
    assert ((even | odd).patterns == -1).all()
    assert len((even & odd).columns) == 0


@pytest.mark.parametrize(
    ("other", "error", "match"),
    [
        (masks.causal(24, block_size=8), ValueError, "masks of the same q_len; got 16 and 24"),
        (masks.causal(16, 24, block_size=8), ValueError, "masks of the same k_len; got 16 and 24"),
        (masks.causal(16, block_size=16), ValueError, r"same block_size; got \(8, 8\) and \(16, 16\)"),
        (masks.random_blocks(16, count=1, heads=3, block_size=8), ValueError, "as many heads, or 1; got 2 and 3"),
        (torch.ones(16, 16).bool(), TypeError, "needs another BlockMask; got Tensor"),
    ],
    ids=str,
)
def test_what_cannot_be_joined(other, error, match):
    mask = masks.random_blocks(16, count=1, heads=2, block_size=8)
    for join in (lambda: mask & other, lambda: mask | other):
        with pytest.raises(error, match=match):
            join()


def test_memory_is_far_below_the_square():
    l = 2**16
    mask = masks.window(l, left=512, right=0) | masks.global_tokens(l, tokens=16)
    mask = mask | masks.random_blocks(l, count=2)
    assert mask.nbytes < 2**18
    assert mask.nbytes == sum(t.nbytes for t in (mask.offsets, mask.columns, mask.patterns, mask.bits))
    assert mask.density < 0.03


def test_repr_tells_how_much_is_visible():
    shown = repr(masks.causal(40, block_size=8))
    assert "40 queries, 40 keys" in shown
    assert "15 blocks visible (60.0%), 5 of them in part by 1 patterns" in shown


def test_to_a_device():
    mask = masks.causal(40, block_size=8)
    assert mask.to("cpu") is mask
    moved = mask.to("meta")
    assert moved.device.type == "meta"
    assert (moved.q_len, moved.k_len, moved.block_size) == (40, 40, (8, 8))


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"offsets": torch.tensor([[0, 1, 3]])}, TypeError, "`offsets` must be a tensor of torch.int32; got .*int64"),
        ({"columns": [0, 0, 1]}, TypeError, "`columns` must be a tensor of torch.int32; got list"),
        ({"offsets": torch.tensor([[0, 1]]).int()}, ValueError, r"must have shape \(heads, 3\) for 16 queries"),
        ({"offsets": torch.tensor([[0, 2, 1]]).int()}, ValueError, "`offsets` must rise from 0 to 3"),
        ({"offsets": torch.tensor([[0, 1, 2]]).int()}, ValueError, "`offsets` must rise from 0 to 3"),
        ({"offsets": torch.tensor([[0, 1, 1], [2, 2, 3]]).int()}, ValueError, "`offsets` must rise from 0 to 3"),
        ({"columns": torch.tensor([0, 0, 2]).int()}, ValueError, "`columns` must lie below 2"),
        ({"columns": torch.tensor([0, 1, 0]).int()}, ValueError, "rise within each row"),
        ({"columns": torch.tensor([0, 0]).int()}, ValueError, "as long as one another"),
        ({"patterns": torch.tensor([0, -1, 1]).int()}, ValueError, "`patterns` must be -1 or lie below 1"),
        ({"bits": torch.zeros(1, 8).byte()}, ValueError, r"`bits` must have shape \(patterns, block_q, block_k / 8\)"),
    ],
    ids=str,
)
def test_members_that_make_no_mask(changes, error, match):
    mask = masks.causal(16, block_size=8)  # rows of one and two blocks
    with pytest.raises(error, match="BlockMask: .*" + match):
        dataclasses.replace(mask, **changes)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: masks.causal(8, block_size=12), "causal: .*keys, these a multiple of 8; got 12"),
        (lambda: masks.window(8, left=1, right=0, block_size=(0, 8)), r"window: `block_size` must .*; got \(0, 8\)"),
        (lambda: masks.window(-1, left=1, right=0), "window: `q_len` must be at least 0; got -1"),
        (lambda: masks.window(8, left=-2, right=0), "window: `left` must be at least 0, or -1 for no bound; got -2"),
        (lambda: masks.prefix(8, length=-1), "prefix: `length` must be at least 0; got -1"),
        (lambda: masks.global_tokens(8, tokens=9), "global_tokens: `tokens` must be positions from 0 to 7"),
        (lambda: masks.random_blocks(8, count=-1), "random_blocks: `count` must be at least 0; got -1"),
        (lambda: masks.strided(8, stride=0), "strided: `stride` must be at least 1"),
        (lambda: masks.strided(8, stride=1, heads=0), "strided: `heads` must be at least 1; got 0"),
        (lambda: masks.document(torch.zeros(3)), "document: `ids` must be integers of one axis; got torch.float32"),
    ],
)
def test_makers_refuse(call, match):
    with pytest.raises(ValueError, match=match):
        call()
