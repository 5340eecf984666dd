"""Native attention over several pieces of the keys, ranges of queries and parts of the gradients; what it refuses."""

from __future__ import annotations

import pytest
import torch

from ssmkernels import attention, explain, native, selected_attention

pytestmark = [
    pytest.mark.op("attention", "selected_attention"),
    pytest.mark.skipif(native.missing() is not None, reason=str(native.missing())),
]


def drawn(l, m, h=3, h_kv=1, k=3, v=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, l, h, k), (2, m, h_kv, k), (2, m, h_kv, v)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def results(attend, tensors, implementation, **options):
    """out, lse and the gradients of both."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out, lse = attend(*leaves, return_lse=True, implementation=implementation, **options)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    loss = (out * weight).sum() + lse.masked_fill(lse == -torch.inf, 0).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]


RUNS = {
    "causal": {"causal": True},
    "window": {"window": (150, 37)},
    "all": {},
    "far left": {"window": (0, -1)},
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize(("l", "m"), [(300, 420), (420, 300)])
def test_runs_longer_than_pieces_and_ranges(options, l, m):
    tensors = drawn(l, m)
    for one, other in zip(*(results(attention, tensors, name, **options) for name in ("cpu", "tiled")), strict=True):
        torch.testing.assert_close(one, other)


def selection(l, size, n):
    own = torch.arange(l)[:, None, None] // size
    blocks = (torch.rand(1, l, 1, n, generator=torch.Generator().manual_seed(1)) * (own + 1)).int()
    blocks[..., 0] = own[..., 0]
    return {"blocks": blocks, "block_size": size}


@pytest.mark.parametrize("attend", ["runs", "blocks"])
def test_parts_of_the_gradients_and_threads(attend, on_threads):
    l = 2100  # two parts
    call, options = (attention, {"window": (100, 0)}) if attend == "runs" else (selected_attention, selection(l, 80, 3))
    tensors = [x[:1] for x in drawn(l, l, h=2)]
    alone, shared = (on_threads(number, results, call, tensors, "cpu", **options) for number in (1, 2))
    assert all(map(torch.equal, alone, shared))
    for one, other in zip(alone, results(call, tensors, "tiled", **options), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_hidden_keys_may_hold_anything(value):
    """Keys 100 … 109 are seen by the queries that stand there, and by those up to 20 places after them."""
    q, k, v = drawn(300, 300)
    clean = results(attention, (q, k, v), "cpu", window=(20, 0))
    k[:, 100:110] = value
    v[:, 100:110] = value
    found = results(attention, (q, k, v), "cpu", window=(20, 0))
    seeing = torch.zeros(300, dtype=torch.bool)
    seeing[100:130] = True
    for i in (0, 2):  # out, and the gradient of q
        torch.testing.assert_close(found[i][:, ~seeing], clean[i][:, ~seeing])
        assert not found[i][:, seeing].isfinite().any()


def test_rising_positions_are_runs():
    q, k, v = drawn(70, 90)
    generator = torch.Generator().manual_seed(2)
    places = {
        "q_positions": torch.randint(0, 99, (2, 70), generator=generator).sort().values,
        "k_positions": torch.randint(0, 99, (2, 90), generator=generator).sort().values,
    }
    options = {"window": (30, 5), **places}
    for one, other in zip(*(results(attention, (q, k, v), n, **options) for n in ("cpu", "reference")), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("positions", [("q",), ("k",), ("q", "k")], ids="".join)
def test_tokens_in_any_order_are_sorted(positions, dtype):
    """The same bits as in order, in that order; each row of the batch has an order of its own."""
    q, k, v = (x.to(dtype) for x in drawn(70, 90))
    generator = torch.Generator().manual_seed(2)
    places = {"q": torch.arange(20, 90).expand(2, -1), "k": torch.arange(90).expand(2, -1)}
    orders = {
        name: torch.stack([torch.randperm(n, generator=generator) for _ in range(2)])
        if name in positions
        else torch.arange(n).expand(2, -1)
        for name, n in (("q", 70), ("k", 90))
    }

    def moved(x, name, axis=1):
        shape = [2, *[1] * (x.ndim - 1)]
        shape[axis] = -1
        return x.gather(axis, orders[name].view(shape).expand(x.shape))

    options = {"window": (30, 5), "return_lse": True}
    weight = torch.linspace(-1, 1, 70, dtype=dtype)[None, :, None, None]

    def found(tensors, weight, **places):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out, lse = attention(*leaves, implementation="cpu", **options, **places)
        gradients = torch.autograd.grad((out * weight).sum() + (lse * weight[:, None, :, 0, 0]).sum(), leaves)
        return out.detach(), lse.detach(), *gradients

    straight = {f"{name}_positions": place.contiguous() for name, place in places.items()}
    there = {f"{name}_positions": moved(place, name) for name, place in places.items()}
    weights = weight.expand(2, -1, 1, 1)
    out, lse, dq, dk, dv = found((q, k, v), weights, **straight)
    mixed = found((moved(q, "q"), moved(k, "k"), moved(v, "k")), moved(weights, "q"), **there)
    wanted = (moved(out, "q"), moved(lse, "q", 2), moved(dq, "q"), moved(dk, "k"), moved(dv, "k"))
    for one, other in zip(mixed, wanted, strict=True):
        assert torch.equal(one, other)
    assert explain(attention, q, k, v, **options, **there).chosen == "cpu"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"softcap": 1.0}, "no softcap"),
        ({"sinks": torch.zeros(3, dtype=torch.float64)}, "no sinks"),
        ({"alibi_slopes": torch.ones(3, dtype=torch.float64)}, "no ALiBi"),
        ({"cu_seqlens": torch.tensor([0, 3, 9], dtype=torch.int32)}, "no packed sequences"),
    ],
    ids=str,
)
def test_what_it_cannot_do(options, reason):
    tensors = [x[:1] for x in drawn(9, 9)]
    with pytest.raises(
        ValueError, match="implementation 'cpu' .* cannot run this call: the native kernel has " + reason
    ):
        attention(*tensors, implementation="cpu", **options)
