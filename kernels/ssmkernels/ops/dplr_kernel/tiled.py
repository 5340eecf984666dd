"""The kernel of a diagonal plus low-rank state-space model by matrix products: no (d n length) tensor.

With blocks of r taps and t = q r + i, K_t = (C Ā^i)(Ā^{rq} B̄): a product of two small tables for each channel, the rows
C Ā^i (r N) and the columns Ā^{rq} B̄ (N blocks). With r near √length both hold N √length numbers, forward and backward.

The tables come by doubling, from rows 0..m-1 to 0..2m-1 with Ā^m, whose square is the next one's. They are in float64:
there a high power loses no digits that anyone would miss. Nothing is divided by I - Ā^length, as the product at the
roots of unity must, and any discretisation will do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.validate import precision
from ssmkernels.ops.dplr_kernel.discretize import discretize_dplr, output


def unsupported(a: Any) -> str | None:
    return "no float64 on this device" if a.A.device.type == "mps" else None


def compute(a: Any) -> Tensor:
    wide = precision(a.A, a.P, a.Q, a.B, a.C, a.dt)
    taps = max(a.length, 1)
    block = 1 << (taps - 1).bit_length() // 2
    blocks = -(-taps // block)
    A_bar, B_bar = discretize_dplr(a.A, a.P, a.Q, a.B, a.dt.double(), discretization=a.discretization)
    rows, A_block = _table(output(a.C, a.A).double(), A_bar, block)  # (d block N), (d N N)
    columns, _ = _table(B_bar, A_block.mT, blocks)  # (d blocks N)
    K = torch.bmm(columns.to(wide), rows.to(wide).mT)  # (d blocks block)
    if K.requires_grad:  # bmm is very slow on strides of 0, which the gradient of a sum has
        K.register_hook(lambda g: None if g is None else g.contiguous())
    return K.flatten(1)[:, : a.length].contiguous()


def _table(row: Tensor, matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """row (d N) times matrix^0, ..., matrix^{count-1}, (d count N); and matrix^m, m the largest power of 2 ≤ count."""
    rows = row[:, None]
    while (m := rows.shape[1]) < count:
        rows = torch.cat([rows, rows[:, : count - m] @ matrix], dim=1)
        if 2 * m <= count:
            matrix = matrix @ matrix
    return rows, matrix
