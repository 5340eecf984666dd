"""All Triton kernels of linear attention."""

from ssmkernels.ops.linear_attention.triton_channels_backward_kernels import (
    keys_backward,
    states_backward,
    weights_backward,
)
from ssmkernels.ops.linear_attention.triton_channels_kernels import outputs, pairs, walk
from ssmkernels.ops.linear_attention.triton_sequential_kernels import backward, forward

__all__ = [
    "backward",
    "forward",
    "keys_backward",
    "outputs",
    "pairs",
    "states_backward",
    "walk",
    "weights_backward",
]
