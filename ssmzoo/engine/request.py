"""A request: a prompt, how it is to be continued, and what has come of it."""

from __future__ import annotations

import hashlib
import struct
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from ssmzoo.engine.swap import Swapped
from ssmzoo.generate import Sampling
from ssmzoo.generate.arguments import is_int
from ssmzoo.generate.drafts import Draft
from ssmzoo.generate.penalties import History
from ssmzoo.generate.sampling import draws_of
from ssmzoo.plain import short
from ssmzoo.state import State


class TokenLogprob(NamedTuple):
    """The natural logarithm of a token's probability under the model, and the most likely ids with theirs."""

    logprob: float
    top: list[tuple[int, float]]


class Request:
    """What :meth:`ssmzoo.Engine.submit` gives.

    Iterating gives the new ids as they come, and makes the engine work while there are none; so does :meth:`result`.
    Several threads may do so at once.

    Attributes:
        prompt: its ids.
        max_tokens: most new tokens.
        tokens: the new ids so far.
        finish: why it is over: ``"stop"``, ``"length"``, ``"cancelled"`` or ``"error"``; None while it is not.
        error: what went wrong.
        shared: tokens of the prompt whose state came from an earlier request.
        logprobs: of each token, where :meth:`ssmzoo.Engine.submit` was asked for them; else empty.
    """

    def __init__(self, prompt: list[int], max_tokens: int, step: Callable[[], object]):
        self.prompt, self.max_tokens = prompt, max_tokens
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish: Literal["stop", "length", "cancelled", "error"] | None = None
        self.error: Exception | None = None
        self.shared = 0
        self._step = step

    @property
    def done(self) -> bool:
        """Whether no further token will come."""
        return self.finish is not None

    def cancel(self) -> None:
        """Ends it as it is. Its memory is free with the engine's next step."""
        self.finish = self.finish or "cancelled"

    def fail(self, error: Exception) -> None:
        """Ends it with an error, unless it is over."""
        if not self.done:
            self.error, self.finish = error, "error"

    def result(self) -> list[int]:
        """The new ids, once all are there.

        Raises:
            Exception: :attr:`error`, where one ended it.
        """
        return list(self)

    def __iter__(self) -> Iterator[int]:
        given = 0
        while True:
            while given < len(self.tokens):
                yield self.tokens[given]
                given += 1
            if self.done and given == len(self.tokens):
                break
            self._step()
        if self.error is not None:
            raise self.error


class Job:
    """The engine's side of a request.

    Attributes:
        order: earlier requests come first.
        position: how many tokens the state has read.
        state: of one sequence; None before the first token, within a batch, or swapped out.
        swapped: the state while it is put away.
        history: what penalties have to know of the prompt and its answer; None without penalties.
        unread: new tokens that the state has not read: the newest, and where a draft failed those before it; none until
            the whole prompt was read.
        draft: what proposes its tokens, once somebody has asked for them.
        proposal: tokens that are read together with the unread ones, to see whether they are the next.
        logprobs: how many of the most likely ids are noted with each token; None to note nothing.
        borders: digest of the prompt's first ``page_size``, ``2 · page_size``, … tokens.
    """

    def __init__(
        self,
        request: Request,
        order: int,
        sampling: Sampling,
        stops: list[tuple[int, ...]],
        seed: int,
        page_size: int,
        logprobs: int | None = None,
    ):
        self.request, self.order, self.sampling, self.stops, self.logprobs = request, order, sampling, stops, logprobs
        self.position = 0
        self.state: State | None = None
        self.swapped: Swapped | None = None
        self.unread: list[int] = []
        self.draft: Draft | None = None
        self.proposal: list[int] = []
        self.draws = draws_of(1, request.max_tokens, seed, torch.device("cpu"))
        self.history: History | None = None
        self.borders = _digests(request.prompt, page_size)

    def take(self, token: int, logprob: TokenLogprob | None = None) -> None:
        """A new token."""
        request = self.request
        if request.done:
            return
        if logprob is not None:
            request.logprobs.append(logprob)  # before the token: whoever sees that may look for this
        request.tokens.append(token)
        self.unread.append(token)
        if self.history is not None:
            self.history.add(torch.tensor([token]))
        if any(tuple(request.tokens[-len(stop) :]) == stop for stop in self.stops):
            request.finish = "stop"
        elif len(request.tokens) == request.max_tokens:
            request.finish = "length"

    def fail(self, error: Exception) -> None:
        """Ends the request with an error.

        The error's traceback becomes a note: its frames would hold states for as long as somebody keeps the request.
        """
        if error.__traceback__ is not None:
            told: BaseException | None = error
            note = "".join(traceback.format_exception(error))
            while told is not None and told.__traceback__ is not None:
                told.__traceback__ = None
                told = told.__context__
            if hasattr(error, "add_note"):  # from Python 3.11 on
                error.add_note(note)
        self.request.fail(error)

    def let_go(self) -> None:
        """Forgets its states."""
        self.state = self.draft = None


def prompt_of(ids: Tensor | Sequence[int], vocab: int) -> list[int]:
    """A prompt as a list of ids, checked."""
    values = ids.tolist() if isinstance(ids, Tensor) else ids
    if (
        isinstance(values, str | bytes)
        or not isinstance(values, Sequence)
        or not (_plain_ints(values) or all(is_int(v, -(2**63)) for v in values))
    ):
        raise TypeError(f"Engine.submit: `prompt_ids` must be ids, in a list or a tensor (l); got {short(ids)}")
    if not values:
        raise ValueError("Engine.submit: `prompt_ids` must hold at least one id; got none")
    outside = [] if min(values) >= 0 and max(values) < vocab else [v for v in values if not 0 <= v < vocab]
    if outside:
        raise ValueError(
            f"Engine.submit: `prompt_ids` must be from 0 to {vocab - 1}, the vocabulary; got {short(outside[0])}"
        )
    return list(values)


def _plain_ints(values: Sequence[object]) -> bool:
    """Whether all are ints of Python's own within 64 bits: a long prompt's are looked at by no loop of Python's."""
    return {*map(type, values)} == {int} and min(cast(Sequence[int], values)) >= -(2**63)


def stops_of(stop: int | Sequence[int | Sequence[int]] | None, vocab: int) -> list[tuple[int, ...]]:
    """The sequences of ids that end a request."""
    given = [] if stop is None else stop if isinstance(stop, Iterable) else [stop]
    stops = [(s,) if isinstance(s, int) else tuple(s) if isinstance(s, list | tuple) else () for s in given]
    if not all(s and all(is_int(id, 0, vocab - 1) for id in s) for s in stops):
        raise ValueError(
            f"Engine.submit: `stop` must be an id from 0 to {vocab - 1}, or a list of ids and of sequences of ids; "
            f"got {short(stop)}"
        )
    return stops


def _digests(ids: list[int], page_size: int) -> list[bytes]:
    """A digest of all ids up to each border of pages."""
    found, digest = [], b""
    for end in range(page_size, len(ids) + 1, page_size):
        page = struct.pack(f"<{page_size}q", *ids[end - page_size : end])
        digest = hashlib.blake2b(digest + page, digest_size=16).digest()
        found.append(digest)
    return found
