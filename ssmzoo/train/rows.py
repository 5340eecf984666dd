"""Rows of the log, out of what steps have given."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ssmzoo.train.log import Row


def rows_of(
    first: int,
    rates: Sequence[float],
    values: Sequence[Sequence[float]],
    tokens_per_second: float,
    bits: Callable[[float], Row],
) -> list[Row]:
    """A row for each step.

    Args:
        first: the number of the first of them.
        rates: learning rates.
        values: losses, gradient norms and, where there are experts, their load.
        tokens_per_second: of all of them.
        bits: a loss → its column in bits.
    """
    return [
        {
            "step": first + i,
            "loss": loss,
            **bits(loss),
            "lr": rate,
            "gradient_norm": norm,
            "tokens_per_second": float(f"{tokens_per_second:.4g}"),
            **({"expert_load": load[0]} if load else {}),
        }
        for i, (rate, (loss, norm, *load)) in enumerate(zip(rates, values, strict=True))
    ]


def not_finite(rows: Sequence[Row], columns: Sequence[str]) -> tuple[int, str] | None:
    """The place and the column of the first number among these columns that is none; None if all are."""
    for place, row in enumerate(rows):
        for column in columns:
            if not math.isfinite(row[column]):
                return place, column
    return None
