"""Attention over cuts in each of its ways: outputs and gradients are those of one process."""

from typing import Any

import pytest
import torch
from context_cases import attends
from ranks import Ranks

from ssmkernels import attention
from ssmkernels.ops.attention.partial import partial_gradients
from ssmzoo.parallel.blocks import Pairs
from ssmzoo.parallel.cut import Cut
from ssmzoo.parallel.layout import Layout
from ssmzoo.parallel.plan import Plan


@pytest.fixture(scope="module")
def processes():
    found = Ranks(4)
    yield found
    found.stop()


CAUSAL = {"causal": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "causal": CAUSAL,
    "of groups, with sinks": CAUSAL | {"h_kv": 3, "per_head": ["sinks"]},
    "with distances": CAUSAL | {"per_head": ["alibi_slopes"], "softcap": 2.0},
    "with a window": CAUSAL | {"window": (3, 0)},
    "with a wide window": CAUSAL | {"window": (12, 0), "h_kv": 3, "per_head": ["alibi_slopes", "sinks"]},
    "both ways": {"window": (5, 2)},
    "of everything": {},
}
CUTS = ([4, 17], [5, 0, 16], [11, 1, 3, 9])
BORDERS = [0, 5, 5, 6, 13, 21]


NOT_CAUSAL = [name for name in OPTIONS if "causal" not in OPTIONS[name]]
WAYS = [(name, how) for name in OPTIONS for how in ("ring", "heads", "balanced")]
WAYS += [(name, "window") for name in OPTIONS if name not in NOT_CAUSAL]


@pytest.mark.mixer("attention")
@pytest.mark.parametrize(("name", "how"), WAYS)
def test_each_way(name: str, how: str, processes: Ranks):
    options = OPTIONS[name]
    for lengths in CUTS:
        if how != "heads" or options.get("h_kv", 12) % len(lengths) == 0:
            found = processes.run(len(lengths), attends, how, options, lengths, None)
            assert all(text.startswith(how) for text in found)
    processes.run(3, attends, how, options, [4, 6, 11], BORDERS)
    processes.run(3, attends, how, options, [0, 0, 21], BORDERS)


@pytest.mark.mixer("attention")
@pytest.mark.parametrize(("name", "how"), [each for each in WAYS if each[1] in ("window", "heads")])
def test_each_way_as_where_it_is_computed_again(name: str, how: str, processes: Ranks):
    """Its gradients are then those of the output and the log-sum-exp that are kept."""
    processes.run(3, attends, how, OPTIONS[name], [4, 6, 11], None, True)
    processes.run(3, attends, how, OPTIONS[name], [0, 0, 21], BORDERS, True)


@pytest.mark.mixer("attention")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gradients_without_outputs(dtype: torch.dtype):
    """A process that helps gets outputs' products with their gradients, a number a head, in the place of outputs."""
    torch.manual_seed(0)
    q, k, v, d_out = (torch.randn(1, 33, 4, 8, dtype=dtype) for _ in range(4))
    wide = torch.promote_types(dtype, torch.float32)
    out, lse = (x.to(wide) for x in attention(q, k, v, causal=True, return_lse=True))
    d_lse = torch.randn_like(lse)
    beside = d_lse - (out * d_out).sum(-1).transpose(1, 2)
    expected = partial_gradients(q, k, v, out, lse, d_out, d_lse, causal=True)
    found = partial_gradients(q, k, v, torch.zeros_like(out), lse, d_out, beside, causal=True)
    for name in ("q", "k", "v"):
        torch.testing.assert_close(found[name], expected[name])


def plan_of(lengths: list[int], how: str | None = None, **changes: Any) -> Plan:
    """Of attention of 8 heads, over parts of these lengths."""
    cut = Cut.of_batch(0, lengths, 1, torch.device("cpu"))
    heads = changes.pop("h_kv", 8)
    tensors = {"q": torch.empty(1, 0, 8, 4), "k": torch.empty(1, 0, heads, 4), "v": torch.empty(1, 0, heads, 4)}
    given = {"causal": True, "window": None, "scale": None, "softcap": 0.0, "return_lse": False}
    return Plan.of(Layout.of_cut(cut), how, tensors | given | changes)


