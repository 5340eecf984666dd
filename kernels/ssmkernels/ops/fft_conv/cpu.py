"""The long convolution in the native CPU library (``cpu.cpp``, ``cpu_backward.cpp``).

Channels lie side by side in a vector's lanes, so that nothing is transposed; see ``cpu_transform.h`` for the transform.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from ssmkernels import native
from ssmkernels.core import packing
from ssmkernels.core.memory import large_pages
from ssmkernels.core.validate import precision
from ssmkernels.native import address, missing, plain, rows, wrong_device
from ssmkernels.ops.fft_conv.cpu_circles import LARGEST, Layout, has_layout, lay_out, roots
from ssmkernels.ops.fft_conv.non_finite import cleaned, reached

__all__ = ["backward", "forward", "missing", "unsupported"]

TASKS = 16  # that few channels are split into, where there are as many blocks


def unsupported(a: Any) -> str | None:
    if a.u.shape[-1] == 0:
        return "no channels"
    if not has_layout(a.u.shape[1], a.kernel.shape[1], _ahead(a)):
        return f"a circle of more than {2 * LARGEST} points"
    return wrong_device(a)


def forward(a: Any, _: bool) -> Tensor:
    a = _prepared(a)
    y = _convolve(a, a.u, a.gate, False)
    # What is not finite spreads over a circle, and shows in each block's first output
    if not math.isfinite(y[:, _starts(a)].sum().item()):
        return _apart(a)
    return y


def _apart(a: Any) -> Tensor:
    """:func:`forward` of inputs that hold NaN or infinity: NaN where the direct sum meets one of them, and only there.

    The sums are those of the other values, so that no sequence's result depends on a neighbour that went wrong.
    """
    weights = {name: None if (w := getattr(a, name)) is None else cleaned(w) for name in ("kernel", "kernel_reverse")}
    finite = a._replace(u=cleaned(a.u), **weights)
    y = _convolve(finite, finite.u, a.gate, False)
    spans = [slice(None)] if a.cu_seqlens is None else [time for _, time in packing.spans(a.cu_seqlens)]
    for time in spans:
        y[:, time].masked_fill_(reached(a.u[:, time], a.kernel, a.kernel_reverse).mT, torch.nan)
    return y


def backward(a: Any, _: Any, grads: Any) -> dict[str, Tensor]:
    a, g = _prepared(a), _lines(grads.y)
    found: dict[str, Tensor] = {}
    if "u" in grads.wanted:
        found["u"] = _convolve(a, g, a.gate, True)
    if "gate" in grads.wanted:
        found["gate"] = _convolve(a, a.u, g, False)
    if {"kernel", "D", "kernel_reverse"}.intersection(grads.wanted):
        found |= _correlate(a, g, grads.wanted)
    return found


def _convolve(a: Any, x: Tensor, gate: Tensor | None, adjoint: bool) -> Tensor:
    """The convolution of x, or its adjoint."""
    y = x.new_empty(x.shape)
    large_pages(y)
    for layout, sequences in _groups(a):
        values, _kept = _values(a, x, gate, y, layout, sequences)
        native.run("fft_conv", values | {"adjoint": adjoint, "lead": layout.lead(adjoint)})
    return y


def _starts(a: Any) -> Any:
    """Where blocks start, as an index."""
    if a.cu_seqlens is None:
        layout = _layout(a, a.u.shape[1])
        assert layout is not None
        return slice(None, None, layout.block)
    spans = [(layout.block, *span) for layout, sequences in _groups(a) for span in sequences]
    return [at for block, _, start, length in spans for at in range(start, start + length, block)]


def _correlate(a: Any, g: Tensor, wanted: list[str]) -> dict[str, Tensor]:
    wide = precision(a.u)
    found: dict[str, Tensor] = {}
    for name in ("kernel", "kernel_reverse", "D"):
        given = getattr(a, name)
        if name in wanted:
            found[name] = torch.zeros(given.shape, dtype=wide, device=given.device)
    for layout, sequences in _groups(a):
        values, _kept = _values(a, a.u, a.gate, g, layout, sequences)
        parts = {}
        for name, count in (("kernel", values["taps"]), ("kernel_reverse", values["ahead"]), ("D", 1)):
            if name in found:
                parts[name] = torch.empty((a.u.shape[-1], count), dtype=wide)
        ours = {"lead": layout.lead(False), "adjoint": False, "g": g.data_ptr(), "y": 0}
        ours |= {"dkernel": address(parts.get("kernel")), "dskip": address(parts.get("D"))}
        native.run("fft_conv_correlate", values | ours | {"dreverse": address(parts.get("kernel_reverse"))})
        for name, part in parts.items():
            sums = found[name].view(a.u.shape[-1], -1)
            sums[:, : part.shape[1]] += part
    return found


def _prepared(a: Any) -> Any:
    """The arguments as the kernels read them: channels side by side, and weights in the precision of sums."""
    wide = precision(a.u)
    weights = {name: None if (w := getattr(a, name)) is None else w.to(wide) for name in ("kernel", "kernel_reverse")}
    weights = {name: None if w is None else w if w.stride(-1) == 1 else w.contiguous() for name, w in weights.items()}
    D = None if a.D is None else plain(a.D, wide)
    return a._replace(u=_lines(a.u), gate=_lines(a.gate), D=D, **weights)


def _lines(x: Any) -> Any:
    """(b l d) with the channels side by side."""
    return None if x is None else rows(x)


def _layout(a: Any, length: int) -> Layout | None:
    return lay_out(length, a.kernel.shape[1], _ahead(a))


def _ahead(a: Any) -> int:
    return 0 if a.kernel_reverse is None else a.kernel_reverse.shape[1]


def _groups(a: Any) -> list[tuple[Layout, list[tuple[int, int, int]]]]:
    """Sequences, by row, first token and length, that lie on circles alike."""
    b, length, _ = a.u.shape
    if a.cu_seqlens is None:
        spans = [(row, 0, length) for row in range(b)] if length else []
    else:
        spans = [(0, start, end - start) for start, end in itertools.pairwise(a.cu_seqlens.tolist()) if start < end]
    found: dict[tuple[int, int], tuple[Layout, list[tuple[int, int, int]]]] = {}
    for span in spans:
        layout = _layout(a, span[2])
        assert layout is not None  # a shorter sequence has one if a longer has
        found.setdefault((layout.points, layout.block), (layout, []))[1].append(span)
    return list(found.values())


def _values(
    a: Any, x: Tensor, gate: Tensor | None, y: Tensor, layout: Layout, sequences: list[tuple[int, int, int]]
) -> tuple[dict[str, Any], list[Any]]:
    """The kernels' arguments, and tensors that they point into."""
    d, points = x.shape[2], layout.points
    blocks = max(-(-length // layout.block) for _, _, length in sequences)
    table = torch.tensor(
        [[*(0 if t is None else row * t.stride(0) + start * t.stride(1) for t in (x, gate, y)), length]
         for row, start, length in sequences]
    )  # fmt: skip
    tree = roots(points, a.kernel.dtype)
    # Taps that come round meet no input: which there are depends on the circle alone, so that nothing else than it
    # decides how a sum is rounded
    taps = min(a.kernel.shape[1], points)
    ahead = min(_ahead(a), points)
    units = len(sequences) * blocks
    values = {
        "u": x.data_ptr(),
        "gate": address(gate),
        "kernel": a.kernel.data_ptr(),
        "reverse": address(a.kernel_reverse),
        "skip": address(a.D),
        "sequences": table.data_ptr(),
        "quarters": tree.quarters.data_ptr(),
        "thirds": tree.thirds.data_ptr(),
        "y": y.data_ptr(),
        "dtype": native.DTYPES[x.dtype],
        "count": len(sequences),
        "blocks": blocks,
        "parts": max(1, min(units, TASKS * 8 // max(d, 1))),
        "d": d,
        "points": points,
        "block": layout.block,
        "taps": taps,
        "ahead": ahead,
        "first_leaf": tree.first_leaf,
        "threads": native.threads(d * points * (units + 1) * 16),
        "u_time": x.stride(1),
        "gate_time": 0 if gate is None else gate.stride(1),
        "y_time": y.stride(1),
        "kernel_row": a.kernel.stride(0),
        "reverse_row": 0 if a.kernel_reverse is None else a.kernel_reverse.stride(0),
    }
    return values, [x, gate, table, tree, a]
