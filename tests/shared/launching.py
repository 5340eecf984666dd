"""Triton's own launcher for NVIDIA's GPUs, above a driver library that launches nothing and tells what it is asked for.

Run as a program it launches the offline cases with the numbers that it is given, on meta tensors, and compares every
parameter of every kernel with what the compiled kernel takes and what the launch gave.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

FORMATS = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B", "u16": "H", "u32": "I"}
FORMATS |= {"u64": "Q", "fp16": "e", "fp32": "f", "f32": "f", "fp64": "d"}
GRID = (2**31 - 1, 65535, 65535)  # the most programs that CUDA takes along each axis
SHARED = 227 * 1024  # the most bytes of one block on Hopper


class Launch(NamedTuple):
    """One launch: how many programs and threads, and of each parameter its bytes here, in the kernel, and the value."""

    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    num_warps: int
    sizes: list[int]
    compiled_sizes: list[int]
    values: list[Any]
    given: list[Any]

    def check(self) -> None:
        assert all(1 <= n <= most for n, most in zip(self.grid, GRID, strict=True)), self
        assert self.block == (32 * self.num_warps, 1, 1), self
        assert self.shared <= SHARED, self
        assert self.sizes == self.compiled_sizes, self
        assert self.values == self.given, self


def build(name: str, source: str, folder: str, _: list[str], places: list[str], __: list[str]) -> str:
    """Triton's build of C sources without optimisation, which takes most of its time."""
    path = Path(folder, f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}")
    compiled(path, Path(source), [*places, sysconfig.get_paths()["include"]])
    return str(path)


def compiled(path: Path, source: Path, places: list[str], *flags: str) -> None:
    include = [f"-I{place}" for place in places]
    subprocess.run([str(compiler()), "-shared", "-fPIC", "-w", *flags, *include, "-o", path, source], check=True)


def compiler() -> str | None:
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


@contextlib.contextmanager
def launching() -> Iterator[list[Launch]]:
    """Inside, this process launches Triton's kernels as on an H100, and each launch is added to the list."""
    import triton.backends.nvidia.driver as nvidia
    from triton import knobs
    from triton.runtime import driver

    launches: list[Launch] = []
    sizes: dict[int, list[int]] = {}  # the bytes of parameters, by kernel
    expected: list[int] = []  # those of the launch under way
    told: list[tuple[bytes, list[int], list[bytes]]] = []

    @ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_void_p))
    def listen(kernel: bytes, configuration: Any, places: Any) -> None:
        told.append((kernel, configuration[:7], [ctypes.string_at(places[i], n) for i, n in enumerate(expected)]))

    class Launcher(nvidia.CudaLauncher):
        def __init__(self, source: Any, metadata: Any):
            super().__init__(source, metadata)
            self.types = tuple(source.signature.values())

        def __call__(self, x: int, y: int, z: int, stream: int, function: int, packed: Any, *rest: Any) -> None:
            pairs = [*leaves(self.types, rest[3:])]  # after what hooks are told
            formats = [FORMATS.get(kind, "Q") for kind, _ in pairs] + ["Q", "Q"]  # and two pieces of scratch memory
            expected[:] = map(struct.calcsize, formats)
            super().__call__(x, y, z, stream, function, packed, *rest)
            kernel, config, raw = told.pop()
            values = [struct.unpack(f, bits)[0] for f, bits in zip(formats, raw, strict=True)]
            given = [number(kind, argument) for kind, argument in pairs] + [0, 0]
            at = tuple(config[:3]), tuple(config[3:6]), config[6]
            launches.append(Launch(kernel.decode(), *at, packed[0], [*expected], sizes[function], values, given))

    class Driver(nvidia.CudaDriver):
        def __init__(self) -> None:
            super().__init__()
            self.launcher_cls = Launcher
            self.get_device_capability = lambda device: (9, 0)
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            load = self.utils.load_binary

            def loaded(name: str, image: bytes, shared: int, device: int) -> Any:
                found = load(name, image, shared, device)
                sizes[found[1]] = parameters(image)
                return found

            self.utils.load_binary = loaded

    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_LIBCUDA_PATH"] = folder
        path = Path(folder, "libcuda.so.1")
        compiled(path, Path(__file__).with_name("launching.c"), nvidia.include_dirs, f"-Wl,-soname,{path.name}")
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL).listen(listen)
        before, knobs.build.impl = driver._active, build
        driver.set_active(Driver())
        torch.Tensor.data_ptr, own = address, torch.Tensor.data_ptr
        try:
            yield launches
        finally:
            driver._active, knobs.build.impl, torch.Tensor.data_ptr = before, None, own


def address(tensor: torch.Tensor) -> int:
    """A number of its own for each tensor that has no memory, as far into its storage as the tensor begins."""
    storage = tensor.untyped_storage()
    begin = storage._cdata << 12 if tensor.is_meta else storage.data_ptr()
    return begin + tensor.storage_offset() * tensor.element_size() if begin else 0


def leaves(types: Any, given: Any) -> Iterator[tuple[str, Any]]:
    """The arguments that a kernel takes at run time, each with its type, out of nested tuples."""
    for kind, argument in zip(types, given, strict=True):
        if isinstance(kind, tuple):
            yield from leaves(kind, argument)
        elif kind != "constexpr":
            yield kind, argument


def number(kind: str, given: Any) -> Any:
    """What a kernel should find where an argument of this type was given."""
    if kind.startswith("*"):
        return 0 if given is None else given.data_ptr()
    return struct.unpack(FORMATS[kind], struct.pack(FORMATS[kind], given))[0]


def parameters(image: bytes) -> list[int]:
    """The bytes of each parameter of a compiled kernel, by its own table."""
    import triton.backends.nvidia.driver as nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        tool = Path(nvidia.dirname) / "bin" / "cuobjdump"
        text = subprocess.run([tool, "-elf", file.name], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Ordinal : 0x(\w+)\s+Offset\s+: 0x\w+\s+Size\s+: 0x(\w+)", text)
    by_place = {int(ordinal, 16): int(size, 16) for ordinal, size in found}
    return [by_place[i] for i in sorted(by_place)]


def main(numbers: set[int]) -> None:
    from ssmkernels.check.offline import offline_cases

    count = 0
    with launching() as launches:
        for i, (name, launch) in enumerate(offline_cases()):
            if i not in numbers:
                continue
            launch()
            assert launches, f"{name}: no launch"
            for one in launches:
                one.check()
            count += len(launches)
            print(f"{name}: {len(launches)} launches")
            launches.clear()
    print(f"{count} launches")


if __name__ == "__main__":
    main(eval(sys.argv[1]))
