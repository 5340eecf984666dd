"""How a call crossed its cuts, for :meth:`ssmzoo.parallel.Context.explain`."""

from __future__ import annotations

from typing import NamedTuple


class Step(NamedTuple):
    """One thing that mixes along time, and how it crossed the cuts.

    Attributes:
        layer: the path of the mixer that it is in; empty outside of mixers.
        what: an op, a mixer as a whole, or the tokens before a part.
        how: what the processes exchange.
        in_turn: whether each process waits for the one before it to finish its part.
    """

    layer: str
    what: str
    how: str
    in_turn: bool = False

    def __str__(self) -> str:
        return f"{self.layer or 'model'}: {self.what}: {self.how}"


FOLDED = "processes exchange what their parts do to a state, and each folds those before its own"
WAITS = "each process waits for the state of the one before it"
WHOLE = "every process computes whole sequences"


def of_tokens(width: int) -> str:
    """For what sees a few tokens before a part."""
    return f"the last {width} token{'s' * (width > 1)} of the parts before"


def of_keys(tokens: int, processes: int) -> str:
    """For attention."""
    return f"keys and values of {tokens} tokens from {processes} other process{'es' * (processes != 1)}"
