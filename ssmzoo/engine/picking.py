"""The next token of each of several requests, whose options differ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssmkernels.native.alone import alone
from ssmzoo.engine.request import Job, TokenLogprob
from ssmzoo.generate.penalties import History


def pick(jobs: Sequence[Job], logits: Tensor) -> None:
    """Gives each job its next token from logits ``(jobs, vocab)``; one whose logits are not finite fails.

    Requests with the same options are drawn for together, each with its own random numbers.
    """
    with alone(logits, max(job.sampling.operations for job in jobs)):
        _pick(jobs, logits.float())


def _pick(jobs: Sequence[Job], scores: Tensor) -> None:
    finite = scores.amax(-1).isfinite().tolist()
    groups: dict[tuple, list[int]] = {}
    for i, job in enumerate(jobs):
        if finite[i]:
            groups.setdefault(job.sampling.key, []).append(i)
        else:
            job.fail(ValueError(f"Engine: the logits of `model` are not finite at token {len(job.request.tokens) + 1}"))
    for rows in groups.values():
        chosen = [jobs[i] for i in rows]
        sampling, some = chosen[0].sampling, scores if len(rows) == len(jobs) else scores[rows]
        histories = [job.history for job in chosen if job.history is not None]
        draws = None
        if sampling.temperature != 0:
            draws = iter([torch.cat([next(job.draws) for job in chosen]).to(scores.device)])
        tokens = sampling.pick(some, History.concatenate(histories) if histories else None, draws).tolist()
        for job, token, own in zip(chosen, tokens, some, strict=True):
            job.take(token, None if job.logprobs is None else _logprob(own, token, job.logprobs))


def _logprob(scores: Tensor, token: int, count: int) -> TokenLogprob:
    """Of a token, and the ``count`` most likely ones, by the scores ``(vocab)`` of the model alone."""
    logprobs = scores.log_softmax(-1)
    values, ids = logprobs.topk(min(count, len(logprobs)))
    return TokenLogprob(float(logprobs[token]), list(zip(ids.tolist(), values.tolist(), strict=True)))
