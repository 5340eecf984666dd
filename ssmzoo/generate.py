"""Continuing prompts token by token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ssmzoo.mixers._base import Mixer
from ssmzoo.model import SequenceModel


@torch.no_grad()  # and no inference mode: its tensors may not enter a later loss
def generate(
    model: SequenceModel,
    ids: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_id: int | None = None,
    stream: Callable[[Tensor], object] | None = None,
    seed: int | None = None,
    mask: Tensor | None = None,
) -> Tensor | list[list[int]]:
    """Continues prompts: one call for all of a prompt, then one token at a time through the state.

    From logits to a token, in this order, as ``transformers`` does it: the repetition penalty, the
    temperature, top-k, top-p, min-p, and a draw. Ids that only pad the vocabulary are never drawn.

    Each row has a random stream of its own: row i draws from a generator seeded with ``seed + i``, one number
    a token. So what a prompt becomes depends neither on its neighbours nor on ``max_new_tokens`` (but for
    rounding in the logits): row i of a batch equals that prompt alone with ``seed=seed + i``, and at
    temperature 0 simply that prompt alone.

    Args:
        model: a causal model with token ids in and token logits out. It runs in evaluation mode, and is put
            back after.
        ids: prompts ``(b, l)``, int64 or int32; or lists of ids of any lengths, none empty.
        max_new_tokens: how many tokens to add, at most.
        temperature: divides the logits; 0 takes the most likely token each time.
        top_k: keep the k most likely tokens.
        top_p: keep the fewest tokens, the most likely first, whose probabilities reach p (Holtzman et al.
            2019, arXiv 1904.09751).
        min_p: keep tokens at least this fraction as likely as the most likely one (arXiv 2407.01082).
        repetition_penalty: divides the positive and multiplies the negative logits of ids that stand in the
            row already, prompt included (CTRL, arXiv 1909.05858, section 4.1); 1 for none.
        eos_id: a row ends after this id; generation stops once all have.
        stream: called with each step's new tokens, ``(b)`` int64 on the model's device, as they come; a row
            that has ended gives ``eos_id``.
        seed: at least 0. If None, it is drawn from PyTorch's global generator.
        mask: bool ``(b, l)``, True at real tokens, for prompts in a tensor that are padded on whichever side.

    Returns:
        For a tensor ``(b, l + n)``: the prompts as they came and n ≤ max_new_tokens new tokens; rows that
        ended are filled up with ``eos_id``. For lists a list of lists: each prompt and what follows it, up to
        its ``eos_id``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range, by name, or a model that cannot
            do this.
    """
    _check_model(model)
    vocab = model.config.vocab_size or 0
    _check_options(vocab, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, eos_id, seed)
    if stream is not None and not callable(stream):
        raise TypeError(f"generate: `stream` must be a function of the new tokens (b); got {stream!r:.80}")
    device = model.lm_head.weight.device
    prompts, mask = _prompts(ids, mask, vocab, device)
    if max_new_tokens == 0:
        return prompts if isinstance(ids, Tensor) else [list(row) for row in ids]

    b, l = prompts.shape
    draws = None if temperature == 0 else _draws(b, max_new_tokens, seed, device)
    seen = _seen(prompts, mask, vocab) if repetition_penalty != 1 else None  # (b vocab)
    ended = torch.zeros(b, dtype=torch.bool, device=device)
    new: list[Tensor] = []
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        logits, state = model(prompts, model.initial_state(b, l + max_new_tokens), mask=mask, last_only=True)
        while True:
            scores = logits[:, 0, :vocab].float()
            if seen is not None:
                scores = penalise(scores, seen, repetition_penalty)
            if draws is None:
                token = scores.argmax(-1)
            else:
                token = sample(filtered(scores / temperature, top_k, top_p, min_p), draws[:, len(new)])
            if eos_id is not None:
                token = torch.where(ended, eos_id, token)
                ended |= token == eos_id
            new.append(token)
            if stream is not None:
                stream(token)
            if len(new) == max_new_tokens or (eos_id is not None and bool(ended.all())):
                break
            if seen is not None:
                seen.scatter_(1, token[:, None], True)
            logits, state = model(token[:, None], state)
    finally:
        for module, training in modes:
            module.training = training

    added = torch.stack(new, dim=1)
    if isinstance(ids, Tensor):
        return torch.cat([prompts, added], dim=1)
    return [[*prompt, *_until(row, eos_id)] for prompt, row in zip(ids, added.tolist(), strict=True)]


def penalise(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Makes seen ids less likely (CTRL, arXiv 1909.05858). scores (b v), seen (b v) bool → (b v)."""
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def filtered(scores: Tensor, top_k: int | None, top_p: float | None, min_p: float | None) -> Tensor:
    """Scores (b v) with -inf where a token is out; the most likely one always stays."""
    if top_k is not None and top_k < scores.shape[-1]:
        threshold = scores.topk(top_k).values[:, -1:]
        scores = scores.masked_fill(scores < threshold, -torch.inf)
    if top_p is not None and top_p < 1:
        ascending, order = scores.sort(dim=-1)
        out = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        out[:, -1] = False
        scores = scores.masked_fill(out.scatter(1, order, out), -torch.inf)
    if min_p is not None and min_p > 0:
        probabilities = scores.softmax(-1)
        out = probabilities < min_p * probabilities.amax(-1, keepdim=True)
        scores = scores.masked_fill(out, -torch.inf)
    return scores


