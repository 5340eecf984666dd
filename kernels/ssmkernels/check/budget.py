"""How far an implementation may be from the truth: a budget that each case computes, and no fixed tolerance.

The truth is the reference in float64 on the very inputs. The budget is the sum of

- twice the error of the reference in the inputs' own dtype;
- a rounding band: ``BAND`` times how far the float64 reference moves when each of its sums, products and functions,
  forward and backward, is off by about one rounding in the precision of sums (Monte Carlo arithmetic: Parker 1997).
  It is wide where any computation must lose digits, such as a difference of nearly equal numbers, and narrow elsewhere.
  Where inputs are half precision, also once how far it moves when they are rounded once more, as a matrix product
  rounds what goes into it;
- one rounding of the result, relative to its largest value.

The error is measured three ways, each against its own budget: the largest, the root mean square, and the median of the
relative error, which sees small values beside large ones.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Another order of the same sums, and other formulas for the same functions, round elsewhere and perhaps more often.
BAND = 4.0

# Operators of PyTorch that round; others move numbers about.
ROUNDS = frozenset(
    """add sub rsub mul div reciprocal neg sum mean prod cumsum mm bmm addmm baddbmm mv dot addmv addcmul addcdiv
exp expm1 log log1p logsumexp softplus softplus_backward sigmoid sigmoid_backward silu silu_backward tanh tanh_backward
sqrt rsqrt pow square sin cos _softmax _softmax_backward_data gelu gelu_backward linalg_vector_norm cumprod
_fft_r2c _fft_c2r _fft_c2c""".split()  # noqa: SIM905 (a list of as many strings is harder to read)
)


@dataclasses.dataclass(frozen=True)
class Truth:
    """One result or gradient as it should be.

    Attributes:
        exact: from the float64 reference.
        peer: from the reference in the inputs' dtype.
        moved: functions that give exact ones from inputs or operations off by one rounding, each with how many such
            movements are allowed.
    """

    exact: Tensor
    peer: Tensor
    moved: Sequence[tuple[float, Callable[[], Tensor]]]

    def used(self, actual: Tensor, *, quick: bool = False) -> float:
        """The error of ``actual``, of the peer's shape and dtype, as a part of what is allowed; over 1 is too much.

        The movements take longest to compute. If ``quick``, none is counted that is not needed to come down to 1: the
        verdict is the same, but the part may really be smaller.
        """
        if self.exact.numel() == 0:
            return 0.0
        peer = distance(self.peer, self.exact)
        counts = peer.isfinite()  # what overflows in this dtype has no right value
        rounding = torch.finfo(self.peer.dtype).eps
        floor = rounding * float(self.exact.abs().nan_to_num(0, 0, 0).max())
        norms = (_largest, floor), (_root_mean_square, floor), (self._median_relative, rounding)
        errors = [norm(torch.where(counts, distance(actual, self.exact), 0)) for norm, _ in norms]
        allowed = [2 * norm(torch.where(counts, peer, 0)) + least for norm, least in norms]
        for times, moved in self.moved:
            if quick and max(map(_part, errors, allowed)) <= 1:
                break
            off = distance(moved(), self.exact)
            allowed = [a + times * norm(off) for a, (norm, _) in zip(allowed, norms, strict=True)]
        return max(map(_part, errors, allowed))

    def worst(self, actual: Tensor) -> tuple[int, ...]:
        """Where ``actual`` is furthest off."""
        error = distance(actual, self.exact)
        return tuple(int(i) for i in torch.unravel_index(error.argmax().cpu(), error.shape))

    def _median_relative(self, error: Tensor) -> float:
        size = self.exact.abs()
        relative = (error / size)[(size > torch.finfo(self.peer.dtype).tiny) & size.isfinite()]
        return float(relative.median()) if relative.numel() else 0.0


@functools.cache
def _rounds(operator: Any) -> bool:
    return operator.overloadpacket.__name__.removesuffix("_") in ROUNDS


class Rounding(TorchDispatchMode):
    """Inside, every result of an operator that rounds is off by a random part, up to ``eps``, of itself."""

    def __init__(self, eps: float, seed: int):
        super().__init__()
        self.eps = eps
        self.seed = seed
        self.generators: dict[torch.device, torch.Generator] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Without the wrapper that keeps compilers out, which takes as long as a small operator."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs) if kwargs else func(*args)
        if _rounds(func) and (result.is_floating_point() or result.is_complex()):
            factor = torch.empty_like(result.real if result.is_complex() else result)
            factor.uniform_(1 - self.eps, 1 + self.eps, generator=self._generator(result.device))
            result.mul_(factor)  # an infinity stays one
        return result

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self.generators[device]


def moved(value: Tensor, eps: float, sign: Callable[..., Tensor]) -> Tensor:
    """``value`` with every number off by the relative size ``eps``, up or down by ``sign(*shape)``."""
    signs = sign(*value.shape).sign().to(value.device, value.real.dtype)  # in float32, 1 + eps may be 1
    return value * (1 + eps * signs)


def distance(actual: Tensor, exact: Tensor) -> Tensor:
    """|actual - exact| in float64; 0 where both are the same infinity or both NaN, ∞ where only one is."""
    actual = actual.to(exact.dtype)
    apart = (actual - exact).abs().nan_to_num(math.inf, math.inf)
    return torch.where((actual == exact) | (actual.isnan() & exact.isnan()), 0, apart)


def differs(a: Tensor, b: Tensor) -> tuple[int, ...] | None:
    """Where two tensors of one shape first differ in a bit that matters; any NaN is as good as another."""
    apart = ~((a == b) | (a.isnan() & b.isnan()))
    return tuple(apart.nonzero()[0].tolist()) if apart.any() else None


def _largest(x: Tensor) -> float:
    return float(x.max())


def _root_mean_square(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _part(error: float, allowed: float) -> float:
    if not math.isfinite(allowed):
        raise ArithmeticError("the budget is not finite: the float64 reference overflows beside a finite value")
    if error == 0:
        return 0.0
    return error / allowed if allowed > 0 else math.inf
