"""Mamba-3's layer, where the package has it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkernels import mamba3_scan
from ssmkernels.compat._dtypes import int32_borders
from ssmkernels.compat.mamba_ssm._layers import Device, Recurrent, check_sizes, new_dt_bias, parameter, wide
from ssmkernels.compat.mamba_ssm.ops.triton.layernorm_gated import RMSNorm
from ssmkernels.core.validate import check_options

__all__ = ["Mamba3"]

ACTIVATIONS = {
    "softplus": F.softplus,
    "heavy_tail": lambda x: x.clamp(min=0) + 1 / (1 - x.clamp(max=0)),
}


class Mamba3(Recurrent):
    """Mamba-3's layer (Lahoti et al. 2026, arXiv 2603.15569).

    Args:
        d_model: width of input and output.
        d_state: states of each channel.
        expand: expand · d_model channels inside.
        headdim: channels of a head.
        ngroups: groups of heads that share B and C.
        rope_fraction: the part of the d_state dimensions that turns, 0.5 or 1.
        dt_min, dt_max, dt_init_floor: Δ starts log-uniform between the first two, at least the third.
        A_floor: -A is at least this.
        is_outproj_norm: whether each head's output is normalised before its gate.
        is_mimo, mimo_rank: several inputs and outputs a step, and how many.
        fuse_pregate_headwise_norm: has no effect.
        chunk_size: tokens of a chunk, a hint.
        dropout, n_layer: have no effect, as in the package.
        layer_idx: the place of the layer's states in ``inference_params``.
        device, dtype: of the weights; D, MIMO's weights and all biases are float32.
        A_activation: what makes -A of its projection, in addition to the package's arguments: "softplus", as in its
            releases up to 2.3.2, or "heavy_tail", as in its later sources.

    Raises:
        ValueError: sizes that do not divide one another, or an option that there is not.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        expand: float = 2,
        headdim: int = 64,
        ngroups: int = 1,
        rope_fraction: float = 0.5,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        A_floor: float = 1e-4,
        is_outproj_norm: bool = False,
        is_mimo: bool = False,
        mimo_rank: int = 4,
        fuse_pregate_headwise_norm: bool = True,
        chunk_size: int = 64,
        dropout: float = 0.0,
        layer_idx: int | None = None,
        n_layer: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
        A_activation: str = "softplus",
    ):
        super().__init__()
        check_sizes("Mamba3", d_model, expand, d_state=d_state, headdim=headdim, ngroups=ngroups)
        check_options("Mamba3", "number", rope_fraction=rope_fraction, A_floor=A_floor)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.headdim, self.expand = d_model, d_state, headdim, expand
        self.d_inner = int(expand * d_model)
        self.nheads = self.d_inner // headdim
        self.num_bc_heads, self.chunk_size, self.layer_idx = ngroups, chunk_size, layer_idx
        if self.nheads * headdim != self.d_inner:
            raise ValueError(f"Mamba3: `headdim` must divide the {self.d_inner} channels inside; got {headdim}")
        if rope_fraction not in (0.5, 1.0):
            raise ValueError(f"Mamba3: `rope_fraction` must be 0.5 or 1; got {rope_fraction}")
        if A_activation not in ACTIVATIONS:
            raise ValueError(f"Mamba3: `A_activation` must be one of {', '.join(ACTIVATIONS)}; got {A_activation!r}")
        self.A_activation, self.A_floor, self.is_outproj_norm = A_activation, A_floor, is_outproj_norm
        self.is_mimo, self.mimo_rank = is_mimo, mimo_rank if is_mimo else 1
        self.num_rope_angles = int(d_state * rope_fraction) // 2

        h, r, maps = self.nheads, self.mimo_rank, self.mimo_rank * ngroups * d_state
        self._splits = [self.d_inner, self.d_inner, maps, maps, h, h, h, self.num_rope_angles]
        self.in_proj = nn.Linear(d_model, sum(self._splits), bias=False, **made)
        self.dt_bias = parameter(new_dt_bias(h, dt_min, dt_max, dt_init_floor, device))
        self.B_bias = nn.Parameter(torch.ones(h, r, d_state, device=device))
        self.C_bias = nn.Parameter(torch.ones(h, r, d_state, device=device))
        self.B_norm = RMSNorm(d_state, eps=1e-5, **made)
        self.C_norm = RMSNorm(d_state, eps=1e-5, **made)
        if is_mimo:
            self.mimo_x = nn.Parameter(torch.full((h, r, headdim), 1 / r, device=device))
            self.mimo_z = nn.Parameter(torch.ones(h, r, headdim, device=device))
            self.mimo_o = nn.Parameter(torch.full((h, r, headdim), 1 / r, device=device))
        self.D = parameter(torch.ones(h, device=device))
        if is_outproj_norm:
            self.norm = RMSNorm(self.d_inner, eps=1e-5, norm_before_gate=True, group_size=headdim, **made)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False, **made)

    def forward(
        self,
        u: Tensor,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: Any = None,
    ) -> Tensor:
        """``(b, l, d_model)`` → the same; with ``inference_params`` the start of sequences, or their next tokens.

        Args:
            seq_idx: None.
            cu_seqlens: borders ``(s + 1)`` of sequences packed into a batch of one.

        Raises:
            ValueError: a ``seq_idx``; no ``layer_idx``; states of another number of sequences.
        """
        if seq_idx is not None:
            raise ValueError("Mamba3: `seq_idx` must be None; packed sequences are told by `cu_seqlens`")
        borders = None if cu_seqlens is None else int32_borders("Mamba3", cu_seqlens, u.shape[1])
        states = None
        if inference_params is not None:
            states = self.states_in(inference_params, len(u) if borders is None else len(borders) - 1)
        return self._run(u, states, borders, goes_on=states is not None and inference_params.seqlen_offset > 0)

    def step(
        self, u: Tensor, angle_state: Tensor, ssm_state: Tensor, k_state: Tensor, v_state: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """One token ``(b, d_model)``, and its states, which are written in place.

        Returns:
            the output ``(b, d_model)`` and the states.
        """
        states = (angle_state, ssm_state, k_state, v_state)
        return (self._run(u[:, None], states, None, goes_on=True)[:, 0], *states)

    def allocate_inference_cache(  # type: ignore[override]
        self,
        batch_size: int,
        max_seqlen: int,
        device: Device = None,
        dtype: torch.dtype | None = None,
        inplace_state: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The states before a token: angles ``(b, h, a)`` and sums ``(b, h, headdim, d_state)``, which are float32, and
        the last key ``(b, r, h, d_state)`` and value ``(b, h, headdim)``."""
        sums: dict[str, Any] = {"device": device, "dtype": torch.float32}
        last: dict[str, Any] = {"device": device, "dtype": dtype}
        new, h = self.in_proj.weight.new_zeros, self.nheads
        return (
            new(batch_size, h, self.num_rope_angles, **sums),
            new(batch_size, h, self.headdim, self.d_state, **sums),
            new(batch_size, self.mimo_rank, h, self.d_state, **last),
            new(batch_size, h, self.headdim, **last),
        )

    def _run(self, u: Tensor, states: tuple[Tensor, ...] | None, cu_seqlens: Tensor | None, goes_on: bool) -> Tensor:
        """Sequences (b l d_model), from the states on where they go on; the last ones are written into them."""
        z, x, B, C, dt, A, trap, angles = self.in_proj(u).split(self._splits, dim=-1)
        heads, maps = (self.nheads, self.headdim), (self.mimo_rank, self.num_bc_heads, self.d_state)
        z, x = z.unflatten(-1, heads), x.unflatten(-1, heads)  # (b l h p)
        gates = self._each(z, "mimo_z")
        start: dict[str, Any] = {}
        if states is not None and goes_on:
            angle, ssm, key, value = (t.to(wide(x[:, :0]).dtype) for t in states)
            value = wide(self._each(value, "mimo_x"))
            start = {"initial_state": ssm, "initial_angle": angle, "initial_key": key, "initial_value": value}
        y, ssm, angle, key, _ = mamba3_scan(
            self._each(x, "mimo_x"),
            F.softplus(wide(dt) + wide(self.dt_bias)),
            -ACTIVATIONS[self.A_activation](wide(A)).clamp(min=self.A_floor),
            self.B_norm(B.unflatten(-1, maps)),
            self.C_norm(C.unflatten(-1, maps)),
            torch.sigmoid(wide(trap)),
            math.pi * torch.tanh(wide(angles)),
            wide(self.B_bias),
            wide(self.C_bias),
            wide(self.D),
            None if self.is_outproj_norm else gates,
            interleaved=not self.is_mimo,
            chunk_size=self.chunk_size,
            return_final_state=True,
            cu_seqlens=cu_seqlens,
            **start,
        )
        if states is not None and x.shape[1]:
            value = x[:, -1] if cu_seqlens is None else x[0, cu_seqlens[1:].long() - 1]
            for held, new in zip(states, (angle, ssm, key, value), strict=True):
                held.copy_(new.detach())
        if self.is_outproj_norm:
            y = self.norm(y.flatten(-2), gates.flatten(-2)).unflatten(-1, heads)
        if self.is_mimo:
            y = torch.einsum("blrhp,hrp->blhp", y, self.mimo_o.to(y.dtype))
        else:
            y = y[:, :, 0]
        return self.out_proj(y.flatten(-2))

    def _each(self, x: Tensor, weight: str) -> Tensor:
        """(… h p) → (… r h p): the inputs or gates of a step."""
        x = x.unsqueeze(-3)
        return x * getattr(self, weight).transpose(0, 1).to(x.dtype) if self.is_mimo else x
