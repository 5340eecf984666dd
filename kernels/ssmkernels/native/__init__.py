"""The native CPU library: found, checked and loaded on first use.

It is built when the package is installed, by whatever C++ compiler is there (:mod:`ssmkernels.native.build`), and knows
nothing of PyTorch: tensors go in as addresses and strides. ``SSMZOO_CPU_ISA`` forces one of the instruction sets
``baseline``, ``avx2`` and ``avx512``; otherwise the best that this CPU can run is taken.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch  # first: its OpenMP runtime, and with it its threads, then serve this library too
from torch import Tensor

from ssmkernels.core.memory import large_pages
from ssmkernels.native import quota
from ssmkernels.native.build import ABI, ISAS, NAME

PATH = Path(__file__).resolve().parent.parent / NAME

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

SMALL = 2**16  # multiply-adds that one thread does in the time that it takes to wake another, and to wait for it

REBUILD = "install a C++ compiler (g++ or clang++) and install ssmzoo again, or run `python -m ssmkernels.native.build`"


class Library(NamedTuple):
    """The loaded library, or why there is none."""

    handle: ctypes.CDLL | None
    isa: str
    missing: str | None


@functools.cache
def library() -> Library:
    """Loads the library once. Under ``torch.compile`` this has happened before: dispatch asks :func:`missing` first."""
    if not PATH.exists():
        return Library(None, "", f"the native CPU library was not built ({PATH} does not exist): {REBUILD}")
    try:
        handle = ctypes.CDLL(str(PATH))
        abi = handle.ssmzoo_abi()
    except (OSError, AttributeError) as error:
        return Library(None, "", f"the native CPU library does not load ({error}): {REBUILD}")
    if abi != ABI:
        return Library(
            None, "", f"the native CPU library {PATH} is of another version (ABI {abi}, not {ABI}): {REBUILD}"
        )
    for name in ("ssmzoo_isas", "ssmzoo_compiler"):
        getattr(handle, name).restype = ctypes.c_char_p
    able = [isa for isa in handle.ssmzoo_isas().decode().split() if handle.ssmzoo_can_run(isa.encode())]
    forced = os.environ.get("SSMZOO_CPU_ISA")
    if forced and forced not in able:
        known = "is none of its names" if forced not in ISAS else "cannot be run by this CPU, or was not built"
        return Library(None, "", f"SSMZOO_CPU_ISA={forced}: {forced!r} {known}; there are: {', '.join(able)}")
    limit = quota.cores()
    if limit is not None:
        handle.ssmzoo_limit_threads(limit)
    return Library(handle, forced or able[-1], None)


def missing() -> str | None:
    """What this machine lacks for the native kernels, and what to do about it; None where all is well."""
    return library().missing


missing._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a compiler need not look into the loader


def wrong_device(a: Any) -> str | None:
    """Why kernels cannot reach the tensors of a call; None where they can."""
    name = a.declared.leader
    device = getattr(a, name).device
    return None if device.type == "cpu" else f"its tensors must be on the CPU; `{name}` is on {device}"


def info() -> dict[str, Any]:
    """The library: path, ABI and what is missing; where it loads also the ISA in use, those built, OpenMP, compiler."""
    handle, isa, why = library()
    found: dict[str, Any] = {"path": str(PATH), "missing": why, "abi": ABI}
    if handle is not None:
        found |= {
            "isa": isa,
            "isas": handle.ssmzoo_isas().decode().split(),
            "openmp": bool(handle.ssmzoo_openmp()),
            "compiler": handle.ssmzoo_compiler().decode(),
        }
    return found


def arguments(name: str, fields: str, numbers: tuple[str, ...] = ()) -> type[ctypes.Structure]:
    """A kernel's argument structure: the named addresses and 64-bit integers, in the order of its C++ source.

    Those in ``numbers`` are doubles.
    """
    kinds = [(field, ctypes.c_double if field in numbers else ctypes.c_int64) for field in fields.split()]
    return type(name, (ctypes.Structure,), {"_fields_": kinds})


_Transpose = arguments("_Transpose", "from to bytes batch rows columns from_batch from_row from_column threads")


@functools.cache
def kernel(name: str) -> Callable[[Any], int]:
    """The named function of the library, for the instruction set in use."""
    handle, isa, why = library()
    if handle is None:
        raise RuntimeError(why)
    function = getattr(handle, f"ssmzoo_{isa}_{name}")
    function.restype = ctypes.c_int
    return function


def run(name: str, values: ctypes.Structure) -> None:
    """Calls a kernel.

    Raises:
        MemoryError: there was none left for its scratch memory.
    """
    if kernel(name)(ctypes.byref(values)):
        raise MemoryError(f"{name}: no memory left for the kernel's own use")


def threads(updates: int) -> int:
    """How many threads a call of so many multiply-adds is worth: waking the others takes a few microseconds."""
    return torch.get_num_threads() if updates >= SMALL else 1


def address(x: Tensor | None) -> int:
    """The tensor's first element's address; 0, which is null, without a tensor."""
    return 0 if x is None else x.data_ptr()


def plain(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x of this dtype and contiguous: itself where it is, in a tenth of the time that asking PyTorch for it takes."""
    return x if x.dtype == dtype and x.is_contiguous() else x.to(dtype).contiguous()


def rows(x: Tensor) -> Tensor:
    """x with a contiguous last axis: itself where it has one, else a copy."""
    if x.stride(-1) == 1 or x.shape[-1] <= 1:
        return x
    if x.ndim != 3 or x.stride(1) != 1 or x.numel() < SMALL or x.element_size() > 8:
        return x.contiguous()
    to = x.new_empty(x.shape)  # from channels before time, which is how mamba_ssm's callers hold activations
    large_pages(to)
    batch, length, d = x.shape
    places = (x.data_ptr(), to.data_ptr(), x.element_size(), batch, length, d, x.stride(0), 1, x.stride(2))
    run("transpose", _Transpose(*places, torch.get_num_threads()))
    return to
