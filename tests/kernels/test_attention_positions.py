"""Attention whose causal masks, windows and ALiBi go by positions of the tokens' own."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ssmkernels import attention
from ssmkernels.masks import from_function
from ssmkernels.ops.attention import _parts

pytestmark = pytest.mark.op("attention")

NAMES = ("reference", "sdpa", "tiled")
EACH = pytest.mark.parametrize("attend", [functools.partial(attention, implementation=n) for n in NAMES], ids=NAMES)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(_parts, "ROWS", 4)
    monkeypatch.setattr(_parts, "COLUMNS", 5)
    monkeypatch.setattr(_parts, "ELEMENTS", 64)


def drawn(b=2, l=17, m=23, h=4, h_kv=2, k=5, v=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q": (b, l, h, k), "k": (b, m, h_kv, k), "v": (b, m, h_kv, v)}
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


def permuted(made, seed=3):
    """The same tokens in another order for each row of the batch, with their positions; and the orders."""
    generator = torch.Generator().manual_seed(seed)
    (b, l), m = made["q"].shape[:2], made["k"].shape[1]
    orders = {n: torch.stack([torch.randperm(n, generator=generator) for _ in range(b)]) for n in {l, m}}
    q, k = orders[l], orders[m].flip(0)
    moved = {"q": rows(made["q"], q), "k": rows(made["k"], k), "v": rows(made["v"], k)}
    return moved | {"q_positions": q + m - l, "k_positions": k}, q, k


def rows(x, order):
    return x[torch.arange(len(x))[:, None], order]


def with_gradients(attend, made, weight, **options):
    leaves = {name: made[name].clone().requires_grad_() for name in "qkv"}
    out = attend(**{**made, **leaves}, **options)
    (out * weight).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves.values())]


OPTIONS = (
    {"causal": True},
    {"window": (4, 2)},
    {"causal": True, "window": (6, -1), "alibi_slopes": torch.tensor([0.1, 0.2, 0.4, 0.8])},
    {"alibi_slopes": torch.tensor([0.1, 0.2, 0.4, 0.8])},
    {"causal": True, "scale": -0.3},
)


@EACH
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ", ".join(o))
@pytest.mark.parametrize("l", [17, 31])  # 31 queries over 23 keys: the first ones see nothing
def test_any_order_gives_the_same_in_that_order(attend, options, l, small_tiles):
    made = drawn(l=l)
    options = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    moved, q, k = permuted(made)
    weight = torch.randn(2, l, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    expected = with_gradients(functools.partial(attention, implementation="reference"), made, weight, **options)
    found = with_gradients(attend, moved, rows(weight, q), **options)
    for f, e, order in zip(found, expected, (q, q, k, k), strict=True):
        torch.testing.assert_close(f, rows(e, order), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["reference", "tiled"])
def test_the_order_of_queries_does_not_change_a_bit(name):
    made = drawn(b=1, l=96, m=600, h=2, h_kv=1, k=16, v=16, dtype=torch.float32)
    positions = torch.arange(600)[None]
    last = positions[:, -96:]
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    attend = functools.partial(attention, causal=True, k_positions=positions, return_lse=True, implementation=name)
    out, lse = attend(**made, q_positions=last)
    other, other_lse = attend(**made | {"q": made["q"][:, order]}, q_positions=last[:, order])
    assert torch.equal(other, out[:, order])
    assert torch.equal(other_lse, lse[:, :, order])


@EACH
def test_dropped_tokens_leave_gaps(attend, small_tiles):
    made = drawn(b=1, l=30, m=30)
    kept_q, kept_k = torch.arange(0, 30, 3), torch.arange(1, 30, 2)
    found = attend(
        q=made["q"][:, kept_q],
        k=made["k"][:, kept_k],
        v=made["v"][:, kept_k],
        q_positions=kept_q[None].int(),
        k_positions=kept_k[None],
        causal=True,
        window=(9, -1),
    )
    mask = from_function(lambda h, i, j: (j % 2 == 1) & (j <= i) & (j >= i - 9), 30, 30, block_size=8)
    expected = attention(**made, block_mask=mask, implementation="reference")[:, kept_q]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not found[:, 0].any(), "the first query sees nothing"


def test_a_query_that_sees_nothing(small_tiles):
    made = {name: x.requires_grad_() for name, x in drawn(b=1, l=9, m=9).items()}
    places = {"q_positions": torch.arange(9)[None], "k_positions": torch.arange(4, 13)[None]}
    for name in ("reference", "tiled"):
        out, lse = attention(**made, **places, causal=True, return_lse=True, implementation=name)
        assert not out[:, :4].any()
        assert (lse[:, :, :4] == -torch.inf).all()
        assert lse[:, :, 4:].isfinite().all()
        dq, dk, dv = torch.autograd.grad(out.sum() + lse[:, :, 4:].sum(), list(made.values()))
        assert not dq[:, :4].any()
        assert not dk[:, 5:].any()
        assert not dv[:, 5:].any()


@pytest.mark.parametrize("name", NAMES)
def test_buckets_packed_one_after_another(name):
    """Tokens sorted by bucket and packed by it see those of their bucket, up to their own position."""
    made = drawn(b=1, l=40, m=40)
    bucket = torch.randint(4, (40,), generator=torch.Generator().manual_seed(2))
    order = bucket.sort(stable=True).indices
    borders = torch.bincount(bucket, minlength=5).cumsum(0).int()
    moved = {n: x[:, order] for n, x in made.items()}
    places = {"q_positions": order[None], "k_positions": order[None]}
    packing = {"cu_seqlens": torch.cat([borders.new_zeros(1), borders])}
    found = attention(**moved, **places, **packing, causal=True, implementation=name)
    mask = from_function(lambda h, i, j: (bucket[i] == bucket[j]) & (j <= i), 40, 40, block_size=8)
    expected = attention(**made, block_mask=mask, implementation="reference")[:, order]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@EACH
def test_what_is_not_seen_may_be_nan(attend):
    made = drawn(b=1, l=12, m=12, dtype=torch.float32)
    moved, q, k = permuted(made)
    clean = attend(**moved, causal=True)
    late = k[0] >= 6
    moved["k"][:, late], moved["v"][:, late] = torch.nan, torch.nan
    found = attend(**moved, causal=True)
    early = q[0] < 6
    torch.testing.assert_close(found[:, early], clean[:, early])
    assert found[:, ~early].isnan().all()


class Weights(TorchDispatchMode):
    """Counts the weights of the tiles that are computed."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == "exp2_":
            self.count += result.numel()
        return result


