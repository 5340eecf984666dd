"""The kernel of a diagonal plus low-rank state-space model by matrix products: no (d n length) tensor.

With blocks of r taps and t = q r + i, K_t = (C Ā^i)(Ā^{rq} B̄): a product of two small tables for each channel, the rows
C Ā^i (r N) and the columns Ā^{rq} B̄ (N blocks). With r near √length both hold N √length numbers, forward and backward.

The tables come by doubling, from rows 0..m-1 to 0..2m-1 with Ā^m, whose square is the next one's. They are in float64:
there a high power loses no digits that anyone would miss. Nothing is divided by I - Ā^length, as the product at the
roots of unity must, and any discretisation will do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.validate import precision
from ssmkernels.ops.dplr_kernel.discretize import discretize_dplr, output


def unsupported(arguments: Mapping[str, Any]) -> str | None:
    return "no float64 on this device" if arguments["A"].device.type == "mps" else None


def dplr_kernel(
    A: Tensor, P: Tensor, Q: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, discretization: str
) -> Tensor:
    wide = precision(A, P, Q, B, C, dt)
    block = 1 << (max(length, 1) - 1).bit_length() // 2
    blocks = -(-max(length, 1) // block)
    A_bar, B_bar = discretize_dplr(A, P, Q, B, dt.double(), discretization=discretization)
    rows, A_block = _table(output(C, A).double(), A_bar, block)  # (d block N), (d N N)
    columns, _ = _table(B_bar, A_block.mT, blocks)  # (d blocks N)
    taps = torch.bmm(columns.to(wide), rows.to(wide).mT)  # (d blocks block)
    if taps.requires_grad:  # bmm is very slow on strides of 0, which the gradient of a sum has
        taps.register_hook(lambda g: None if g is None else g.contiguous())
    return taps.flatten(1)[:, :length].contiguous()


def _table(row: Tensor, matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """row (d N) times matrix^0, ..., matrix^{count-1}, (d count N); and matrix^m, m the largest power of 2 ≤ count."""
    rows = row[:, None]
    while (m := rows.shape[1]) < count:
        rows = torch.cat([rows, rows[:, : count - m] @ matrix], dim=1)
        if 2 * m <= count:
            matrix = matrix @ matrix
    return rows, matrix
