"""What the package's layers share: states in ``inference_params``, how weights start, and their precision."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ssmkernels.core.validate import check_range, precision

Device = torch.device | str | None


class Recurrent(nn.Module):
    """A layer that keeps its states in ``inference_params.key_value_memory_dict[layer_idx]``, written in place."""

    layer_idx: int | None

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, ...]:
        """The states before the first token."""
        raise NotImplementedError

    def states_in(self, inference_params: Any, sequences: int) -> tuple[Tensor, ...]:
        """The layer's states, which the first call allocates.

        Raises:
            ValueError: the layer has no number, or the states belong to another number of sequences.
        """
        name = type(self).__name__
        if self.layer_idx is None:
            raise ValueError(f"{name}: `layer_idx` must be given to the layer for `inference_params`; got None")
        held = inference_params.key_value_memory_dict
        if self.layer_idx not in held:
            held[self.layer_idx] = self.allocate_inference_cache(sequences, inference_params.max_seqlen)
        states: tuple[Tensor, ...] = held[self.layer_idx]
        if len(states[0]) != sequences:
            raise ValueError(
                f"{name}: the states of layer {self.layer_idx} in `inference_params` must belong to {sequences} "
                f"sequences, as the input; got {len(states[0])}"
            )
        return states


def check_sizes(name: str, d_model: int, expand: float, **sizes: int) -> None:
    """Every size is at least 1.

    Raises:
        ValueError: by its name.
    """
    check_range(name, 1, d_model=d_model, **sizes)
    if not expand * d_model >= 1:
        raise ValueError(f"{name}: `expand` must give at least one channel for d_model={d_model}; got {expand}")


def check_one_token(name: str, x: Tensor) -> None:
    """Single tokens alone continue a sequence.

    Raises:
        ValueError: the input (b l d) has more.
    """
    if x.ndim != 3 or x.shape[1] != 1:
        raise ValueError(
            f"{name}: `hidden_states` must be one token, (b, 1, d_model), after the start; got {tuple(x.shape)}"
        )


def wide(t: Tensor) -> Tensor:
    """In float32, or float64 as it is."""
    return t.to(precision(t))


def last_inputs(x: Tensor, out: Tensor) -> None:
    """Writes the last inputs of a convolution, x (b d l), into its state (b d w), after zeros where x has fewer."""
    length = min(x.shape[-1], out.shape[-1])
    out[..., : out.shape[-1] - length] = 0
    out[..., out.shape[-1] - length :] = x[..., x.shape[-1] - length :]


def new_conv1d(
    channels: int, d_conv: int, bias: bool, device: Device = None, dtype: torch.dtype | None = None
) -> nn.Conv1d:
    """Holds the weights of a causal convolution of each channel."""
    options: dict[str, Any] = {"groups": channels, "padding": d_conv - 1, "bias": bias}
    return nn.Conv1d(channels, channels, d_conv, **options, device=device, dtype=dtype)


def new_dt_bias(size: int, low: float, high: float, floor: float, device: Device = None) -> Tensor:
    """Numbers whose softplus is log-uniform between ``low`` and ``high``, and at least ``floor``."""
    dt = torch.empty(size, device=device, dtype=torch.float32).uniform_(math.log(low), math.log(high))
    return torch.log(torch.expm1(dt.exp().clamp(min=floor)))


def parameter(t: Tensor) -> nn.Parameter:
    """A parameter that is marked as one without weight decay, as training scripts of the package look it up."""
    found = nn.Parameter(t)
    found._no_weight_decay = True  # type: ignore[attr-defined]
    return found
