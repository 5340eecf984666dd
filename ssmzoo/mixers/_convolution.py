"""The causal convolution of a mixer that holds its weights in a ``Conv1d``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn

from ssmkernels.core.crossing import crossing, current
from ssmkernels.core.validate import precision
from ssmkernels.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from ssmzoo.linear import is_plain
from ssmzoo.mixers._one_call import in_one_call
from ssmzoo.mixers._places import Places


def convolve(
    conv1d: nn.Module,
    x: Tensor,
    width: int,
    activation: Literal["silu"] | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The op where the module is as it was built; otherwise the module itself, so that hooks and adapters act.

    Args:
        conv1d: a depthwise convolution without padding, or what stands in its place.
        x: ``(b, l, d)``.
        width: its taps.
        activation: what follows the convolution.
        state: the inputs before x, ``(s, width - 1, d)``, float32 (float64); None for zeros.
        cu_seqlens: borders of packed sequences.

    Returns:
        As many as came in ``(b, l, d)``, and the last inputs, as ``state``. One token without gradients updates the
        state in place.
    """
    if state is not None and x.shape[1] == 1 and cu_seqlens is None and in_one_call(x, conv1d):
        assert isinstance(conv1d, nn.Conv1d)
        return causal_conv1d_step(state, x[:, 0], conv1d.weight.squeeze(1), conv1d.bias, activation)[:, None], state
    if is_plain(conv1d):
        assert isinstance(conv1d, nn.Conv1d)
        result = causal_conv1d(
            x,
            conv1d.weight.squeeze(1),
            conv1d.bias,
            activation,
            initial_state=state,
            return_final_state=True,
            cu_seqlens=cu_seqlens,
        )
        return cast(tuple[Tensor, Tensor], result)
    over = current()
    if over is not None:
        before, after = over.window(x, state, width - 1)
        with crossing(None):
            return convolve(conv1d, x, width, activation, before, cu_seqlens)[0], after
    if x.numel() == 0:  # Conv1d takes no input shorter than its kernel
        sequences = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        none = x.new_zeros(sequences, width - 1, x.shape[2], dtype=precision(x))
        return x, none if state is None else state
    places = Places.of(width - 1, x.shape[1], cu_seqlens)
    inputs = places.spread(x, state)
    y = places.gather(conv1d(inputs.mT).mT)
    return F.silu(y) if activation == "silu" else y, places.last(inputs)


def depthwise(channels: int, width: int, bias: bool) -> nn.Conv1d:
    """A convolution of each channel on its own, which holds its weights under their published names."""
    return nn.Conv1d(channels, channels, width, groups=channels, bias=bias)


def convolve_each(
    convs: Sequence[nn.Module],
    inputs: Sequence[Tensor],
    width: int,
    activation: Literal["silu"] | None,
    states: Sequence[Tensor] | None,
    cu_seqlens: Tensor | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """:func:`convolve` for several inputs with a convolution each: as many ``(b, l, d)``, and the states after."""
    before = [None] * len(inputs) if states is None else states
    found = [
        convolve(conv, x, width, activation, state, cu_seqlens)
        for conv, x, state in zip(convs, inputs, before, strict=True)
    ]
    return [y for y, _ in found], [state for _, state in found]
