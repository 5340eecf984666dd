"""S5 (Smith, Warrington and Linderman 2023, arXiv 2208.04933, sections 3 and 4).

Glossary: b batch, l length, d: d_model (H in the paper), n: states: d_state (P in the paper), or half of them where one
stands for a conjugate pair. For u (b l d)::

    h'(t) = Λ h(t) + B̃ u(t)              (n), complex: one system for all channels; B̃ = V⁻¹B (n d)
    Λ̄, B̄  = Λ and B̃ in discrete time     at a step Δ (n) for each state, by zero-order hold or the bilinear rule
    h_t   = Λ̄ h_{t-1} + B̄ u_t            (b l n)
    y_t   = 2 Re(C̃ h_t) + D u_t          (b l d), C̃ = C V (d n), D (d); Re alone where all states are kept
    out   = gelu(y) σ(out2(gelu(y)))     (b l d)

Λ starts as the eigenvalues, and V as the eigenvectors, of a block-diagonal matrix: in each block the normal part of the
HiPPO-LegS matrix (:mod:`ssmzoo.lti.hippo`).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from ssmkernels import discretize_diagonal
from ssmkernels.core.finite import finite_exp
from ssmzoo.init import log_uniform, starting, wide_dtype
from ssmzoo.lti.hippo import nplr
from ssmzoo.mixers._diagonal_system import Activation, DiagonalSystem, complex_of
from ssmzoo.registry import register_mixer

TRUNCATED = 0.87962566103423978  # standard deviation of the standard normal distribution cut off at ±2


@register_mixer("s5")
class S5(DiagonalSystem):
    """S5: one complex diagonal state space for all channels, run as a recurrence; then a gated linear unit.

    Args:
        d_model: width of input and output.
        d_state: P, states before the conjugate ones are left out.
        blocks: of the HiPPO matrix that it starts from; each has d_state / blocks states, an even number.
        C_init: ``"trunc_standard_normal"``, C of variance 1/d_state, cut off at two deviations, then C̃ = C V;
            ``"lecun_normal"``, the same at variance 1/(d_model d_state); ``"complex_normal"``, C̃ of variance 1 itself.
        discretization: ``"zoh"`` or ``"bilinear"``.
        conj_sym: whether one of each conjugate pair of states is kept.
        clip_eigs: keeps the real parts of Λ at most -1e-4, so that the system is stable whatever training does.
        bidirectional: adds outputs of the states from the end, by a second C; then it is not causal and has no state.
        step_rescale: stretches Δ: the spacing of the inputs over that for which the layer is made, or was trained. The
            attribute ``rate`` holds it and may change at any time, see :func:`ssmzoo.set_rate`.
        dt_min, dt_max: Δ starts log-uniform between them.
        activation: after the system, ``"full_glu"``, ``"half_glu1"``, ``"half_glu2"``, ``"gelu"`` or ``"none"``; see
            :class:`~ssmzoo.mixers._diagonal_system.DiagonalSystem`.
        dropout: after each GELU and at the end.
        opt_config: which weights get ``lr`` and no weight decay. ``"standard"``: Λ, Δ and B. ``"BandCdecay"``: the
            same, but B with weight decay. ``"BfastandCdecay"``: Λ and Δ alone. ``"noBCdecay"``: C and D as well.
        dt_global: leaves Δ to the optimiser.
        lr: the learning rate of those weights; the optimiser's if None.

    Λ and Δ stay float32.
    """

    float32_parameters = ("Lambda_re", "Lambda_im", "log_step")
    has_rate = True

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 256,
        blocks: int = 8,
        C_init: Literal["trunc_standard_normal", "lecun_normal", "complex_normal"] = "trunc_standard_normal",
        discretization: Literal["zoh", "bilinear"] = "zoh",
        conj_sym: bool = True,
        clip_eigs: bool = False,
        bidirectional: bool = False,
        step_rescale: float = 1.0,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        activation: Activation = "half_glu1",
        dropout: float = 0.0,
        opt_config: Literal["standard", "BandCdecay", "BfastandCdecay", "noBCdecay"] = "standard",
        dt_global: bool = False,
        lr: float | None = 0.001,
    ):
        super().__init__(d_model, d_state // 2 if conj_sym else d_state, activation, dropout, bidirectional)
        self.check_at_least(1, d_state=d_state, blocks=blocks)
        if d_state % (2 * blocks):
            raise ValueError(f"S5: `blocks` must divide d_state={d_state} into even sizes; got {blocks}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"S5: 0 < `dt_min` <= `dt_max` must hold; got {dt_min} and {dt_max}")
        if not 0 < step_rescale < math.inf:
            raise ValueError(f"S5: `step_rescale` must be above 0; got {step_rescale}")
        self.twice, self.clip_eigs, self.discretization, self.rate = conj_sym, clip_eigs, discretization, step_rescale
        Lambda, V = hippo_blocks(d_state, blocks, conj_sym)
        Lambda, V = (t.to(wide_dtype().to_complex()) for t in (Lambda, V))
        Lambda = Lambda.to(torch.get_default_device())
        self.Lambda_re, self.Lambda_im = nn.Parameter(Lambda.real.clone()), nn.Parameter(Lambda.imag.clone())
        n, wide = self.n, wide_dtype()
        log_step = starting((n, 1), wide, lambda: log_uniform(n, dt_min, dt_max).log()[:, None])
        self.log_step = nn.Parameter(log_step)

        def vectors() -> Tensor:
            return V.to(torch.get_default_device())

        def new_B() -> Tensor:
            return vectors().mH @ lecun((d_state, d_model), d_state).to(V.dtype)

        def new_C() -> Tensor:
            if C_init == "complex_normal":
                return torch.randn(d_model, self.n, dtype=V.dtype)
            fan = d_state if C_init == "trunc_standard_normal" else d_state * d_model
            return torch.complex(*(lecun((d_model, d_state), fan) for _ in range(2))) @ vectors()

        self.B = _pairs(starting((n, d_model), V.dtype, new_B))  # (n d 2)
        self.outputs = ("C1", "C2") if bidirectional else ("C",)
        for name in self.outputs:  # (d n 2)
            self.register_parameter(name, _pairs(starting((d_model, n), V.dtype, new_C)))
        self.D = nn.Parameter(torch.randn(d_model))
        self._set_rates(opt_config, dt_global, lr)

    def system(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        damping = self.Lambda_re.clamp(max=-1e-4) if self.clip_eigs else self.Lambda_re
        Lambda = torch.complex(damping, self.Lambda_im)[:, None]  # (n 1): each state has a step of its own
        step = self.rate * finite_exp(self.log_step[:, 0])
        decay, gain = discretize_diagonal(Lambda, torch.ones_like(Lambda), step, discretization=self.discretization)
        return decay[:, 0], gain * complex_of(self.B), [complex_of(getattr(self, name)) for name in self.outputs]

    @property
    def skip(self) -> Tensor:
        return self.D

    def _set_rates(self, opt_config: str, dt_global: bool, lr: float | None) -> None:
        """``learning_rates`` and ``no_weight_decay``."""
        slow = ["Lambda_re", "Lambda_im", *([] if dt_global else ["log_step"])]
        slow += ["B"] if opt_config in ("standard", "noBCdecay") else []
        slow += [*self.outputs, "D"] if opt_config == "noBCdecay" else []
        self.no_weight_decay = tuple(slow)
        if lr is not None:
            self.check_at_least(0, lr=lr)
            self.learning_rates = dict.fromkeys([*slow, *(["B"] if opt_config == "BandCdecay" else [])], lr)


def hippo_blocks(d_state: int, blocks: int, conj_sym: bool) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``(n)`` and eigenvectors ``(d_state n)`` of ``blocks`` HiPPO-N blocks, complex128."""
    block = nplr("legs", d_state // blocks)
    Lambda, V = block.Lambda, block.V
    if not conj_sym:
        Lambda, V = torch.cat([Lambda, Lambda.conj()]), torch.cat([V, V.conj()], dim=1)
    return Lambda.repeat(blocks), torch.block_diag(*[V] * blocks)


def lecun(shape: tuple[int, ...], fan_in: int) -> Tensor:
    """Normal of variance 1/fan_in, cut off at two deviations of the distribution before the cut."""
    weight = nn.init.trunc_normal_(torch.empty(shape, dtype=wide_dtype()), a=-2.0, b=2.0)
    return weight / (TRUNCATED * math.sqrt(fan_in))


def _pairs(x: Tensor) -> nn.Parameter:
    """(...) complex → (..., 2) in the default dtype, which every optimiser and file format takes."""
    return nn.Parameter(torch.view_as_real(x.resolve_conj()).to(torch.get_default_dtype()).contiguous())
