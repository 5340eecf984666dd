"""States that a step writes, and gradients that it would lose."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def check_written(op: str, name: str, state: Tensor) -> None:
    """Checks that a step can write its new state into ``state``.

    Raises:
        ValueError: it is a view whose sign or conjugate PyTorch has put off, several of its elements share memory, or
            it is a leaf that requires grad.
    """
    if torch.compiler.is_compiling():
        return
    if state.is_neg() or state.is_conj():
        raise ValueError(
            f"{op}: `{name}` is written in place and must be plain memory; got a negated or conjugated view "
            f"(x.conj(), x.conj().imag): pass a copy, `{name}.resolve_conj().resolve_neg().clone()`"
        )
    if not state.is_contiguous() and _overlaps(state):
        raise ValueError(
            f"{op}: `{name}` is written in place and its elements must not share memory; got strides "
            f"{state.stride()} for shape {tuple(state.shape)}, as of an expanded tensor: pass a copy, `{name}.clone()`"
        )
    if state.requires_grad and state.is_leaf and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: `{name}` is written in place and must not be a leaf that requires grad: pass `{name}.clone()` to "
            f"have a gradient, or `{name}.detach()`, or call under torch.no_grad()"
        )


def _overlaps(x: Tensor) -> bool:
    """Whether two elements lie at one place in memory."""
    axes = sorted((stride, size) for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1)
    reach = 0
    for stride, size in axes:
        if stride <= reach:
            break
        reach += stride * (size - 1)
    else:
        return False
    offsets = torch.zeros((), dtype=torch.int64)  # axes interleave, which few views do: count the places
    for stride, size in axes:
        offsets = offsets[..., None] + stride * torch.arange(size)
    return x.numel() > 0 and offsets.unique().numel() < offsets.numel()


def gradient_wanted(a: Iterable[Any]) -> str | None:
    """Why a step without a backward pass cannot run a call: it would lose the gradient. None where none is wanted."""
    tensors = (x for x in a if isinstance(x, Tensor))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "a step has no gradient here; call it under torch.no_grad()"
    return None
