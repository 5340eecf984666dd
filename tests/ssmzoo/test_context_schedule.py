"""Balanced attention on paper: every pair of a query and a key that it sees once, and as much to do for everybody."""

import itertools
import random
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from ssmzoo.parallel import balanced
from ssmzoo.parallel.blocks import Options, merged
from ssmzoo.parallel.cut import Cut
from ssmzoo.parallel.inputs import Inputs
from ssmzoo.parallel.layout import Layout, Run, Span
from ssmzoo.parallel.line import Line
from ssmzoo.parallel.schedule import loads, schedule
from ssmzoo.parallel.transfers import To

pytestmark = pytest.mark.mixer("attention")
CAUSAL = (-1, 0)
WINDOWS = [CAUSAL, (3, 0), (9, 0), (-1, -1), (5, 2), (0, 4)]


def options_of(window: tuple[int, int]) -> Options:
    return Options(*window, None, 0.0)


def rows_of(spans: list[Span]) -> list[int]:
    return [row for a, b in spans for row in range(a, b)]


def tokens_of(layout: Layout, rank: int) -> list[tuple[int, int]]:
    """The sequence and the place of each row."""
    return [(run.sequence, place) for run in layout.runs[rank] for place in range(run.first, run.end)]


def computed(layout: Layout, options: Options) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """The pairs of a query and a key that tasks compute, as often as they do."""
    found = []
    for task in itertools.chain(*schedule(layout, options)):
        queries, keys = tokens_of(layout, task.asks), tokens_of(layout, task.gives)
        queries, keys = (
            [of[row] for row in rows_of(rows)] for of, rows in ((queries, task.queries), (keys, task.keys.rows))
        )
        assert task.at in (task.asks, task.gives)
        area = len(found)
        for pair in task.keys.pairs:
            for i, q in enumerate(queries[slice(*pair.q)]):
                for j, k in enumerate(keys[slice(*pair.k)]):
                    assert q[1] - k[1] == pair.apart + i - j
                    if sees(options, q, k):
                        found.append((q, k))
        assert task.area == len(found) - area
        assert {q for q, _ in found[area:]} == set(queries), "queries that see nothing"
        assert {k for _, k in found[area:]} == set(keys), "keys that nobody sees"
    return found


def sees(options: Options, q: tuple[int, int], k: tuple[int, int]) -> bool:
    left, right = (n if n >= 0 else 10**9 for n in options[:2])
    return q[0] == k[0] and q[1] - left <= k[1] <= q[1] + right


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize(
    ("lengths", "borders"),
    [
        ([7], None),
        ([8, 8], None),
        ([5, 5, 5], None),
        ([4, 17], None),
        ([5, 0, 16], None),
        ([6, 6, 6, 6], None),
        ([11, 1, 3, 0, 9], None),
        ([4, 6, 11], [0, 5, 5, 6, 13, 21]),
        ([0, 0, 21], [0, 5, 5, 6, 13, 21]),
        ([8, 8, 8, 8], [0, 2, 30, 32]),
        ([0, 0], None),
    ],
)
def test_each_visible_pair_once(lengths: list[int], borders: list[int] | None, window: tuple[int, int]):
    cpu, options = torch.device("cpu"), options_of(window)
    cut = Cut.of_batch(0, lengths, 2, cpu) if borders is None else Cut.of_packed(0, lengths, borders, cpu)
    layout = Layout.of_cut(cut)
    tokens = [token for rank in range(len(lengths)) for token in tokens_of(layout, rank)]
    seen = [(q, k) for q in tokens for k in tokens if sees(options, q, k)]
    assert sorted(computed(layout, options)) == sorted(seen)


@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("ranks", range(2, 17))
def test_causal_attention_is_even_in_half_the_steps(ranks: int, sequences: int):
    layout = Layout.of_cut(Cut.of_batch(0, [64] * ranks, sequences, torch.device("cpu")))
    steps = schedule(layout, options_of(CAUSAL))
    work = loads(steps, ranks)
    assert sum(work) == sequences * 64 * ranks * (64 * ranks + 1) // 2
    assert max(work) <= 1.02 * sum(work) / ranks
    assert len(steps) == 1 + ranks // 2
    for step in steps:  # nobody waits in a step for another that has more to do
        of_step = loads((step,), ranks)
        assert max(of_step) <= 1.02 * min(of_step)


@pytest.mark.parametrize("seed", range(8))
def test_uneven_parts_are_as_even_as_two_can_make_them(seed: int):
    """No process that has more to do than another has a share of a block that the other could take over."""
    generator = random.Random(seed)
    lengths = [generator.randrange(40, 120) for _ in range(generator.randrange(3, 9))]
    borders = [0, *sorted(generator.sample(range(1, sum(lengths)), generator.randrange(3))), sum(lengths)]
    layout = Layout.of_cut(Cut.of_packed(0, lengths, borders, torch.device("cpu")))
    steps = schedule(layout, options_of(CAUSAL))
    work, ranks = loads(steps, len(lengths)), len(lengths)
    mean = sum(work) / ranks
    for task in itertools.chain(*steps):
        if task.source is not None and max(work) > 1.05 * mean and work[task.at] == max(work):
            assert work[task.source] > 0.9 * max(work) or task.area < 0.05 * mean


def test_pairs_are_counted():
    for q, k, window in itertools.product(
        [Run(0, 0, 5), Run(0, 3, 1), Run(0, 7, 6)], [Run(0, 0, 4), Run(0, 4, 7), Run(0, 9, 1)], WINDOWS
    ):
        options = options_of(window)
        expected = [
            (i, j) for i in range(q.first, q.end) for j in range(k.first, k.end) if sees(options, (0, i), (0, j))
        ]
        assert options.visible(q, k) == len(expected)
        if expected:
            asking = options.asking(q, k)
            assert sorted({i for i, _ in expected}) == [*range(asking.first, asking.end)]


@pytest.mark.parametrize("rank", [0, 3, 4])
def test_transfers_travel_while_steps_are_computed(rank: int, monkeypatch):
    """What step t + 1 needs is on its way before step t is computed; what step t has found, until t + 1 is computed."""
    layout = Layout.of_cut(Cut.of_batch(0, [8] * 5, 1, torch.device("cpu")))
    steps = schedule(layout, options_of(CAUSAL))
    events: list[str] = []

    def transfer(line: Line, sends: list[To], comes: list[To]) -> Callable[[], None]:
        number = sum("start" in event for event in events)
        events.append(f"start {number}")
        for x, _ in comes:
            x.zero_()
        return lambda: events.append(f"wait {number}")

    def computes(*args: object) -> None:
        events.append("compute")
        merged(*args)

    monkeypatch.setattr(balanced, "transfer", transfer)
    monkeypatch.setattr(balanced, "merged", computes)
    q, k, v = torch.randn(3, 8, 2, 4).unbind(0)
    line = SimpleNamespace(rank=rank, ranks=5)
    balanced.Balanced(line, options_of(CAUSAL), steps).forward(Inputs(q, k, v, None, None))
    # 0: nothing for step 0; 1: for step 1; 2: of step 0, nothing; 3: for step 2; 4: of step 1; 5: nothing; 6: of step 2
    assert [event for event in events if event not in ("start 0", "wait 0", "start 2", "wait 2", "start 5")] == [
        *("start 1", "compute"),
        *("wait 1", "start 3", "compute", "start 4"),
        *("wait 3", "compute", "wait 4", "start 6", "wait 6"),
    ]
