"""What the functions of :mod:`ssmkernels.compat.fla` do: the package's options into arguments of our ops."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels import delta_rule, delta_rule_step, linear_attention, linear_attention_step, rms_norm
from ssmkernels.compat._dtypes import int32_borders, together
from ssmkernels.core.validate import REAL, check_dtypes, check_options, check_shapes, precision
from ssmkernels.core.written import gradient_wanted

FLAGS = (
    "output_final_state",
    "use_qk_l2norm_in_kernel",
    "use_gate_in_kernel",
    "use_beta_sigmoid_in_kernel",
    "allow_neg_eigval",
    "state_v_first",
    "reverse",
    "normalize",
)
Found = tuple[Tensor, Any]
STEPS: dict[Any, Any] = {delta_rule: delta_rule_step, linear_attention: linear_attention_step}


def delta(a: Any) -> Found:
    """The delta rules: β alone, with one decay a head, or with one for each key channel."""
    per_channel = a.op.endswith("kda")
    decay = "b l h k" if per_channel else "b l h"
    _check(a, {"beta": (a.beta, "b l h"), "g": (_of(a, "g"), decay), "gk": (_of(a, "gk"), "b l h k")})
    _check_gate(a, per_channel)
    dtype = together(a.q, a.k, a.v, a.beta if a.beta is not None and a.beta.dtype == torch.float64 else None)
    q, k, v = (t.to(dtype) for t in (a.q, a.k, a.v))
    if a.use_qk_l2norm_in_kernel:
        q, k = (_l2_normalised(t, a.implementation) for t in (q, k))
    beta = v.new_ones(v.shape[:3]) if a.beta is None else a.beta
    if _of(a, "use_beta_sigmoid_in_kernel"):
        beta = torch.sigmoid(beta.to(precision(beta))) * (2 if a.allow_neg_eigval else 1)
    return recalled(a, delta_rule, q, k, v, _decay(a, per_channel, precision(q)), beta=beta.to(dtype))


def linear(a: Any) -> Found:
    """Linear attention with the decays that the op knows."""
    _check(
        a,
        {
            "g": (_of(a, "g"), "b l h k" if a.op == "chunk_gla" else "b l h"),
            "gk": (_of(a, "gk"), "b l h k"),
            "g_gamma": (_of(a, "g_gamma"), "h"),
        },
    )
    dtype = together(a.q, a.k, a.v)
    q, k, v = (t.to(dtype) for t in (a.q, a.k, a.v))
    wide, decay = precision(q), None
    if a.op.endswith("retention"):
        decay = torch.log1p(-(2.0 ** -(5 + torch.arange(v.shape[2], device=v.device, dtype=wide))))
    for name in ("g", "gk"):
        decay = decay if _of(a, name) is None else _of(a, name).to(wide)
    if _of(a, "g_gamma") is not None:
        decay = a.g_gamma.to(wide) if decay is None else decay + a.g_gamma.to(wide)
    if not _of(a, "normalize"):
        return recalled(a, linear_attention, q, k, v, decay)
    state, total = a.initial_state if isinstance(a.initial_state, tuple) else (a.initial_state, None)
    o, state = recalled(a._replace(initial_state=state), linear_attention, q, k, v, None)
    # The sum of keys so far is the state for values that are all 1.
    total = None if total is None else total.transpose(1, 2).mT  # (s 1 h k) → (s h k 1)
    ones = v.new_ones(*v.shape[:2], k.shape[2], 1)
    sums, total = recalled(a._replace(initial_state=total), linear_attention, q, k, ones, None)
    o = o / (sums.to(o.dtype) + 1e-10).repeat_interleave(v.shape[2] // k.shape[2], dim=2)
    if state is None or total is None:
        return o, None
    return o, (state, total.mT.transpose(1, 2))


def _of(a: Any, name: str) -> Any:
    return getattr(a, name, None)


def _check(a: Any, others: dict[str, tuple[Any, str]]) -> None:
    state = "s h v k" if _of(a, "state_v_first") else "s h k v"
    names = {"q": (a.q, "b l g k"), "k": (a.k, "b l g k"), "v": (a.v, "b l h v")}
    given = {name: pair for name, pair in others.items() if hasattr(a, name)}
    states = {"initial_state": (a.initial_state, state)}
    if isinstance(a.initial_state, tuple) and _of(a, "normalize"):
        if len(a.initial_state) != 2:
            raise ValueError(f"{a.op}: `initial_state` must be (state, sum of keys); got {len(a.initial_state)} things")
        matrix, sums = a.initial_state
        states = {"initial_state[0]": (matrix, state), "initial_state[1]": (sums, "s 1 g k")}
    check_shapes(a.op, {**names, **given, **states}, ("q", "k", "v"))
    numbers = {name: value for name, (value, _) in {**names, **given, **states}.items()}
    check_dtypes(a.op, {**numbers, "A_log": _of(a, "A_log"), "dt_bias": _of(a, "dt_bias")}, REAL)
    check_options(a.op, "bool", **{name: getattr(a, name) for name in FLAGS if hasattr(a, name)})
    refuse(a)


def refuse(a: Any) -> None:
    """Refuses options that none of our ops has.

    Raises:
        ValueError: naming the first of them.
    """
    for name, why in (
        ("gv", "decays of values"),
        ("cp_context", "sequences that are cut over processes"),
        ("reverse", "sequences from their end"),
        ("output_attentions", "weights of attention"),
    ):
        found = _of(a, name)
        if found is not None and found is not False:
            raise ValueError(f"{a.op}: `{name}`: {why} are not supported; leave it away")


def _check_gate(a: Any, per_channel: bool) -> None:
    if not _of(a, "use_gate_in_kernel"):
        return
    if _of(a, "A_log") is None and _of(a, "lower_bound") is None:
        raise ValueError(f"{a.op}: `use_gate_in_kernel` needs `A_log`, or `lower_bound` without it; got neither")
    width = a.q.shape[3] if per_channel else 1
    heads = a.v.shape[2]
    for name, numbers in (("A_log", heads), ("dt_bias", heads * width)):
        found = _of(a, name)
        if found is not None and found.numel() != numbers:
            raise ValueError(f"{a.op}: `{name}` must have {numbers} numbers; got shape {tuple(found.shape)}")


def _decay(a: Any, per_channel: bool, wide: torch.dtype) -> Tensor | None:
    """Logarithms of the decay, in the precision of sums."""
    g, gk = _of(a, "g"), _of(a, "gk")
    if g is not None:
        g = g.to(wide)
        if _of(a, "use_gate_in_kernel"):
            g = _gated(a, g, per_channel)
    if gk is None:
        return g
    return gk.to(wide) if g is None else gk.to(wide) + g[..., None]


def _gated(a: Any, g: Tensor, per_channel: bool) -> Tensor:
    shape = g.shape[2:]
    if _of(a, "dt_bias") is not None:
        g = g + a.dt_bias.to(g.dtype).reshape(shape)
    rate = g.new_ones(()) if _of(a, "A_log") is None else torch.exp(a.A_log.to(g.dtype).flatten())
    rate = rate[:, None] if per_channel and rate.ndim else rate
    if _of(a, "lower_bound") is not None:
        return a.lower_bound * torch.sigmoid(rate * g)
    return -rate * F.softplus(g, threshold=40)


def _l2_normalised(x: Tensor, implementation: str | None) -> Tensor:
    """x / √(Σ x² + 1e-6) over the last axis, which is a root mean square norm with other constants."""
    k = x.shape[-1]
    if x.shape[1] == 1 and implementation is None:  # few operations cost less than a call of an op
        wide = x.to(precision(x))
        return (wide * torch.rsqrt((wide * wide).sum(-1, keepdim=True) + 1e-6)).to(x.dtype)
    found: Any = rms_norm(x, x.new_full((k,), k**-0.5), eps=1e-6 / k, implementation=implementation)
    return found


def _is_step(a: Any, op: Any, q: Tensor, *others: Tensor | None) -> bool:
    """Whether a call is one token after a state, which an op's step reads and writes once."""
    plain = a.initial_state is not None and a.cu_seqlens is None and a.implementation is None
    return plain and op in STEPS and q.shape[1] == 1 and gradient_wanted((a.initial_state, q, *others)) is None


