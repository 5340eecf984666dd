"""Beam search: the most likely continuations, kept side by side."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ssmkernels.native.alone import alone
from ssmzoo.generate.arguments import TokenModel
from ssmzoo.state import State


@torch.no_grad()
def beam_search(
    model: TokenModel, prompts: Tensor, mask: Tensor | None, steps: int, num_beams: int, ends: tuple[int, ...]
) -> Tensor:
    """The best continuation of each prompt, as ``transformers`` finds it by default.

    At each step every prompt keeps the ``num_beams`` most likely running continuations. One that ends is set aside
    with its mean log-probability a token (a length penalty of 1). A prompt is done when it has ``num_beams`` of those
    and its best running one is no better; what still runs after the last step counts as ended.

    Args:
        model: in evaluation mode.
        prompts: int64 ``(b, l)``.
        mask: bool ``(b, l)`` where prompts are padded, or None.
        steps: most new tokens, at least 1.
        num_beams: continuations that are kept for each prompt.
        ends: ids after which a continuation ends.

    Returns:
        The new ids ``(b, n)``, ends included; what ended early is filled up with the first of ``ends``.

    Raises:
        ValueError: logits that are not finite, naming the step.
    """
    b, l = prompts.shape
    vocab = model.config.vocab_size or 0
    logits, state = model(prompts, model.initial_state(b, l + min(steps, ROOM)), mask=mask, last_only=True)
    every = torch.arange(b).repeat_interleave(num_beams)
    logits, state = logits[every.to(logits.device)], state.select(every)
    scores = torch.full((b, num_beams), -math.inf, device=logits.device)
    scores[:, 0] = 0.0  # the beams of a prompt are all the same at first: one of them branches
    running: list[list[list[int]]] = [[[] for _ in range(num_beams)] for _ in range(b)]
    ended: list[list[tuple[float, list[int]]]] = [[] for _ in range(b)]
    done = [False] * b
    wide = min(max(2, 1 + len(ends)) * num_beams, num_beams * vocab)  # enough that num_beams of them do not end
    for step in range(1, steps + 1):
        with alone(logits, 16):
            raw = logits[:, 0, :vocab].float()
            check_finite(raw.amax(-1), step)
            totals = raw.log_softmax(-1).view(b, num_beams, vocab) + scores[:, :, None]
            best, places = totals.flatten(1).topk(wide)
            values, chosen = best.tolist(), places.tolist()
        rows, tokens, kept = [], [], []
        for i in range(b):
            new = [] if done[i] else _branch(values[i], chosen[i], running[i], ended[i], num_beams, vocab, ends, step)
            new += [(-math.inf, 0, 0)] * (num_beams - len(new))  # nothing left to branch, or done
            running[i] = [[*running[i][beam], token] for _, beam, token in new]
            rows += [i * num_beams + beam for _, beam, _ in new]
            tokens += [token for _, _, token in new]
            kept.append([score for score, _, _ in new])
            if not done[i]:
                full = len(ended[i]) == num_beams and ended[i][-1][0] >= kept[i][0] / step
                done[i] = full or kept[i][0] == -math.inf
                if not done[i] and step == steps:
                    ended[i] += [(s / step, ids) for s, ids in zip(kept[i], running[i], strict=True) if s > -math.inf]
        if all(done) or step == steps:
            break
        scores = torch.tensor(kept, device=logits.device)
        ids = torch.tensor(tokens, device=prompts.device)[:, None]
        logits, state = model(ids, reordered(state, rows))
    found = [max(candidates, key=lambda pair: pair[0])[1] for candidates in ended]
    longest = max(map(len, found))
    return torch.tensor([[*row, *ends[:1] * (longest - len(row))] for row in found], device=prompts.device)


def reordered(state: State, rows: list[int]) -> State:
    """The state with these rows in place of its own; in its own memory where it consists of tensors alone.

    A model that makes a token's calls together (:mod:`ssmzoo.decoding`) does so as long as tensors stay where they are.
    """
    if rows == list(range(len(rows))):
        return state
    chosen = state.select(rows)
    if not all(map(_plain, state.nested())):
        return chosen
    for mine, new in zip(state.tensors(), chosen.tensors(), strict=True):
        mine.copy_(new)
    return state


def _plain(state: State) -> bool:
    """Whether its rows are those of its tensors, and it holds nothing else."""
    kind = type(state)
    fields = [part for held in vars(state).values() for part in (held if isinstance(held, list) else (held,))]
    return (
        kind.select is State.select
        and kind.tensors is State.tensors
        and all(part is None or isinstance(part, Tensor | State) for part in fields)
    )


ROOM = 4096  # tokens of a cache that are set aside at once; it grows where more come


def _branch(
    values: list[float],
    places: list[int],
    running: list[list[int]],
    ended: list[tuple[float, list[int]]],
    num_beams: int,
    vocab: int,
    ends: tuple[int, ...],
    step: int,
) -> list[tuple[float, int, int]]:
    """The next beams (score, beam it goes on from, token), best first; those that end go into ``ended``."""
    new: list[tuple[float, int, int]] = []
    for rank, (value, place) in enumerate(zip(values, places, strict=True)):
        beam, token = divmod(place, vocab)
        if value == -math.inf or len(new) == num_beams:
            break
        if token not in ends:
            new.append((value, beam, token))
        elif rank < num_beams:
            ended.append((value / step, [*running[beam], token]))
    ended.sort(key=lambda pair: -pair[0])
    del ended[num_beams:]
    return new


def check_finite(highest: Tensor, step: int) -> None:
    """Refuses logits whose maximum ``(b)`` is no finite number.

    Raises:
        ValueError: naming the step and the row.
    """
    if math.isfinite(float(highest.sum())):  # the usual case, in one look
        return
    bad = ~highest.isfinite()
    if bool(bad.any()):
        row = int(bad.int().argmax())
        raise ValueError(
            f"generate: the logits of `model` are not finite at step {step} (row {row}: {float(highest[row])}); its "
            "weights, or numbers in half precision, have overflowed"
        )
