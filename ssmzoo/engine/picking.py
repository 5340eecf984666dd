"""The next token of each of several requests, whose options differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ssmzoo.engine.request import Job


def pick(jobs: Sequence[Job], scores: Tensor) -> None:
    """Gives each job its next token from scores ``(jobs, vocab)``; one whose scores are not finite fails.

    Requests with the same options are drawn for together, each with its own random numbers.
    """
    finite = scores.amax(-1).isfinite().tolist()
    groups: dict[tuple, list[int]] = {}
    for i, job in enumerate(jobs):
        if finite[i]:
            options = dataclasses.replace(job.sampling, seed=None)
            groups.setdefault(dataclasses.astuple(options), []).append(i)
        else:
            job.fail(ValueError(f"Engine: the logits of `model` are not finite at token {len(job.request.tokens) + 1}"))
    for rows in groups.values():
        chosen = [jobs[i] for i in rows]
        sampling, some = chosen[0].sampling, scores if len(rows) == len(jobs) else scores[rows]
        seen = [job.seen for job in chosen if job.seen is not None]
        draws = None
        if sampling.temperature != 0:
            draws = iter([torch.cat([next(job.draws) for job in chosen]).to(scores.device)])
        tokens = sampling.pick(some, torch.cat(seen) if seen else None, draws).tolist()
        for job, token in zip(chosen, tokens, strict=True):
            job.take(token)
