"""This machine as a device: what ranks measure, and what a plan makes of it. How fast it is, no test asks."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import multiprocessing
import os
import runpy
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import PRELOAD, Ranks

from ssmzoo import planning
from ssmzoo.config import ModelConfig
from ssmzoo.devices import cpu_name
from ssmzoo.parallel.transitions import TRANSITIONS
from ssmzoo.planning import Mesh, calibration, op_times, stopwatch, validation
from ssmzoo.planning import ranks as rank_processes
from ssmzoo.planning.calibration import Rates, device_of, shapes_of
from ssmzoo.planning.counting import BACKWARD, ENDS, FORWARD
from ssmzoo.planning.overheads import Overheads
from ssmzoo.planning.ranks import on_ranks
from ssmzoo.planning.validation import small

SMALL = runpy.run_path(str(Path(__file__).with_name("small_mixers.py")))["SMALL"]
LENGTH = 24
STILL = Overheads(small("mamba2", 32, 1), 16, 0.0, {}, {})
RATES = Rates(8e9, 4e9, 1e-5, {(FORWARD, "ssd"): 2e9, (BACKWARD, "ssd"): 1e9}, math.inf, 0.0, {}, STILL)


@pytest.fixture(scope="module")
def processes():
    found = Ranks(2)
    yield found
    found.stop()


def quickly(call: Callable[[], object]) -> float:
    """In place of the stopwatch's seconds: one call, which took a thousandth."""
    call()
    return 1e-3


def quick_rates(group: dist.ProcessGroup, config: ModelConfig, precision: str, changes: dict[str, float]) -> Rates:
    """What a rank measures at small sizes, where every call takes a thousandth of a second."""
    calibration.seconds = op_times.seconds = quickly
    calibration.SENT, calibration.COLD, op_times.COLD = 64, 1, 1
    return dataclasses.replace(calibration.measure(shapes_of(config, LENGTH, precision)), **changes)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ranks_measure_what_a_plan_asks_for(ranks: int, precision: str, processes: Ranks):
    config = ModelConfig(d_model=64, n_layers=2, pattern=["mamba", "attention"], vocab_size=256)
    alone = Ranks(1) if ranks == 1 else processes
    try:
        found = alone.run(ranks, quick_rates, config, precision, {})
    finally:
        if ranks == 1:
            alone.stop()
    rows, width, several = LENGTH, 64, 2
    for one in found:
        assert one.matrix == several * 12 * rows * width**2 / 1e-3
        assert one.bandwidth == several * 3 * rows * width * calibration.DTYPES[precision].itemsize / 1e-3
        assert one.call == 1e-3 / (2 * calibration.CHAIN)
        assert {(FORWARD, "selective_scan"), (BACKWARD, "selective_scan"), (FORWARD, "attention")} <= set(one.ops)
        assert (ENDS, "selective_scan") in one.ops
        assert (ENDS, "attention") not in one.ops
        assert set(one.links) == (set() if ranks == 1 else {"shard", "states", "keys"})
        assert (one.link == math.inf) == (ranks == 1)
        assert (one.latency == 0) == (ranks == 1)
        assert all(rate > 0 for rate in [*one.ops.values(), *one.links.values()])
    device = device_of(found, precision)
    best = planning.plan(config, ranks, LENGTH, device=device, precision=precision, mesh=Mesh(context=ranks)).best
    assert 0 < best.step < math.inf
    if ranks == 2:  # what a sum of many numbers sends, and gloo's other ways
        sent = 4 * 64 // 2
        assert found[0].link == 2 * sent / 1e-3
        assert found[0].links == {"shard": 3 * sent / 1e-3, "states": 2 * sent / 1e-3, "keys": sent / 1e-3}


def op_times_of(group: dist.ProcessGroup, config: ModelConfig) -> dict[str, tuple[float, float, float, float]]:
    op_times.seconds, op_times.COLD = quickly, 1
    given = shapes_of(config, LENGTH, "fp32").ops
    return {op: op_times.op_seconds(op, sizes, torch.float32) for op, sizes in given.items()}


@pytest.mark.parametrize("mixer", sorted(SMALL))
def test_the_ops_of_every_mixer_can_be_timed(mixer: str, processes: Ranks):
    """At the sizes that a plan of it counts, with the ends of parts where it crosses cuts by them."""
    config = ModelConfig(d_model=16, n_layers=1, pattern=[mixer], mixers={mixer: SMALL[mixer]}, vocab_size=256)
    for found in processes.run(2, op_times_of, config):
        for op, (forward, backward, ends, flops) in found.items():
            assert forward > 0
            assert backward > 0
            assert flops >= 0, op
            assert ends == 0 or op in TRANSITIONS


def test_the_slowest_rank_counts():
    slow = dataclasses.replace(RATES, matrix=4e9, ops={key: rate / 2 for key, rate in RATES.ops.items()})
    links = {"link": 3e9, "links": {"shard": 2e9}}
    late = dataclasses.replace(RATES, bandwidth=1e9, call=3e-5, latency=2e-4, link=1e9, links={"shard": 5e9})
    device = device_of([dataclasses.replace(slow, **links), late], "fp32")
    assert (device.matrix, device.vector, device.bandwidth) == ({"fp32": 4e9}, 4e9, 1e9)
    assert device.rates == slow.ops
    assert (device.link, device.network, device.links) == (1e9, 1e9, {"shard": 2e9})
    assert (device.call, device.latency) == (3e-5, 2e-4)
    assert f"{cpu_name()}, 2 ranks of one thread" in device.source
    assert device_of([RATES], "fp32").memory == pytest.approx(2 * device.memory)
    assert "1 rank of one thread" in device_of([RATES], "fp32").source