def test_tiles_without_a_visible_key_are_passed_over(monkeypatch):
    monkeypatch.setattr(_parts, "ROWS", 8)
    monkeypatch.setattr(_parts, "COLUMNS", 8)
    made = drawn(b=1, l=64, m=64, h=1, h_kv=1)
    order = torch.arange(64).view(8, 8).flip(0).flatten()[None]  # blocks from the last to the first
    counts = []
    for places in ({"q_positions": order, "k_positions": order}, {}):
        with Weights() as watch:
            attention(**made, **places, causal=True, window=(15, 0), implementation="tiled")
        counts.append(watch.count)
    assert counts[0] == (3 * 8 - 3) * 64  # each block with itself and the two before it
    with Weights() as watch:
        mask = from_function(lambda h, i, j: i // 16 == j // 16, 64, 64, block_size=(8, 8))
        attention(**made, q_positions=order, k_positions=order, causal=True, block_mask=mask, implementation="tiled")
    assert watch.count == 3 * 4 * 64


@pytest.mark.parametrize(
    ("places", "error", "match"),
    [
        ({"q_positions": torch.zeros(2, 17).long()}, ValueError, "`q_positions` needs `k_positions`"),
        ({"k_positions": torch.zeros(2, 23).long()}, ValueError, "`k_positions` needs `q_positions`"),
        (
            {"q_positions": torch.zeros(2, 17), "k_positions": torch.zeros(2, 23).long()},
            TypeError,
            "`q_positions` must be int32 or int64; got float32",
        ),
        (
            {"q_positions": torch.zeros(2, 17).long(), "k_positions": torch.zeros(2, 22).long()},
            ValueError,
            r"`k_positions` must have shape \(b m\) with b=2, m=23; got \(2, 22\)",
        ),
        (
            {"q_positions": torch.zeros(17).long(), "k_positions": torch.zeros(2, 23).long()},
            ValueError,
            r"`q_positions` must have shape \(b l\)",
        ),
        (
            {"q_positions": torch.zeros(2, 17).long(), "k_positions": torch.full((2, 23), 2**30)},
            ValueError,
            "`k_positions` must be from -1073741824 to 1073741823; got 1073741824",
        ),
        (
            {"q_positions": torch.full((2, 17), -(2**40)), "k_positions": torch.zeros(2, 23).long()},
            ValueError,
            "`q_positions` must be from .* got -1099511627776",
        ),
        ({"q_positions": [0], "k_positions": torch.zeros(2, 23).long()}, TypeError, "`q_positions` must be a tensor"),
    ],
)
def test_errors(places, error, match):
    with pytest.raises(error, match=match):
        attention(**drawn(), **places)
