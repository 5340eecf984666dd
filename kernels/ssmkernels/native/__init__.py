"""The native CPU library: found, checked and loaded on first use.

It is built when the package is installed, by whatever C++ compiler is there (:mod:`ssmkernels.native.build`), and knows
nothing of PyTorch: tensors go in as addresses and strides. ``SSMZOO_CPU_ISA`` forces one of the instruction sets
``baseline``, ``avx2``, ``avxvnni``, ``avx512`` and ``avx512vnni``, or ``baseline`` and ``dotprod`` on Arm; otherwise
the best that this CPU can run is taken.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import platform
import struct
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any, NamedTuple

import torch  # first: its OpenMP runtime, and with it its threads, then serve this library too
from torch import Tensor

from ssmkernels.core.memory import large_pages
from ssmkernels.core.on_paper import kind_of
from ssmkernels.core.warn import warn
from ssmkernels.native import quota, sources

PATH = sources.PACKAGE / sources.NAME

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

FEW = 32  # rows up to which a product reads each weight once (product.h); more fill the tiles of a product of matrices

SMALL = 2**16  # multiply-adds that one thread does in the time that it takes to wake another, and to wait for it

BUILD = "run `python -m ssmkernels.native.build`"
REBUILD = f"install a C++ compiler (g++, clang++ or `pip install ziglang`) and {BUILD}"


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
        for name in ("ssmzoo_sources", "ssmzoo_layouts", "ssmzoo_isas", "ssmzoo_compiler"):
            getattr(handle, name).restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        return Library(None, "", f"the native CPU library does not load ({error}): {REBUILD}")
    if handle.ssmzoo_sources().decode() != _digest():
        stale = f"the native CPU library {PATH} was built from other sources than those beside it: {BUILD}"
        warn(stale)  # a missing one may be meant, this is not
        return Library(None, "", stale)
    able = [isa for isa in handle.ssmzoo_isas().decode().split() if handle.ssmzoo_can_run(isa.encode())]
    forced = os.environ.get("SSMZOO_CPU_ISA")
    if forced and forced not in able:
        known = (
            "is none of its names"
            if forced not in sources.flags_by_isa(platform.machine())
            else "cannot be run by this CPU, or was not built"
        )
        return Library(None, "", f"SSMZOO_CPU_ISA={forced}: {forced!r} {known}; there are: {', '.join(able)}")
    limit = quota.cores()
    if limit is not None:
        handle.ssmzoo_limit_threads(limit)
        if torch.get_num_threads() > limit:
            warn(
                f"this container has the time of {limit} core(s), but PyTorch computes on {torch.get_num_threads()} "
                f"threads, which then keep each other waiting: call torch.set_num_threads({limit})"
            )
    return Library(handle, forced or able[-1], None)


def _digest() -> str:
    """The sources': as they were installed, or in a checkout, where they may have been edited since, as they are."""
    installed = sources.PACKAGE / sources.DIGEST
    return installed.read_text() if installed.exists() else sources.digest()


def missing() -> str | None:
    """What this machine lacks for the native kernels, and what to do about it; None where all is well."""
    return library().missing


missing._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a compiler need not look into the loader


def wrong_device(a: Any) -> str | None:
    """Why kernels cannot reach the tensors of a call; None where they can."""
    name = a.declared.leader
    device = getattr(a, name).device
    return None if kind_of(device) == "cpu" else f"its tensors must be on the CPU; `{name}` is on {device}"


def info() -> dict[str, Any]:
    """The library: path and what is missing; where it loads also the ISA in use, those built, OpenMP, compiler."""
    handle, isa, why = library()
    found: dict[str, Any] = {"path": str(PATH), "missing": why}
    if handle is not None:
        found |= {
            "isa": isa,
            "isas": handle.ssmzoo_isas().decode().split(),
            "openmp": bool(handle.ssmzoo_openmp()),
            "compiler": handle.ssmzoo_compiler().decode(),
        }
    return found


class Kernel(NamedTuple):
    """A function of the library, for the instruction set in use, and how its arguments lie in memory."""

    function: Callable[[bytes], int]
    fields: tuple[str, ...]
    ordered: Callable[[Mapping[str, float]], tuple[float, ...]]
    pack: Callable[..., bytes]


