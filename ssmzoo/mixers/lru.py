"""The linear recurrent unit (Orvieto et al. 2023, arXiv 2303.06349, sections 3 and 4).

Glossary: b batch, l length, d: d_model, n: d_hidden, states. For u (b l d)::

    λ   = exp(-exp(ν) + i exp(θ))         (n), eigenvalues within the unit circle, by nu_log and theta_log
    γ   = exp(gamma_log)                  (n), starts at √(1 - |λ|²), so that h neither grows nor shrinks with |λ|
    h_t = λ h_{t-1} + γ (B u_t)           (b l n), complex; B (n d)
    y_t = Re(C h_t) + D u_t               (b l d), C (d n), D (d)
    out = out1(gelu(y)) σ(out2(gelu(y)))  (b l d)

|λ| starts such that λ is uniform on the ring r_min ≤ |λ| ≤ r_max, within the phases [0, max_phase].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ssmkernels.core.finite import finite_exp
from ssmkernels.core.validate import precision
from ssmzoo.init import wide_dtype
from ssmzoo.mixers._diagonal_system import Activation, DiagonalSystem
from ssmzoo.registry import register_mixer

EIGENVALUES = ("nu_log", "theta_log", "gamma_log")


@register_mixer("lru")
class LRU(DiagonalSystem):
    """The linear recurrent unit: a complex diagonal recurrence with stable eigenvalues, then a gated linear unit.

    Args:
        d_model: width of input and output.
        d_hidden: n, complex states; d_model if None.
        r_min, r_max: the absolute values of the eigenvalues start between them.
        max_phase: their phases start uniform in [0, max_phase]; small ones for long sequences.
        activation: after the system, ``"full_glu"``, ``"half_glu1"``, ``"half_glu2"``, ``"gelu"`` or ``"none"``; see
            :class:`~ssmzoo.mixers._diagonal_system.DiagonalSystem`.
        dropout: after each GELU and at the end.
        bidirectional: adds outputs of the states from the end, by a second C; then it is not causal and has no state.
        lr: learning rate of ν, θ, γ and B, which get no weight decay; the optimiser's if None.

    ν, θ and γ stay float32.
    """

    float32_parameters = EIGENVALUES
    no_weight_decay = (*EIGENVALUES, "B_re", "B_im")
    nu_log: Tensor  # (n), as the other two
    theta_log: Tensor
    gamma_log: Tensor

    def __init__(
        self,
        d_model: int,
        *,
        d_hidden: int | None = None,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 6.28,
        activation: Activation = "full_glu",
        dropout: float = 0.0,
        bidirectional: bool = False,
        lr: float | None = None,
    ):
        n = d_model if d_hidden is None else d_hidden
        super().__init__(d_model, n, activation, dropout, bidirectional)
        self.check_at_least(1, d_hidden=n)
        if not 0 <= r_min < r_max <= 1:
            raise ValueError(f"LRU: 0 <= `r_min` < `r_max` <= 1 must hold; got {r_min} and {r_max}")
        if not 0 < max_phase < math.inf:
            raise ValueError(f"LRU: `max_phase` must be above 0; got {max_phase}")
        if lr is not None:
            self.check_at_least(0, lr=lr)
            self.learning_rates = dict.fromkeys(self.no_weight_decay, lr)
        self.r_min, self.r_max, self.max_phase = r_min, r_max, max_phase
        for name in EIGENVALUES:
            self.register_parameter(name, nn.Parameter(torch.empty(n, dtype=wide_dtype())))
        for part in ("re", "im"):
            self.register_parameter(f"B_{part}", nn.Parameter(torch.empty(n, d_model)))
            for C in ("C", "C2")[: 1 + bidirectional]:
                self.register_parameter(f"{C}_{part}", nn.Parameter(torch.empty(d_model, n)))
        self.D = nn.Parameter(torch.empty(d_model))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The ring of eigenvalues; B of variance 1/d and C of 2/n, counting both parts; D of variance 1."""
        if self.nu_log.is_meta:
            return
        u = torch.rand_like(self.nu_log)
        # Away from 0 and 1: of |λ| = 0 the logarithm is infinite, and so is that of γ at |λ| = 1.
        square = (u * (self.r_max**2 - self.r_min**2) + self.r_min**2).clamp(1e-6, 1 - 1e-6)
        self.nu_log.copy_(torch.log(-0.5 * torch.log(square)))
        self.theta_log.copy_(torch.log(self.max_phase * torch.rand_like(u).clamp(min=1e-6)))
        self.gamma_log.copy_(0.5 * torch.log1p(-square))
        for name, weight in self.named_parameters(recurse=False):
            if name.startswith("B"):
                weight.normal_(std=(2 * self.d_model) ** -0.5)
            elif name.startswith("C"):
                weight.normal_(std=self.n**-0.5)
        self.D.normal_()

    def system(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        size, phase = torch.exp(-finite_exp(self.nu_log)), torch.exp(self.theta_log)
        decay = torch.complex(size * torch.cos(phase), size * torch.sin(phase))
        C = [self._complex(name) for name in ("C", "C2")[: 1 + self.bidirectional]]
        return decay, torch.exp(self.gamma_log)[:, None] * self._complex("B"), C

    @property
    def skip(self) -> Tensor:
        return self.D

    def _complex(self, name: str) -> Tensor:
        real, imaginary = getattr(self, f"{name}_re"), getattr(self, f"{name}_im")
        wide = precision(real)
        return torch.complex(real.to(wide), imaginary.to(wide))
