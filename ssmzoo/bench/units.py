"""Times, ratios and rates as people write them."""

from __future__ import annotations


def seconds(value: float) -> str:
    """0.0063 → "6.30 ms"."""
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= unit:
            return f"{_three(value / unit)} {name}"
    return f"{_three(value / 1e-9)} ns"


def span(low: float, high: float) -> str:
    """0.0063, 0.0071 → "6.30-7.10 ms"."""
    (first, unit), (last, other) = (seconds(value).split() for value in (low, high))
    return f"{first}-{last} {unit}" if unit == other else f"{first} {unit}-{last} {other}"


def ratio(value: float) -> str:
    """30.14 → "30.1×"."""
    return f"{_three(value)}×"


def rate(value: float, unit: str) -> str:
    """1.12e10, "B/s" → "11.2 GB/s"."""
    for power, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= power:
            return f"{_three(value / power)} {name}{unit}"
    return f"{value:.0f} {unit}"


def _three(value: float) -> str:
    """Three digits that count, and no exponent."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
