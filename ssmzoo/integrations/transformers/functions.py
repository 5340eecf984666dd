"""Our functions, by the packages and names that transformers looks for, and called as it calls them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
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
        state: of a function for single tokens that is in ``FEW``, the position and name of the argument with the state.
    """

    call: Callable[..., Any]
    runs: str
    state: tuple[int, str] | None = None

    def over(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """What takes the place of transformers' ``own``."""
        return self.call if self.state is None else _but_for_few(self.call, own, *self.state)


# Numbers in a state up to which transformers' own operations take less time for a token than a call of one of our ops.
FEW = {
    "selective_state_update": 2**15,
    "fused_recurrent_gated_delta_rule": 2**18,
    "fused_recurrent_kda": 2**18,
}


@functools.cache
def _but_for_few(ours: Callable[..., Any], own: Callable[..., Any], position: int, name: str) -> Callable[..., Any]:
    known = set(inspect.signature(own).parameters)

    @functools.wraps(ours)
    def step(*args: Any, **kwargs: Any) -> Any:
        state = args[position] if len(args) > position else kwargs.get(name)
        if state is None or state.numel() > FEW[ours.__name__]:
            return ours(*args, **kwargs)
        more = [key for key, value in kwargs.items() if key not in known and value is not None]
        dtypes = {t.dtype for t in (*args, *kwargs.values()) if isinstance(t, Tensor)}
        if more or dtypes != {torch.float32}:  # ours knows more options, mixes dtypes and keeps float64
            return ours(*args, **kwargs)
        return own(*args, **{key: value for key, value in kwargs.items() if key in known})

    return step


def causal_conv1d_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, seq_idx: Tensor | None = None, activation: str | None = None
) -> Any:
    seq_idx = current().seq_idx if seq_idx is None else seq_idx
    fused = activation in (None, "silu", "swish")
    wide = x.double() if weight.dtype == torch.float64 else x  # Inkling's activations are narrower than its weights
    y: Any = causal_conv1d.causal_conv1d_fn(wide, weight, bias, seq_idx, activation=activation if fused else None)
    return (y if fused else _activated(y, activation)).to(x.dtype)


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


_bind_chunks = Binder(inspect.signature(mamba_ssm.mamba_chunk_scan_combined))


@functools.wraps(mamba_ssm.mamba_chunk_scan_combined, assigned=())  # the signature alone
def mamba_chunk_scan_combined(*args: Any, **kwargs: Any) -> Any:
    """Keeps to the sequences of the layer that calls it, which transformers 5.15 and 5.16 do not hand on."""
    seq_idx = current().seq_idx
    if seq_idx is None:
        return mamba_ssm.mamba_chunk_scan_combined(*args, **kwargs)
    given = _bind_chunks(args, kwargs)
    if given["seq_idx"] is None:
        given["seq_idx"] = seq_idx
    return mamba_ssm.mamba_chunk_scan_combined(**given)


def unfused(*args: Any, **kwargs: Any) -> None:
    """Has the layer go through its own steps, each of which is one of our functions.

    mamba_ssm's fused functions are as fast and change results: ``mamba_inner_fn`` norms Δ after its projection, where
    transformers norms it before, and ``mamba_split_conv1d_scan_combined`` always gates before the norm.
    """


_SMALL = "; transformers' own for small states"
_FUNCTIONS = {
    ("causal_conv1d", "causal_conv1d_fn"): Supplied(causal_conv1d_fn, "ssmkernels.causal_conv1d"),
    ("causal_conv1d", "causal_conv1d_update"): Supplied(causal_conv1d_update, "ssmkernels.causal_conv1d_step"),
    ("mamba_ssm", "selective_scan_fn"): Supplied(selective_scan_fn, "ssmkernels.selective_scan"),
    ("mamba_ssm", "selective_state_update"): Supplied(
        mamba_ssm.selective_state_update, f"ssmkernels.selective_scan_step{_SMALL}", (0, "state")
    ),
    ("mamba_ssm", "mamba_chunk_scan_combined"): Supplied(mamba_chunk_scan_combined, "ssmkernels.ssd"),
    ("fla", "chunk_gated_delta_rule"): Supplied(fla.chunk_gated_delta_rule, "ssmkernels.delta_rule"),
    ("fla", "fused_recurrent_gated_delta_rule"): Supplied(
        fla.fused_recurrent_gated_delta_rule, f"ssmkernels.delta_rule_step{_SMALL}", (5, "initial_state")
    ),
    ("fla", "chunk_kda"): Supplied(fla.chunk_kda, "ssmkernels.delta_rule"),
    ("fla", "fused_recurrent_kda"): Supplied(
        fla.fused_recurrent_kda, f"ssmkernels.delta_rule_step{_SMALL}", (5, "initial_state")
    ),
    ("mamba_ssm", "mamba_inner_fn"): Supplied(unfused, "the layer's steps, one by one"),
    ("mamba_ssm", "mamba_split_conv1d_scan_combined"): Supplied(unfused, "the layer's steps, one by one"),
}
for name in ("gated_delta_rule", "kda"):  # their names in the first versions that looked them up
    _FUNCTIONS["fla", f"recurrent_{name}"] = _FUNCTIONS["fla", f"fused_recurrent_{name}"]
# Mamba-2 and its hybrids have one decay a head, which selective_state_update recognises.
_OF_HEADS = Supplied(mamba_ssm.selective_state_update, f"ssmkernels.ssd_step{_SMALL}")


def supplied(package: str, function: str, of_heads: bool = False) -> Supplied | None:
    """Ours, or None where there is none; ``of_heads`` for families of Mamba-2."""
    if of_heads and function == "selective_state_update":
        return _OF_HEADS
    return _FUNCTIONS.get((package, function))
