"""H3, "Hungry Hungry Hippos" (Fu, Dao et al. 2022, arXiv 2212.14052, section 3).

Glossary: b batch, l length, d: d_model, p: head_dim, h = d / p heads, n: d_state. For x (b l d)::

    q, k, v = q_proj(x), k_proj(x), v_proj(x)                     (b l d) each
    k̄_t     = Σ_{j<n} S_j k_{t-j} + D_k k_t                       (b l d), the shift SSM
    u_t     = k̄_t v_tᵀ                                            (b l h p p), for each head
    y_t     = 2 Re Σ_{j≥0} C Ā^j B̄ u_{t-j} + D u_t                (b l h p p), the diagonal SSM, one for each head
    out     = output_linear(q_t y_t)                              (b l d)

The shift SSM moves its state on by one place with each token: h_t = shift(h_{t-1}) + B k_t, k̄_t = C h_t. So it is a
convolution with n taps, S_j = Σ_i C_{i+j} B_i, and its state is the last n - 1 of k.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ssmkernels import causal_conv1d, diagonal_kernel, discretize_diagonal, fft_conv
from ssmkernels.core.finite import finite_exp
from ssmzoo.init import log_uniform, starting, wide_dtype
from ssmzoo.linear import Linear
from ssmzoo.lti.diagonal import DiagonalFilter
from ssmzoo.lti.hippo import diagonal
from ssmzoo.lti.kept import Kept
from ssmzoo.lti.recurrence import Diagonal, DiagonalStep
from ssmzoo.mixer import Mixer
from ssmzoo.registry import register_mixer
from ssmzoo.state import State


@dataclasses.dataclass
class H3State(State):
    """What the two systems remember."""

    shift: Tensor  # (s, d_state - 1, d_model), the last k; float32
    ssm: Tensor  # (s, p·p·h, d_state / 2), complex64


class ShiftKernel(nn.Module):
    """The weights of the shift SSM under their published names."""

    def __init__(self, d: int, n: int):
        super().__init__()
        self.B = nn.Parameter(torch.zeros(d, n, dtype=wide_dtype()))
        self.C = nn.Parameter(torch.empty(1, d, n, dtype=wide_dtype()))
        nn.init.ones_(self.B[:, 0])
        nn.init.uniform_(self.C, -(n**-0.5), n**-0.5)

    def forward(self) -> Tensor:
        """S, the weight of each lag: (d n)."""
        n = self.B.shape[1]
        products = F.pad(self.C[0], (0, n)).unfold(1, n, 1)[:, :n]  # (d j i): C_{i+j}
        return (products @ self.B[..., None])[..., 0]


class DiagonalKernel(nn.Module):
    """The weights of a diagonal SSM for each of h heads under their published names."""

    def __init__(self, h: int, n: int, init: str, dt_min: float, dt_max: float):
        super().__init__()
        wide, place = wide_dtype(), torch.get_default_device()
        A = diagonal(init, n)

        def each(x: Tensor) -> nn.Parameter:
            return nn.Parameter(x.to(place, wide).repeat(h, *[1] * x.ndim))

        self.log_dt = nn.Parameter(starting(h, wide, lambda: log_uniform(h, dt_min, dt_max).log()))
        self.inv_A_real, self.A_imag = each((-A.real).log()), each(A.imag)
        self.B = each(torch.view_as_real(torch.ones_like(A)))
        shape = (1, h, n // 2, 2)
        self.C = nn.Parameter(starting(shape, wide, lambda: 0.5**0.5 * torch.randn(shape, dtype=wide)))

    def forward(self, copies: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A, B, C (copies·h n/2), complex, and Δ (copies·h)."""
        A = torch.complex(-finite_exp(self.inv_A_real), self.A_imag)
        maps = (torch.view_as_complex(x) for x in (self.B, self.C[0]))
        A, B, C = (x.repeat(copies, 1) for x in (A, *maps))
        return A, B, C, finite_exp(self.log_dt).repeat(copies)


