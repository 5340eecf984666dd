"""What was measured, on what: a CSV file with one line a measurement, written as they come."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

import ssmzoo
from ssmkernels import native
from ssmkernels.bench import Measurement
from ssmzoo.devices import cpu_name, gpu_name

# Column → field of Measurement.
MEASURED = {
    "kind": "kind",
    "what": "what",
    "pass": "work",
    "implementation": "implementation",
    "role": "role",
    "shape": "shape",
    "dtype": "dtype",
    "device": "device",
    "median_s": "median",
    "q1_s": "low",
    "q3_s": "high",
    "samples": "samples",
    "limit_s": "limit",
    "limited_by": "limited_by",
    "ratio_to_limit": "of_limit",
    "ratio_to_ours": "of_ours",
    "tokens_per_s": "tokens_per_second",
    "peak_bytes": "peak_bytes",
    "result_bytes": "result_bytes",
    "length": "length",
    "time_exponent": "time_exponent",
    "memory_exponent": "memory_exponent",
    "per_token_ratio": "per_token",
    "resident_bytes": "resident_bytes",
    "note": "note",
    "not_timed": "refused",
}
PEERS = ("transformers", "mambapy", "mamba-ssm", "causal-conv1d", "flash-linear-attention", "flash-attn")


@dataclass(frozen=True)
class Machine:
    """Where and with what it was measured. ``peers`` and ``commit`` are empty where there are none.

    ``instructions`` is the set that the native kernels ran on, empty without them;
    ``memory`` is "kept" where the process kept what it freed, see :func:`ssmkernels.keep_memory`.
    """

    cpu: str
    instructions: str
    cores: int
    gpu: str
    threads: int
    memory: str
    python: str
    torch: str
    triton: str
    ssmzoo: str
    peers: str
    commit: str
    date: str

    @classmethod
    def here(cls, keeps_memory: bool = False) -> Machine:
        peers = ((name, version(name)) for name in PEERS)
        return cls(
            cpu=cpu_name(),
            instructions=native.library().isa,
            cores=os.cpu_count() or 0,
            gpu=gpu_name() if torch.cuda.is_available() else "",
            threads=torch.get_num_threads(),
            memory="kept" if keeps_memory else "",
            python=platform.python_version(),
            torch=torch.__version__,
            triton=version("triton"),
            ssmzoo=ssmzoo.__version__,
            peers=", ".join(f"{name} {found}" for name, found in peers if found),
            commit=commit(),
            date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        )

    def __str__(self) -> str:
        """Two lines for a figure's caption."""
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        kept = ", freed memory kept" if self.memory else ""
        cpu = f"{self.cpu} ({self.instructions})" if self.instructions else self.cpu
        where = f"{cpu}, {threads} of {self.cores} cores{kept}" + (f"; {self.gpu}" if self.gpu else "")
        what = f"ssmzoo {self.ssmzoo}" + (f" ({self.commit})" if self.commit else "")
        versions = f"{what}, PyTorch {self.torch}, Python {self.python}" + (f", {self.peers}" if self.peers else "")
        return f"{where}\n{versions}; {self.date[:10]}"


class Log:
    """A CSV file that each measurement is appended to at once, so that a stopped run keeps what it has."""

    def __init__(self, path: Path, machine: Machine):
        self.path = path
        self.machine = machine
        with path.open("w", newline="") as file:
            csv.writer(file).writerow([*MEASURED, *vars(machine)])

    def write(self, rows: Iterable[Measurement]) -> None:
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file)
            for row in rows:
                values = (getattr(row, field) for field in MEASURED.values())
                writer.writerow([*("" if v is None else v for v in values), *vars(self.machine).values()])


def version(package: str) -> str:
    """The installed version; empty where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """The commit that is checked out around this package, with a + where files differ from it; empty outside of git."""
    here = ["git", "-C", str(Path(__file__).parent)]
    try:
        # A package that lies in somebody else's repository, as in a virtual environment, is not its commit.
        subprocess.run([*here, "ls-files", "--error-unmatch", __file__], capture_output=True, timeout=10, check=True)
        found = subprocess.run([*here, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=10)
        dirty = subprocess.run([*here, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip() + ("+" if dirty.stdout.strip() else "")
