"""Devices by name, the names that they have, and how many threads a container is worth."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from ssmkernels.native import quota


def usable(device: torch.device | str, argument: str) -> torch.device:
    """The device of this name, after a small computation on it.

    Args:
        device: as PyTorch names it; ``"meta"`` too.
        argument: what an error calls it, such as ``--device``.

    Raises:
        ValueError: there is no such device, or it cannot be used.
    """
    try:
        place = torch.device(device)
        result = torch.zeros(1, device=place).add(1)
        if place.type != "meta":
            result.cpu()
    except Exception as error:  # PyTorch raises what the device's back end does
        raise ValueError(f"{argument}: {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from None
    return place


def fit_threads() -> None:
    """Gives PyTorch no more threads than the container has cores, as the commands do at their start.

    PyTorch counts the machine's cores. Where a control group allows half a core, two threads that wait for each other
    use up its time. Does nothing if ``OMP_NUM_THREADS`` or ``MKL_NUM_THREADS`` says how many threads there are to be.
    """
    cores = quota.cores()
    chosen = any(name in os.environ for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"))
    if cores is not None and not chosen and torch.get_num_threads() > cores:
        torch.set_num_threads(cores)


def cpu_name() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def gpu_name() -> str:
    """The GPUs that PyTorch can use, or why there is none."""
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        return ", ".join(f"{d.name} ({d.total_memory / 2**30:.0f} GiB)" for d in devices) + f"; {runtime}"
    if torch.backends.mps.is_available():
        return "Apple's (mps)"
    built = torch.version.cuda or torch.version.hip
    return "none found" if built else "none usable: this PyTorch is built for the CPU alone"
