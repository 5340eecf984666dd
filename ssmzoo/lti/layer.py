"""What S4 and S4D share: all of the layer but the form of A."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkernels import fft_conv
from ssmkernels.core.autocast import autocasts
from ssmkernels.core.crossing import crossing
from ssmkernels.core.finite import finite_exp
from ssmkernels.core.names import unknown
from ssmkernels.core.packing import longest, spans
from ssmzoo.init import log_uniform, starting, wide_dtype
from ssmzoo.linear import Linear
from ssmzoo.lti.kept import Kept
from ssmzoo.lti.options import ACTIVATIONS, LTIOptions
from ssmzoo.lti.recurrence import Dense, Diagonal, run_chunk
from ssmzoo.mixer import Mixer
from ssmzoo.state import State

# Where HiPPO has no damping, A's real part starts here: below 0, as its logarithm is what is trained.
LEAST_DAMPING = 1e-4

# The names of the learning rates → the weights that they are for.
RATES = {"A": ("A_log", "A_imag", "P"), "B": ("B",), "C": ("C", "C_reverse"), "dt": ("log_dt",)}


@dataclasses.dataclass
class S4State(State):
    """The system's state, ``(s, d, n)``: one of each conjugate pair, or real where A is."""

    ssm: Tensor


class Stepper(Protocol):
    """A discrete system, one token at a time."""

    def step(self, h: Tensor, u: Tensor) -> Tensor:
        """h (s d n) and one token u (s d) → the state after it."""


class Continuous(NamedTuple):
    """The continuous system of each channel: A = diag(``A``) - P Q*, with Δ of its own; all by channel, ``(d ...)``."""

    A: Tensor  # (d n)
    B: Tensor  # (d n)
    dt: Tensor  # (d)
    P: Tensor  # (d r n), with r = 0 where A is diagonal
    Q: Tensor  # (d r n)


