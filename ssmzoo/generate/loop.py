"""Continuing prompts: one call for all of a prompt, then one token at a time through the state."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ssmkernels.native.alone import alone
from ssmzoo.generate.arguments import (
    TokenModel,
    check_alone,
    check_draft,
    check_model,
    ends_of,
    is_int,
    prompts_of,
    require,
)
from ssmzoo.generate.beams import ROOM, beam_search, check_finite
from ssmzoo.generate.sampling import Sampling, draws_of
from ssmzoo.generate.speculative import Speculation
from ssmzoo.steady import steady


@torch.no_grad()  # and no inference mode: its tensors may not enter a later loss
def generate(
    model: TokenModel,
    ids: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | None = None,
    eos_id: int | Sequence[int] | None = None,
    stream: Callable[[Tensor], object] | None = None,
    seed: int | None = None,
    mask: Tensor | None = None,
    num_beams: int = 1,
    draft: TokenModel | Literal["lookup"] | None = None,
    draft_tokens: int = 8,
) -> Tensor | list[list[int]]:
    """Continues prompts: one call for all of a prompt, then one token at a time through the state.

    From logits to a token, in this order: the bias, the repetition penalty, those for presence and frequency, the
    temperature, top-k, top-p, min-p, and a draw. Ids that only pad the vocabulary are never drawn.

    Each row has a random stream of its own: row i draws from a generator seeded with ``seed + i``, one number
    a token. So what a prompt becomes depends neither on its neighbours nor on ``max_new_tokens`` (but for
    rounding in the logits): row i of a batch equals that prompt alone with ``seed=seed + i``, and at
    temperature 0 simply that prompt alone.

    Args:
        model: a causal model with token ids in and token logits out. It runs in evaluation mode, and is put
            back when the last of the calls that run at the same time has ended.
        ids: prompts ``(b, l)``, int64 or int32; or lists of ids of any lengths, none empty.
        max_new_tokens: how many tokens to add, at most.
        temperature: divides the logits; 0 takes the most likely token each time.
        top_k: keep the k most likely tokens.
        top_p: keep the fewest tokens, the most likely first, whose probabilities reach p (Holtzman et al.
            2019, arXiv 1904.09751).
        min_p: keep tokens at least this fraction as likely as the most likely one (arXiv 2407.01082).
        repetition_penalty: divides the positive and multiplies the negative logits of ids that stand in the
            row already, prompt included (CTRL, arXiv 1909.05858, section 4.1); from 1e-6 to 1e6, 1 for none.
        presence_penalty, frequency_penalty: from -2 to 2, subtracted from the logits of ids that were generated before:
            the first once, the second once for each time (as OpenAI's API defines them; the prompt does not count).
        logit_bias: numbers from -100 to 100 by id, added to the model's logits.
        eos_id: a row ends after this id, or after any of several; generation stops once all have.
        stream: called with each step's new tokens, ``(b)`` int64 on the model's device, as they come; a row
            that has ended gives ``eos_id``, the first of them. Generation stops where it returns True. It may not
            change the model.
        seed: at least 0. If None, it is drawn from PyTorch's global generator.
        mask: bool ``(b, l)``, True at real tokens, for prompts in a tensor that are padded on whichever side.
        num_beams: above 1, beam search: the continuation with the highest mean log-probability a token among those
            that this many beams find. Nothing is drawn, so it goes with no option of sampling, no penalty, no bias and
            not with ``stream``.
        draft: for one prompt, proposes tokens that the model then reads in one call (speculative decoding, arXiv
            2211.17192): a smaller model of the same vocabulary, or ``"lookup"``, what followed the last tokens where
            they stood before. The answer at temperature 0 stays the same, but for rounding; else its distribution
            does, and a seed gives other tokens than without a draft.
        draft_tokens: most tokens that are proposed at once.

    Returns:
        For a tensor ``(b, l + n)``: the prompts as they came and n ≤ max_new_tokens new tokens; rows that
        ended are filled up with ``eos_id``, the first if several. For lists a list of lists: each prompt and
        what follows it, up to its ``eos_id``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range, by name, or a model that cannot
            do this; or logits that are not finite, naming the step.
    """
    check_model(model)
    vocab = model.config.vocab_size or 0
    require(is_int(max_new_tokens, 0), "max_new_tokens", max_new_tokens, "an int of at least 0")
    require(max_new_tokens < 2**31, "max_new_tokens", max_new_tokens, "at most 2**31 - 1")
    penalties = (repetition_penalty, presence_penalty, frequency_penalty)
    sampling = Sampling(temperature, top_k, top_p, min_p, *penalties, logit_bias, seed)
    sampling.check_ids(vocab)
    ends = ends_of(eos_id, vocab)
    require(is_int(num_beams, 1, 1024), "num_beams", num_beams, "an int from 1 to 1024")
    for name in [*sampling.given, *["stream"] * (stream is not None)] if num_beams > 1 else ():
        raise ValueError(f"generate: `num_beams`={num_beams} draws nothing and goes without `{name}`; leave it out")
    if stream is not None and not callable(stream):
        raise TypeError(f"generate: `stream` must be a function of the new tokens (b); got {stream!r:.80}")
    prompts, mask = prompts_of(ids, mask, vocab, model.device)
    check_draft(draft, draft_tokens, model)
    if draft is not None:
        check_alone(prompts, mask, num_beams)
    if max_new_tokens == 0:
        return prompts if isinstance(ids, Tensor) else [list(row) for row in ids]
    with evaluating(model), steady(cast(nn.Module, model)):
        if num_beams > 1:
            added = beam_search(model, prompts, mask, max_new_tokens, num_beams, ends)
        elif draft is not None:
            added = _speculative(model, prompts, max_new_tokens, sampling, ends, stream, draft, draft_tokens)
        else:
            added = _sampled(model, prompts, mask, max_new_tokens, sampling, ends, stream)
    if isinstance(ids, Tensor):
        return torch.cat([prompts, added], dim=1)
    return [[*prompt, *_until(row, ends)] for prompt, row in zip(ids, added.tolist(), strict=True)]


def _sampled(
    model: TokenModel,
    prompts: Tensor,
    mask: Tensor | None,
    steps: int,
    sampling: Sampling,
    ends: tuple[int, ...],
    stream: Callable[[Tensor], object] | None,
) -> Tensor:
    """New ids (b n), n ≤ steps; rows that ended are filled up."""
    (b, l), device, vocab = prompts.shape, prompts.device, model.config.vocab_size or 0
    draws = None if sampling.temperature == 0 else draws_of(b, steps, sampling.seed, device)
    history = sampling.history(prompts, mask, vocab)
    stops = torch.tensor(ends, device=device)
    ended = torch.zeros(b, dtype=torch.bool, device=device)
    highest: list[Tensor] = []  # logit of each row, of steps that are not yet checked
    new: list[Tensor] = []
    logits, state = model(prompts, model.initial_state(b, l + min(steps, ROOM)), mask=mask, last_only=True)
    while True:
        with alone(logits, sampling.operations):
            scores = logits[:, 0, :vocab].float()
            highest.append(scores.amax(-1))
            if device.type == "cpu":  # on other devices reading it would wait; they are checked at the end
                check_finite(highest.pop(), len(new) + 1)
            token = sampling.pick(scores, history, draws)
        if ends:
            token = torch.where(ended, ends[0], token)
            ended |= torch.isin(token, stops)
        new.append(token)
        stopped = stream is not None and stream(token) is True
        if stopped or len(new) == steps or (ends and bool(ended.all())):
            break
        if history is not None:
            history.add(token)
        logits, state = model(token[:, None], state)
    for step, top in enumerate(highest, 1):
        check_finite(top, step)
    return torch.stack(new, dim=1)


def _speculative(
    model: TokenModel,
    prompts: Tensor,
    steps: int,
    sampling: Sampling,
    ends: tuple[int, ...],
    stream: Callable[[Tensor], object] | None,
    draft: TokenModel | Literal["lookup"],
    count: int,
) -> Tensor:
    """New ids (1 n), n ≤ steps."""
    new: list[Tensor] = []
    with contextlib.ExitStack() as stack:
        if not isinstance(draft, str):
            stack.enter_context(evaluating(draft))
            stack.enter_context(steady(cast(nn.Module, draft)))
        for token in Speculation.of(model, draft, count, sampling, prompts.shape[1] + steps).run(prompts, steps, ends):
            new.append(torch.tensor([token], device=prompts.device))
            if stream is not None and stream(new[-1]) is True:
                break
    return torch.stack(new, dim=1)


def _until(row: list[int], ends: tuple[int, ...]) -> list[int]:
    for i, token in enumerate(row):
        if token in ends:
            return row[: i + 1]
    return row


_running: weakref.WeakKeyDictionary[nn.Module, tuple[int, list]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


@contextlib.contextmanager
def evaluating(model: TokenModel) -> Iterator[None]:
    """Evaluation mode for as long as any thread is in here; the last one to leave puts the modes back."""
    assert isinstance(model, nn.Module)
    with _lock:
        users, modes = _running.get(model) or (0, [])
        if users == 0:
            modes = [(module, module.training) for module in model.modules() if module.training]
            if modes:  # setting all modes takes a good part of a small model's token
                model.eval()
        _running[model] = users + 1, modes
    try:
        yield
    finally:
        with _lock:
            users, modes = _running[model]
            _running[model] = users - 1, modes
            if users == 1:
                del _running[model]
                for module, training in modes:
                    module.training = training
