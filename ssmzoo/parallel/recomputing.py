"""Activation checkpointing of layers whose sequences are cut over processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ssmkernels.core.crossing import crossing, current
from ssmzoo.parallel.parts import Parts


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For ``torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=checkpoint_contexts)``.

    What processes have sent each other in the forward pass is kept: states, a few tokens before each part, and of
    attention, whichever way it goes, its output and log-sum-exp, as in DistFlashAttn (Li et al. 2023, arXiv 2310.03294,
    section 3.3). Computing the layer again takes that from there. So nothing is sent twice, no process waits for
    another, and attention is computed once. Outside of a call over cuts both contexts do nothing.
    """
    over = current()
    if not isinstance(over, Parts):
        return nullcontext(), nullcontext()
    tape: list[Any] = []
    return _recorded(over, tape), _again(over, tape)


@contextlib.contextmanager
def _recorded(parts: Parts, tape: list[Any]) -> Iterator[None]:
    outer, parts.line.tape = parts.line.tape, tape
    try:
        yield
    finally:
        parts.line.tape = outer


@contextlib.contextmanager
def _again(parts: Parts, tape: list[Any]) -> Iterator[None]:
    """The graph of what is computed here is not used: nothing of the line but its tape may take part."""
    line, steps = parts.line, parts.steps
    outer, token = line.again, line.token
    line.again, line.token, parts.steps = iter(tape), token.detach().requires_grad_(), []
    try:
        with crossing(parts):
            yield
    finally:
        line.again, line.token, parts.steps = outer, token, steps
