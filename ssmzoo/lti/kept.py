"""What decoding makes of a mixer's weights once, and not for every token."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Kept(Generic[T]):
    """A value made from weights, kept as long as every weight has the value that it was made from.

    To compare values would make a GPU wait, and a compiler cannot; there, where gradients are wanted, and where a
    weight is quantised, sharded or elsewhere, the value is made for each call.

    Attributes:
        value: what is kept; None before the first call that may keep it.
    """

    def __init__(self) -> None:
        self.value: T | None = None
        self._key: Hashable = None
        self._weights: list[Tensor] = []

    def get(self, make: Callable[[], T], weights: Sequence[Tensor], key: Hashable = None) -> T:
        """``make()``, or what it gave the last time if it was for equal weights and an equal key."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not all(map(_comparable, weights)):
            return make()
        if self.value is not None and key == self._key and all(map(_same, weights, self._weights)):
            return self.value
        self.value, self._key, self._weights = make(), key, [w.clone() for w in weights]
        return self.value


def _comparable(a: Tensor) -> bool:
    return type(a) in (Tensor, torch.nn.Parameter) and a.device.type == "cpu"


def _same(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)
