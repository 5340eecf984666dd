"""Continuing prompts token by token."""

from __future__ import annotations

import contextlib
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ssmzoo.beams import ROOM, beam_search, check_finite
from ssmzoo.mixers._base import Mixer
from ssmzoo.model import SequenceModel
from ssmzoo.plain import short


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
    eos_id: int | Sequence[int] | None = None,
    stream: Callable[[Tensor], object] | None = None,
    seed: int | None = None,
    mask: Tensor | None = None,
    num_beams: int = 1,
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
            back when the last of the calls that run at the same time has ended.
        ids: prompts ``(b, l)``, int64 or int32; or lists of ids of any lengths, none empty.
        max_new_tokens: how many tokens to add, at most.
        temperature: divides the logits; 0 takes the most likely token each time.
        top_k: keep the k most likely tokens.
        top_p: keep the fewest tokens, the most likely first, whose probabilities reach p (Holtzman et al.
            2019, arXiv 1904.09751).
        min_p: keep tokens at least this fraction as likely as the most likely one (arXiv 2407.01082).
        repetition_penalty: divides the positive and multiplies the negative logits of ids that stand in the
            row already, prompt included (CTRL, arXiv 1909.05858, section 4.1); 1 for none.
        eos_id: a row ends after this id, or after any of several; generation stops once all have.
        stream: called with each step's new tokens, ``(b)`` int64 on the model's device, as they come; a row
            that has ended gives ``eos_id``, the first of them. Generation stops where it returns True.
        seed: at least 0. If None, it is drawn from PyTorch's global generator.
        mask: bool ``(b, l)``, True at real tokens, for prompts in a tensor that are padded on whichever side.
        num_beams: above 1, beam search: the continuation with the highest mean log-probability a token among those
            that this many beams find. Nothing is drawn, so it goes with no option of sampling, and not with
            ``repetition_penalty`` or ``stream``.

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
    _check_options(vocab, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, eos_id, seed)
    _check_beams(num_beams, temperature, top_k, top_p, min_p, repetition_penalty, stream, seed)
    if stream is not None and not callable(stream):
        raise TypeError(f"generate: `stream` must be a function of the new tokens (b); got {stream!r:.80}")
    device = model.device
    prompts, mask = _prompts(ids, mask, vocab, device)
    if max_new_tokens == 0:
        return prompts if isinstance(ids, Tensor) else [list(row) for row in ids]

    ends = () if eos_id is None else (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)
    if num_beams > 1:
        with evaluating(model):
            found = beam_search(model, prompts, mask, max_new_tokens, num_beams, ends)
        if not isinstance(ids, Tensor):
            return [[*prompt, *row] for prompt, row in zip(ids, found, strict=True)]
        longest = max(map(len, found))
        rows = [[*row, *ends[:1] * (longest - len(row))] for row in found]
        return torch.cat([prompts, torch.tensor(rows, device=device)], dim=1)
    b, l = prompts.shape
    draws = None if temperature == 0 else _draws(b, max_new_tokens, seed, device)
    stops = torch.tensor(ends, device=device)
    highest: list[Tensor] = []  # logit of each row, of steps that are not yet checked
    seen = _seen(prompts, mask, vocab) if repetition_penalty != 1 else None  # (b vocab)
    ended = torch.zeros(b, dtype=torch.bool, device=device)
    new: list[Tensor] = []
    with evaluating(model):
        room = l + min(max_new_tokens, ROOM)
        logits, state = model(prompts, model.initial_state(b, room), mask=mask, last_only=True)
        while True:
            scores = logits[:, 0, :vocab].float()
            highest.append(scores.amax(-1))
            if device.type == "cpu":  # elsewhere a look would wait for the device: all at the end
                check_finite(highest.pop(), len(new) + 1)
            if seen is not None:
                scores = penalise(scores, seen, repetition_penalty)
            if draws is None:
                token = scores.argmax(-1)
            else:
                token = sample(filtered(warmed(scores, temperature), top_k, top_p, min_p), next(draws))
            if ends:
                token = torch.where(ended, ends[0], token)
                ended |= torch.isin(token, stops)
            new.append(token)
            stopped = stream is not None and stream(token) is True
            if stopped or len(new) == max_new_tokens or (ends and bool(ended.all())):
                break
            if seen is not None:
                seen.scatter_(1, token[:, None], True)
            logits, state = model(token[:, None], state)
    for step, top in enumerate(highest, 1):
        check_finite(top, step)

    added = torch.stack(new, dim=1)
    if isinstance(ids, Tensor):
        return torch.cat([prompts, added], dim=1)
    return [[*prompt, *_until(row, ends)] for prompt, row in zip(ids, added.tolist(), strict=True)]


