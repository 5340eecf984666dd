"""Mamba-2's layer without inference, where the package has it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ssmkernels.compat.mamba_ssm._layers import Device, parameter
from ssmkernels.compat.mamba_ssm.modules.mamba2 import Mamba2

__all__ = ["Mamba2Simple"]


class Mamba2Simple(Mamba2):
    """Mamba-2's layer with other defaults, and states that may be learned.

    Args:
        learnable_init_states: whether the state before each sequence is a weight, ``init_states``.
        activation: of the convolution: "silu", "swish" or None.
        d_model, …: as :class:`Mamba2`.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: float = 2,
        headdim: int = 128,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        learnable_init_states: bool = False,
        activation: str = "swish",
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ):
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            d_model,
            d_state,
            d_conv,
            conv_init,
            expand,
            headdim,
            ngroups=ngroups,
            A_init_range=A_init_range,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init_floor=dt_init_floor,
            dt_limit=dt_limit,
            bias=bias,
            conv_bias=conv_bias,
            chunk_size=chunk_size,
            use_mem_eff_path=use_mem_eff_path,
            layer_idx=layer_idx,
            **made,
        )
        self.learnable_init_states, self.activation = learnable_init_states, activation
        self.init_states: nn.Parameter | None = None
        if learnable_init_states:
            shape = (self.nheads, headdim, d_state)
            self.init_states = parameter(torch.zeros(shape, **made))

    def forward(self, u: Tensor, seq_idx: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """``(b, l, d_model)`` → the same; ``seq_idx`` as in :class:`Mamba2`."""
        start = self.init_states
        return self._whole(u, seq_idx, initial_states=None if start is None else start.expand(len(u), -1, -1, -1))