@register_mixer("h3")
class H3(Mixer):
    """H3: a shift state space on the keys, a diagonal one on key times value, and the query as a gate.

    Args:
        d_model: width of input and output.
        d_state: n, taps of the shift SSM, and states of the diagonal one as n / 2 conjugate pairs.
        head_dim: p; keys and values of a head meet in a p by p outer product, which costs p times the convolutions.
        init: the diagonal of A, ``"lin"`` or ``"inv"`` as in S4D.
        discretization: of the diagonal SSM, ``"bilinear"`` or ``"zoh"``.
        dt_min, dt_max: its step sizes Δ start log-uniform between them.
        lr: the learning rate of A, both B and Δ, which get no weight decay; the optimiser's if None.

    Raises:
        ValueError: sizes that do not fit together.

    The names of its weights are those of the published checkpoints. All of both systems stays float32.
    """

    crosses_in_ops = crosses_with_state = True
    state_class = H3State
    residual_projections = ("output_linear",)

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        head_dim: int = 1,
        init: Literal["lin", "inv"] = "lin",
        discretization: Literal["bilinear", "zoh"] = "bilinear",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        lr: float | None = None,
    ):
        super().__init__(d_model)
        self.check_at_least(1, head_dim=head_dim)
        if d_state < 2 or d_state % 2:
            raise ValueError(f"H3: `d_state` must be positive and even, as pairs; got {d_state}")
        if d_model % head_dim:
            raise ValueError(f"H3: `head_dim` must divide d_model={d_model}; got {head_dim}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"H3: 0 < `dt_min` <= `dt_max` must hold; got {dt_min} and {dt_max}")
        self.check_at_least(0, lr=lr)
        self.d_state, self.head_dim, self.discretization = d_state, head_dim, discretization
        self._kept: Kept[DiagonalStep] = Kept()
        self.q_proj, self.k_proj, self.v_proj, self.output_linear = (Linear(d_model, d_model) for _ in range(4))
        self.ssm_k_kernel = nn.ModuleDict({"kernel": ShiftKernel(d_model, d_state)})
        self.ssm_k_D = nn.Parameter(torch.randn(d_model, dtype=wide_dtype()))
        h = d_model // head_dim
        self.kernel = nn.ModuleDict({"kernel": DiagonalKernel(h, d_state, init, dt_min, dt_max)})
        self.D = nn.Parameter(torch.randn(h, dtype=wide_dtype()))
        systems = [f"kernel.kernel.{name}" for name in ("log_dt", "inv_A_real", "A_imag", "B")]
        self.no_weight_decay = ("ssm_k_kernel.kernel.B", *systems)
        self.learning_rates = {} if lr is None else dict.fromkeys(self.no_weight_decay, float(lr))
        self.float32_parameters = (
            *self.no_weight_decay,
            *("ssm_k_kernel.kernel.C", "kernel.kernel.C", "ssm_k_D", "D"),
        )

    def initial_state(self, batch_size: int, max_length: int | None = None) -> H3State:
        new = self.like(wide=True).new_zeros
        wide = self.D.dtype
        return H3State(
            shift=new(batch_size, self.d_state - 1, self.d_model, dtype=wide),
            ssm=new(batch_size, self.d_model * self.head_dim, self.d_state // 2, dtype=wide.to_complex()),
        )

    def mixing_flops(self, context: int) -> float:
        """A token's by recurrence: two a tap; 18 for each complex state; and the outer product and the gate."""
        return self.d_model * (2 * self.d_state + self.head_dim * (9 * self.d_state + 3))

    def mix(self, x: Tensor, state: H3State | None, cu_seqlens: Tensor | None) -> tuple[Tensor, H3State | None]:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # (b l d)
        shift: ShiftKernel = self.ssm_k_kernel["kernel"]  # type: ignore[assignment]
        k, last = self._shifted(k, shift(), None if state is None else state.shift, cu_seqlens)
        p = self.head_dim
        if p == 1:
            u, gate = k * v, q
        else:
            outer = rearrange(k, "b l (h p) -> b l p 1 h", p=p) * rearrange(v, "b l (h p) -> b l 1 p h", p=p)
            u = outer.flatten(2)  # (b l p·p·h)
            gate = rearrange(q, "b l (h p) -> b l p 1 h", p=p).expand_as(outer).flatten(2)
        y, ssm = self._diagonal()(u, gate, None if state is None else state.ssm, cu_seqlens)
        if p > 1:
            y = y.unflatten(-1, (p, -1)).sum(2)  # the published order of channels: (b l p·h)
        return self.output_linear(y), None if ssm is None or last is None else H3State(last, ssm)

    def kernels(self, length: int) -> tuple[Tensor, Tensor]:
        """What both systems answer to an impulse at the present weights, without their skips; differentiable.

        Args:
            length: taps of the second.

        Returns:
            The shift SSM's, ``(d_model, d_state)``, and the diagonal one's, ``(head_dim · d_model, length)``.
        """
        return self.ssm_k_kernel["kernel"](), self._diagonal().kernel(length)

    def _shifted(
        self, k: Tensor, taps: Tensor, before: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """k (b l d) through the shift SSM with these taps, and the last k if some came in."""
        if before is None:
            return fft_conv(k, taps, self.ssm_k_D, cu_seqlens=cu_seqlens), None
        taps = torch.cat([taps[:, :1] + self.ssm_k_D[:, None], taps[:, 1:]], dim=1)  # the skip is at lag 0
        found = causal_conv1d(k, taps.flip(1), initial_state=before, return_final_state=True, cu_seqlens=cu_seqlens)
        return cast(tuple[Tensor, Tensor], found)

    def _diagonal(self) -> DiagonalFilter:
        """The diagonal SSM for each channel of key times value."""
        copies = self.head_dim**2
        weights: DiagonalKernel = self.kernel["kernel"]  # type: ignore[assignment]
        A, B, C, dt = weights(copies)
        how = self.discretization

        def discrete() -> Diagonal:
            A_bar, B_bar = discretize_diagonal(A, B, dt.double(), discretization=how)
            return Diagonal(A_bar, B_bar.to(B.dtype))

        return DiagonalFilter(
            kernel=lambda length: diagonal_kernel(A, B, C, dt, length, discretization=how),
            discrete=discrete,
            stepper=lambda: self._kept.get(lambda: DiagonalStep.of(discrete()), list(weights.parameters())),
            C=C,
            D=self.D.repeat(copies),
        )