_running: weakref.WeakKeyDictionary[SequenceModel, tuple[int, list]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


@contextlib.contextmanager
def evaluating(model: SequenceModel) -> Iterator[None]:
    """Evaluation mode for as long as any thread is in here; the last one to leave puts the modes back."""
    with _lock:
        users, modes = _running.get(model) or (0, [])
        if users == 0:
            modes = [(module, module.training) for module in model.modules() if module.training]
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


def warmed(scores: Tensor, temperature: float) -> Tensor:
    """Scores (b v) divided by a temperature, the highest at 0 so that a small one overflows nowhere."""
    if temperature >= 1e-3:
        return scores / temperature
    return (scores - scores.amax(-1, keepdim=True)) / max(temperature, 1e-30)


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


def _draws(b: int, n: int, seed: int | None, device: torch.device) -> Iterator[Tensor]:
    """n times (b) numbers uniform in [0, 1): a generator for each row, on the CPU, so that devices agree."""
    if seed is None:
        seed = int(torch.randint(2**32, (), device="cpu"))
    generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(b)]
    dtype = torch.float32 if device.type == "mps" else torch.float64
    for start in range(0, n, 256):
        size = min(256, n - start)
        rows = [torch.rand(size, generator=g, dtype=torch.float64, device="cpu") for g in generators]
        yield from torch.stack(rows).to(device, dtype).unbind(1)


def _seen(prompts: Tensor, mask: Tensor | None, vocab: int) -> Tensor:
    """(b vocab): the ids that stand in each prompt."""
    seen = torch.zeros(len(prompts), vocab + 1, dtype=torch.bool, device=prompts.device)
    seen.scatter_(1, prompts if mask is None else prompts.masked_fill(~mask, vocab), True)
    return seen[:, :vocab].contiguous()


def _until(row: list[int], ends: tuple[int, ...]) -> list[int]:
    for i, token in enumerate(row):
        if token in ends:
            return row[: i + 1]
    return row


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


def check_model(model: SequenceModel) -> None:
    """Refuses a model that cannot continue token ids, saying why."""
    if not isinstance(model, SequenceModel):
        raise TypeError(f"generate: `model` must be a SequenceModel; got {type(model).__name__}")
    config = model.config
    if config.output != "tokens" or config.d_input is not None:
        into = "features" if config.d_input is not None else "tokens"
        raise ValueError(
            f"generate: `model` must go from tokens to tokens; this one goes from {into} to {config.output}"
        )
    for name, module in model.named_modules():
        if isinstance(module, Mixer) and not (module.causal and module.has_state):
            why = "has no state" if module.causal else "is bidirectional"
            raise ValueError(f"generate: every mixer of `model` must be causal and have a state; {name} {why}")


def _check_options(
    vocab: int,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float,
    eos_id: int | Sequence[int] | None,
    seed: int | None,
) -> None:
    rules = [
        ("max_new_tokens", max_new_tokens, _int(max_new_tokens, 0), "an int of at least 0"),
        ("max_new_tokens", max_new_tokens, _int(max_new_tokens, 0, 2**31 - 1), "at most 2**31 - 1"),
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
            eos_id is None
            or _int(eos_id, 0, vocab - 1)
            or (isinstance(eos_id, list | tuple) and len(eos_id) > 0 and all(_int(i, 0, vocab - 1) for i in eos_id)),
            f"an id from 0 to {vocab - 1}, several in a list, or None",
        ),
        ("seed", seed, seed is None or _int(seed, 0, 2**63), "an int from 0 to 2**63, or None"),
    ]
    for name, value, fits, expected in rules:
        if not fits:
            raise ValueError(f"generate: `{name}` must be {expected}; got {short(value)}")


def _check_beams(
    num_beams: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float,
    stream: object,
    seed: int | None,
) -> None:
    if not _int(num_beams, 1, 1024):
        raise ValueError(f"generate: `num_beams` must be an int from 1 to 1024; got {short(num_beams)}")
    given = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "stream": stream, "seed": seed}
    given["temperature"] = None if temperature in (0, 1) else temperature
    given["repetition_penalty"] = None if repetition_penalty == 1 else repetition_penalty
    for name, value in given.items():
        if num_beams > 1 and value is not None:
            raise ValueError(f"generate: `num_beams`={num_beams} draws nothing and goes without `{name}`; leave it out")


def _int(value: object, low: int, high: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
