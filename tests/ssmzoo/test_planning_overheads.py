"""What Python and messages take is found again from the times of steps."""

from __future__ import annotations

import dataclasses

import pytest
import torch.distributed as dist
from ranks import Ranks

from ssmzoo.planning import DEVICES, Mesh
from ssmzoo.planning.devices import Device
from ssmzoo.planning.estimate import Task, estimate
from ssmzoo.planning.overheads import (
    LAYERS,
    STAND_IN,
    TOKENS,
    Overheads,
    few_layers,
    overheads,
    ways_of,
    with_overheads,
)
from ssmzoo.planning.validation import small

CPU = dataclasses.replace(DEVICES["h100"], name="here", kind="cpu", overlaps=False, call=1e-6, latency=5e-4)
BETWEEN = 0.02  # seconds of what ranks compute between layers


def step(config, device: Device, mesh: Mesh) -> float:
    return estimate(Task(config, TOKENS * mesh.context, device, "fp32"), mesh, mesh.batches, False).step


def measured(config, device: Device, ranks: int) -> Overheads:
    """Of a machine that is as the plan says."""
    idle, ways = step(config, device, Mesh()), ways_of(ranks)
    return Overheads(config, TOKENS, idle, {way: step(config, device, ways[way]) + BETWEEN for way in ways}, {})


@pytest.mark.parametrize("mixer", ["mamba2", "attention"])
def test_they_are_found_again(mixer: str):
    config, waits = small(mixer, 64, 2), {"gradients": 2e-3, "shard": 1e-3, "states": 3e-3, "keys": 3e-3}
    true = dataclasses.replace(CPU, call=4e-5, waits=waits)
    found = with_overheads(CPU, [measured(config, true, 2)] * 2, "fp32")
    assert found.call == pytest.approx(true.call)
    assert found.waits == pytest.approx(waits)
    for mesh in (Mesh(data=2), Mesh(shard=2), Mesh(context=2)):
        assert step(config, found, mesh) == pytest.approx(step(config, true, mesh))


def test_the_slowest_rank_counts():
    config = small("mamba2", 64, 2)
    slow, fast = (
        measured(config, dataclasses.replace(CPU, call=call, waits={"shard": wait}), 2)
        for call, wait in ((4e-5, 2e-3), (2e-5, 1e-3))
    )
    found = with_overheads(CPU, [fast, slow], "fp32")
    assert found.call == pytest.approx(4e-5)
    assert found.waits["shard"] == pytest.approx(2e-3, rel=0.2)


def test_a_call_takes_no_less_than_an_operator_alone():
    config = small("mamba2", 64, 2)
    found = with_overheads(CPU, [dataclasses.replace(measured(config, CPU, 1), idle=0.0)], "fp32")
    assert found.call == CPU.call
    assert found.waits == {}


def test_what_could_not_be_measured_is_said():
    config = small("mamba2", 64, 2)
    one = measured(config, CPU, 2)
    one.steps.pop("states")
    found = with_overheads(CPU, [dataclasses.replace(one, unable={"states": "it does not cross cuts"})] * 2, "fp32")
    assert found.source.endswith("; not measured: states (it does not cross cuts)")
    assert set(found.waits) == {"gradients", "shard"}
    assert found.sending("states", 2, 0.0, 1.0) == CPU.latency


def test_few_layers():
    assert few_layers(small("mamba", 64, 2)) == small("mamba", 64, 2)
    assert few_layers(small("mamba", 64, 12)) == small("mamba", 64, LAYERS)
    assert few_layers(small("mamba", 2048, 12)) == STAND_IN


def both_ways(group: dist.ProcessGroup, config, length: int, precision: str) -> Overheads:
    return overheads(config, length, precision)


@pytest.fixture(scope="module")
def processes():
    found = Ranks(2)
    yield found
    found.stop()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ranks_train_in_each_way(precision: str, processes: Ranks):
    """In bfloat16 too, where some weights of Mamba and Mamba-2 stay float32, which FSDP does not take together."""
    for config in (small("mamba", 32, 1), small("mamba2", 32, 1), small("attention", 64, 1)):
        for one in processes.run(2, both_ways, config, 64, precision):
            assert set(one.steps) == {"alone", "gradients", "shard", "states"}
            assert one.unable == {}
            assert min(one.idle, *one.steps.values()) > 0
