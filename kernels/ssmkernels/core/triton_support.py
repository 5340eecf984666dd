"""What the bindings of all Triton kernels share. Imports Triton where it can be used, and not at its own import."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.on_paper import kind_of


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors. Triton reads the variable when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def missing() -> str | None:
    """What this machine lacks for Triton kernels; None where all is well."""
    return _missing()


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (there are builds for Linux only)"
    if not interpreting() and not torch.cuda.is_available():
        return "there is no GPU (TRITON_INTERPRET=1 runs Triton's kernels on the CPU, for tests)"
    try:
        importlib.import_module("triton")
    except Exception as error:  # a build for another machine may raise anything
        return f"triton is installed but does not import ({error}): install it again"
    return None


def wrong_device(a: Any) -> str | None:
    """Why kernels cannot reach the tensors of a call; None where they can."""
    wanted, where = ("cpu", "the CPU, for Triton's interpreter") if interpreting() else ("cuda", "a GPU")
    name = a.declared.leader
    device = getattr(a, name).device
    return None if kind_of(device) == wanted else f"its tensors must be on {where}; `{name}` is on {device}"


# A compiler need not look into them
interpreting._dynamo_marked_constant = True  # type: ignore[attr-defined]
missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def kernels(package: str) -> Any:
    """The module ``triton_kernels`` of an op's package."""
    module = importlib.import_module(f"{package}.triton_kernels")
    if interpreting():
        _repair_interpreter()
    return module


@functools.cache
def _repair_interpreter() -> None:
    """Three faults of Triton 3.6's interpreter.

    Loop bounds are arrays of one element, of which NumPy from 2.4 on makes no ints. It keeps bfloat16 as its bits,
    which matrix products take for integers; and it cuts float32 off to it, where every GPU rounds to the nearest.
    """
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    language: Any = importlib.import_module("triton.language")
    numpy: Any = importlib.import_module("numpy")
    builder = interpreter.InterpreterBuilder
    patch, dot, cast = interpreter._patch_lang_tensor, builder.create_dot, builder.cast_impl

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def widened(self: Any, a: Any, b: Any, *others: Any) -> Any:
        a, b = (self.cast_impl(x, language.float32) if x.dtype.scalar == language.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *others)

    def rounded(self: Any, x: Any, dtype: Any) -> Any:
        if (x.dtype.scalar, dtype.scalar) != (language.float32, language.bfloat16):
            return cast(self, x, dtype)
        bits = x.data.view(numpy.uint32)
        up = bits + 0x7FFF + ((bits >> 16) & 1)  # to the nearest, halves to the even one
        bits = numpy.where(numpy.isnan(x.data), bits | 0x400000, up)
        return interpreter.TensorHandle((bits >> 16).astype(numpy.uint16), dtype.scalar)

    interpreter._patch_lang_tensor = patched
    builder.create_dot, builder.cast_impl = widened, rounded


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current GPU: inside, that is the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def all_registers(threads: int = 256) -> dict[str, int]:
    """Launch options that let a thread have all registers: NVIDIA's assembler may spill to fit more threads in.

    Args:
        threads: that share those of a multiprocessor, at least as many as a program has.
    """
    if interpreting():
        return {}
    target = importlib.import_module("triton.runtime").driver.active.get_current_target()
    return {"maxnreg": min(255, 65536 // threads)} if target.backend == "cuda" else {}


def next_power_of_2(x: int) -> int:
    return 1 << max(0, x - 1).bit_length()


def owners(cu_seqlens: Tensor, length: int, tile: int) -> Tensor:
    """The sequence of each tile of a packed batch, int32 ``(length // tile + s)``, without reading borders on the host.

    Sequence i's tiles have the numbers from ``cu_seqlens[i] // tile + i`` on: at least one, and as many as it needs.
    """
    s = cu_seqlens.shape[0] - 1
    first = cu_seqlens[:-1] // tile + torch.arange(s, device=cu_seqlens.device, dtype=torch.int32)
    tiles = torch.arange(length // tile + s, device=cu_seqlens.device, dtype=torch.int32)
    return (torch.searchsorted(first, tiles, right=True, out_int32=True) - 1).to(torch.int32)