@functools.cache
def kernel(name: str) -> Kernel:
    """The named kernel, with the layout that the library itself says it was compiled with."""
    handle, isa, why = library()
    if handle is None:
        raise RuntimeError(why)
    found = dict(line.split(maxsplit=1) for line in handle.ssmzoo_layouts().decode().splitlines())[name].split()
    added = sources.ADDED.get(isa, isa)
    function = getattr(handle, f"ssmzoo_{isa}_{name}", None) or getattr(handle, f"ssmzoo_{added}_{name}")
    function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int
    fields = tuple(field.lstrip("*") for field in found)
    layout = "".join("d" if field.startswith("*") else "q" for field in found)
    return Kernel(function, fields, itemgetter(*fields), struct.Struct(layout).pack)


def run(name: str, values: Mapping[str, float]) -> None:
    """Calls a kernel with the addresses and numbers for each member of its structure in C++, by name.

    Raises:
        KeyError: values lack one.
        TypeError: they have one that the kernel does not know.
        MemoryError: there was none left for its scratch memory.
    """
    function, fields, ordered, pack = kernel(name)
    if len(values) != len(fields):
        differing = ", ".join({*values} ^ {*fields})
        raise TypeError(f"{name}: `values` must have {', '.join(fields)}; got others or not all: {differing}")
    if function(pack(*ordered(values))):
        raise MemoryError(f"{name}: no memory left for the kernel's own use")


def threads(updates: int) -> int:
    """How many threads a call of so many multiply-adds is worth: waking the others takes a few microseconds."""
    return torch.get_num_threads() if updates >= SMALL else 1


def address(x: Tensor | None) -> int:
    """The tensor's first element's address; 0, which is null, without a tensor."""
    return 0 if x is None else x.data_ptr()


def fields_of(tensors: Mapping[str, Tensor | None], x: Tensor, cu_seqlens: Tensor | None) -> dict[str, float]:
    """Addresses by name, and what all kernels of a recurrence know of activations x (b l …), which borders may pack."""
    found: dict[str, float] = {name: address(t) for name, t in tensors.items()}
    found |= {"dtype": DTYPES[x.dtype], "length": x.shape[1]}
    found["sequences"] = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return found


def plain(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x of this dtype and contiguous: itself where it is, in a tenth of the time that asking PyTorch for it takes."""
    return x if x.dtype == dtype and x.is_contiguous() else x.to(dtype).contiguous()


def rows(x: Tensor) -> Tensor:
    """x with a contiguous last axis: itself where it has one, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else turned(x)


def lines(x: Tensor | None) -> Any:
    """x ``(..., d)`` as ``(rows, d)`` with the channels side by side: itself where it lies so, else a copy; or None."""
    if x is None:
        return None
    x = x.reshape(x.shape[:-1].numel(), x.shape[-1]) if x.ndim != 2 else x
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def turned(x: Tensor) -> Tensor:
    """A contiguous copy of x ``(b, l, …)``: a quick one of channels before time, as convolutions of PyTorch leave them.

    So do layers of mamba_ssm and transformers, which split such channels into heads.
    """
    axes = zip(x.shape[2:-1], x.stride()[2:-1], x.shape[3:], x.stride()[3:], strict=True)
    together = all(size == 1 or stride == inner * step for size, stride, inner, step in axes)
    if x.ndim < 3 or x.stride(1) != 1 or not together or x.numel() < SMALL or x.element_size() > 8:
        return x.contiguous()
    to = x.new_empty(x.shape)
    large_pages(to)
    batch, length = x.shape[:2]
    run(
        "transpose",
        {
            "from": x.data_ptr(),
            "to": to.data_ptr(),
            "bytes": x.element_size(),
            "batch": batch,
            "rows": length,
            "columns": math.prod(x.shape[2:]),
            "from_batch": x.stride(0),
            "from_row": 1,
            "from_column": x.stride(-1),
            "threads": torch.get_num_threads(),
        },
    )
    return to
