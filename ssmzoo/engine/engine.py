"""The engine: requests join and leave a batch at any token."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ssmzoo.decoding import let_go
from ssmzoo.engine.active import Active
from ssmzoo.engine.drafting import Drafting
from ssmzoo.engine.memory import Memory
from ssmzoo.engine.prefixes import Prefixes
from ssmzoo.engine.prompts import Prompts
from ssmzoo.engine.request import Job, Request, prompt_of, stops_of
from ssmzoo.engine.swap import Store
from ssmzoo.engine.turns import Turns
from ssmzoo.generate import Sampling, check_model
from ssmzoo.generate.arguments import TokenModel, check_draft, is_int
from ssmzoo.generate.loop import evaluating
from ssmzoo.plain import short
from ssmzoo.steady import steady


class Engine:
    """Answers many requests at once, with the tokens that :func:`ssmzoo.generate.generate` gives for each alone.

    Each step gives a token to every request whose prompt was read, all in one call of the model, and reads at most
    ``chunk`` tokens of the prompts of others, packed into one call. Requests begin in the order in which they came.

    States are held within a budget: those of a fixed size as one batch, caches of attention in pages, which all
    requests share and which take memory only where tokens are. Where tokens to come need more, snapshots of prompts go
    first, and then the youngest request's state is put away, and comes back when there is room.

    Args:
        model: a causal model with token ids in and token logits out. It runs in evaluation mode during a step.
        memory: bytes for states and snapshots; the weights, and what a call computes with, come on top.
        max_batch: most requests that have a state at once.
        chunk: tokens of prompts that are read in a step, a multiple of ``page_size``.
        page_size: tokens of a page, where the model's config has no ``page_size``; and the grid of shared prefixes.
        share_prefixes: keep snapshots of states while prompts are read: every ``chunk`` tokens, and at the last border
            of pages. A prompt that begins in the same way goes on from there. They stand for the model's weights as
            they are: call :meth:`forget` when you change those.
        draft: proposes tokens while few requests are under way, which are then read together with the next one
            (speculative decoding): a smaller model of the same vocabulary, or ``"lookup"``, what followed the last
            tokens where they stood before. Requests get the same tokens, but for rounding. The states of a draft model
            are no part of ``memory``.
        draft_tokens: most tokens that are proposed at once.
        swap: a folder for states that are put away; if None, the system's for temporary files, or, where the model is
            not on a CPU, the host's memory.

    Raises:
        TypeError, ValueError: a model that cannot do this, or an argument out of range.
    """

    def __init__(
        self,
        model: TokenModel,
        *,
        memory: int = 2**30,
        max_batch: int = 64,
        chunk: int = 512,
        page_size: int = 64,
        share_prefixes: bool = True,
        draft: TokenModel | Literal["lookup"] | None = None,
        draft_tokens: int = 8,
        swap: str | Path | None = None,
    ):
        check_model(model, caller="Engine")
        for name, value, low in (("memory", memory, 1), ("max_batch", max_batch, 1), ("page_size", page_size, 1)):
            if not is_int(value, low):
                raise ValueError(f"Engine: `{name}` must be an int of at least {low}; got {short(value)}")
        if not is_int(chunk, page_size) or chunk % page_size:
            raise ValueError(f"Engine: `chunk` must be a multiple of `page_size`={page_size}; got {short(chunk)}")
        self.model, self.vocab = model, model.config.vocab_size or 0
        self._memory = Memory(model, memory, page_size, chunk)
        self._prefixes = Prefixes(page_size)
        self._active = Active(self._memory, self._prefixes, max_batch, Store(swap, model.device))
        check_draft(draft, draft_tokens, model, "Engine")
        self._drafting = Drafting(draft, draft_tokens, self._active)
        self._turns = Turns(model, self._active, Prompts(self._prefixes, chunk, share_prefixes), self._drafting)
        self._lock, self._stepping = threading.RLock(), False
        self._numbers = itertools.count()

    def submit(
        self,
        prompt_ids: Tensor | Sequence[int],
        *,
        max_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | None = None,
        stop: int | Sequence[int | Sequence[int]] | None = None,
        logprobs: int | None = None,
    ) -> Request:
        """A new request, which begins with one of the next steps. Any thread may call this.

        Args:
            prompt_ids: ids ``(l)``, at least one.
            max_tokens: most new tokens, at least 1.
            temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, logit_bias, seed:
                as those of :func:`ssmzoo.generate.generate`.
            stop: an id, or a list of ids and of sequences of ids, any of which ends it. They stand in its tokens.
            logprobs: note the log-probability of each token under the model, before bias, penalties, temperature and
                filters, and those of this many most likely ids, in the request's
                :attr:`~ssmzoo.engine.Request.logprobs`.

        Raises:
            TypeError, ValueError: an argument of the wrong kind or out of range; or a request that needs more than the
                whole budget, or more positions than the model has.
        """
        prompt = prompt_of(prompt_ids, self.vocab)
        if not is_int(max_tokens, 1, 2**31 - 1):
            raise ValueError(f"Engine.submit: `max_tokens` must be an int from 1 to 2**31 - 1; got {short(max_tokens)}")
        if logprobs is not None and not is_int(logprobs, 0, self.vocab):
            raise ValueError(
                f"Engine.submit: `logprobs` must be an int from 0 to {self.vocab}, the vocabulary, or None; "
                f"got {short(logprobs)}"
            )
        penalties = (repetition_penalty, presence_penalty, frequency_penalty)
        sampling = Sampling(temperature, top_k, top_p, min_p, *penalties, logit_bias, seed, "Engine.submit")
        sampling.check_ids(self.vocab, "Engine.submit")
        stops = stops_of(stop, self.vocab)
        total = len(prompt) + max_tokens
        positions = self.model.config.learned_positions
        if positions is not None and total > positions:
            raise ValueError(
                f"Engine.submit: `prompt_ids` and `max_tokens` must be at most {positions} tokens together, as the "
                f"model has `learned_positions`={positions}; got {len(prompt)} and {max_tokens}"
            )
        needed = self._memory.full(total)
        if needed > self._memory.limit:
            raise ValueError(
                f"Engine.submit: a prompt of {len(prompt)} tokens and `max_tokens`={max_tokens} take {needed:,} bytes, "
                f"more than the engine's `memory`={self._memory.limit:,}; this request can never run"
            )
        if seed is None:
            seed = int(torch.randint(2**32, (), device="cpu"))
        request = Request(prompt, max_tokens, self.step)
        job = Job(request, next(self._numbers), sampling, stops, seed, self._prefixes.page_size, logprobs)
        job.history = sampling.history(torch.tensor([prompt], device=self.model.device), None, self.vocab)
        self._active.enqueue(job)
        return request

    @property
    def waiting(self) -> int:
        """Requests that have no state in memory: they have not begun, or were put away."""
        return self._active.waiting

    @property
    def active(self) -> int:
        """Requests that have one."""
        return len(self._active)

    @property
    def nbytes(self) -> int:
        """Bytes of the budget in use, snapshots included."""
        return self._active.nbytes

    @property
    def memory(self) -> int:
        """The budget in bytes."""
        return self._memory.limit

    @property
    def max_batch(self) -> int:
        """Most requests that have a state at once."""
        return self._active.max_batch

    @property
    def swaps(self) -> int:
        """How often a state was put away."""
        return self._active.swaps

    @property
    def proposed(self) -> int:
        """Tokens that a draft has proposed."""
        return self._drafting.proposed

    @property
    def kept(self) -> int:
        """Those of them that were the next tokens."""
        return self._drafting.kept

    def forget(self) -> None:
        """Drops all snapshots of prompts."""
        with self._lock:
            self._prefixes.kept.clear()

    def step(self) -> bool:
        """A token more for each request that has read its prompt, and a part of the prompts of others.

        Returns:
            Whether any request is still under way.

        Raises:
            KeyboardInterrupt, …: whatever cuts a step short. The requests that have a state end with an error.
            RuntimeError: a step calls this, as by a hook of the model's.
        """
        with (
            self._lock,
            self._alone(),
            evaluating(self.model),
            self._drafting.ready(),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            try:
                self._active.leave()
                self._drafting.propose()
                self._active.make_room()
                self._active.admit()
                self._turns.write()
                self._turns.check()
                self._turns.read()
                self._active.leave()
            except BaseException as error:  # an interrupt, say: nobody knows how far the states have come
                self._active.fail(RuntimeError(f"Engine: a step of this request was cut short by {error!r:.200}"))
                raise
            return bool(self.active or self.waiting)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Refuses a step within a step."""
        if self._stepping:
            raise RuntimeError("Engine.step: called within a step, as by a hook of the model, which would break it")
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False

    def run(self) -> None:
        """Steps until all requests are done.

        The model stays as it is meanwhile: a change of its weights, options or hooks need not take effect.
        """
        with evaluating(self.model), steady(cast(nn.Module, self.model)):
            try:
                while self.step():
                    pass
            finally:
                let_go(cast(nn.Module, self.model))
