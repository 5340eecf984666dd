"""Mamba-2's layer, where the package has it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkernels import ssd_step
from ssmkernels.compat._dtypes import int32_borders
from ssmkernels.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update, causal_conv1d_varlen_states
from ssmkernels.compat.mamba_ssm import mamba_chunk_scan_combined
from ssmkernels.compat.mamba_ssm._layers import (
    Device,
    Recurrent,
    check_one_token,
    check_sizes,
    last_inputs,
    new_conv1d,
    new_dt_bias,
    parameter,
    wide,
)
from ssmkernels.compat.mamba_ssm.ops.triton.layernorm_gated import RMSNorm

__all__ = ["Mamba2"]


class Mamba2(Recurrent):
    """Mamba-2's layer (Dao and Gu 2024, arXiv 2405.21060, section 7).

    Args:
        d_model: width of input and output.
        d_state: states of each channel.
        d_conv, conv_init: width of the convolution; its weight starts uniform within ± conv_init, or as PyTorch's.
        expand: d_inner = expand · d_model channels inside.
        headdim: channels of a head.
        d_ssm: channels of the recurrence; the others pass through a gated MLP beside it. All of them if None.
        ngroups: groups of heads that share B and C.
        A_init_range: -A starts uniform in it.
        D_has_hdim: D is a number for each channel rather than for each head.
        rmsnorm, norm_before_gate: whether the output is normalised beside its gate, and whether before it.
        dt_min, dt_max, dt_init_floor: Δ starts log-uniform between the first two, at least the third.
        dt_limit: the least and the most that Δ may be, in single tokens too.
        bias, conv_bias: biases of the projections in and out, and of the convolution.
        chunk_size: tokens of a chunk, a hint.
        use_mem_eff_path: has no effect.
        layer_idx: the place of the layer's states in ``inference_params``.
        process_group, sequence_parallel: None, and no effect: layers that are split over processes are not supported.
        device, dtype: of the weights; D is float32.

    Raises:
        ValueError: sizes that do not divide one another; a ``process_group``.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: float = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: Any = None,
        sequence_parallel: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_sizes("Mamba2", d_model, expand, d_state=d_state, d_conv=d_conv, headdim=headdim, ngroups=ngroups)
        if process_group is not None:
            raise ValueError("Mamba2: `process_group` must be None: layers split over processes are not supported")
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        self.headdim, self.ngroups, self.dt_limit = headdim, ngroups, dt_limit
        self.nheads = self.d_ssm // headdim
        if self.nheads * headdim != self.d_ssm:
            raise ValueError(f"Mamba2: `headdim` must divide `d_ssm`, {self.d_ssm} channels; got {headdim}")
        if self.nheads % ngroups:
            raise ValueError(f"Mamba2: `ngroups` must divide the {self.nheads} heads; got {ngroups}")
        self.D_has_hdim, self.rmsnorm, self.norm_before_gate = D_has_hdim, rmsnorm, norm_before_gate
        self.chunk_size, self.use_mem_eff_path = chunk_size, use_mem_eff_path
        self.layer_idx, self.activation = layer_idx, "silu"

        d_mlp, maps = self.d_inner - self.d_ssm, ngroups * d_state
        convolved = self.d_ssm + 2 * maps  # x, B and C
        self._splits = [d_mlp, d_mlp, self.d_ssm, convolved, self.nheads]
        self._parts = [self.d_ssm, maps, maps]
        self.in_proj = nn.Linear(d_model, sum(self._splits), bias=bias, **made)
        self.conv1d = new_conv1d(convolved, d_conv, conv_bias, **made)
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        self.dt_bias = parameter(new_dt_bias(self.nheads, dt_min, dt_max, dt_init_floor, device).to(dtype))
        A = torch.empty(self.nheads, dtype=torch.float32, device=device).uniform_(*A_init_range)
        self.A_log = parameter(A.log().to(dtype))
        self.D = parameter(torch.ones(self.d_ssm if D_has_hdim else self.nheads, device=device))
        if rmsnorm:
            groups: dict[str, Any] = {"norm_before_gate": norm_before_gate, "group_size": self.d_ssm // ngroups}
            self.norm = RMSNorm(self.d_ssm, eps=1e-5, **groups, **made)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **made)

    def forward(
        self,
        u: Tensor,
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: Any = None,
    ) -> Tensor:
        """A layer's output, with ``inference_params`` at the start of sequences, or at their next token.

        Args:
            u: ``(b, l, d_model)``, or ``(b l, d_model)`` with ``seqlen``, which is l.
            seq_idx: integers ``(b, l)``, the number of each token's sequence.
            cu_seqlens: ``(s + 1)``, borders of the sequences in a batch of one, which the states in
                ``inference_params`` are of; ``seq_idx`` follows from them.

        Raises:
            ValueError: several tokens after the start; no ``layer_idx``; states of another number of sequences.
        """
        if seqlen is not None:
            return self(u.unflatten(0, (-1, seqlen)), None, seq_idx, cu_seqlens, inference_params).flatten(0, 1)
        states = None
        if inference_params is not None:
            states = self.states_in(inference_params, len(u) if cu_seqlens is None else len(cu_seqlens) - 1)
            if inference_params.seqlen_offset > 0:
                return self.step(u, *states)[0]
        if cu_seqlens is not None and seq_idx is None:
            if len(u) != 1:
                raise ValueError(f"Mamba2: `u` must be a batch of one with `cu_seqlens`; got {len(u)}")
            cu_seqlens = int32_borders("Mamba2", cu_seqlens, u.shape[1])
            places = torch.arange(u.shape[1], dtype=torch.int32, device=u.device)
            seq_idx = torch.searchsorted(cu_seqlens[1:], places, right=True, out_int32=True)[None]
        return self._whole(u, seq_idx, cu_seqlens, states)

    def _whole(
        self,
        u: Tensor,
        seq_idx: Tensor | None,
        cu_seqlens: Tensor | None = None,
        states: tuple[Tensor, ...] | None = None,
        initial_states: Tensor | None = None,
    ) -> Tensor:
        """Whole sequences (b l d_model), whose last states are written into ``states``."""
        gate, up, z, xBC, dt = self.in_proj(u).split(self._splits, dim=-1)
        if states is not None:
            self._keep_inputs(xBC.detach(), states[0], cu_seqlens)
        weight, bias = self.conv1d.weight[:, 0], self.conv1d.bias
        convolved: Any = causal_conv1d_fn(xBC.transpose(1, 2), weight, bias, seq_idx, activation=self.activation)
        x, B, C = self._heads(convolved.transpose(1, 2))
        by_borders = states is not None and cu_seqlens is not None
        y, *last = mamba_chunk_scan_combined(
            x,
            dt,
            -torch.exp(wide(self.A_log)),
            B,
            C,
            self.chunk_size,
            self._skip(),
            None if self.rmsnorm else z.unflatten(-1, (self.nheads, self.headdim)),
            self.dt_bias,
            initial_states,
            seq_idx,
            cu_seqlens if by_borders else None,
            dt_softplus=True,
            dt_limit=self.dt_limit,
            return_final_states=True,
            return_varlen_states=by_borders,
        )
        if states is not None:
            states[1].copy_(last[-1].detach())
        return self._projected(y.flatten(-2), z, gate, up)

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One token ``(b, 1, d_model)``, and its states, which are written in place.

        Returns:
            the output ``(b, 1, d_model)`` and the states.
        """
        check_one_token(type(self).__name__, hidden_states)
        gate, up, z, xBC, dt = self.in_proj(hidden_states[:, 0]).split(self._splits, dim=-1)
        xBC = causal_conv1d_update(xBC, conv_state, self.conv1d.weight[:, 0], self.conv1d.bias, self.activation)
        x, B, C = self._heads(xBC)
        A, held = -torch.exp(wide(self.A_log)), wide(ssm_state)
        bias: dict[str, Any] = {"dt_bias": wide(self.dt_bias), "dt_softplus": True, "dt_limit": self.dt_limit}
        y = ssd_step(held, x, dt, A, B, C, self._skip(), **bias).flatten(-2)
        if held is not ssm_state:
            ssm_state.copy_(held)
        y = y if self.rmsnorm else y * F.silu(z)
        return self._projected(y, z, gate, up)[:, None], conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The states of convolution ``(b, d, d_conv)`` and recurrence ``(b, h, headdim, d_state)`` before a token."""
        conv, ssm = self.conv1d.weight, self.in_proj.weight
        return (
            conv.new_zeros(batch_size, self.d_conv, len(conv), dtype=dtype).transpose(1, 2),
            ssm.new_zeros(batch_size, self.nheads, self.headdim, self.d_state, dtype=dtype),
        )

    @staticmethod
    def _keep_inputs(xBC: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> None:
        """Writes the last inputs of the convolution (b l d) into its state."""
        if cu_seqlens is None:
            last_inputs(xBC.transpose(1, 2), state)
        else:
            state.copy_(causal_conv1d_varlen_states(xBC[0], cu_seqlens, state.shape[-1]))

    def _heads(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(… d) → x (… h p), B and C (… g n)."""
        x, B, C = xBC.split(self._parts, dim=-1)
        groups = (self.ngroups, self.d_state)
        return x.unflatten(-1, (self.nheads, self.headdim)), B.unflatten(-1, groups), C.unflatten(-1, groups)

    def _skip(self) -> Tensor:
        return self.D.unflatten(0, (self.nheads, self.headdim)) if self.D_has_hdim else self.D

    def _projected(self, y: Tensor, z: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        """The norm, what the MLP beside the recurrence gives, and the projection out."""
        y = self.norm(y, z) if self.rmsnorm else y
        return self.out_proj(torch.cat([F.silu(gate) * up, y], dim=-1) if up.shape[-1] else y)
