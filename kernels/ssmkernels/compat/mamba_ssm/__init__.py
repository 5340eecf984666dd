"""mamba_ssm's functions: its signatures and its layout, channels before time, on a CPU as well as on a GPU.

Written after mamba-ssm 2.3.2. Imports change like this::

    mamba_ssm                                   → ssmkernels.compat.mamba_ssm
    mamba_ssm.ops.selective_scan_interface      → ssmkernels.compat.mamba_ssm.ops.selective_scan_interface
    mamba_ssm.ops.triton.selective_state_update → ssmkernels.compat.mamba_ssm.ops.triton.selective_state_update
    mamba_ssm.ops.triton.ssd_combined           → ssmkernels.compat.mamba_ssm.ops.triton.ssd_combined
    mamba_ssm.ops.triton.layer_norm             → ssmkernels.compat.mamba_ssm.ops.triton.layer_norm
    mamba_ssm.ops.triton.layernorm_gated        → ssmkernels.compat.mamba_ssm.ops.triton.layernorm_gated
    mamba_ssm.modules.…                         → ssmkernels.compat.mamba_ssm.modules.…
    mamba_ssm.models.mixer_seq_simple           → ssmkernels.compat.mamba_ssm.models.mixer_seq_simple
    mamba_ssm.utils.generation                  → ssmkernels.compat.mamba_ssm.utils.generation

Its layers and its language model load its checkpoints, under the same names of weights. ``ssmzoo`` has its own, for
training, other mixers and faster decoding.

Where these do more than the package: a gradient goes through the last state, and, in ``mamba_inner_fn``, through the
norms of B, C and Δ and to their weights; ``selective_state_update`` has a gradient; float64 works.

Sizes: b batch, l length, d channels, n state size, g groups, h heads, p channels of a head, r rank of Δ, w width.
"""

from __future__ import annotations

import importlib
import math
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ssmkernels.compat._calls import by_reference, compatible
from ssmkernels.compat._scan import inner, scan
from ssmkernels.compat._ssd import chunk_scan
from ssmkernels.compat._update import update

if TYPE_CHECKING:
    from ssmkernels.compat.mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    from ssmkernels.compat.mamba_ssm.modules.mamba2 import Mamba2
    from ssmkernels.compat.mamba_ssm.modules.mamba3 import Mamba3
    from ssmkernels.compat.mamba_ssm.modules.mamba_simple import Mamba

__version__ = "2.3.2"

__all__ = [
    "Mamba",
    "Mamba2",
    "Mamba3",
    "MambaLMHeadModel",
    "mamba_chunk_scan_combined",
    "mamba_chunk_scan_combined_ref",
    "mamba_inner_fn",
    "mamba_inner_ref",
    "selective_scan_fn",
    "selective_scan_ref",
    "selective_state_update",
    "selective_state_update_ref",
]

# Layers are made of the functions below, and are imported when they are asked for.
MODULES = {
    "Mamba": "modules.mamba_simple",
    "Mamba2": "modules.mamba2",
    "Mamba3": "modules.mamba3",
    "MambaLMHeadModel": "models.mixer_seq_simple",
}


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{MODULES[name]}"), name)


