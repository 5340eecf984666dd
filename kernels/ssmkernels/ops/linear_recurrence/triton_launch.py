"""The launches of the linear recurrence's Triton kernels that its passes and its step share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.triton_support import interpreting, kernels, on_device_of, owners

OPTIONS = {"T": 8, "BLOCK_D": 64, "num_warps": 2}
SPAN, INTERPRETED_SPAN = 128, 16  # steps of a chunk, whatever the length


def launch(a: Any, h: Tensor, final_state: Tensor, states: Tensor | None) -> None:
    """Fills these; the final state may lie where the initial one does."""
    call = Chunks(a)
    b, initial = numbers(a.b), contiguous(a.initial_state)
    with on_device_of(a.b):
        before = call.carried(b, initial, final_state.dtype, reverse=False)
        outputs = {"h": numbers(h), "final": numbers(final_state), "states": states}
        call.run("forward", call.count, b=b, **strides("b", b), before=before, **outputs)


class Chunks:
    """Where a call's chunks lie, and the launches over them."""

    def __init__(self, a: Any):
        self.span = INTERPRETED_SPAN if interpreting() else SPAN
        self.length, self.d = a.b.shape[1:]
        self.log_a, self.like, self.complex, self.complex_a = a.log_a, a.b, a.b.is_complex(), a.a.is_complex()
        per_sequence = max(1, -(-self.length // self.span))
        self.cu_seqlens = self.owners = None
        self.sequences = a.b.shape[0] if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
        if a.cu_seqlens is None:
            self.count = self.sequences * per_sequence
        else:
            self.cu_seqlens = a.cu_seqlens.contiguous()
            self.owners = owners(self.cu_seqlens, self.length, self.span)
            self.count = len(self.owners)
        self.places = {"cu_seqlens": self.cu_seqlens, "per_sequence": per_sequence}
        decay = numbers(torch.exp(a.a) if a.log_a and self.complex_a else a.a)
        fixed = {"a_batch": 0, "a_time": 0, "a_d": decay.stride(0)}
        self.decay = {"a": decay, **(fixed if a.a.ndim == 1 else strides("a", decay))}

    def run(self, kernel: str, programs: int, **fields: Any) -> None:
        """Runs a kernel of one program for each block of channels of so many chunks or sequences."""
        blocks = -(-self.d // OPTIONS["BLOCK_D"])
        if programs * blocks:
            fields |= {"d": self.d, "COMPLEX": self.complex, "COMPLEX_A": self.complex_a}
            if kernel != "walk":
                fields |= {"owners": self.owners, "length": self.length, "LOG": self.log_a, **self.decay}
            getattr(kernels(__package__), kernel)[(programs * blocks,)](
                **self.places, **fields, SPAN=self.span, **OPTIONS
            )

    def carried(self, b: Tensor, given: Tensor | None, dtype: torch.dtype, reverse: bool) -> Tensor | None:
        """The state before each chunk, or the gradient of the state after it; ``given`` where a sequence is a chunk."""
        if self.count == self.sequences:
            return given
        wide = dtype.to_real() if dtype.is_complex else dtype
        decay, added = (
            self.like.new_empty(self.count, self.d, *((2,) if paired else ()), dtype=wide)
            for paired in (self.complex_a, self.complex)
        )
        self.run(
            "summaries",
            self.count,
            b=b,
            **strides("b", b),
            decay=decay,
            added=added,
            REVERSE=reverse,
        )
        self.run("walk", self.sequences, decay=decay, added=added, initial=given, REVERSE=reverse)
        return added


def contiguous(x: Tensor | None) -> Tensor | None:
    """As :func:`numbers`, without gaps."""
    return None if x is None else numbers(x.contiguous())


def numbers(x: Tensor) -> Tensor:
    """A complex tensor as a real one with an axis more, of real and imaginary part."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def strides(name: str, x: Tensor) -> dict[str, int]:
    """In numbers, by the kernels' names."""
    return {f"{name}_{axis}": x.stride(i) for i, axis in enumerate(("batch", "time", "d"))}
