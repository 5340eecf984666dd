"""What of each mixer and MLP a process keeps: some of the heads, or some of the channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ssmzoo.mixers.attention import Attention
from ssmzoo.mixers.gated_deltanet import GatedDeltaNet
from ssmzoo.mixers.mamba import Mamba
from ssmzoo.mixers.mamba2 import Mamba2
from ssmzoo.mlp.dense import GEGLU, GELU, ReGLU, SquaredReLU, SwiGLU, TanhGEGLU, TanhGELU
from ssmzoo.parallel.tensor.share import Share
from ssmzoo.parallel.tensor.sums import SummedGatedRMSNorm

Plan = Callable[[Share, Any], None]


def attention(share: Share, m: Attention) -> None:
    """Heads of queries, with the keys and values that they meet."""
    _refuse(m, alibi=m.alibi, qk_norm="whole" if m.qk_norm == "whole" else None)
    q, kv = m.n_heads * m.head_dim, m.n_kv_heads * m.head_dim
    m.n_heads, m.n_kv_heads = share.of("heads of Attention", m.n_heads), share.of("`n_kv_heads`", m.n_kv_heads)
    for projection in (m.q_proj, m.k_proj, m.v_proj, m.gate_proj):
        share.outputs(projection)
    share.outputs(m.conv1d, (q, True), (kv, True), (kv, True))
    share.common(m.q_norm)
    share.common(m.k_norm)
    share.weight(m, "sinks")
    share.inputs(m, "out_proj")


def mamba(share: Share, m: Mamba) -> None:
    """Channels. What Δ, B and C are made of is a sum over all of them."""
    d = m.d_inner
    m.d_inner = share.of("channels of Mamba", d)
    share.outputs(m.in_proj, (d, True), (d, True))
    for norm in (m.dt_layernorm, m.b_layernorm, m.c_layernorm):
        share.common(norm)
    for way in ("", "_b") if m.bidirectional else ("",):
        share.outputs(m.get_submodule(f"conv1d{way}"))
        share.inputs(m, f"x_proj{way}", own=True)
        share.outputs(m.get_submodule(f"dt_proj{way}"))
        share.weight(m, f"A{way}_log")
        share.weight(m, f"D{way}")
    share.inputs(m, "out_proj")


def mamba2(share: Share, m: Mamba2) -> None:
    """Heads. Where they have one group, every process has its B and C."""
    _refuse(m, multipliers=m.scale)
    if m.ngroups % share.ranks and m.ngroups > 1:
        raise ValueError(
            f"`parallel.tensor` must divide Mamba2's {m.ngroups} `ngroups`, or these be 1; got {share.ranks}"
        )
    d, h, mlp, maps = m.d_ssm, m.n_heads, m.d_inner - m.d_ssm, m.ngroups * m.d_state
    grouped = m.ngroups % share.ranks == 0
    conv = ((d, True), (maps, grouped), (maps, grouped))
    share.outputs(m.in_proj, (mlp, True), (mlp, True), (d, True), *conv, (h, True))
    for way, log in (("", "A_log"), ("_b", "A_b_log")) if m.bidirectional else (("", "A_log"),):
        share.outputs(m.get_submodule(f"conv1d{way}"), *conv)
        for name in (f"dt_bias{way}", log, f"D{way}"):
            share.weight(m, name)
    if m.norm is not None:
        _norm(share, m, d)
    share.inputs(m, "out_proj", (mlp, True), (d, True))
    m.n_heads, m.d_ssm, m.d_inner = share.of("heads of Mamba2", h), d // share.ranks, m.d_inner // share.ranks
    m.ngroups = m.ngroups // share.ranks if grouped else m.ngroups
    m.d_conv_channels = m.d_ssm + 2 * m.ngroups * m.d_state
    m.splits = [mlp // share.ranks, mlp // share.ranks, m.d_ssm, m.d_conv_channels, m.n_heads]


def _norm(share: Share, m: Mamba2, d: int) -> None:
    """The norm before the output, over groups of channels: whole ones here, or one over all processes."""
    norm = m.norm
    assert norm is not None
    if m.norm_groups % share.ranks == 0:
        share.weight(norm, "weight")
        m.norm_groups //= share.ranks
    elif m.norm_groups == 1:
        share.weight(norm, "weight")
        summed = SummedGatedRMSNorm(norm.weight, d, norm.eps, norm.norm_before_gate, share.group)
        share.layouts[summed, "weight"] = share.layouts.pop((norm, "weight"))
        m.norm = summed  # type: ignore[assignment]
    else:
        raise ValueError(
            f"`parallel.tensor` must divide Mamba2's {m.norm_groups} `norm_groups`, or these be 1; got {share.ranks}"
        )


def gated_deltanet(share: Share, m: GatedDeltaNet) -> None:
    """Heads of values, with the queries and keys that they share."""
    m.n_heads = share.of("heads of GatedDeltaNet", m.n_heads)
    m.n_v_heads = share.of("`n_v_heads`", m.n_v_heads)
    m.widths = tuple(width // share.ranks for width in m.widths)  # type: ignore[assignment]
    convs = (m.q_conv1d, m.k_conv1d, m.v_conv1d) if m.use_short_conv else ()
    for module in (m.q_proj, m.k_proj, m.v_proj, m.b_proj, m.a_proj, m.g_proj, *convs):
        share.outputs(module)
    share.weight(m, "A_log")
    share.weight(m, "dt_bias")
    share.common(m.o_norm)
    share.inputs(m, "o_proj")


def gated_mlp(share: Share, m: Any) -> None:
    """Channels inside, with their gates."""
    inside = m.fc2.in_features
    share.outputs(m.fc1, (inside, True), (inside, True))
    share.inputs(m, "fc2")


def plain_mlp(share: Share, m: Any) -> None:
    """Channels inside."""
    share.outputs(m.fc1)
    share.inputs(m, "fc2")


PLANS: dict[type[nn.Module], Plan] = {
    Attention: attention,
    Mamba: mamba,
    Mamba2: mamba2,
    GatedDeltaNet: gated_deltanet,
    **dict.fromkeys((SwiGLU, GEGLU, TanhGEGLU, ReGLU), gated_mlp),
    **dict.fromkeys((GELU, TanhGELU, SquaredReLU), plain_mlp),
}


def plan_of(layer: nn.Module) -> Plan:
    """The plan of a mixer or MLP.

    Raises:
        ValueError: it has none; names it and those that have one.
    """
    if type(layer) not in PLANS:
        known = ", ".join(kind.__name__ for kind in PLANS)
        raise ValueError(
            f"`parallel.tensor` must be 1 for a model with {type(layer).__name__}; only {known} can be shared out"
        )
    return PLANS[type(layer)]


def _refuse(mixer: nn.Module, **options: Any) -> None:
    """Raises ValueError for an option that is set."""
    for name, value in options.items():
        if value:
            raise ValueError(
                f"`parallel.tensor` must be 1 for a model with {type(mixer).__name__} and its option `{name}`, which "
                "cannot be shared out"
            )
