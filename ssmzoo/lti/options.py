"""The options that S4 and S4D share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.core.names import unknown
from ssmzoo.rate import check_rate

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
    "tanh": torch.tanh,
    "none": torch.positive,
}


@dataclasses.dataclass(kw_only=True)
class LTIOptions:
    """Options of a layer around a linear time-invariant system.

    Attributes:
        d_state: size of each channel's state, as d_state / 2 conjugate pairs (d_state numbers where A is real).
        init: how A starts; each mixer has its own.
        discretization: from continuous to discrete time; each mixer has its own.
        dt_min, dt_max: the step sizes Δ start log-uniform between them.
        dt_tie: one Δ a channel; otherwise one for each state of it, Δ ∘ (A h + B u).
        n_ssm: how many different A and B there are, dealt out to the channels in turn; one a channel if None.
        channels: kernels, and so outputs, of each channel; they share its state.
        bidirectional: adds a kernel that looks ahead; then it is not causal and has no state.
        gate: multiplies the activations, mapped to gate · (channels inside), by a linear map of the layer's input.
        bottleneck: d_model / bottleneck channels inside.
        activation: after the convolution and its skip.
        dropout: before the last linear map.
        rate: stretches Δ: the spacing of the inputs over that for which the layer is made, or was trained. The
            attribute of this name may change at any time, see :func:`ssmzoo.set_rate`.
        lr: learning rate of A (with P), B and Δ, which get no weight decay: a number, or one for each of "A", "B",
            "C" and "dt". 0 keeps a weight as it is; None, or a name left out, leaves it to the optimiser.
    """

    d_state: int = 64
    init: str = "legs"
    discretization: str = "zoh"
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_tie: bool = True
    n_ssm: int | None = None
    channels: int = 1
    bidirectional: bool = False
    gate: int | None = None
    bottleneck: int | None = None
    activation: Literal["gelu", "silu", "relu", "tanh", "none"] = "gelu"
    dropout: float = 0.0
    rate: float = 1.0
    lr: float | dict[str, Any] | None = 0.001

    def check(self, mixer: str, d_model: int) -> None:
        """Raises ValueError, in the mixer's name, for options that fit neither d_model nor each other."""
        for option in ("channels", "gate", "bottleneck", "n_ssm"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise ValueError(f"{mixer}: `{option}` must be at least 1; got {value}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"{mixer}: " + unknown("activation", self.activation, ACTIVATIONS))
        if not 0 < self.dt_min <= self.dt_max:
            raise ValueError(f"{mixer}: 0 < `dt_min` <= `dt_max` must hold; got {self.dt_min} and {self.dt_max}")
        check_rate(mixer, self.rate)
        if d_model % (self.bottleneck or 1):
            raise ValueError(f"{mixer}: `bottleneck` must divide d_model={d_model}; got {self.bottleneck}")
        d = d_model // (self.bottleneck or 1)
        if d % (self.n_ssm or d):
            raise ValueError(f"{mixer}: `n_ssm` must divide the {d} channels; got {self.n_ssm}")

    def check_state_size(self, mixer: str, pairs: bool) -> None:
        """Raises ValueError unless d_state is positive, and even where it is made of conjugate pairs."""
        if self.d_state < 1 or (pairs and self.d_state % 2):
            raise ValueError(f"{mixer}: `d_state` must be positive{', and even, as pairs' * pairs}; got {self.d_state}")
