"""Whether one op may compute a whole layer from its weights, without calling the layer's modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ssmkernels.core.autocast import autocasts
from ssmzoo.linear import is_plain
from ssmzoo.norm import GatedRMSNorm


def up_to_convolution(mixer: Any, x: Tensor, state: Any) -> tuple[Any, ...]:
    """What the steps of Mamba's and Mamba-2's layers take first: states, input, first map and convolution."""
    in_proj, conv1d = mixer.in_proj, mixer.conv1d
    return state.conv, state.ssm, x, in_proj.weight, in_proj.bias, conv1d.weight.squeeze(1), conv1d.bias


def in_one_call(x: Tensor, *modules: nn.Module | None, norm: nn.Module | None = None) -> bool:
    """Whether it may: no hooks, adapters or quantised layers, no autocast, and nobody wants gradients.

    Args:
        x: the layer's input.
        modules: linear maps and convolutions whose weights the op takes.
        norm: a gated norm whose weight it takes, if there is one.
    """
    return (
        not torch.is_grad_enabled()
        and not autocasts(x.device.type)
        and is_plain(*modules)
        and (norm is None or is_plain(norm, kinds=(GatedRMSNorm,)))
    )
