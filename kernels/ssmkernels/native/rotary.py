"""What the native rotation of keys and queries by their positions takes: whether it can, and the kernel's arguments."""

from __future__ import annotations

from torch import Tensor

from ssmkernels import native


def turns(x: Tensor, frequency: Tensor) -> bool:
    """Whether frequencies ``(r)`` are for channels that heads ``(b, h, k)`` have."""
    return frequency.ndim == 1 and 2 * len(frequency) <= x.shape[2]


def placing(x: Tensor, frequency: Tensor | None) -> dict[str, float]:
    """Arguments of the kernel ``rotary`` for x ``(b, h, k)``: all but positions, and where its result, in one row,
    lies.
    """
    b, h, k = x.shape
    return {
        "x": x.data_ptr(),
        "positions": 0,
        "frequency": native.address(frequency),
        "places": 0,
        "table": 0,
        "dtype": native.DTYPES[x.dtype],
        "rows": b,
        "heads": h,
        "half": 0 if frequency is None else len(frequency),
        "width": k,
        "x_row": x.stride(0),
        "page_size": 1,
        "y_page": h * k,
        "y_position": 0,
        "y_head": k,
        "table_row": 0,
        "table_block": 0,
    }