def _borders(a: Any) -> Tensor | None:
    return None if a.cu_seqlens is None else int32_borders(a.op, a.cu_seqlens, a.v.shape[1])


def recalled(a: Any, op: Any, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, /, **others: Tensor) -> Found:
    """A call of one of our ops, from the state that came in to the one that goes out."""
    state = a.initial_state
    swapped = _of(a, "state_v_first")
    if state is not None and swapped:
        state = state.mT
    if _is_step(a, op, q, k, v, decay, *others.values()):
        last = state.to(precision(q), copy=True, memory_format=torch.contiguous_format)
        of_time = {"q": q, "k": k, "v": v, **{name: t for name, t in others.items() if name != "bonus"}}
        given = others | {name: t[:, 0] for name, t in of_time.items()}
        decay = decay if decay is None or decay.ndim == 1 else decay[:, 0]
        o = STEPS[op](last, **given, log_decay=decay, scale=a.scale)[:, None]
    else:
        o, last = op(
            q,
            k,
            v,
            **others,
            log_decay=decay,
            scale=a.scale,
            initial_state=None if state is None else state.to(precision(q)),
            return_final_state=True,
            cu_seqlens=_borders(a),
            implementation=a.implementation,
        )
    return o.to(a.v.dtype), (last.mT.contiguous() if swapped else last) if a.output_final_state else None
