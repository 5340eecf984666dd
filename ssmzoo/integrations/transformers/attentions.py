"""Causal attention of long sequences in transformers' layers, which our kernel computes sooner than PyTorch's."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ssmkernels import attention
from ssmkernels.native import eager
from ssmzoo.integrations.transformers.layers import Function

FEW = 2**9  # tokens below which PyTorch's own takes about as long, with gradients

OPTIONS = ("cache", "position_bias", "s_aux", "softcap")  # of transformers, which it computes, refuses or passes over

# The families with layers of attention, which look it up by the name in their config
FAMILIES = frozenset(
    {"bailing_hybrid", "bamba", "falcon_h1", "glm5_next", "granitemoehybrid", "inkling", "inkling2", "inkling2_loop"}
    | {"jamba", "kimi_linear", "lara_mini", "lfm2", "lfm2_moe", "lfm3", "minimax", "nemotron_h", "olmo_hybrid"}
    | {"qwen3_5", "qwen3_5_moe", "qwen3_next", "qwen4_exp", "recurrent_gemma", "zamba", "zamba2"}
)


def interfaces(original: Any) -> Any:
    """transformers' table of attention functions, with ours in the place of PyTorch's."""
    return _Interfaces(original)


class _Interfaces:
    def __init__(self, own: Any):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        self._own, self._slow = own, sdpa_attention_forward
        self._fast = functools.partial(causal, sdpa_attention_forward)

    def get_interface(self, name: str, default: Function) -> Function:
        found: Function = self._own.get_interface(name, default)
        return self._fast if found is self._slow else found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def __getitem__(self, name: str) -> Function:
        found: Function = self._own[name]
        return found

    def __setitem__(self, name: str, function: Function) -> None:
        self._own[name] = function

    def __delitem__(self, name: str) -> None:
        del self._own[name]

    def __contains__(self, name: object) -> bool:
        return name in self._own

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)


def causal(
    original: Function,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of ``(b, h, l, d)``, ``(b, l, h, d)``; transformers' own where masks or anything else is asked for."""
    one_way = getattr(module, "is_causal", True) if is_causal is None else is_causal
    asked = any(kwargs.get(name) is not None for name in OPTIONS) or kwargs.get("output_attentions")
    plain = attention_mask is None and not dropout and not asked
    if plain and one_way is True and _ours(query, key, value):
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        y = attention(q, k, v, causal=True, scale=scaling, implementation="cpu")
        assert isinstance(y, Tensor)
        return y, None
    found: tuple[Tensor, None] = original(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
    return found


def _ours(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether our kernel gives the same numbers, and sooner.

    Where a cache holds more keys than there are queries, PyTorch's counts them from the first. It also shares keys
    among the sequences of a batch.
    """
    return (
        eager.float32(query, key, value)
        and 0 not in (*query.shape, *value.shape)
        and query.shape[2] == key.shape[2] >= FEW
        and (query.shape[0], query.shape[3]) == (key.shape[0], key.shape[3])
        and key.shape[:3] == value.shape[:3]
        and query.shape[1] % key.shape[1] == 0
        and eager.reachable(query=query, key=key, value=value)
    )
