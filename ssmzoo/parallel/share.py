"""Which channels, heads or taps a process has where they are dealt out."""

from __future__ import annotations


def share(channels: int, rank: int, ranks: int) -> slice:
    """Those of a process: as many for each, and one more for the first ones where they do not divide."""
    few, more = divmod(channels, ranks)
    first = rank * few + min(rank, more)
    return slice(first, first + few + (rank < more))
