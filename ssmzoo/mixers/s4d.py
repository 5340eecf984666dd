"""S4D, the diagonal structured state space (Gu, Gupta, Goel and Ré 2022, arXiv 2206.11893)."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkernels import diagonal_kernel, discretize_diagonal, fft_conv
from ssmkernels.packing import spans
from ssmzoo.mixers._base import Mixer
from ssmzoo.mixers._init import log_uniform
from ssmzoo.registry import register_mixer
from ssmzoo.state import State

BLOCK = 256  # tokens that take part in one step of the recurrence over blocks, when there is a state


@dataclasses.dataclass
class S4DState(State):
    """The diagonal system's state, ``(s, d_model, n)``, complex unless A is real."""

    ssm: Tensor


@register_mixer("s4d")
class S4D(Mixer):
    """Diagonal linear time-invariant state space, a long convolution by FFT; then GELU and a gated linear unit.

    Args:
        d_model: width of input and output; each channel has a system of its own.
        d_state: size of each channel's state, as d_state / 2 conjugate pairs (d_state numbers for ``init="real"``).
        init: the diagonal of A (n = 0, 1, ...): ``"lin"`` -1/2 + iπn, ``"inv"`` -1/2 + i (N/π)(N/(2n+1) - 1) with
            N = d_state, ``"legs"`` the eigenvalues of the normal part of HiPPO-LegS, ``"real"`` -(n + 1).
        dt_min, dt_max: the step sizes start log-uniform between them.
        discretization: ``"zoh"`` or ``"bilinear"``.
        dropout: after the GELU.
        bidirectional: adds a kernel that looks ahead; then it is not causal and has no state.
        lr: learning rate of A, B and the step sizes, which get no weight decay.
    """

    state_class = S4DState
    residual_projections = ()

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        init: Literal["legs", "lin", "inv", "real"] = "legs",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        discretization: Literal["zoh", "bilinear"] = "zoh",
        dropout: float = 0.0,
        bidirectional: bool = False,
        lr: float = 0.001,
    ):
        super().__init__(d_model)
        if d_state < 1 or (init != "real" and d_state % 2):
            raise ValueError(f"S4D: `d_state` must be positive, and even unless init='real'; got {d_state}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"S4D: 0 < `dt_min` <= `dt_max` must hold; got {dt_min} and {dt_max}")
        self.discretization = discretization
        self.causal = not bidirectional
        A = diagonal(init, d_state).to(torch.get_default_device())  # (n)
        n = len(A)
        self.log_dt = nn.Parameter(log_uniform(d_model, dt_min, dt_max).log())
        self.A_log = nn.Parameter((-A.real).log().repeat(d_model, 1))
        self.A_imag = nn.Parameter(A.imag.repeat(d_model, 1)) if A.is_complex() else None
        self.B = self._pairs(torch.ones(d_model, n, dtype=A.dtype))
        self.C = self._pairs(torch.randn(d_model, n, dtype=A.dtype))
        self.C_reverse = self._pairs(torch.randn(d_model, n, dtype=A.dtype)) if bidirectional else None
        self.D = nn.Parameter(torch.randn(d_model))
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(d_model, 2 * d_model)
        self.float32_parameters = tuple(name for name, _ in self.named_parameters(recurse=False))
        self.no_weight_decay = tuple(n for n in ("log_dt", "A_log", "A_imag", "B") if n in self.float32_parameters)
        self.learning_rates = dict.fromkeys(self.no_weight_decay, lr)

    def initial_state(self, batch_size: int, max_length: int | None = None) -> S4DState:
        dtype = self.A_log.dtype if self.A_imag is None else torch.promote_types(self.A_log.dtype, torch.complex64)
        return S4DState(torch.zeros(batch_size, *self.A_log.shape, dtype=dtype, device=self.A_log.device))

    def mixing_flops(self, context: int) -> float:
        """Eighteen a state and channel: a complex product and sum (8) each for decay and output, 2 for the input."""
        return self.d_model * 18 * self.A_log.shape[1]

    def mix(self, x: Tensor, state: S4DState | None, cu_seqlens: Tensor | None) -> tuple[Tensor, S4DState | None]:
        A, B, C, dt = self._system()
        if state is None:
            kernel, reverse = self._kernel(x.shape[1], A, B, C, dt)
            y = fft_conv(x, kernel, self.D, kernel_reverse=reverse, cu_seqlens=cu_seqlens)
            return self._output(y), None
        A_bar, B_bar = discretize_diagonal(A, B, dt, discretization=self.discretization)
        if cu_seqlens is None:
            y, h = self._with_state(x, state.ssm, A_bar, B_bar, C)
            return self._output(y), S4DState(h)
        ys, hs = [x[:, :0]], [state.ssm[:0]]
        for i, time in spans(cu_seqlens):
            y, h = self._with_state(x[:, time], state.ssm[i : i + 1], A_bar, B_bar, C)
            ys.append(y)
            hs.append(h)
        return self._output(torch.cat(ys, dim=1)), S4DState(torch.cat(hs))

    def _with_state(self, u: Tensor, h: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        """u (b l d) from the state h (b d n) on, block by block → y (b l d) before GELU, the state after.

        h_{t+j} = Ā^{j+1} h_{t-1} + Σ_{i≤j} Ā^{j-i} B̄ u_{t+i}
        """
        if u.shape[1] == 1:
            h = A * h + B * u[:, 0, :, None]
            y = self._real((h * C).sum(-1)) + self.D * u[:, 0]
            return y[:, None].to(u.dtype), h
        length = min(BLOCK, u.shape[1])
        powers = torch.cat([torch.ones_like(A)[..., None], A[..., None].expand(*A.shape, length)], -1).cumprod(-1)
        ys = [u[:, :0]]
        for block in u.split(BLOCK, dim=1) if length else ():
            t = block.shape[1]
            kernel = self._real(torch.einsum("dn,dnt->dt", C * B, powers[..., :t]))
            inherited = self._real(torch.einsum("bdn,dn,dnt->btd", h, C, powers[..., 1 : t + 1]))
            ys.append((fft_conv(block, kernel, self.D) + inherited).to(u.dtype))
            taken = torch.einsum("btd,dnt->bdn", block.to(powers.dtype), powers[..., :t].flip(-1))
            h = powers[..., t] * h + B * taken
        return torch.cat(ys, dim=1), h

    def _output(self, y: Tensor) -> Tensor:
        return F.glu(self.out_proj(self.dropout(F.gelu(y))), dim=-1)

    def _system(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A, B, C (d n) and dt (d)."""
        A = -torch.exp(self.A_log)
        if self.A_imag is not None:
            A = torch.complex(A, self.A_imag)
        return A, self._joined(self.B), self._joined(self.C), torch.exp(self.log_dt)

    def _kernel(self, length: int, A: Tensor, B: Tensor, C: Tensor, dt: Tensor) -> tuple[Tensor, Tensor | None]:
        kernel = diagonal_kernel(A, B, C, dt, length, discretization=self.discretization)
        if self.C_reverse is None:
            return kernel, None
        C = self._joined(self.C_reverse)
        return kernel, diagonal_kernel(A, B, C, dt, length, discretization=self.discretization)

    def _pairs(self, x: Tensor) -> nn.Parameter:
        """Complex weights are stored as (..., 2) real numbers, which every optimiser and file format takes."""
        return nn.Parameter(torch.view_as_real(x).contiguous() if x.is_complex() else x)

    def _joined(self, x: Tensor) -> Tensor:
        return x if self.A_imag is None else torch.view_as_complex(x)

    def _real(self, x: Tensor) -> Tensor:
        return 2 * x.real if x.is_complex() else x  # each entry stands for itself and its conjugate


def diagonal(init: str, d_state: int) -> Tensor:
    """The diagonal of A, ``(d_state / 2)`` complex64 with positive imaginary parts, or ``(d_state)`` float32 for
    "real".

    S4D (arXiv 2206.11893), section 4: S4D-LegS, S4D-Inv (equation 8), S4D-Lin (equation 9), S4D-Real.
    """
    if init == "real":
        return -(torch.arange(d_state, dtype=torch.float32, device="cpu") + 1)
    n = torch.arange(d_state // 2, dtype=torch.float64, device="cpu")
    if init == "lin":
        imaginary = math.pi * n
    elif init == "inv":
        imaginary = d_state / math.pi * (d_state / (2 * n + 1) - 1)
    else:
        # HiPPO-LegS plus its rank-one term is -1/2 I + S with S skew-symmetric: eigenvalues -1/2 ± i·imaginary.
        root = torch.sqrt(2 * torch.arange(d_state, dtype=torch.float64, device="cpu") + 1)
        skew = torch.tril(root[:, None] * root / 2, -1)
        imaginary = torch.linalg.eigvalsh(1j * (skew.T - skew))[d_state // 2 :]
    return torch.complex(torch.full_like(imaginary, -0.5), imaginary).to(torch.complex64)
