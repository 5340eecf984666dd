"""What :func:`ssmkernels.compat.mamba_ssm.ops.triton.ssd_combined.mamba_split_conv1d_scan_combined` does."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.compat.causal_conv1d import causal_conv1d_fn
from ssmkernels.compat.mamba_ssm import mamba_chunk_scan_combined
from ssmkernels.compat.mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
from ssmkernels.core.validate import check_options, check_shapes, precision


def split_scan(a: Any) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-2's layer from its first projection on: convolution, scan, gated norm, second projection."""
    arguments = {"zxbcdt": (a.zxbcdt, "b l all"), "A": (a.A, "h"), "D": (a.D, "h | h p")}
    sizes = check_shapes(a.op, arguments, ("zxbcdt", "A", "D"))
    headdim, h, groups = sizes.get("p", a.headdim), sizes["h"], a.ngroups
    check_options(a.op, "int or None", headdim=headdim)
    check_options(a.op, "int", ngroups=groups)
    if headdim is None:
        raise ValueError(f"{a.op}: `headdim` must be given where `D` is (h), which does not tell it; got None")
    d = h * headdim
    check_shapes(a.op, {**arguments, "conv1d_weight": (a.conv1d_weight, "inside w")}, ("zxbcdt", "conv1d_weight"))
    inside = a.conv1d_weight.shape[0]
    states, rest = divmod(inside - d, 2 * groups) if groups > 0 and h % groups == 0 else (0, 1)
    if rest or states < 1:
        raise ValueError(
            f"{a.op}: `conv1d_weight` must have {d} channels and then 2 · `ngroups` n, where `ngroups` divides the {h} "
            f"heads; got {inside} with `ngroups`={groups}"
        )
    beside, rest = divmod(sizes["all"] - d - inside - h, 2)  # an MLP beside the layer
    if rest or beside < 0:
        raise ValueError(
            f"{a.op}: `zxbcdt` must have {d} channels, then {inside}, then {h}, or an even number before those; got "
            f"{sizes['all']} in all"
        )
    weights = {
        "conv1d_bias": (a.conv1d_bias, "inside"),
        "rmsnorm_weight": (a.rmsnorm_weight, "d"),
        "outproj_weight": (a.outproj_weight, "o out"),
        "outproj_bias": (a.outproj_bias, "o"),
    }
    check_shapes(a.op, {**arguments, **weights}, ("zxbcdt",), inside=inside, d=d, out=beside + d)
    up, z, mixed, dt = a.zxbcdt.split([2 * beside, d, inside, h], dim=-1)
    convolved = causal_conv1d_fn(
        mixed.transpose(1, 2), a.conv1d_weight, a.conv1d_bias, seq_idx=a.seq_idx, activation=a.activation
    )
    assert isinstance(convolved, Tensor)
    x, B, C = convolved.transpose(1, 2).split([d, groups * states, groups * states], dim=-1)
    x, gate = (t.unflatten(-1, (h, headdim)) for t in (x, z))
    found = mamba_chunk_scan_combined(
        x,
        dt,
        a.A,
        B.unflatten(-1, (groups, states)),
        C.unflatten(-1, (groups, states)),
        a.chunk_size,
        a.D,
        gate if a.rmsnorm_weight is None else None,
        a.dt_bias,
        a.initial_states,
        a.seq_idx,
        dt_softplus=True,
        dt_limit=a.dt_limit,
        return_final_states=True,
    )
    y, last = found[0].flatten(-2), found[1]
    if a.rmsnorm_weight is not None:
        y = rmsnorm_fn(y, a.rmsnorm_weight, None, z, a.rmsnorm_eps, d // groups, a.norm_before_gate)
    if beside:
        one, other = up.chunk(2, dim=-1)
        y = torch.cat([(F.silu(one.to(precision(one))) * other).to(y.dtype), y], dim=-1)
    if a.outproj_weight is not None:
        bias = None if a.outproj_bias is None else a.outproj_bias.to(a.outproj_weight.dtype)
        y = F.linear(y.to(a.outproj_weight.dtype), a.outproj_weight, bias)
    return (y, last) if a.return_final_states else y
