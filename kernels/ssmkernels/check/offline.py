"""Compiling Triton kernels for chips that are not there, and reading what each would take of them.

A module with Triton kernels offers ``offline_cases()``: names and functions that launch its kernels on meta tensors.
Inside :func:`compiling_for` nothing is launched: each kernel is compiled, just as that launch would have it, and its
report kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ssmkernels.core.names import OPS, unknown


class Chip(NamedTuple):
    """A target of Triton's compiler, and the most shared memory that one block may take there, in bytes."""

    backend: str
    arch: int | str
    warp_size: int
    shared: int


CHIPS = {
    "sm_80": Chip("cuda", 80, 32, 163 * 1024),
    "sm_90": Chip("cuda", 90, 32, 227 * 1024),
    "sm_100": Chip("cuda", 100, 32, 227 * 1024),
    "gfx942": Chip("hip", "gfx942", 64, 64 * 1024),
}


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes: registers of a thread, bytes of it spilled to memory, shared bytes of a block."""

    kernel: str
    chip: str
    registers: int
    spills: int
    shared: int
    num_warps: int

    def __str__(self) -> str:
        return (
            f"{self.kernel} on {self.chip}: {self.registers} registers, {self.spills} spilled, "
            f"{self.shared} bytes shared, {self.num_warps} warps"
        )


class _Driver:
    """Stands in for the GPU's driver, of which the compiler only asks what to compile for."""

    def __init__(self, chip: str, target: Any):
        self.chip, self.target = chip, target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return self.chip  # Triton keeps what it compiled by device

    def get_current_stream(self, device: str) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(chip: str) -> Iterator[list[Resources]]:
    """Inside, every launch of a Triton kernel in this process compiles it for ``chip`` and adds a report to the list.

    Raises:
        ValueError: an unknown chip.
    """
    if chip not in CHIPS:
        raise ValueError(unknown("chip", chip, CHIPS))
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    reports: list[Resources] = []
    seen: set[str] = set()
    before, launch = driver._active, JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = launch(kernel, *args, grid=grid, warmup=True, **options)
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            reports.append(_resources(compiled, chip))
        return compiled

    driver.set_active(_Driver(chip, GPUTarget(*CHIPS[chip][:3])))
    JITFunction.run = compile_only
    try:
        yield reports
    finally:
        JITFunction.run = launch
        driver._active = before


def offline_cases(*ops: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The launches on meta tensors, by name, of these ops; of every op with Triton kernels, if none is named.

    Raises:
        ValueError: an unknown op.
    """
    for op in ops:
        if op not in OPS:
            raise ValueError(unknown("op", op, OPS))
    for package in sorted({OPS[op].package for op in ops or OPS if "triton" in OPS[op].names}):
        for name, launch in importlib.import_module(f"{package}.triton").offline_cases():
            yield f"{package.rpartition('.')[2]}: {name}", launch


def _resources(compiled: Any, chip: str) -> Resources:
    read = _read_cubin if CHIPS[chip].backend == "cuda" else _read_amdgcn
    registers, spills = read(compiled)
    metadata = compiled.metadata
    return Resources(compiled.name, chip, registers, spills, metadata.shared, metadata.num_warps)


def _read_cubin(compiled: Any) -> tuple[int, int]:
    """Registers and bytes of stack and local memory, from the cubin's own resource report."""
    spec = importlib.util.find_spec("triton.backends.nvidia")
    assert spec is not None
    assert spec.origin is not None
    tool = Path(spec.origin).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return _number(r"REG:(\d+)", text), _number(r"STACK:(\d+)", text) + _number(r"LOCAL:(\d+)", text)


def _read_amdgcn(compiled: Any) -> tuple[int, int]:
    """Vector registers and bytes of scratch memory. Scalar registers spill into vector registers, not into memory."""
    text = compiled.asm["amdgcn"]
    return _number(r"\.vgpr_count:\s*(\d+)", text), _number(r"\.private_segment_fixed_size:\s*(\d+)", text)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the compiler's report has no {pattern!r}")
    return int(found[1])
