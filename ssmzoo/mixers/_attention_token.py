"""The native calls of attention's token, for :meth:`ssmzoo.mixers.attention.Attention.prepare_step`."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkernels.core.validate import precision
from ssmkernels.native.calls import Calls
from ssmkernels.ops.decode_attention.token import attend
from ssmzoo.cache import Cache
from ssmzoo.linear import prepare_map
from ssmzoo.mixers._hidden_attention import HiddenAttention
from ssmzoo.mixers._rope import frequencies
from ssmzoo.norm import prepare_norm


def prepare_token(mixer: HiddenAttention, calls: Calls, x: Tensor, cache: Cache) -> Tensor | None:
    """Adds the calls for one token of each sequence, x ``(b, d_model)`` → ``(b, d_model)``.

    Returns:
        The result, or None where positions are scaled by the length, or with an amplitude.

    Raises:
        ValueError: the cache is one of other heads.
    """
    scaling, logits, wide = mixer.scaling, mixer.logits, precision(x)
    if scaling is not None and (scaling.by_length or scaling.amplitude != 1):
        return None
    q, k, v = (prepare_map(calls, module, x) for module in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    if mixer.qk_norm == "whole":
        q, k = prepare_norm(calls, mixer.q_norm, q), prepare_norm(calls, mixer.k_norm, k)
    q, k, v = (t.unflatten(-1, (-1, mixer.head_dim)) for t in (q, k, v))
    if mixer.qk_norm and mixer.qk_norm != "whole":
        q, k = prepare_norm(calls, mixer.q_norm, q), prepare_norm(calls, mixer.k_norm, k)
    cache.check_heads(k, v)
    frequency = None
    if mixer.rope_dim is not None:
        frequency = frequencies(mixer.rope_dim, mixer.rope_base, wide, x.device)
        if scaling is not None:
            frequency = scaling.scale(frequency, mixer.rope_base, torch.zeros((), dtype=torch.int32))
    sinks = logits.sinks
    if sinks is not None and sinks.dtype != wide:
        sinks = calls.widened(sinks)
    out = attend(
        calls,
        q,
        k,
        v,
        frequency=frequency,
        left=-1 if logits.window is None else logits.window[0],
        scale=logits.scale,
        softcap=logits.softcap,
        slopes=None if logits.alibi_slopes is None else logits.alibi_slopes.to(wide),
        sinks=sinks,
    )
    if mixer.gate_proj is not None:
        gate = prepare_map(calls, mixer.gate_proj, x)
        if gate.shape[1] == mixer.n_heads:  # one for all channels of a head
            gates = calls.activated(gate, "sigmoid").view(-1, 1)
            out = calls.activated(out.flatten(0, 1), factor=gates).view_as(out)
        else:
            out = calls.activated(gate, "sigmoid", factor=out.flatten(1))
    return prepare_map(calls, mixer.out_proj, out.flatten(1))
