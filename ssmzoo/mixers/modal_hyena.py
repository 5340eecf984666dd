"""StripedHyena's layer: Hyena with filters in modal form (Poli et al. 2023, Together's StripedHyena-7B).

A filter is a sum of few complex exponentials, as Laughing Hyena distils them (Massaroli et al. 2023, arXiv 2310.18780,
section 3), so that a recurrence gives exactly what the convolution does. Glossary: b batch, l length, d: d_model,
n: state_size. For x (b l d)::

    x_2, x_1, v = short_filter(projections(x))              (b l d) each; causal, short_filter_length taps
    u_t  = x_1 ∘ v                                          (b l d)
    s_t  = λ s_{t-1} + u_t                                  (b l d n), complex; λ: poles
    y_t  = x_2 ∘ (Re Σ_n R s_t + D u_t)                     (b l d); R: residues. The filter is h_j = Re Σ_n R λ^j
    out  = out_filter_dense(y)                              (b l d)
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from ssmkernels import diagonal_kernel
from ssmzoo.init import log_uniform, wide_dtype
from ssmzoo.linear import Linear
from ssmzoo.lti.diagonal import DiagonalFilter
from ssmzoo.lti.kept import Kept
from ssmzoo.lti.recurrence import Diagonal, DiagonalStep
from ssmzoo.mixer import Mixer
from ssmzoo.mixers._convolution import convolve, depthwise
from ssmzoo.registry import register_mixer
from ssmzoo.state import State


@dataclasses.dataclass
class ModalHyenaState(State):
    """What the short filter and the recurrence remember."""

    conv: Tensor  # (s, short_filter_length - 1, 3·d), the last inputs; float32
    modes: Tensor  # (s, d, n), complex64


class ModalFilter(nn.Module):
    """The weights of the long filters under their published names; ``filters`` of them, each for d / filters channels.

    The published code has no values to start training from. Here λ = exp(Δ (-1/2 + iπk)) for the k-th pole, with Δ
    log-uniform for each filter, as S4D starts, and R is normal with a variance of Δ, so that filters have alike norms.
    """

    def __init__(self, d: int, filters: int, n: int, dt_min: float, dt_max: float):
        super().__init__()
        wide, shape = wide_dtype(), (filters, n, 1, 2)
        self.D = nn.Parameter(torch.zeros(d, dtype=wide))
        self.poles = nn.Parameter(torch.empty(shape, dtype=wide))
        self.residues = nn.Parameter(torch.empty(shape, dtype=wide))
        self.reset_parameters(dt_min, dt_max)

    @torch.no_grad()
    def reset_parameters(self, dt_min: float, dt_max: float) -> None:
        if self.poles.is_meta:
            return
        filters, n = self.poles.shape[:2]
        dt = log_uniform(filters, dt_min, dt_max).to(self.poles)[:, None]
        turn = dt * math.pi * torch.arange(n).to(dt)
        self.poles.copy_((torch.exp(-dt / 2)[..., None] * torch.stack([turn.cos(), turn.sin()], dim=-1))[:, :, None])
        self.residues.normal_().mul_(dt.sqrt()[..., None, None])

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """λ and R for each channel, (d n), complex, and the skip D, (d)."""
        copies = len(self.D) // len(self.poles)
        poles, residues = (
            torch.view_as_complex(x[:, :, 0].contiguous()).repeat_interleave(copies, 0)
            for x in (self.poles, self.residues)
        )
        return poles, residues, self.D


@register_mixer("modal_hyena")
class ModalHyena(Mixer):
    """Hyena with filters in modal form, whose decoding by a recurrence is exact: the layer of StripedHyena.

    Args:
        d_model: width of input and output.
        state_size: n, complex poles of a filter.
        num_filters: different filters, each for d_model / num_filters channels side by side; one a channel if None.
        short_filter_length: taps of the short filter.
        short_filter_bias: a bias on it.
        n_heads: x_2, x_1 and v lie side by side for each head in ``projections``, as in the published checkpoints with
            32; it changes nothing else.
        dt_min, dt_max: -2 log|λ| starts log-uniform between them.

    Raises:
        ValueError: sizes that do not fit together.

    The names of its weights are those of the published checkpoints, but for the short filter's. Poles, residues and D
    stay float32. Nothing keeps a pole within the unit circle, in the published code neither.
    """

    crosses_in_ops = crosses_with_state = True
    state_class = ModalHyenaState
    residual_projections = ("out_filter_dense",)
    float32_parameters = ("filter.D", "filter.poles", "filter.residues")
    no_weight_decay = ("filter.poles", "filter.residues")

    def __init__(
        self,
        d_model: int,
        *,
        state_size: int = 2,
        num_filters: int | None = None,
        short_filter_length: int = 3,
        short_filter_bias: bool = True,
        n_heads: int = 1,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
    ):
        super().__init__(d_model)
        filters = d_model if num_filters is None else num_filters
        self.check_at_least(1, state_size=state_size, num_filters=filters, n_heads=n_heads)
        self.check_at_least(1, short_filter_length=short_filter_length)
        if d_model % filters:
            raise ValueError(f"ModalHyena: `num_filters` must divide d_model={d_model}; got {num_filters}")
        if d_model % n_heads:
            raise ValueError(f"ModalHyena: `n_heads` must divide d_model={d_model}; got {n_heads}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"ModalHyena: 0 < `dt_min` <= `dt_max` must hold; got {dt_min} and {dt_max}")
        self.state_size, self.n_heads, self.short_filter_length = state_size, n_heads, short_filter_length
        self.projections = Linear(d_model, 3 * d_model)
        self.short_filter = depthwise(3 * d_model, short_filter_length, bias=short_filter_bias)
        self.filter = ModalFilter(d_model, filters, state_size, dt_min, dt_max)
        self.out_filter_dense = Linear(d_model, d_model)
        self._kept: Kept[DiagonalStep] = Kept()

    def initial_state(self, batch_size: int, max_length: int | None = None) -> ModalHyenaState:
        new, wide = self.like(wide=True).new_zeros, self.filter.D.dtype
        return ModalHyenaState(
            conv=new(batch_size, self.short_filter_length - 1, 3 * self.d_model),
            modes=new(batch_size, self.d_model, self.state_size, dtype=wide.to_complex()),
        )

    def mixing_flops(self, context: int) -> float:
        """A token's by recurrence: two a tap of the short filter, 14 for each complex state, the gates and the skip."""
        return self.d_model * (6 * self.short_filter_length + 14 * self.state_size + 4)

    def mix(
        self, x: Tensor, state: ModalHyenaState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, ModalHyenaState | None]:
        before = None if state is None else state.conv
        z, conv = convolve(self.short_filter, self.projections(x), self.short_filter_length, None, before, cu_seqlens)
        x2, x1, v = (part.flatten(2) for part in z.unflatten(-1, (self.n_heads, -1)).chunk(3, dim=-1))  # (b l d)
        y, modes = self._filter()(x1 * v, x2, None if state is None else state.modes, cu_seqlens)
        return self.out_filter_dense(y), None if modes is None else ModalHyenaState(conv, modes)

    def _filter(self) -> DiagonalFilter:
        """The long filters as systems, of which a state counts for its conjugate too: with half of each residue."""
        poles, residues, skip = self.filter()

        def kernel(length: int) -> Tensor:
            # λ = (1 + A/2) / (1 - A/2) has a solution for every pole but -1, where exp(A) has none at 0
            A = 2 * (poles - 1) / (poles + 1)
            return diagonal_kernel(A, 1 - A / 2, residues / 2, torch.ones_like(skip), length, discretization="bilinear")

        def discrete() -> Diagonal:
            return Diagonal(poles.to(torch.complex128), torch.ones_like(poles))

        return DiagonalFilter(
            kernel=kernel,
            discrete=discrete,
            stepper=lambda: self._kept.get(lambda: DiagonalStep.of(discrete()), [self.filter.poles]),
            C=residues / 2,
            D=skip,
        )
