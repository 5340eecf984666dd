"""Mamba's layer, where the package has it."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkernels.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from ssmkernels.compat.mamba_ssm import _layers as layers
from ssmkernels.compat.mamba_ssm import mamba_inner_fn, selective_scan_fn, selective_state_update

__all__ = ["Mamba"]


class Mamba(layers.Recurrent):
    """Mamba's layer (Gu and Dao 2023, arXiv 2312.00752, figure 3).

    Args:
        d_model: width of input and output.
        d_state: states of each channel.
        d_conv: width of the convolution.
        expand: d_inner = expand · d_model channels inside.
        dt_rank: rank of the projection that makes Δ; ⌈d_model / 16⌉ for "auto".
        dt_min, dt_max, dt_init_floor: Δ starts log-uniform between the first two, at least the third.
        dt_init, dt_scale: the weight of Δ's projection starts "random", uniform within ± dt_scale · dt_rank^-½, or
            "constant", at that bound.
        conv_bias, bias: biases of the convolution, and of the projections in and out.
        use_fast_path: whether training keeps less for the backward pass, by ``mamba_inner_fn``.
        layer_idx: the place of the layer's states in ``inference_params``.
        device, dtype: of the weights; A_log and D are float32.

    Raises:
        ValueError: another ``dt_init``.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: layers.Device = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        layers.check_sizes("Mamba", d_model, expand, d_state=d_state, d_conv=d_conv)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.use_fast_path, self.layer_idx, self.activation = use_fast_path, layer_idx, "silu"
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **made)
        self.conv1d = layers.new_conv1d(self.d_inner, d_conv, conv_bias, **made)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **made)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=True, **made)
        bound = dt_scale * self.dt_rank**-0.5
        if dt_init == "constant":
            nn.init.constant_(self.dt_proj.weight, bound)
        elif dt_init == "random":
            nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        else:
            raise ValueError(f"Mamba: `dt_init` must be 'random' or 'constant'; got {dt_init!r}")
        with torch.no_grad():
            self.dt_proj.bias.copy_(layers.new_dt_bias(self.d_inner, dt_min, dt_max, dt_init_floor, device))
        self.dt_proj.bias._no_reinit = True  # type: ignore[attr-defined]
        A = torch.arange(1, d_state + 1, dtype=torch.float32, device=device)
        self.A_log = layers.parameter(A.log().repeat(self.d_inner, 1))
        self.D = layers.parameter(torch.ones(self.d_inner, device=device))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **made)

    def forward(self, hidden_states: Tensor, inference_params: Any = None) -> Tensor:
        """``(b, l, d_model)`` → the same; with ``inference_params`` the start of sequences, or their next token.

        Raises:
            ValueError: several tokens after the start; no ``layer_idx``; states of another number of sequences.
        """
        states = None
        if inference_params is not None:
            states = self.states_in(inference_params, len(hidden_states))
            if inference_params.seqlen_offset > 0:
                return self.step(hidden_states, *states)[0]
        xz = self.in_proj(hidden_states).transpose(1, 2)  # (b 2d l)
        A = -torch.exp(layers.wide(self.A_log))
        if self.use_fast_path and states is None and self._maps_are_plain():
            return mamba_inner_fn(
                xz,
                self.conv1d.weight,
                self.conv1d.bias,
                self.x_proj.weight,
                self.dt_proj.weight,
                self.out_proj.weight,
                self.out_proj.bias,
                A,
                D=layers.wide(self.D),
                delta_bias=layers.wide(self.dt_proj.bias),
            )
        x, z = xz.chunk(2, dim=1)
        if states is not None:
            layers.last_inputs(x.detach(), states[0])
        found = causal_conv1d_fn(x, self.conv1d.weight[:, 0], self.conv1d.bias, activation=self.activation)
        assert isinstance(found, Tensor)
        delta, bias, B, C = self._selected(found.transpose(1, 2))
        delta, B, C = (t.transpose(1, 2) for t in (delta, B, C))
        y, last = selective_scan_fn(found, delta, A, B, C, layers.wide(self.D), z, bias, True, return_last_state=True)
        if states is not None:
            states[1].copy_(last.detach())
        return self.out_proj(y.transpose(1, 2))

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One token ``(b, 1, d_model)``, and its states, which are written in place.

        Returns:
            the output ``(b, 1, d_model)`` and the states.
        """
        layers.check_one_token("Mamba", hidden_states)
        x, z = self.in_proj(hidden_states[:, 0]).chunk(2, dim=-1)  # (b d)
        x = causal_conv1d_update(x, conv_state, self.conv1d.weight[:, 0], self.conv1d.bias, self.activation)
        delta, bias, B, C = self._selected(x)
        A = -torch.exp(layers.wide(self.A_log))
        y = selective_state_update(ssm_state, x, delta, A, B, C, layers.wide(self.D), z, bias, dt_softplus=True)
        return self.out_proj(y)[:, None], conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The states of convolution ``(b, d_inner, d_conv)`` and scan ``(b, d_inner, d_state)`` before a token."""
        conv, ssm = self.conv1d.weight, self.dt_proj.weight
        return (
            conv.new_zeros(batch_size, self.d_inner, self.d_conv, dtype=dtype),
            ssm.new_zeros(batch_size, self.d_inner, self.d_state, dtype=dtype),
        )

    def _selected(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Δ before its bias, its bias, B and C from (… d); the bias is None where Δ has it already."""
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        if _is_plain(self.dt_proj):  # the scan adds the bias, in float32
            return F.linear(dt, self.dt_proj.weight), layers.wide(self.dt_proj.bias), B, C
        return self.dt_proj(dt), None, B, C

    def _maps_are_plain(self) -> bool:
        return all(_is_plain(m) for m in (self.x_proj, self.dt_proj, self.out_proj))


def _is_plain(m: nn.Module) -> bool:
    """Whether a linear map may be read rather than called: nothing replaces, wraps or watches it."""
    return type(m) is nn.Linear and not (m._forward_hooks or m._forward_pre_hooks or m._backward_hooks)
