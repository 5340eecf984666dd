"""Arguments of ``generate``: what a model must be, and prompts as one padded batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ssmzoo.config import ModelConfig
from ssmzoo.mixer import Mixer
from ssmzoo.plain import is_finite, short
from ssmzoo.state import State


class TokenModel(Protocol):
    """What generation asks of a model; :class:`~ssmzoo.SequenceModel` has it."""

    config: ModelConfig

    @property
    def device(self) -> torch.device: ...

    def initial_state(self, batch_size: int, max_length: int | None = None) -> State: ...

    def __call__(self, inputs: Tensor, state: Any = None, **options: Any) -> Any: ...


def check_model(model: TokenModel, argument: str = "model", caller: str = "generate") -> None:
    """Refuses a model that cannot continue token ids, saying why; calls it ``argument`` of what was called."""
    if not isinstance(model, nn.Module) or not isinstance(getattr(model, "config", None), ModelConfig):
        raise TypeError(f"{caller}: `{argument}` must be a SequenceModel; got {type(model).__name__}")
    config = model.config
    if config.output != "tokens" or config.d_input is not None:
        into = "features" if config.d_input is not None else "tokens"
        raise ValueError(
            f"{caller}: `{argument}` must go from tokens to tokens; this one goes from {into} to {config.output}"
        )
    for name, module in model.named_modules():
        if isinstance(module, Mixer) and not (module.causal and module.has_state):
            why = "has no state" if module.causal else "is bidirectional"
            raise ValueError(f"{caller}: every mixer of `{argument}` must be causal and have a state; {name} {why}")


def check_draft(draft: Any, count: object, model: TokenModel, caller: str = "generate") -> None:
    """Refuses what cannot propose tokens to the model, saying why; None proposes none."""
    require(is_int(count, 1, 64), "draft_tokens", count, "an int from 1 to 64", caller)
    if draft is None or (isinstance(draft, str) and draft == "lookup"):
        return
    if not isinstance(draft, nn.Module):
        raise TypeError(f"{caller}: `draft` must be a SequenceModel or 'lookup'; got {short(draft)}")
    check_model(draft, "draft", caller)  # type: ignore[arg-type]
    sizes = [each.config.vocab_size for each in (draft, model)]  # type: ignore[union-attr]
    if sizes[0] != sizes[1]:
        raise ValueError(f"{caller}: `draft` must have the model's vocabulary of {sizes[1]} ids; got {sizes[0]}")
    if draft.device != model.device:
        raise ValueError(f"{caller}: `draft` must be on {model.device}, as the model; got {draft.device}")


def check_alone(prompts: Tensor, mask: Tensor | None, num_beams: int) -> None:
    """Refuses what goes with no draft."""
    for name, given in (("num_beams", num_beams > 1), ("mask", mask is not None)):
        if given:
            raise ValueError(f"generate: `draft` goes without `{name}`; leave one of them out")
    if len(prompts) != 1:
        raise ValueError(f"generate: `draft` goes with one prompt at a time; got {len(prompts)} in `ids`")


def require(fits: bool, name: str, value: object, expected: str, caller: str = "generate") -> None:
    """Raises ValueError, naming what was called and the argument, unless it fits."""
    if not fits:
        raise ValueError(f"{caller}: `{name}` must be {expected}; got {short(value)}")


def is_int(value: object, low: int, high: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: object) -> bool:
    """Whether a value is a number that float64 holds; an int may be larger."""
    return isinstance(value, int | float) and not isinstance(value, bool) and is_finite(value)


def ends_of(eos_id: int | Sequence[int] | None, vocab: int) -> tuple[int, ...]:
    """The ids that end a row."""
    ends = () if eos_id is None else tuple(eos_id) if isinstance(eos_id, list | tuple) else (eos_id,)
    fits = all(is_int(token, 0, vocab - 1) for token in ends) and (bool(ends) or eos_id is None)
    require(fits, "eos_id", eos_id, f"an id from 0 to {vocab - 1}, several in a list, or None")
    return ends


def prompts_of(
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