def test_calls_alike_have_one_plan(monkeypatch):
    """A fault: every call of attention looked at all pairs of processes anew."""
    looked, of = [], Pairs.of
    monkeypatch.setattr(Pairs, "of", lambda *args: (looked.append(1), of(*args))[1])
    lengths = [7, 5, 9]  # of no other test here
    first = plan_of(lengths, window=(2, 0))
    assert first.how
    assert looked
    count = len(looked)
    again = plan_of(lengths, window=(2, 0))
    assert again.how == first.how
    assert again.told(1) == first.told(1)
    assert again.traffic(again.how, 1) == first.traffic(first.how, 1)
    assert len(looked) == count
    others = [plan_of(lengths, "ring", window=(2, 0)), plan_of([7, 9, 5], window=(2, 0)), plan_of(lengths)]
    assert len({first, *others}) == 4


def products(plan: Plan, layout: Layout) -> list[int]:
    """Of queries and the keys that they see, on each process, counted one by one."""
    held = [[p for run in runs for p in range(run.first, run.end)] for runs in layout.runs]
    left = plan.options.left
    return [sum(p + 1 if left < 0 else min(p, left) + 1 for p in each) for each in held]


@pytest.mark.mixer("attention")
@pytest.mark.parametrize("lengths", [[64, 64, 64, 64], [200, 0, 40, 16], [1, 2, 250, 3]])
def test_a_ring_shares_work_evenly(lengths: list[int]):
    plan = plan_of(lengths)
    work = products(plan, plan.layout)
    assert sorted(p for runs in plan.layout.runs for run in runs for p in range(run.first, run.end)) == [*range(256)]
    assert max(work) <= 1.01 * sum(work) / 4
    assert max(products(plan, plan.parts)) > 1.5 * max(work)


@pytest.mark.mixer("attention")
def test_a_window_reaches_no_further_than_it_sees():
    """Work is even as it is, and processes out of reach get nothing."""
    plan = plan_of([64, 64, 64, 64], "ring", window=(70, 0))
    assert plan.layout is plan.parts
    seen = [[sum(b - a for a, b in Pairs.of(plan.layout, r, g, plan.options).rows) for g in range(4)] for r in range(4)]
    assert seen == [[64, 0, 0, 0], [64, 64, 0, 0], [6, 64, 64, 0], [0, 6, 64, 64]]


@pytest.mark.mixer("attention")
def test_the_way_that_sends_less():
    assert plan_of([64] * 4, window=(20, 0)).how == "window"
    assert plan_of([64] * 4).how == "heads"
    assert "would send" in plan_of([64] * 4).told(0)
    assert plan_of([64] * 4, h_kv=2).how == "balanced"
    assert "8 and 2 heads do not divide by 4" in plan_of([64] * 4, h_kv=2).told(0)
    assert plan_of([64] * 12, h_kv=1).how == "ring"  # whose few keys go round at little cost
    assert plan_of([200, 0, 40, 16], h_kv=2).how == "ring"
    assert "balanced, the busiest process would have too much to do" in plan_of([200, 0, 40, 16], h_kv=2).told(0)
    assert plan_of([64] * 4, window=(100, 0), h_kv=2).how == "ring"
    assert plan_of([64] * 4, causal=False, h_kv=2).how == "ring"
    for how in ("ring", "balanced"):
        assert "as asked for" in plan_of([64] * 4, how).told(0)
    with pytest.raises(ValueError, match="`how` 'heads' needs heads that 4 processes divide; got 8 of queries and 2"):
        plan_of([64] * 4, "heads", h_kv=2)
