"""What an op's results and gradients should be: its reference in double precision, and how far rounding moves it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ssmkernels.check.budget import BAND, Rounding, Truth, moved
from ssmkernels.check.running import is_real_or_complex, run
from ssmkernels.check.spec import Draw, Spec
from ssmkernels.core.validate import HALF


@functools.lru_cache(maxsize=128)  # for the next implementation of the same op: small tensors, all of them
def truths_of(
    spec: Spec, case: tuple[tuple[str, Any], ...], dtype: torch.dtype, device: torch.device, gradients: bool, seed: int
) -> dict[str, Truth]:
    """Every result and gradient of a case as it should be."""
    named = dict(case)
    wide = spec.float32(named)

    def reference(arguments: Mapping[str, Any], noise: float = 0.0) -> dict[str, Tensor]:
        return run(spec, "reference", arguments, gradients=gradients, seed=seed, noise=noise, poison=False).tensors

    def inputs() -> dict[str, Any]:
        return spec.inputs(named, dtype, device, seed)

    @functools.cache
    def rounded_inputs(eps: float) -> dict[str, Tensor]:
        draw = Draw(seed + 1)
        arguments = {
            name: moved(value, eps, draw.normal) if is_real_or_complex(value) and name not in wide else value
            for name, value in _doubled(inputs()).items()
        }
        return reference(arguments, noise=eps)

    @functools.cache
    def rounded_operations(number: int) -> dict[str, Tensor]:
        with Rounding(torch.finfo(torch.float32 if dtype in HALF else dtype).eps, number):
            return reference(_doubled(inputs()))

    def movements(what: str) -> list[tuple[float, Callable[[], Tensor]]]:
        """The quickest first."""
        eps = torch.finfo(dtype).eps
        inputs_once = [(1.0, lambda: rounded_inputs(eps)[what])] if dtype in HALF else []
        return [
            *inputs_once,
            (BAND / 2, lambda: rounded_operations(1)[what]),
            (BAND / 2, lambda: rounded_operations(2)[what]),
        ]

    exact = reference(_doubled(inputs()))
    peer = exact if dtype == torch.float64 else reference(inputs())  # in double precision they are one call
    return {what: Truth(exact[what], peer[what], movements(what)) for what in exact}


def _doubled(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same numbers in double precision."""
    wide = {name: value for name, value in arguments.items() if is_real_or_complex(value)}
    return {**arguments, **{n: v.to(torch.complex128 if v.is_complex() else torch.float64) for n, v in wide.items()}}