@compatible(scan)
def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`ssmkernels.selective_scan` with channels before time.

    Args:
        u, delta, z: ``(b, d, l)``.
        A: ``(d, n)``, real or complex; complex entries stand for themselves and their conjugates, so that the output is
            twice the real part.
        B, C: ``(d, n)`` when fixed, else ``(b, n, l)`` or ``(b, g, n, l)``. Where A is complex, fixed ones may be
            complex, and the others hold real and imaginary parts by turns along the last axis, of length 2l.
        D, delta_bias: ``(d)``.
        delta_softplus: whether Δ = delta + delta_bias passes through softplus.
        return_last_state: whether to return the state after the last step as well.

    Returns:
        y ``(b, d, l)`` in u's dtype, a view of a time-major tensor; with ``return_last_state`` also the state
        ``(b, d, n)``, float32 (float64 for float64 input), complex where A is.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, by name.
    """


selective_scan_ref = by_reference("selective_scan_ref", selective_scan_fn, scan)


@compatible(inner)
def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """Mamba's block between its two projections, and the second one: convolution, projections of Δ, B, C, scan, gate.

    Args:
        xz: the first projection's output, ``(b, 2d, l)``: the input of the convolution, then the gate.
        conv1d_weight: ``(d, 1, w)``.
        conv1d_bias: ``(d)``.
        x_proj_weight: ``(r + n + n, d)``, which gives Δ's r numbers, then B, then C. Rows of a B or C that is given may
            be missing. Where A is complex, B and C have 2n rows each, real and imaginary parts by turns.
        delta_proj_weight: ``(d, r)``.
        out_proj_weight: ``(o, d)``.
        out_proj_bias: ``(o)``.
        A, B, C, D, delta_bias, delta_softplus: as :func:`selective_scan_fn`; B and C come from the input if None.
        B_proj_bias, C_proj_bias: added to B and C that come from the input, ``(n)``, or ``(2n)`` where A is complex.
        checkpoint_lvl: 0, or 1 to compute the convolution and Δ again in the backward pass instead of keeping them.
        b_rms_weight, c_rms_weight: ``(n)``: B and C are divided by their root mean square over n, and multiplied by
            these. For real A alone.
        dt_rms_weight: ``(d)``, likewise for Δ before its bias, over the channels.
        b_c_dt_rms_eps: added to the mean of squares.

    Returns:
        ``(b, l, o)``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, or one that another one makes
            meaningless.
    """


mamba_inner_ref = by_reference(
    "mamba_inner_ref",
    mamba_inner_fn,
    inner,
    checkpoint_lvl=0,
    b_rms_weight=None,
    c_rms_weight=None,
    dt_rms_weight=None,
    b_c_dt_rms_eps=1e-6,
)


@compatible(update)
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One token of the selective scan, or of Mamba-2's with heads; updates ``state`` in place.

    Args:
        state: ``(b, p, n)`` or, with heads, ``(b, h, p, n)``, of any floating-point dtype; sums are float32 (float64).
            Overwritten.
        x, dt, z: ``(b, p)`` or ``(b, h, p)``.
        A: ``(p, n)`` or ``(h, p, n)``; one number for a head may be expanded.
        B, C: ``(b, n)`` or ``(b, g, n)``, where g divides h; without heads it is 1.
        D, dt_bias: ``(p)`` or ``(h, p)``.
        dt_softplus: whether dt + dt_bias passes through softplus.
        state_batch_indices: integers ``(b)``: the state is ``(s, ...)``, and these are the rows of it to use. Where one
            is negative, nothing is read or written and the output is 0.

    Returns:
        y in x's shape and dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, by name.
    """


selective_state_update_ref = by_reference(
    "selective_state_update_ref", selective_state_update, update, state_batch_indices=None
)


@compatible(chunk_scan)
def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int | None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """:func:`ssmkernels.ssd` with the package's names.

    Args:
        x, z: ``(b, l, h, p)``.
        dt: ``(b, l, h)``.
        A, dt_bias: ``(h)``.
        B, C: ``(b, l, g, n)``, where g divides h.
        chunk_size: how many tokens a chunk takes, a hint; results are the same to rounding.
        D: ``(h)`` or ``(h, p)``.
        initial_states: ``(b, h, p, n)``; with ``seq_idx`` they belong to the sequence of a row's first token.
        seq_idx: integers ``(b, l)``, the number of each token's sequence: the state starts anew where it changes.
        cu_seqlens: integers ``(s + 1)``, the borders at which ``seq_idx`` changes, for ``return_varlen_states`` alone.
        dt_softplus, dt_limit: as :func:`ssmkernels.ssd`.
        return_final_states: whether to return the state after each row's last token as well, ``(b, h, p, n)``.
        return_varlen_states: whether to return the state after each sequence as well, ``(s, h, p, n)``.

    Returns:
        y ``(b, l, h, p)`` in x's dtype, and the states that were asked for, float32 (float64 for float64 input).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, by name; a sequence in ``seq_idx``
            that comes back after another one.
    """


mamba_chunk_scan_combined_ref = by_reference("mamba_chunk_scan_combined_ref", mamba_chunk_scan_combined, chunk_scan)
