"""Our functions, by the packages and names that transformers looks for, and called as it calls them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ssmkernels import selective_scan
from ssmkernels.compat import causal_conv1d, fla, mamba_ssm
from ssmkernels.compat.sequences import packed, placed, runs
from ssmkernels.core.binding import Binder
from ssmzoo.integrations.transformers.scope import current


@dataclasses.dataclass(frozen=True)
class Supplied:
    """A function of ours for one of theirs.

    Attributes:
        runs: what does the work, for people.
    """

    call: Callable[..., Any]
    runs: str


def causal_conv1d_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, seq_idx: Tensor | None = None, activation: str | None = None
) -> Any:
    seq_idx = current().seq_idx if seq_idx is None else seq_idx
    fused = activation in (None, "silu", "swish")
    y: Any = causal_conv1d.causal_conv1d_fn(x, weight, bias, seq_idx, activation=activation if fused else None)
    return y if fused else _activated(y, activation)


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    fused = activation in (None, "silu", "swish")
    y = causal_conv1d.causal_conv1d_update(x, conv_state, weight, bias, activation if fused else None)
    return y if fused else _activated(y, activation)


def _activated(y: Tensor, activation: str | None) -> Tensor:
    from transformers.activations import ACT2FN

    found: Tensor = ACT2FN[activation](y)
    return found


_bind_scan = Binder(inspect.signature(mamba_ssm.selective_scan_fn))


@functools.wraps(mamba_ssm.selective_scan_fn, assigned=())  # the signature alone
def selective_scan_fn(*args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, Tensor]:
    """Goes on from the state, and keeps to the sequences, of the layer that calls it."""
    scope = current()
    state = scope.next_state()
    if state is None and scope.seq_idx is None:
        return mamba_ssm.selective_scan_fn(*args, **kwargs)
    given = _bind_scan(args, kwargs)
    x, delta, B, C = (given[name].transpose(1, 2) for name in ("u", "delta", "B", "C"))  # (b l d), (b l n)
    z = None if given["z"] is None else given["z"].transpose(1, 2)
    shape, run, cu_seqlens = x.shape, None, None
    state = None if state is None else state.to(given["A"].dtype)
    if scope.seq_idx is not None:
        run, cu_seqlens = runs("selective_scan_fn", scope.seq_idx)
        state = placed(state, run, len(cu_seqlens) - 1)
        x, delta, B, C, z = (packed(t) for t in (x, delta, B, C, z))
    y, last = selective_scan(
        x,
        delta.to(x.dtype),
        given["A"],
        B.to(x.dtype),
        C.to(x.dtype),
        given["D"],
        z,
        given["delta_bias"],
        given["delta_softplus"],
        initial_state=state,
        return_final_state=True,
        cu_seqlens=cu_seqlens,
    )
    y = y.view(shape).transpose(1, 2)
    if not given["return_last_state"]:
        return y
    return y, last if run is None else last[run[:, -1]]


def unfused(*args: Any, **kwargs: Any) -> None:
    """Has the layer go through its own steps, each of which is one of our functions.

    mamba_ssm's fused functions are as fast and change results: ``mamba_inner_fn`` norms Δ after its projection, where
    transformers norms it before, and ``mamba_split_conv1d_scan_combined`` always gates before the norm.
    """


_FUNCTIONS = {
    ("causal_conv1d", "causal_conv1d_fn"): Supplied(causal_conv1d_fn, "ssmkernels.causal_conv1d"),
    ("causal_conv1d", "causal_conv1d_update"): Supplied(causal_conv1d_update, "ssmkernels.causal_conv1d_step"),
    ("mamba_ssm", "selective_scan_fn"): Supplied(selective_scan_fn, "ssmkernels.selective_scan"),
    ("mamba_ssm", "selective_state_update"): Supplied(
        mamba_ssm.selective_state_update, "ssmkernels.selective_scan_step"
    ),
    ("mamba_ssm", "mamba_chunk_scan_combined"): Supplied(mamba_ssm.mamba_chunk_scan_combined, "ssmkernels.ssd"),
    ("fla", "chunk_gated_delta_rule"): Supplied(fla.chunk_gated_delta_rule, "ssmkernels.delta_rule"),
    ("fla", "fused_recurrent_gated_delta_rule"): Supplied(
        fla.fused_recurrent_gated_delta_rule, "ssmkernels.delta_rule"
    ),
    ("fla", "chunk_kda"): Supplied(fla.chunk_kda, "ssmkernels.delta_rule"),
    ("fla", "fused_recurrent_kda"): Supplied(fla.fused_recurrent_kda, "ssmkernels.delta_rule"),
    ("mamba_ssm", "mamba_inner_fn"): Supplied(unfused, "the layer's steps, one by one"),
    ("mamba_ssm", "mamba_split_conv1d_scan_combined"): Supplied(unfused, "the layer's steps, one by one"),
}
# Mamba-2 and its hybrids have one decay a head, which selective_state_update recognises.
_OF_HEADS = Supplied(mamba_ssm.selective_state_update, "ssmkernels.ssd_step")


def supplied(package: str, function: str, of_heads: bool = False) -> Supplied | None:
    """Ours, or None where there is none; ``of_heads`` for families of Mamba-2."""
    if of_heads and function == "selective_state_update":
        return _OF_HEADS
    return _FUNCTIONS.get((package, function))
