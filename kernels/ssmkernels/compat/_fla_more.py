"""What the functions of :mod:`ssmkernels.compat.fla.ops` do whose arguments have other names."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels import attention, generalized_delta_rule, linear_attention, linear_recurrence
from ssmkernels.compat._dtypes import beside, int32_borders, together
from ssmkernels.compat._fla import Found, recalled, refuse
from ssmkernels.core.validate import REAL, check_dtypes, check_options, check_shapes, precision


def _checked(a: Any, shapes: dict[str, str], *optional: str) -> list[Any]:
    """The arguments of these names, once their kinds and shapes are checked."""
    given = {name: getattr(a, name) for name in shapes}
    required = [name for name in shapes if name not in optional]
    check_shapes(a.op, {name: (given[name], shape) for name, shape in shapes.items()}, required)
    check_dtypes(a.op, given, REAL)
    check_options(a.op, "bool", output_final_state=getattr(a, "output_final_state", False))
    refuse(a)
    return list(given.values())


def generalized(a: Any) -> Found:
    """The delta rule with directions of its own, with a decay for each key channel or without."""
    query = "r" if hasattr(a, "r") else "q"
    shapes = {query: "b l h k", "k": "b l h k", "v": "b l h v", "initial_state": "s h k v"}
    other = "kk" if hasattr(a, "kk") else "b"
    decay = next((name for name in ("w", "gk") if hasattr(a, name)), None)
    shapes |= {name: "b l h k" for name in ("a", other, decay) if name is not None}
    _checked(a, shapes, "initial_state")
    dtype = together(getattr(a, query), a.k, a.v, a.a, getattr(a, other))
    q, k, v, read, write = (getattr(a, name).to(dtype) for name in (query, "k", "v", "a", other))
    if other == "kk":  # the direction κ̂, and the rate at which it is learned
        read, write = -write, read * write
    log_decay = None if decay is None else getattr(a, decay).to(precision(q))
    return recalled(a, generalized_delta_rule, q, k, v, log_decay, a=read, b=write)


def with_bonus(a: Any) -> Found:
    """RWKV-6's: a decay for each key channel, and a bonus for the token itself."""
    shapes = {"r": "b l h k", "k": "b l h k", "v": "b l h v", "w": "b l h k", "u": "h k", "initial_state": "s h k v"}
    _checked(a, shapes, "initial_state")
    dtype = together(a.r, a.k, a.v)
    r, k, v = (t.to(dtype) for t in (a.r, a.k, a.v))
    return recalled(a, linear_attention, r, k, v, a.w.to(precision(r)), bonus=beside(a.u, r))


def lightning(a: Any) -> Found:
    """A decay for each head, which depends on the layer."""
    _checked(a, {"q": "b l h k", "k": "b l h k", "v": "b l h v", "initial_state": "s h k v"}, "initial_state")
    check_options(a.op, "int", layer_idx=a.layer_idx, num_layers=a.num_layers)
    if not 0 <= a.layer_idx < a.num_layers:
        raise ValueError(f"{a.op}: `layer_idx` must be from 0 to {a.num_layers - 1}; got {a.layer_idx}")
    dtype = together(a.q, a.k, a.v)
    q, k, v = (t.to(dtype) for t in (a.q, a.k, a.v))
    h = q.shape[2]
    steps = torch.arange(h, device=q.device, dtype=precision(q))
    return recalled(a, linear_attention, q, k, v, -8 / max(1, h) * (1 - a.layer_idx / a.num_layers) * steps)


def gated(a: Any) -> tuple[Tensor, Tensor | None]:
    """HGRN's: h_t = exp(g_t) h_{t-1} + x_t."""
    _checked(a, {"x": "b l d", "g": "b l d", "initial_state": "s d"}, "initial_state")
    wide = precision(a.x, a.g)
    borders = getattr(a, "cu_seqlens", None)
    h, last = linear_recurrence(
        a.g.to(wide),
        a.x.to(wide),
        log_a=True,
        initial_state=None if a.initial_state is None else a.initial_state.to(wide),
        return_final_state=True,
        cu_seqlens=None if borders is None else int32_borders(a.op, borders, a.x.shape[1]),
        implementation=a.implementation,
    )
    return h.to(a.x.dtype), last if a.output_final_state else None


def softmax(a: Any) -> Tensor:
    """Causal attention, whose logits may decay by g of all tokens after the key, that of the query included."""
    shapes = {"q": "b l h k", "k": "b l h_kv k", "v": "b l h_kv v", "g": "b l h"}
    if hasattr(a, "sink_bias"):  # the op that has sinks can do without decays
        _checked(a, shapes | {"sink_bias": "h"}, "g", "sink_bias")
    else:
        _checked(a, shapes)
    sinks = getattr(a, "sink_bias", None)
    if a.window_size is not None:
        check_options(a.op, "int", window_size=a.window_size)
        if a.window_size < 0:
            raise ValueError(f"{a.op}: `window_size` must be 0 or more, or None for all keys; got {a.window_size}")
        if a.window_size == 0:  # as a bound of attention it would be none
            return _of_nothing(a)
    borders = None if a.cu_seqlens is None else int32_borders(a.op, a.cu_seqlens, a.q.shape[1])
    q, k, v, scale = a.q, a.k, a.v, a.scale
    if a.g is not None:
        q, k, scale = *_decaying(a, borders), 1.0
        v = v.to(q.dtype)
    found = attention(
        q,
        k,
        v,
        causal=True,
        window=None if a.window_size is None else (a.window_size - 1, 0),
        scale=scale,
        sinks=beside(sinks, q),
        cu_seqlens=borders,
        implementation=a.implementation,
    )
    assert isinstance(found, Tensor)
    return found.to(a.q.dtype)


def _decaying(a: Any, borders: Tensor | None) -> tuple[Tensor, Tensor]:
    """Queries and keys whose products are the logits, decays included: these are differences of sums over time.

    A query has its head's sum beside a one for its place among the heads that share keys; the keys have a one, and the
    negative sum for each of these places. All of it is at least float32, as the package's own sums are.
    """
    (heads, size), shared = a.q.shape[2:], a.k.shape[2]
    if shared == 0 or heads % shared:
        raise ValueError(f"{a.op}: `q` must have a multiple of `k`'s {shared} heads; got {heads}")
    check_options(a.op, "number or None", scale=a.scale)
    wide = precision(a.q, a.k, a.v)
    total = a.g.double().cumsum(1)
    if borders is not None:  # each sequence sums from its own start
        before = F.pad(total, (0, 0, 1, 0))[:, borders[:-1].long()]
        total = total - before.repeat_interleave(borders.diff().long(), 1)
    total = total.to(wide)
    place = torch.eye(heads // shared, dtype=wide, device=a.q.device).repeat(shared, 1).expand(*total.shape, -1)
    q = a.q.to(wide) * (max(1, size) ** -0.5 if a.scale is None else a.scale)
    k = a.k.to(wide)
    q = torch.cat([q, total[..., None], place], -1)
    return q, torch.cat([k, torch.ones_like(total[:, :, :shared, None]), -total.unflatten(2, (shared, -1))], -1)


def _of_nothing(a: Any) -> Tensor:
    """What queries that see no key get: zeros, and so are their gradients."""
    given = (a.q, a.k, a.v, a.g, getattr(a, "sink_bias", None))
    zero = sum(t.flatten()[:0].sum(dtype=a.q.dtype) for t in given if t is not None)
    return a.q.new_zeros(*a.q.shape[:3], a.v.shape[-1]) + zero