def sample(scores: Tensor, draw: Tensor) -> Tensor:
    """Scores (b v) and numbers uniform in [0, 1) (b) → ids (b), by the inverse of the distribution."""
    probabilities = scores.softmax(-1, dtype=draw.dtype)
    cumulative = probabilities.cumsum(-1)
    # A parallel sum may waver where it should be flat: hence both conditions.
    reached = (cumulative > draw[:, None] * cumulative[:, -1:]) & (probabilities > 0)
    return torch.where(reached.any(-1), reached.int().argmax(-1), probabilities.argmax(-1))


def _draws(b: int, n: int, seed: int | None, device: torch.device) -> Tensor:
    """(b n) numbers uniform in [0, 1): a generator for each row, on the CPU, so that devices agree."""
    if seed is None:
        seed = int(torch.randint(2**32, (), device="cpu"))
    rows = []
    for i in range(b):
        generator = torch.Generator("cpu").manual_seed(seed + i)
        rows.append(torch.rand(n, generator=generator, dtype=torch.float64, device="cpu"))
    return torch.stack(rows).to(device, torch.float32 if device.type == "mps" else torch.float64)


def _seen(prompts: Tensor, mask: Tensor | None, vocab: int) -> Tensor:
    """(b vocab): the ids that stand in each prompt."""
    seen = torch.zeros(len(prompts), vocab + 1, dtype=torch.bool, device=prompts.device)
    seen.scatter_(1, prompts if mask is None else prompts.masked_fill(~mask, vocab), True)
    return seen[:, :vocab].contiguous()


def _until(row: list[int], eos_id: int | None) -> list[int]:
    return row[: row.index(eos_id) + 1] if eos_id in row else row


def _prompts(
    ids: Tensor | Sequence[Sequence[int]], mask: Tensor | None, vocab: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Prompts (b l) and, where they are padded, which positions are real; both on the device."""
    if not isinstance(ids, Tensor):
        if mask is not None:
            raise ValueError("generate: `mask` goes with `ids` in a tensor; lists are padded by themselves")
        ids, mask = _padded(ids)
    if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"generate: `ids` must be int64 or int32 of shape (b, l); got {ids.dtype} {tuple(ids.shape)}")
    if 0 in ids.shape:
        raise ValueError(f"generate: `ids` must hold at least one token in each row; got shape {tuple(ids.shape)}")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != ids.shape:
            raise ValueError(f"generate: `mask` must be bool of shape {tuple(ids.shape)}, as `ids`; got {mask!r:.80}")
        if not bool(mask.any(1).all()):
            raise ValueError(f"generate: `mask` leaves no token in row {int(mask.any(1).int().argmin())}")
    low, high = (int(v) for v in ids.aminmax())
    if low < 0 or high >= vocab:
        raise ValueError(
            f"generate: `ids` must be from 0 to {vocab - 1}, the vocabulary; got {low if low < 0 else high}"
        )
    return ids.to(device, torch.int64), None if mask is None else mask.to(device)


def _padded(ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
    if not isinstance(ids, list | tuple) or not all(isinstance(row, list | tuple) for row in ids):
        raise TypeError(f"generate: `ids` must be an int64 tensor (b, l) or a list of lists of ids; got {ids!r:.80}")
    for i, row in enumerate(ids):
        if not all(isinstance(token, int) for token in row):
            raise TypeError(f"generate: prompt {i} of `ids` must hold ints; got {row!r:.80}")
        if not row:
            raise ValueError(f"generate: prompt {i} of `ids` is empty; give it at least one token")
    if not ids:
        raise ValueError("generate: `ids` must hold at least one prompt; got an empty list")
    lengths = torch.tensor([len(row) for row in ids])
    longest = int(lengths.max())
    padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids])
    return padded, None if bool((lengths == longest).all()) else torch.arange(longest) < lengths[:, None]


def _check_model(model: SequenceModel) -> None:
    if not isinstance(model, SequenceModel):
        raise TypeError(f"generate: `model` must be a SequenceModel; got {type(model).__name__}")
    config = model.config
    if config.output != "tokens" or config.d_input is not None:
        into = "features" if config.d_input is not None else "tokens"
        raise ValueError(
            f"generate: it takes a model from tokens to tokens; this one goes from {into} to {config.output}"
        )
    for name, module in model.named_modules():
        if isinstance(module, Mixer) and not (module.causal and module.has_state):
            why = "has no state" if module.causal else "is bidirectional"
            raise ValueError(f"generate: every mixer must be causal and have a state; {name} {why}")


def _check_options(
    vocab: int,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float,
    eos_id: int | None,
    seed: int | None,
) -> None:
    rules = [
        ("max_new_tokens", max_new_tokens, _int(max_new_tokens, 0), "an int of at least 0"),
        ("temperature", temperature, _number(temperature) and temperature >= 0, "a number of at least 0"),
        ("top_k", top_k, top_k is None or _int(top_k, 1), "an int of at least 1, or None"),
        (
            "top_p",
            top_p,
            top_p is None or (_number(top_p) and 0 < top_p <= 1),
            "above 0 and at most 1, or None",
        ),
        ("min_p", min_p, min_p is None or (_number(min_p) and 0 <= min_p <= 1), "from 0 to 1, or None"),
        (
            "repetition_penalty",
            repetition_penalty,
            _number(repetition_penalty) and repetition_penalty > 0,
            "above 0",
        ),
        (
            "eos_id",
            eos_id,
            eos_id is None or _int(eos_id, 0, vocab - 1),
            f"an id from 0 to {vocab - 1}, or None",
        ),
        ("seed", seed, seed is None or _int(seed, 0, 2**63), "an int from 0 to 2**63, or None"),
    ]
    for name, value, fits, expected in rules:
        if not fits:
            raise ValueError(f"generate: `{name}` must be {expected}; got {value!r}")


def _int(value: object, low: int, high: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