def test_halfway_between_two_measurements_are_the_means_of_the_times():
    later = dataclasses.replace(RATES, matrix=4e9, call=3e-5, link=2e9, links={"keys": 1.0}, latency=4e-4)
    found = dataclasses.replace(RATES, link=1e9, links={"keys": 3.0}).halfway(later)
    assert found.matrix == pytest.approx(1 / ((1 / 8e9 + 1 / 4e9) / 2))
    assert found.call == pytest.approx(2e-5)
    assert found.latency == pytest.approx(2e-4)
    assert found.link == pytest.approx(1 / ((1 / 1e9 + 1 / 2e9) / 2))
    assert found.links == {"keys": pytest.approx(1.5)}
    assert found.ops == pytest.approx(RATES.ops)
    assert RATES.halfway(RATES).link == math.inf  # of one rank


class Clock:
    """Time that passes by what calls say."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def clocked(group: dist.ProcessGroup, each: list[float]) -> tuple[float, int]:
    """Of a call whose times are these in turn, on each rank others."""
    clock, calls = Clock(), []
    stopwatch.time = clock

    def call() -> None:
        clock.now += each[len(calls) % len(each)] * (1 + group.rank())
        calls.append(1)

    return stopwatch.seconds(call), len(calls)


def test_the_stopwatch_takes_the_median_of_as_many_calls_on_all_ranks(processes: Ranks):
    (first, calls), (second, others) = processes.run(2, clocked, [1.0])
    assert (first, second, calls, others) == (1.0, 2.0, 2 + stopwatch.TRIES, 2 + stopwatch.TRIES)
    # Short ones are repeated: as often on each rank as the fastest of them needs, or they would not meet
    (first, calls), (second, others) = processes.run(2, clocked, [1e-5])
    assert calls == others == 2 + stopwatch.TRIES * int(stopwatch.SHORTEST // 1e-5)
    assert second == pytest.approx(2 * first)
    assert first == pytest.approx(1e-5)


@pytest.fixture
def forked(monkeypatch):
    """Processes of a measurement are forks of one that has imported PyTorch, not new ones, which take seconds each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    asked = []
    monkeypatch.setattr(rank_processes.multiprocessing, "get_context", lambda kind: asked.append(kind) or context)
    yield
    assert {*asked} == {"spawn"}


def fails(how: str) -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("no such thing")
    dist.barrier()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "ranks", "said"),
    [
        ("killed", 1, "rank 0 of 1: it ended with status -9 and no answer"),
        ("killed", 2, "rank 1 of 2: it ended with status -9 and no answer"),
        ("raises", 2, "rank 1 of 2: ValueError: no such thing"),
    ],
)
def test_a_rank_that_fails_ends_the_measurement(how: str, ranks: int, said: str, forked):
    with pytest.raises(ChildProcessError, match=said):
        on_ranks(ranks, fails, how)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_plans_beside_what_is_measured(ranks: int, tmp_path, monkeypatch, capsys, forked):
    """As ``python -m ssmzoo.planning.validation`` does, with a model of one layer."""
    monkeypatch.setattr(validation, "small", lambda mixer: small(mixer, 32, 1))
    out = tmp_path / "plan.csv"
    validation.main(["--ranks", str(ranks), "--models", "mamba2", "--length", "64", "--out", str(out)])
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    ways = [mesh for mesh in validation.WAYS if mesh.size == ranks]
    assert [row["mesh"] for row in rows] == [str(mesh) for mesh in ways]
    assert len(capsys.readouterr().out.splitlines()) == len(ways)
    for row in rows:
        assert float(row["planned ms"]) > 0
        assert float(row["measured ms"]) > 0
        memory = float(row["planned MiB"]) / float(row["tensors MiB"])
        assert float(row["memory ratio"]) == pytest.approx(memory, rel=0.2)  # of few tenths of a MiB
        assert float(row["time ratio"]) == pytest.approx(float(row["planned ms"]) / float(row["measured ms"]), rel=0.05)


@pytest.mark.slow
def test_the_command_plans_for_this_machine(ssmzoo_command):
    """In new processes, as for a user."""
    small_model = ("--set", "d_model=32", "--set", "n_layers=1", "--length", "64", "--precision", "fp32", "--json")
    status, out, err = ssmzoo_command("plan", "mamba2-tiny", "--gpus", "2", "--device", "this", *small_model)
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["device"]["name"] == "this"
    assert "2 ranks of one thread" in found["device"]["source"]
    meshes = {str(Mesh(**each["mesh"])) for each in [found["best"], *found["others"]]}
    assert {"data=2", "shard=2"} <= meshes


def test_numbers_that_have_no_end_are_left_out_of_json():
    """One rank has no link, and JSON no infinity."""
    found = planning.plan(small("mamba2", 32, 1), 1, LENGTH, device=device_of([RATES], "fp32"), precision="fp32")

    def refused(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    told = json.loads(found.to_json(), parse_constant=refused)
    assert told["device"]["link"] is None
    assert told["device"]["matrix"] == {"fp32": 8e9}