class S4Layer(Mixer):
    """The layer around a linear time-invariant system: convolution, skip, activation, then a gated linear unit.

    A subclass says how the system starts, what its kernel is, and what it is in discrete time.

    Attributes:
        rate: stretches Δ. A model trained at one sampling rate runs at half of it, on every second sample, with 2.0;
            see :func:`set_rate`. It is no weight: what is saved is the option that the layer was made with.
    """

    crosses_in_ops = crosses_with_state = True
    state_class = S4State
    residual_projections = ()
    discretization: str
    has_rate = True
    length_dependent: ClassVar[tuple[str, ...]] = ()  # discretisations whose kernel depends on the whole length

    def __init__(self, d_model: int, options: LTIOptions, *, A: Tensor, B: Tensor, P: Tensor | None):
        o, name = options, type(self).__name__
        super().__init__(d_model)
        self.look_ahead(o.bidirectional)
        o.check(name, d_model)
        d = d_model // (o.bottleneck or 1)
        self.d_inner, self.channels, self.discretization = d, o.channels, o.discretization
        self.rate = float(o.rate)
        self.has_state = o.discretization not in self.length_dependent
        self.activation = o.activation
        self._kept: Kept[Stepper] = Kept()

        place, wide = torch.get_default_device(), wide_dtype()
        dtype = wide.to_complex() if A.is_complex() else wide
        A, B, P = A.to(dtype), B.to(dtype), None if P is None else P.to(dtype)
        n, copies = len(A), o.n_ssm or d
        damping = (-A.real).clamp(min=LEAST_DAMPING).log()
        A, B, damping = (x.to(place).expand(copies, n) for x in (A, B, damping))
        steps = d if o.dt_tie else d * n
        log_dt = starting(steps, wide, lambda: log_uniform(steps, o.dt_min, o.dt_max).log())
        self.log_dt = nn.Parameter(log_dt if o.dt_tie else log_dt.view(d, n))
        self.A_log = nn.Parameter(damping.contiguous())
        self.A_imag = nn.Parameter(A.imag.contiguous()) if A.is_complex() else None
        self.P = None if P is None else _pairs(P.to(place).expand(copies, *P.shape))
        self.B = _pairs(B)
        self.C = _pairs(torch.randn(o.channels * d, n, dtype=A.dtype))
        self.C_reverse = _pairs(torch.randn(o.channels * d, n, dtype=A.dtype)) if o.bidirectional else None
        self.D = nn.Parameter(torch.randn(o.channels * d, dtype=wide))
        self.float32_parameters = tuple(name for name, _ in self.named_parameters(recurse=False))
        self._set_rates(o.lr)

        self.in_proj = None if o.bottleneck is None else Linear(d_model, d)
        self.gate_in = None if o.gate is None else Linear(d_model, o.gate * d)
        self.gate_out = None if o.gate is None else Linear(o.channels * d, o.gate * d)
        self.dropout = nn.Dropout(o.dropout)
        self.out_proj = Linear((o.gate or o.channels) * d, 2 * d_model)

    def kernel(self, system: Continuous, C: Tensor, length: int) -> Tensor:
        """The response to an impulse, ``(d length)``, for C ``(d n)``."""
        raise NotImplementedError

    def discrete(self, system: Continuous) -> Diagonal | Dense:
        """Ā in float64 and B̄ in the weights' precision, for whole chunks."""
        raise NotImplementedError

    def stepper(self, system: Continuous) -> Stepper:
        """The same in the weights' precision, in the form that is cheapest for one token."""
        raise NotImplementedError

    def kernels(self, length: int) -> tuple[Tensor, Tensor | None]:
        """What the layer convolves an input of this length with, at its present weights and rate; differentiable.

        Args:
            length: the number of taps.

        Returns:
            ``(channels·d, length)``, in the precision of A, d being the channels inside: channel i of output c is in
            row c·d + i. Tap t weighs the input t tokens ago. Then the same for what is ahead, if bidirectional, or
            None: tap t there weighs the input t + 1 tokens ahead.

        Raises:
            TypeError, ValueError: length is no int, or below 0.
        """
        ways = [_joined(C, self.A_imag) for C in (self.C, self.C_reverse) if C is not None]
        copies = self.channels * len(ways)
        repeated = Continuous(*(x.repeat(copies, *[1] * (x.ndim - 1)) for x in self._continuous()))
        kernel, *reverse = self.kernel(repeated, torch.cat(ways), length).chunk(len(ways))
        return kernel, reverse[0] if reverse else None

    def initial_state(self, batch_size: int, max_length: int | None = None) -> S4State:
        if not self.has_state and self.causal:
            raise ValueError(
                f"{type(self).__name__}: there is no `initial_state` with `discretization={self.discretization!r}`, "
                "which divides by a sum over the whole length that no chunk knows. Choose 'zoh', its limit for long "
                "sequences"
            )
        self.check_has_state()
        wide = self.A_log.dtype
        dtype = wide if self.A_imag is None else torch.promote_types(wide, torch.complex64)
        return S4State(
            torch.zeros(batch_size, self.d_inner, self.A_log.shape[1], dtype=dtype, device=self.like().device)
        )

    def mixing_flops(self, context: int) -> float:
        """A token's by recurrence, a state and channel: complex product and sum (8) for the decay, each output and each
        way through the low rank, 2 for the input."""
        rank = 0 if self.P is None else self.P.shape[1]
        return self.d_inner * self.A_log.shape[1] * (10 + 8 * self.channels + 16 * rank)

    def mix(self, x: Tensor, state: S4State | None, cu_seqlens: Tensor | None) -> tuple[Tensor, S4State | None]:
        u = x if self.in_proj is None else self.in_proj(x)  # (b l d)
        if state is None:
            return self._output(self._convolve(u, cu_seqlens), x), None
        kind = u.device.type
        if autocasts(kind):
            with torch.autocast(kind, enabled=False):  # states keep their precision
                y, h = self._recur(u, state.ssm, cu_seqlens)
        else:
            y, h = self._recur(u, state.ssm, cu_seqlens)
        return self._output(y, x), S4State(h)

    def _recur(self, u: Tensor, h: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """u (b l d) and the state before (s d n) → y (b l c·d) as of :meth:`_convolve`, the state after."""
        wide, C = self.A_log.dtype, _joined(self.C, self.A_imag).unflatten(0, (self.channels, self.d_inner))  # (c d n)
        if u.shape[1] == 1 and cu_seqlens is None:
            h = self._stepper().step(h, u[:, 0].to(wide))
            y = (C * h[:, None]).sum(-1).flatten(1)  # (b c·d)
            y = (2 * y.real if y.is_complex() else y) + self.D * u[:, 0].repeat(1, self.channels)
            return y[:, None].to(u.dtype), h
        with crossing(None):  # what comes from elsewhere is in the state
            y = self._convolve(u, cu_seqlens).unflatten(-1, C.shape[:2])  # (b l c d)
        system = self.discrete(self._continuous())
        inherited, h = run_chunk(system, C.transpose(0, 1), u.to(wide), h, cu_seqlens)
        return (y + inherited).flatten(2).to(u.dtype), h

    def _convolve(self, u: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """u (b l d) → y (b l c·d) with the skip, before the activation."""
        if cu_seqlens is not None and not self.has_state:  # each sequence has a kernel of its own
            parts = [self._convolve(u[:, time], None) for _, time in spans(cu_seqlens)]
            return torch.cat([u[:, :0].repeat(1, 1, self.channels), *parts], dim=1)
        kernel, reverse = self.kernels(longest(u.shape[1], cu_seqlens))
        u = u.repeat(1, 1, self.channels) if self.channels > 1 else u
        return fft_conv(u, kernel, self.D, kernel_reverse=reverse, cu_seqlens=cu_seqlens)

    def _output(self, y: Tensor, x: Tensor) -> Tensor:
        """y (b l c·d) out of the system, x (b l d_model) into the layer → (b l d_model)."""
        y = ACTIVATIONS[self.activation](y)
        if self.gate_in is not None and self.gate_out is not None:
            y = self.gate_out(y) * self.gate_in(x)
        return F.glu(self.out_proj(self.dropout(y)), dim=-1)

    def _continuous(self) -> Continuous:
        """Where each state has a Δ of its own, Δ ∘ (A h + B u) is another system, with Δ = 1."""
        d = self.d_inner
        A = -finite_exp(self.A_log)
        if self.A_imag is not None:
            A = torch.complex(A, self.A_imag)
        dt = finite_exp(self.log_dt) * self.rate
        P = A.new_zeros(len(A), 0, A.shape[1]) if self.P is None else _joined(self.P, self.A_imag)
        A, B, P = (x.repeat(d // len(x), *[1] * (x.ndim - 1)) for x in (A, _joined(self.B, self.A_imag), P))
        if dt.ndim == 2:
            return Continuous(dt * A, dt * B, torch.ones_like(dt[:, 0]), dt[:, None] * P, P)
        return Continuous(A, B, dt, P, P)

    def _stepper(self) -> Stepper:
        """The system for one token."""
        weights = [w for w in (self.log_dt, self.A_log, self.A_imag, self.P, self.B) if w is not None]
        return self._kept.get(lambda: self.stepper(self._continuous()), weights, self.rate)

    def _set_rates(self, lr: float | Mapping[str, float | None] | None) -> None:
        """``learning_rates`` and ``no_weight_decay``; what has a rate of 0 is not trained."""
        given = lr if isinstance(lr, Mapping) else dict.fromkeys(("A", "B", "dt"), lr)
        self.no_weight_decay = tuple(n for k in ("dt", "A", "B") for n in RATES[k] if n in self.float32_parameters)
        self.learning_rates = {}
        for key, rate in given.items():
            if key not in RATES:
                raise ValueError(f"{type(self).__name__}: " + unknown("name in `lr`", key, RATES))
            if rate is not None and (not isinstance(rate, int | float) or not 0 <= rate < math.inf):
                raise ValueError(f"{type(self).__name__}: `lr` of {key} must be a number >= 0, or None; got {rate!r}")
            for name in RATES[key]:
                if rate is not None and name in self.float32_parameters:
                    self.learning_rates[name] = float(rate)
                    self.get_parameter(name).requires_grad_(rate > 0)


def _pairs(x: Tensor) -> nn.Parameter:
    """Complex weights are stored as (..., 2) real numbers, which every optimiser and file format takes."""
    return nn.Parameter((torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).contiguous())


def _joined(x: Tensor, A_imag: Tensor | None) -> Tensor:
    return x if A_imag is None else torch.view_as_complex(x)
