"""The terms of a contest: how to measure, what is to be done and by whom, and the lines that come of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ssmkernels.bench.limits import Limits
from ssmkernels.bench.measure import SHORTEST

Results = Mapping[str, Tensor]
Role = Literal["ours", "peer", "limit", "yardstick"]

FORWARD, BOTH = "forward", "forward + backward"


@dataclass(frozen=True)
class Plan:
    """How to measure.

    Attributes:
        device, dtype: where and in what.
        limits: of this machine.
        seconds: for each contestant of a contest.
        peers: whether others take part.
        quick: small sizes, and no growth.
        changes: sizes and options by name, over the usual ones.
        say: is told what is going on.
        shortest: seconds that a sample of a contest lasts at least, in which short calls are repeated.
    """

    device: torch.device
    dtype: torch.dtype
    limits: Limits
    seconds: float = 1.0
    peers: bool = True
    quick: bool = False
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    say: Callable[[str], None] = lambda text: None
    shortest: float = SHORTEST


@dataclass(frozen=True)
class Contestant:
    """Somebody who takes part. ``call`` does the work and returns results by name.

    A limit and a yardstick do other work, so that nothing of theirs is compared. Times are told as multiples of the
    limit's; a yardstick, such as another kind of layer of the same size, is timed for readers to compare with.
    """

    name: str
    role: Role
    call: Callable[[], Results]
    note: str = ""


@dataclass(frozen=True)
class Contest:
    """What is to be done, and by whom.

    Attributes:
        kind: "ops", "mixers", "models", "scaling", "busy", or another of `ssmzoo bench`.
        what: the op's, mixer's or model's name.
        work: "forward", "forward + backward", "prefill" or "decoding".
        shape: the sizes, for people.
        contestants: the first of ours has the results that all others must have.
        limit: the least seconds, where no contestant of that role measures it.
        limited_by: what the limit is.
        tokens: of one call; 0 where that has no meaning.
        length: where this is one of several lengths that show growth; 0 elsewhere.
    """

    kind: str
    what: str
    work: str
    shape: str
    contestants: Sequence[Contestant]
    limit: float | None = None
    limited_by: str = ""
    tokens: int = 0
    length: int = 0


@dataclass(frozen=True)
class Measurement:
    """One line of the result. Times are seconds a call; None where nothing was measured, and ``refused`` says why."""

    kind: str
    what: str
    work: str
    implementation: str
    role: Role
    shape: str
    dtype: str
    device: str
    median: float | None = None
    low: float | None = None  # first quartile
    high: float | None = None  # third quartile
    samples: int = 0
    limit: float | None = None
    limited_by: str = ""
    of_limit: float | None = None  # median / limit
    of_ours: float | None = None  # median / median of our fastest
    tokens_per_second: float | None = None
    peak_bytes: int | None = None  # of tensors, above the inputs
    result_bytes: int | None = None  # of them, the results
    length: int = 0  # where it is one of several that show growth
    time_exponent: float | None = None
    memory_exponent: float | None = None
    per_token: float | None = None  # time for each token at the longest of them over that at the shortest
    resident_bytes: int | None = None  # of the whole process at its peak, above inputs and results
    note: str = ""
    refused: str = ""
