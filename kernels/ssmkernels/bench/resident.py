"""Memory as the operating system counts it: whatever a process holds, be it PyTorch's or a kernel's own."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ssmkernels.bench.ops import gradients_for, lengths_of, make, work_of
from ssmkernels.bench.peers import setting_of
from ssmkernels.bench.terms import Results
from ssmkernels.check.spec import Case, spec_of

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # see proc_pid_clear_refs(5)
WARM = 64  # tokens of the call that loads libraries and starts threads


class Resident:
    """This process's resident memory in bytes, from its making on. Linux only.

    Raises:
        OSError: the system does not tell, or does not let its peak be reset.
    """

    def __init__(self) -> None:
        gc.collect()
        with contextlib.suppress(AttributeError):  # some C libraries have no such thing
            ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back, so that using it again counts
        try:
            CLEAR.write_text(RESET_PEAK)
            self.before = self.now()
        except OSError as error:
            raise OSError(f"resident memory cannot be measured here ({error}): it needs Linux's /proc") from None

    def now(self) -> int:
        return self._read("VmRSS")

    def peak(self) -> int:
        """The most since this object was made."""
        return self._read("VmHWM")

    def grown(self) -> int:
        """By how much the peak is above what there was at first."""
        return self.peak() - self.before

    def _read(self, name: str) -> int:
        for line in STATUS.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
        raise OSError(f"there is no {name} in {STATUS}")


def resident_memory(op: str, case: Case, dtype: torch.dtype, implementation: str, *, backward: bool) -> tuple[int, int]:
    """Calls an op once in a fresh process, on the CPU and on as many threads as here, and watches its memory.

    A small call, and one of the same size without a gradient, come first: what libraries and thread pools hold is not
    counted. What the call allocates is, however it does so.

    Args:
        op: its name.
        case: of its spec.
        dtype: of its activations.
        implementation: by name.
        backward: whether gradients of all inputs are computed too.

    Returns:
        (above, results): bytes at the peak above inputs, gradients that come in, and results; bytes of the results,
        gradients among them.

    Raises:
        OSError: the system does not tell.
        RuntimeError: the process failed; with its last line.
    """
    order = {
        "op": op,
        "case": dict(case),
        "dtype": str(dtype).removeprefix("torch."),
        "implementation": implementation,
        "backward": backward,
        "threads": torch.get_num_threads(),
    }
    command = [sys.executable, "-c", f"from {__name__} import main; main()"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, input=pickle.dumps(order), capture_output=True, env=environment)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"it ended with status {done.returncode}"]
        raise (OSError if lines[-1].startswith("OSError") else RuntimeError)(lines[-1])
    above, results = done.stdout.split()[-2:]
    return int(above), int(results)


def measure(op: str, case: Case, dtype: str, implementation: str, backward: bool, threads: int) -> tuple[int, int]:
    """What :func:`resident_memory` has its process do."""
    torch.set_num_threads(threads)
    spec, setting = spec_of(op), setting_of(op)
    function = functools.partial(spec.function(), implementation=implementation)
    kind, cpu = getattr(torch, dtype), torch.device("cpu")

    def work(one: Case, with_gradients: bool) -> Callable[[], Results]:
        arguments = make(spec, setting, one, kind, cpu)
        incoming = gradients_for(work_of(spec, function, arguments)()) if with_gradients else None
        return work_of(spec, function, arguments, incoming)

    work({**case, **{name: min(case[name], WARM) for name in lengths_of(case)}}, backward)()
    call = work(case, backward)
    resident = Resident()
    results = call()
    returned = sum(t.nbytes for t in results.values())
    return resident.grown() - returned, returned


def main() -> None:
    """The process itself: reads what to do from its input and prints both numbers."""
    print(*measure(**pickle.load(sys.stdin.buffer)))
