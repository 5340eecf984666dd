"""How a call crossed its cuts, for :meth:`ssmzoo.parallel.Context.explain`, and what that sends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ssmzoo.parallel.share import share


class Traffic(NamedTuple):
    """Bytes that a process sends to others, forward and backward.

    Each number counts once for each process that it is for: what all n processes gather is sent n - 1 times.
    """

    sent: int
    returned: int


class Step(NamedTuple):
    """One thing that mixes along time, and how it crossed the cuts.

    Attributes:
        layer: the path of the mixer that it is in; empty outside of mixers.
        what: an op, a mixer as a whole, or the tokens before a part.
        how: what the processes exchange.
        traffic: bytes that this process sends.
        in_turn: whether each process waits for the one before it to finish its part.
    """

    layer: str
    what: str
    how: str
    traffic: Traffic
    in_turn: bool = False

    def __str__(self) -> str:
        return f"{self.layer or 'model'}: {self.what}: {self.how}"


def traffic(steps: Sequence[Step]) -> dict[str, Traffic]:
    """What steps of :meth:`ssmzoo.parallel.Context.explain` send, by their layers."""
    found: dict[str, Traffic] = {}
    for step in steps:
        sent, returned = found.get(step.layer, (0, 0))
        found[step.layer] = Traffic(sent + step.traffic.sent, returned + step.traffic.returned)
    return found


FOLDED = "processes exchange what their parts do to a state, and each folds those before its own"
WAITS = "each process waits for the state of the one before it"
WHOLE = "every process computes whole sequences"
CHANNELS = "each process gets whole sequences of its share of the channels"


def of_tokens(width: int) -> str:
    """For what sees a few tokens before a part."""
    return f"the last {width} token{'s' * (width > 1)} of the parts before"


def gathered(x: Tensor, ranks: int) -> Traffic:
    """For what every process gets from each; its gradients go back to where it is from."""
    bytes_ = (ranks - 1) * x.numel() * x.element_size()
    return Traffic(bytes_, bytes_)


def handed_on(before: Sequence[Tensor], after: Sequence[Tensor], rank: int, ranks: int, keeps: bool) -> Traffic:
    """For a state that goes from process to process, and if it is kept from the last one to all, beside its shapes."""
    after_bytes = sum(t.numel() * t.element_size() for t in after)
    back = sum(t.numel() * t.element_size() for t in before if t.is_floating_point() or t.is_complex())
    sent = after_bytes if rank < ranks - 1 else (ranks - 1) * after_bytes * keeps
    return Traffic(sent, back if rank > 0 else 0)


def spread(tensors: Sequence[Tensor], rank: int, lengths: Sequence[int]) -> Traffic:
    """For tensors ``(l, d)`` whose channels are dealt out, whole sequences of some to each process."""
    ranks, sent, returned = len(lengths), 0, 0
    for t in tensors:
        part = share(t.shape[1], rank, ranks)
        mine = part.stop - part.start
        sent += len(t) * (t.shape[1] - mine) * t.element_size()
        returned += (sum(lengths) - len(t)) * mine * t.element_size()
    return Traffic(sent, returned)
