"""All Triton kernels of the general delta rule."""

from ssmkernels.ops.generalized_delta_rule.triton_chunks_kernels import solve, walk, walk_backward
from ssmkernels.ops.generalized_delta_rule.triton_sequential_kernels import backward, forward

__all__ = ["backward", "forward", "solve", "walk", "walk_backward"]
