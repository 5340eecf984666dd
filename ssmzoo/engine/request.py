"""A request: a prompt, how it is to be continued, and what has come of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from ssmzoo.engine.swap import Swapped
from ssmzoo.generate import Sampling
from ssmzoo.generate.arguments import is_int
from ssmzoo.generate.sampling import draws_of
from ssmzoo.plain import short
from ssmzoo.state import State


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
    """

    def __init__(self, prompt: list[int], max_tokens: int, step: Callable[[], object]):
        self.prompt, self.max_tokens = prompt, max_tokens
        self.tokens: list[int] = []
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
        seen: bool ``(1, vocab)``, the ids that stand in the prompt and its answer, where a penalty asks for them.
        next: the newest token, which the state has not read; None until the whole prompt was read.
        borders: digest of the prompt's first ``page_size``, ``2 · page_size``, … tokens.
    """

    def __init__(
        self, request: Request, order: int, sampling: Sampling, stops: list[tuple[int, ...]], seed: int, page_size: int
    ):
        self.request, self.order, self.sampling, self.stops = request, order, sampling, stops
        self.position = 0
        self.state: State | None = None
        self.swapped: Swapped | None = None
        self.next: int | None = None
        self.draws = draws_of(1, request.max_tokens, seed, torch.device("cpu"))
        self.seen: Tensor | None = None
        self.borders = _digests(request.prompt, page_size)

    def take(self, token: int) -> None:
        """A new token."""
        request = self.request
        if request.done:
            return
        request.tokens.append(token)
        self.next = token
        if self.seen is not None:
            self.seen[0, token] = True
        if any(tuple(request.tokens[-len(stop) :]) == stop for stop in self.stops):
            request.finish = "stop"
        elif len(request.tokens) == request.max_tokens:
            request.finish = "length"

    def fail(self, error: Exception) -> None:
        """Ends the request with an error."""
        if not self.request.done:
            self.request.error, self.request.finish = error, "error"


def prompt_of(ids: Tensor | Sequence[int], vocab: int) -> list[int]:
    """A prompt as a list of ids, checked."""
    values = ids.tolist() if isinstance(ids, Tensor) else ids
    if (
        isinstance(values, str | bytes)
        or not isinstance(values, Sequence)
        or not all(is_int(v, -(2**63)) for v in values)
    ):
        raise TypeError(f"Engine.submit: `prompt_ids` must be ids, in a list or a tensor (l); got {short(ids)}")
    if not values:
        raise ValueError("Engine.submit: `prompt_ids` must hold at least one id; got none")
    outside = [v for v in values if not 0 <= v < vocab]
    if outside:
        raise ValueError(f"Engine.submit: `prompt_ids` must be from 0 to {vocab - 1}, the vocabulary; got {outside[0]}")
    return list(values)


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
        page = b"".join(id.to_bytes(8, "little") for id in ids[end - page_size : end])
        digest = hashlib.blake2b(digest + page, digest_size=16).digest()
        found.append(digest)
    return found
