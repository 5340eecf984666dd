"""causal_conv1d's functions: its signatures and its layout, channels before time, on a CPU as well as on a GPU.

Written after causal-conv1d 1.7.0. Imports change like this::

    causal_conv1d                              → ssmkernels.compat.causal_conv1d
    causal_conv1d.causal_conv1d_interface      → ssmkernels.compat.causal_conv1d.causal_conv1d_interface
    causal_conv1d.causal_conv1d_varlen         → ssmkernels.compat.causal_conv1d.causal_conv1d_varlen

Every width, layout and number of channels is taken, where the package wants widths of 2 to 4 and, for most of its
options, channels last and a multiple of 8. float64 works. Sums are float32 (float64) whatever the dtypes.

Sizes: b batch, l length, d channels, w width, m length of a decoding state (at least w - 1), s sequences.
"""

from __future__ import annotations

from torch import Tensor

from ssmkernels.compat._calls import by_reference, compatible
from ssmkernels.compat._conv import conv, update
from ssmkernels.compat._dtypes import INDICES
from ssmkernels.core.packing import last_of_each
from ssmkernels.core.validate import check_dtypes, check_options, check_range, check_shapes

__version__ = "1.7.0"

__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_ref",
    "causal_conv1d_update",
    "causal_conv1d_update_ref",
    "causal_conv1d_varlen_states",
    "causal_conv1d_varlen_states_ref",
]


@compatible(conv)
def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`ssmkernels.causal_conv1d` with channels before time.

    Args:
        x: ``(b, d, l)``.
        weight: ``(d, w)``.
        bias: ``(d)``.
        seq_idx: integers ``(b, l)``, the number of each token's sequence: tokens of other sequences are not seen, and
            where it is negative the output is 0. Initial states belong to the sequence of a row's first token.
        initial_states: the w-1 inputs before the first, oldest first, ``(b, d, w-1)``.
        return_final_states: whether to return the last w-1 inputs as well.
        final_states_out: ``(b, d, w-1)``, where to write them.
        activation: None, ``"silu"`` or ``"swish"``, which are one.

    Returns:
        y ``(b, d, l)`` in x's dtype, a view of a time-major tensor; with ``return_final_states`` also the last inputs
        ``(b, d, w-1)``, which is ``final_states_out`` where that is given.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device; ``seq_idx`` together with final
            states; a sequence of ``seq_idx`` that another one interrupts for less than w-1 steps.
    """


@compatible(conv, "reference")
def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`causal_conv1d_fn` by our reference, with the package's other order of arguments."""


@compatible(update)
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """The next token, or tokens, of a convolution; updates ``conv_state`` in place.

    Args:
        x: ``(b, d)`` or ``(b, d, l)``.
        conv_state: the last m inputs, oldest first, ``(b, d, m)`` with m ≥ w-1; w and w-1 are common. Overwritten.
        weight: ``(d, w)``.
        bias: ``(d)``.
        activation: None, ``"silu"`` or ``"swish"``.
        cache_seqlens: integers ``(b)``, how many tokens there were before. With them the state is a ring: token i is at
            place i mod m.
        conv_state_indices: integers ``(b)``: ``conv_state`` is ``(s, d, m)``, and these are the rows of it to use.
            Where one is negative, nothing is read or written and the output is 0.

    Returns:
        y in x's shape and dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or name.
    """


causal_conv1d_update_ref = by_reference(
    "causal_conv1d_update_ref", causal_conv1d_update, update, conv_state_indices=None
)


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last inputs of packed sequences, zeros before the first.

    Args:
        x: ``(l, d)``, the sequences one after another.
        cu_seqlens: integers ``(s + 1)``, their borders.
        state_len: how many inputs.

    Returns:
        ``(s, d, state_len)`` in x's dtype.
    """
    op = "causal_conv1d_varlen_states"
    check_shapes(op, {"x": (x, "l d"), "cu_seqlens": (cu_seqlens, "s+1")}, ("x", "cu_seqlens"), s=len(cu_seqlens) - 1)
    check_dtypes(op, {"cu_seqlens": cu_seqlens}, INDICES)
    check_options(op, "int", state_len=state_len)
    check_range(op, 0, state_len=state_len)
    return last_of_each(x, cu_seqlens, state_len).transpose(1, 2)


def causal_conv1d_varlen_states_ref(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """:func:`causal_conv1d_varlen_states`, which has one implementation."""
    return causal_conv1d_varlen_states(x, cu_seqlens, state_len)
