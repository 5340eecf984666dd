"""Falcon-H1's mixer, whose constant factors multiply the wide result of its first map in transformers.

Over a sequence without a cache they multiply the map's weight here, which is smaller, and the gate without a norm is
one pass over memory.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from ssmkernels import swiglu
from ssmkernels.native import eager
from ssmkernels.native.products import among_others, linear
from ssmzoo.integrations.transformers.layers import Function
from ssmzoo.integrations.transformers.lookups import installed
from ssmzoo.linear import is_plain

FEW = 2**8  # tokens up to which its steps stay as they are; chosen, not measured
STEPS = ("apply_mask_to_padding_states", "causal_conv1d_fn", "mamba2_chunk_scan")  # functions of transformers' module


def scaled_map(original: Function) -> Function:
    """The mixer with its factors in the weight; transformers' own where its steps are others than we know."""
    module = inspect.unwrap(original).__globals__
    if not all(name in module for name in STEPS):
        return original

    @functools.wraps(original)
    def forward(
        self: Any, hidden_states: Tensor, cache_params: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        if cache_params is not None or not _ours(self, hidden_states):
            return original(self, hidden_states, cache_params, attention_mask, **kwargs)
        masked, convolve, scan = (module[name] for name in STEPS)
        gate, xBC, dt = _projected(self, masked(hidden_states, attention_mask)).split(
            [self.intermediate_size, self.conv_dim, self.num_heads], dim=-1
        )
        conv = self.conv1d
        xBC = convolve(xBC.transpose(1, 2), conv.weight.squeeze(1), conv.bias, activation=self.activation, **kwargs)
        state = self.groups_time_state_size
        x, B, C = masked(xBC.transpose(1, 2), attention_mask).split([self.intermediate_size, state, state], dim=-1)
        y = scan(
            x.unflatten(-1, (-1, self.head_dim)),
            dt,
            -torch.exp(self.A_log),
            B.unflatten(-1, (self.n_groups, -1)),
            C.unflatten(-1, (self.n_groups, -1)),
            chunk_size=self.chunk_size,
            D=self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.time_step_limit,
            **kwargs,
        ).flatten(2)
        return self.out_proj(self.norm(y, gate) if self.mamba_rms_norm else swiglu(gate, y))

    return forward


def _ours(mixer: Any, x: Tensor) -> bool:
    """Whether nobody else has a say in the first map, and factors and map are there as we know them."""
    factors = getattr(mixer, "mup_vector", None)
    return (
        type(factors) is Tensor
        and not torch.compiler.is_compiling()
        and x.ndim == 3
        and x.shape[0] * x.shape[1] > FEW
        and is_plain(mixer.in_proj)
        and is_plain(mixer.conv1d)
        and eager.float32(x, factors, *mixer.parameters())
        and eager.reachable(x=x)
        and not installed("mamba_ssm")
    )


def _projected(mixer: Any, x: Tensor) -> Tensor:
    """The first map's result times its factors."""
    factors, first = mixer.mup_vector.flatten(), mixer.in_proj
    weight = first.weight * (factors * mixer.ssm_in_multiplier)[:, None]
    bias = None if first.bias is None else first.bias * factors
    return (among_others if torch.is_grad_enabled() else linear)(x, weight, bias)
