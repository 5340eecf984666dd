"""What a plan says of this machine beside what is measured on it: ``python -m ssmzoo.planning.validation``.

Ranks of one thread each, connected by gloo, measure this machine's rates and then train small models, over data, shards
and cut sequences. A plan gets the rates alone. The table has the memory of a rank and the time of a step, planned and
measured; with ``--out`` it is written as CSV. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from ssmkernels import keep_memory
from ssmkernels.bench.measure import peak_memory
from ssmzoo import parallel
from ssmzoo.config import ModelConfig
from ssmzoo.model import SequenceModel
from ssmzoo.planning.calibration import Rates, Shapes, device_of, measure, shapes_of
from ssmzoo.planning.devices import Device
from ssmzoo.planning.estimate import Estimate
from ssmzoo.planning.mesh import Mesh
from ssmzoo.planning.pieces import batch_of, loss_of
from ssmzoo.planning.planner import plan
from ssmzoo.planning.ranks import on_ranks

STEPS, PEAKS = 5, 3
MODELS = ("mamba", "mamba2", "attention")
WAYS = (Mesh(), Mesh(data=2), Mesh(shard=2), Mesh(context=2))


@dataclasses.dataclass(frozen=True)
class Case:
    """A model on a mesh, with a sequence of this length for each part that sequences are dealt out to."""

    config: ModelConfig
    mesh: Mesh
    length: int


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of one rank.

    Attributes:
        tensors: bytes of weights, moments and DDP's buckets, and of what else a step has alive at once, by PyTorch's
            allocator.
        process: bytes that the process grew by.
        seconds: of a step.
    """

    tensors: float
    process: float
    seconds: float


def small(mixer: str, d_model: int = 128, n_layers: int = 4) -> ModelConfig:
    """A byte model of one mixer."""
    return ModelConfig(d_model=d_model, n_layers=n_layers, pattern=[mixer], vocab_size=256)


def run(group: dist.ProcessGroup, case: Case, rounds: int = STEPS) -> Measured:
    """Trains on this rank, one of as many as the mesh has."""
    mesh = case.mesh

    def start() -> tuple[Callable[[], None], Callable[[], float]]:
        torch.manual_seed(0)
        model = SequenceModel(case.config)
        called = _wrapped(model, mesh, group)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        inputs, targets = batch_of(case.config, 1, case.length, torch.float32)
        x, y = (t.tensor_split(mesh.context, dim=1)[dist.get_rank() % mesh.context] for t in (inputs, targets))

        def step() -> None:
            loss_of(called(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

        def held() -> float:
            states = (x for state in optimizer.state.values() for x in state.values())
            tensors = [*model.parameters(), *(x for x in states if isinstance(x, torch.Tensor))]
            buckets = sum(p.nbytes for p in model.parameters()) * (mesh.data > 1)
            return float(sum(_here(x).nbytes for x in tensors) + buckets)

        return step, held

    gc.collect()
    before = _resident("VmRSS")
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now
    step, held = start()
    step()
    taken = []
    for _ in range(rounds):
        dist.barrier(group)
        begun = time.perf_counter()
        step()
        taken.append(time.perf_counter() - begun)
    grown = _resident("VmHWM") - before
    # A block that a thread of gloo frees is not seen to be freed, so that a peak can only be too high
    peaks = [peak_memory(step)[1] for _ in range(PEAKS)]
    return Measured(held() + min(peaks), grown, statistics.median(taken))


def _wrapped(model: SequenceModel, mesh: Mesh, group: dist.ProcessGroup) -> nn.Module:
    if mesh.data > 1:
        return nn.parallel.DistributedDataParallel(model, process_group=group)
    if mesh.context > 1:
        return parallel.context(model, group, reduce_gradients=True)
    if mesh.shard > 1:
        from torch.distributed.fsdp import fully_shard

        over: DeviceMesh = init_device_mesh("cpu", (mesh.shard,))
        for block in model.blocks:
            fully_shard(block, mesh=over)
        fully_shard(model, mesh=over)
    return model


def _here(x: torch.Tensor) -> torch.Tensor:
    """What of a tensor is on this rank."""
    return x.to_local() if isinstance(x, DTensor) else x


def _resident(name: str) -> float:
    """Bytes of this process's memory, now or at its peak; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0.0)


def all_cases(mixers: Sequence[str], length: int, meshes: Sequence[Mesh]) -> list[Case]:
    """A model of each mixer on each mesh."""
    return [Case(small(mixer), mesh, length) for mixer in mixers for mesh in meshes]


def both(cases: Sequence[Case], shapes: Sequence[Shapes]) -> list[tuple[Rates, Measured]]:
    """On one rank: for each case the rates, and what training took."""
    keep_memory()
    group = dist.group.WORLD
    assert group is not None
    return [(measure(shape), run(group, case)) for case, shape in zip(cases, shapes, strict=True)]


def planned(case: Case, device: Device) -> Estimate:
    """The plan's estimate of a case."""
    given = plan(
        case.config,
        case.mesh.size,
        case.length,
        device=device,
        batch=case.mesh.batches,
        precision="fp32",
        mesh=case.mesh,
        checkpointing=False,
    )
    return given.best


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs all cases and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m ssmzoo.planning.validation", description=__doc__)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--ranks", type=int, nargs="+", choices=(1, 2), default=(1, 2), help="how many, in turn")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="of which mixers")
    parser.add_argument("--out", type=Path, help="a CSV file to write")
    asked = parser.parse_args(arguments)
    rows = []
    for ranks in asked.ranks:
        cases = all_cases(asked.models, asked.length, [mesh for mesh in WAYS if mesh.size == ranks])
        shapes = [shapes_of(case.config, case.length // case.mesh.context, "fp32") for case in cases]
        answers = on_ranks(ranks, both, cases, shapes)
        for i, case in enumerate(cases):
            device = device_of([answer[i][0] for answer in answers], "fp32")
            best = planned(case, device)
            ran = [answer[i][1] for answer in answers]
            rows.append(
                {
                    "model": case.config.pattern[0],
                    "mesh": str(case.mesh),
                    "length": case.length,
                    "planned MiB": f"{best.memory.total / 2**20:.1f}",
                    "tensors MiB": f"{max(each.tensors for each in ran) / 2**20:.1f}",
                    "process MiB": f"{max(each.process for each in ran) / 2**20:.1f}",
                    "memory ratio": f"{best.memory.total / max(each.tensors for each in ran):.3f}",
                    "planned ms": f"{best.step * 1e3:.1f}",
                    "measured ms": f"{max(each.seconds for each in ran) * 1e3:.1f}",
                    "time ratio": f"{best.step / max(each.seconds for each in ran):.3f}",
                }
            )
            print("  ".join(f"{value}" for value in rows[-1].values()), flush=True)
    if asked.out is not None:
        with asked.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
