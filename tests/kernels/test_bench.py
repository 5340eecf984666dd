"""The measuring core: who takes part, whose turn it is, what a fit finds; and peers that do the same work as ours."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import ssmkernels
from ssmkernels import bench
from ssmkernels.bench import contest, measure
from ssmkernels.bench import ops as ops_bench
from ssmkernels.bench.peers import Package, Peer, peers_of, setting_of
from ssmkernels.check.spec import spec_of, specs

SMALL = {"l": 16, "d": 8, "n": 4, "m": 16, "length": 32, "l_k": 16, "h": 2, "h_kv": 2, "k": 8, "shape": (2, 5, 8)}
LIMITS = bench.Limits(bandwidth=1e10, flops=1e11)


def plan(**changed):
    given = {"seconds": 1e-4, "quick": True, "changes": SMALL, **changed}
    return bench.Plan(torch.device("cpu"), torch.float32, LIMITS, **given)


def rows_of(op, **changed):
    return [row for rows in bench.bench_op(op, plan(**changed)) for row in rows]


@pytest.fixture
def peers(monkeypatch):
    """Puts peers in place of an op's own."""

    def put(*made):
        monkeypatch.setattr(ops_bench, "peers_of", lambda op, device: made)

    return put


def scan(*args, **kwargs):
    return ssmkernels.selective_scan(*args, **kwargs, implementation="reference")


def wrong_gradient(u, *args, **kwargs):
    return scan(1.01 * u - 0.01 * u.detach(), *args, **kwargs)


def broken(*args, **kwargs):
    raise ImportError("it is of another version\nand more")


def test_who_fails_the_check_is_named_and_not_timed(peers):
    peers(Peer("wrong", bench.Package(), wrong_gradient), Peer("broken", bench.Package(), broken))
    rows = {(row.implementation, row.work): row for row in rows_of("selective_scan")}
    assert rows["wrong", ""].median is None
    assert "fails its check" in rows["wrong", ""].refused
    assert "gradient of u" in rows["wrong", ""].refused
    assert "it is of another version" in rows["broken", ""].refused
    assert "\n" not in rows["broken", ""].refused
    assert not {name for name, work in rows if work} & {"wrong", "broken"}


def test_who_does_other_work_at_the_timed_size_is_not_timed(peers):
    def only_short(u, *args, **kwargs):
        return scan(u if u.shape[-1] < SMALL["d"] else 2 * u, *args, **kwargs)

    peers(Peer("another", bench.Package(), only_short))
    rows = [row for row in rows_of("selective_scan") if row.implementation == "another"]
    assert [row.work for row in rows] == [bench.FORWARD, bench.BOTH]
    assert all(row.median is None and "its results are others: y is off" in row.refused for row in rows)


def test_an_implementation_of_ours_that_fails_is_not_timed(peers, monkeypatch):
    peers()
    real = ops_bench.check

    def check(op, function, **options):
        return real(op, wrong_gradient if function == "tiled" else function, **options)

    monkeypatch.setattr(ops_bench, "check", check)
    monkeypatch.setenv("SSMZOO_DISABLE", "cpu,triton")
    rows = {row.implementation: row for row in rows_of("selective_scan")}
    assert "fails its check" in rows["tiled"].refused
    assert rows["reference"].median is not None  # somebody has to do the work that others are held against


def test_an_absent_peer_is_told_with_what_to_install(peers):
    peers(Peer("theirs", Package("no_such_module", "no-such-package"), scan))
    (row,) = [row for row in rows_of("selective_scan") if row.implementation == "theirs"]
    assert row.refused == "not installed: pip install no-such-package"


def test_without_peers_nobody_is_asked(peers):
    peers(Peer("theirs", Package("no_such_module"), scan))
    assert {row.role for row in rows_of("selective_scan", peers=False)} == {"ours"}


def test_turns_alternate_and_each_round_starts_with_another():
    assert list(bench.schedule({"a": 3, "b": 3, "c": 3})) == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]


