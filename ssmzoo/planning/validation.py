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
import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from ssmkernels import keep_memory
from ssmkernels.bench.measure import peak_memory
from ssmkernels.bench.words import counted
from ssmzoo.config import ModelConfig
from ssmzoo.planning.calibration import Rates, Shapes, device_of, measure, shapes_of
from ssmzoo.planning.devices import Device
from ssmzoo.planning.estimate import Estimate
from ssmzoo.planning.mesh import Mesh
from ssmzoo.planning.planner import plan
from ssmzoo.planning.ranks import on_ranks
from ssmzoo.planning.training import Training

STEPS, PEAKS = 9, 9
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
    gc.collect()
    before = _resident("VmRSS")
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now
    training = Training(case.config, case.mesh, group, case.length)
    training.step()
    taken = []
    for _ in range(rounds):
        dist.barrier(group)
        begun = time.perf_counter()
        training.step()
        taken.append(time.perf_counter() - begun)
    grown = _resident("VmHWM") - before
    # A block that a thread of gloo frees is not seen to be freed, so that a peak can only be too high
    peaks = [peak_memory(training.step)[1] for _ in range(PEAKS)]
    return Measured(training.held() + min(peaks), grown, statistics.median(taken))


def _resident(name: str) -> float:
    """Bytes of this process's memory, now or at its peak; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0.0)


def both(cases: Sequence[Case], shapes: Shapes) -> tuple[Rates, list[Measured]]:
    """On one rank: the rates for a model, and what training it took on each mesh."""
    keep_memory()
    group = dist.group.WORLD
    assert group is not None
    before, ran = measure(shapes), [run(group, case) for case in cases]
    return before.halfway(measure(shapes)), ran  # as a machine drifts


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


def row(case: Case, best: Estimate, ran: Sequence[Measured]) -> dict[str, str]:
    """A line of the table, of the rank that took most."""
    planned, tensors, process = best.memory.total, max(r.tensors for r in ran), max(r.process for r in ran)
    seconds = max(r.seconds for r in ran)
    return {
        "model": case.config.pattern[0],
        "mesh": str(case.mesh),
        "length": str(case.length),
        "planned MiB": f"{planned / 2**20:.1f}",
        "tensors MiB": f"{tensors / 2**20:.1f}",
        "process MiB": f"{process / 2**20:.1f}",
        "memory ratio": f"{planned / tensors:.3f}",
        "planned ms": f"{best.step * 1e3:.1f}",
        "measured ms": f"{seconds * 1e3:.1f}",
        "time ratio": f"{best.step / seconds:.3f}",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs all cases and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m ssmzoo.planning.validation", description=__doc__)
    parser.add_argument("--length", type=counted, default=1024, help="tokens of a sequence")
    parser.add_argument("--ranks", type=int, nargs="+", choices=(1, 2), default=(1, 2), help="how many, in turn")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="of which mixers")
    parser.add_argument("--out", type=Path, help="a CSV file to write")
    asked = parser.parse_args(arguments)
    if asked.length < max(asked.ranks):
        parser.error(f"argument --length: must be at least {max(asked.ranks)}, a token a rank; got {asked.length}")
    rows = []
    for ranks, mixer in itertools.product(asked.ranks, asked.models):
        cases = [Case(small(mixer), mesh, asked.length) for mesh in WAYS if mesh.size == ranks]
        answers = on_ranks(ranks, both, cases, shapes_of(small(mixer), asked.length, "fp32"))
        device = device_of([rates for rates, _ in answers], "fp32")
        for i, case in enumerate(cases):
            rows.append(row(case, planned(case, device), [ran[i] for _, ran in answers]))
            print("  ".join(rows[-1].values()), flush=True)
    if asked.out is not None:
        with asked.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
