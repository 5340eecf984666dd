"""The matrix memory in Triton: its own stabilisers, then the kernels of the state-space dual.

The dual's inputs are float32 whatever the activations are: gradients of the division are as large as 1/ε, which float16
does not hold, and what cancels between values and normaliser must not be rounded before.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.names import OPS
from ssmkernels.core.strided import strided
from ssmkernels.core.triton_support import kernels, missing, on_device_of, wrong_device
from ssmkernels.ops.mlstm import surroundings, triton_step
from ssmkernels.ops.mlstm.surroundings import SAVES, empty
from ssmkernels.ops.ssd.triton_arguments import Parts, wide
from ssmkernels.ops.ssd.triton_backward import Backward
from ssmkernels.ops.ssd.triton_launch import Chunks

__all__ = ["SAVES", "backward", "empty", "forward", "missing", "offline_cases", "unsupported"]


def unsupported(a: Any) -> str | None:
    if a.q.dtype == torch.float64:
        return "float64"
    return "no heads, keys or values" if 0 in (*a.q.shape[2:], a.v.shape[3]) else wrong_device(a)


class MemoryChunks(Chunks):
    """The dual's chunks with the decays and weights of gates.

    Attributes:
        m: float32 (b l h), ``final_m`` (s h).
    """

    def __init__(self, call: Any, final: Tensor | None):
        self.call = call
        sequences = call.q.shape[0] if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
        self.m = call.q.new_empty(call.i.shape, dtype=torch.float32)
        self.final_m = self.m.new_empty((sequences, call.i.shape[2]))
        keys, queries = call.k.float(), call.q.float()
        super().__init__(
            surroundings.recurrence(call, surroundings.beside_ones(call), keys, queries, self.m, None), final
        )

    def precisions(self) -> dict[str, Any]:
        factor = importlib.import_module("triton.language").float32
        return {"FACTOR": factor, "PRECISION": "ieee" if self.call.q.dtype == torch.float32 else "tf32"}

    def gate_fields(self) -> dict[str, Any]:
        a = self.call
        found = {"i": strided(a.i), "f": strided(a.f), "m": self.m, "initial": wide(a.initial_m)}
        return found | {**self.places, "H": a.i.shape[2], "Q": self.Q, "num_warps": 4}

    def step_sizes(self) -> None:
        if self.final_m.numel():
            kernels(__package__).gates[(self.final_m.numel(),)](
                **self.gate_fields(), final=self.final_m, steps=self.steps
            )


class MemoryBackward(Backward):
    """The dual's backward pass, with gradients of decays and weights in the place of those of step sizes."""

    chunks: MemoryChunks

    def steps(self, parts: Parts) -> dict[str, Tensor | None]:
        chunks, h = self.chunks, self.a.x.shape[2]
        ddecay, dweight = (torch.empty_like(chunks.m) for _ in range(2))
        if chunks.count:
            made = {"steps": chunks.steps, "parts": parts, "ddecay": ddecay, "dweight": dweight, **parts.counts()}
            kernels(__package__).decays_backward[(chunks.count * h,)](
                **made, **chunks.places, H=h, Q=chunks.Q, num_warps=4
            )
        return {"decay": ddecay, "weight": dweight}


def forward(a: Any, save: bool) -> tuple[Tensor, ...]:
    with on_device_of(a.q):
        heads, keys, values = a.q.shape[2], a.q.shape[3], a.v.shape[3]
        s = a.q.shape[0] if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
        state = a.q.new_empty((s, heads, values + 1, keys), dtype=torch.float32)
        chunks = MemoryChunks(a, state)
        together = torch.empty_like(chunks.a.x)
        chunks.outputs(together, None, None, None)
        return surroundings.finish(a, save, together, state, chunks.m, chunks.final_m)


def backward(a: Any, saved: Any, grads: Any) -> dict[str, Tensor | None]:
    with on_device_of(a.q):
        chunks = MemoryChunks(a, None)

        def of_recurrence(dstate: Tensor | None) -> dict[str, Any]:
            dy, dm = surroundings.of_division(a, saved, grads.y)
            incoming = SimpleNamespace(y=dy, final_state=dstate)
            found: dict[str, Any] = MemoryBackward(chunks.a, incoming, chunks).gradients()
            return found | {"x": found["x"][..., :-1], "m": dm}

        def of_gates(ddecay: Tensor, dweight: Tensor, dm: Tensor, dfinal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            di, df, dinitial = (t.new_empty(t.shape) for t in (a.i, a.f, chunks.final_m))
            incoming = {"ddecay": ddecay, "dweight": dweight, "dm": dm.contiguous(), "dfinal": dfinal}
            if dinitial.numel():
                kernels(__package__).gates_backward[(dinitial.numel(),)](
                    **chunks.gate_fields(), **incoming, di=di, df=df, dinitial=dinitial
                )
            return di, df, dinitial

        return surroundings.gradients(a, saved, grads, of_recurrence, of_gates)


def offline_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Launches on meta tensors, by name, for compiling without a GPU."""

    def launches(dtype: torch.dtype, k: int, v: int, packed: bool) -> None:
        def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        q, values, gate = meta(1, 256, 8, k), meta(1, 256, 8, v), meta(1, 256, 8, dtype=torch.float32)
        cu_seqlens = meta(4, dtype=torch.int32) if packed else None
        C, n, m = (meta(3 if packed else 1, 8, *sizes, dtype=torch.float32) for sizes in ((k, v), (k,), ()))
        Arguments, Step = (OPS[name].declared.Arguments for name in ("mlstm", "mlstm_step"))
        a = Arguments(q, q, values, gate, gate, None, C, n, m, cu_seqlens)
        y, *finals, sums, exact, kept = forward(a, True)
        saved = SimpleNamespace(y=y, final_C=finals[0], final_n=finals[1], sums=sums, exact=exact, m=kept)
        grads = SimpleNamespace(y=y, final_C=finals[0], final_n=finals[1], final_m=finals[2])
        backward(a, saved, grads)
        token = (q[:, 0], q[:, 0], values[:, 0], gate[:, 0], gate[:, 0])
        triton_step.forward(Step(C[:1], n[:1], m[:1], *token, None), False)

    for dtype, k, v, packed in (
        (torch.bfloat16, 256, 512, True),
        (torch.float16, 64, 64, False),
        (torch.float32, 33, 17, False),
        (torch.float32, 64, 128, True),
    ):
        name = f"{str(dtype).removeprefix('torch.')}, k {k}, v {v}{', packed' * packed}"
        yield name, functools.partial(launches, dtype, k, v, packed)