def test_few_samples_are_spread_over_the_whole_time():
    turns = list(bench.schedule({"quick": 12, "slow": 3}))
    assert turns.count("quick") == 12
    assert turns.count("slow") == 3
    places = [i for i, name in enumerate(turns) if name == "slow"]
    assert all(3 <= after - before <= 7 for before, after in itertools.pairwise(places))
    assert list(bench.schedule({})) == []


def test_contestants_run_by_turns():
    seen = []
    timings = bench.compete({name: lambda name=name: seen.append(name) for name in "ab"}, seconds=1e-3)
    turns = [name for name, _ in itertools.groupby(seen)]
    assert turns[:5] == ["a", "b", "a", "b", "a"]  # warm-up; then ab and ba, where the two bs are one here
    assert all(len(timing.samples) >= 3 for timing in timings.values())


def test_the_slowest_are_called_twice():
    calls = []
    (timing,) = bench.compete({"slow": lambda: calls.append(0)}, seconds=0.0).values()
    assert len(timing.samples) == 2


class Clock:
    """Time that passes by what calls say."""

    now = 0.0

    def perf_counter(self):
        return self.now


def test_who_takes_forever_is_called_once(monkeypatch):
    calls, weighed, clock = [], [], Clock()
    monkeypatch.setattr(contest, "ENDLESS", 0.02)
    monkeypatch.setattr(measure, "ENDLESS", 0.02)
    monkeypatch.setattr(measure, "time", clock)
    monkeypatch.setattr(contest, "_memory", lambda one, plan: weighed.append(one.name) or (1, 1))

    def quick():
        clock.now += 1e-3
        return {"y": torch.ones(2)}

    def slow():
        calls.append(0)
        clock.now += 0.03
        return {"y": torch.ones(2)}

    given = [bench.Contestant("quick", "ours", quick), bench.Contestant("slow", "peer", slow)]
    first, last = contest.hold(bench.Contest("ops", "smooth", "forward", "", given), plan(seconds=1.0))
    assert len(calls) == last.samples == 1
    assert first.samples >= 3
    assert last.median == pytest.approx(0.03)
    assert last.of_ours == last.median / first.median
    assert weighed == ["quick"]
    assert (last.peak_bytes, last.refused) == (None, "")


def test_a_timing_has_its_quartiles():
    timing = bench.Timing((5.0, 1.0, 2.0, 3.0, 4.0))
    assert (timing.median, timing.quartiles) == (3.0, (2.0, 4.0))
    assert bench.Timing((2.0,)).quartiles == (2.0, 2.0)


@pytest.mark.parametrize("power", [0.0, 1.0, 1.5, 2.0])
def test_the_fit_of_growth_is_exact(power):
    lengths = [128, 256, 512, 2048]
    assert bench.exponent(lengths, [3e-4 * l**power for l in lengths]) == pytest.approx(power, abs=1e-12)


def test_a_fit_needs_two_sizes():
    with pytest.raises(ValueError, match="`sizes` and `values` must be two or more"):
        bench.exponent([128, 128], [1.0, 2.0])


def test_memory_is_measured_after_the_times(peers, monkeypatch):
    """What watches it changes what the next call finds in the allocator."""
    order = []

    def watched(name, function):
        return lambda *given, **how: order.append(name) or function(*given, **how)

    for name in ("compete", "peak_memory"):
        monkeypatch.setattr(contest, name, watched(name, getattr(contest, name)))
    peers()
    list(bench.bench_op("causal_conv1d", plan(quick=False)))
    runs = [name for name, _ in itertools.groupby(order)]
    assert runs == ["compete", "peak_memory"] * 3  # forward, forward + backward, growth


def test_growth_times_several_lengths_and_fits(peers):
    peers()
    changes = SMALL | {"l": 32}
    rows = [row for row in rows_of("causal_conv1d", quick=False, changes=changes) if row.length or row.time_exponent]
    assert [row.length for row in rows] == [8, 16, 32, 64, 128, 0]
    assert rows[-1].time_exponent is not None
    assert 0 < rows[-1].memory_exponent <= 1.01


