"""Which options of attention go together, said before anything is built."""

from __future__ import annotations

from typing import Any

from torch import nn

from ssmzoo.mixers._heads import heads_of_width
from ssmzoo.norm import CentredRMSNorm, RMSNorm


def heads(d_model: int, head_dim: int, n_heads: int | None, n_kv_heads: int | None) -> tuple[int, int]:
    """Heads of the queries, and of keys and values.

    Raises:
        ValueError: they do not fit d_model or each other.
    """
    n_heads = heads_of_width("Attention", d_model, head_dim, n_heads)
    n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
    if n_heads % n_kv_heads:
        raise ValueError(
            f"Attention: `n_kv_heads` must divide the number of heads, {n_heads} (d_model={d_model}, "
            f"head_dim={head_dim}); got {n_kv_heads}"
        )
    return n_heads, n_kv_heads


def rotary_dim(
    rope: bool, rope_dim: int | None, rope_base: float, rope_scaling: dict[str, Any] | None, head_dim: int
) -> int | None:
    """How many channels of each head turn; None without a rotary embedding.

    Raises:
        ValueError: an odd number, one beyond the head, a base that is none, or options of what there is not.
    """
    if not rope:
        for name, value in (("rope_dim", rope_dim), ("rope_scaling", rope_scaling)):
            if value is not None:
                raise ValueError(f"Attention: `{name}` has no meaning with `rope` false; got {value}")
        return None
    if rope_base <= 1:
        raise ValueError(f"Attention: `rope_base` must be above 1; got {rope_base}")
    rope_dim = head_dim if rope_dim is None else rope_dim
    if rope_dim % 2 or not 2 <= rope_dim <= head_dim:
        raise ValueError(
            f"Attention: `rope_dim` must be even and at most head_dim={head_dim}, or `rope` false; got {rope_dim}"
        )
    return rope_dim


def norms_of(
    kind: bool | str, head_dim: int, n_heads: tuple[int, int], eps: float
) -> tuple[nn.Module | None, nn.Module | None]:
    """The norms of queries and of keys, of which there are ``n_heads`` each, that the option ``qk_norm`` asks for."""
    if not kind:
        return None, None
    if kind == "whole":
        return RMSNorm(n_heads[0] * head_dim, eps), RMSNorm(n_heads[1] * head_dim, eps)
    norm = CentredRMSNorm if kind == "centred" else RMSNorm
    return norm(head_dim, eps), norm(head_dim, eps)


def check_hidden(
    *, rope: bool, qk_norm: bool, d_conv: int, bidirectional: bool, bias: bool, sinks: bool, softcap: float
) -> None:
    """Whether keys are one linear map of the hidden states, so that these can be cached in their place.

    Raises:
        ValueError: naming the option that excludes it, and why.
    """
    for given, name, reason in (
        (rope, "rope", "it turns each key by its position, between the projection and the product; give rope=False"),
        (qk_norm, "qk_norm", "it divides each key by its own norm"),
        (d_conv > 0, "d_conv", "it mixes neighbouring keys and values"),
        (bidirectional, "bidirectional", "there is then no state"),
        (bias and sinks, "bias", "with `sinks` a key's bias does not cancel in the softmax"),
        (bias and softcap > 0, "bias", "with `softcap` a key's bias does not cancel in the softmax"),
    ):
        if given:
            raise ValueError(f"Attention: `cache` 'hidden' excludes `{name}`: {reason}")