def test_further_calls_follow_the_first_unless_sizes_are_given(peers, monkeypatch):
    peers()
    short = {"l": 16, "h": 2, "h_kv": 2, "k": 8}
    setting = bench.peers.Setting(case=short, further=({"window": (3, 0)}, {"mask": "shared", "causal": False}))
    monkeypatch.setattr(ops_bench, "setting_of", lambda op: setting)
    shapes = [row.shape for row in rows_of("attention", changes={}) if row.work == bench.FORWARD]
    told = [shape.partition("k 8")[2] for shape in dict.fromkeys(shapes)]
    assert told == ["", ", window (3, 0)", ", mask shared"]
    given = {row.shape for row in rows_of("attention", changes={"l": 9, "window": [2, 0]})}
    assert len(given) == 1
    assert given.pop().endswith("window (2, 0)")


def test_a_window_of_other_people_is_a_mask(randn):
    (sdpa,) = (peer for peer in peers_of("attention", "cpu") if peer.name == "SDPA")
    q, k, v = (randn(1, 20, 2, 8) for _ in range(3))
    for causal, window in ((True, (4, 0)), (False, (2, 5))):
        expected = ssmkernels.attention(q, k, v, causal=causal, window=window)
        torch.testing.assert_close(sdpa.function(q, k, v, causal=causal, window=window), expected)
    with pytest.raises(NotImplementedError, match="rows that see nothing"):
        sdpa.function(q, k[:, :3], v[:, :3], causal=True, window=(1, 0))


def test_peak_memory_counts_what_is_alive_at_once():
    x = torch.zeros(1000, 1000)
    result, peak = bench.peak_memory(lambda: (x + 1).sum())  # one temporary of x's size, then a number
    assert result == 1e6
    assert x.nbytes <= peak <= x.nbytes + 10_000
    _, peak = bench.peak_memory(lambda: x.add_(1))
    assert peak < 10_000


def test_limits_are_positive_and_the_larger_counts():
    assert LIMITS.seconds(flops=1e11, nbytes=1e9) == 1.0
    assert LIMITS.which(flops=1e11, nbytes=1e9) == "matrix rate"
    assert LIMITS.seconds(flops=1e9, nbytes=1e10) == 1.0
    assert LIMITS.which(flops=1e9, nbytes=1e10) == "bandwidth"


def test_the_least_bytes_of_forward_and_backward():
    x, w = torch.zeros(1, 16, 8), torch.zeros(8, 4)
    spec = spec_of("causal_conv1d")
    case = spec.case({"b": 1, "l": 16, "d": 8})
    arguments, results = {"x": x, "weight": w, "bias": None}, {"y": F.silu(x)}
    read, written = x.nbytes + w.nbytes, x.nbytes
    assert ops_bench.least(spec, case, arguments, results, bench.FORWARD)[1] == read + written
    assert ops_bench.least(spec, case, arguments, results, bench.BOTH) == (
        3 * spec.flops(case),
        2 * (read + written) + read,
    )


def test_a_gpu_that_is_none_is_refused():
    with pytest.raises(ValueError, match="must be cpu or cuda; got 'mps'"):
        bench.compete({"a": dict}, device="mps")


PEERS = [pytest.param(op, peer, id=f"{op}-{peer.name}") for op in specs() for peer in peers_of(op, "cpu")]


@pytest.mark.parametrize(("op", "peer"), PEERS)
def test_an_installed_peer_does_what_ours_does(op, peer):
    if peer.package.missing:
        pytest.skip(f"{peer.name} is {peer.package.missing}")
    p = plan()
    spec, setting = spec_of(op), setting_of(op)
    rows = ops_bench.checked_rows(spec, setting, ops_bench.real_use(spec, setting, p))
    assert ops_bench.fails(op, peer, rows, p) == ""


def test_peers_are_imported_by_a_call_alone():
    import subprocess
    import sys

    code = (
        "import sys, ssmkernels.bench as b\n"
        "from ssmkernels.check.spec import specs\n"
        "from ssmkernels.bench.peers import peers_of\n"
        "assert all(p.package is not None for op in specs() for p in peers_of(op, 'cpu'))\n"
        "assert not {'transformers', 'mambapy', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
