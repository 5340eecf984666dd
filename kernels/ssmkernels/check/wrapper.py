"""A tensor that has no memory of its own, as quantised and distributed tensors are: to try calls with."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map


class Wrapper(Tensor):
    """Holds another tensor, and runs PyTorch's operators on that."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Wrapper:
        return Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, strides=held.stride())

    def __init__(self, held: Tensor):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map(unwrap, (args, kwargs or {}))
        return tree_map(lambda x: cls(x) if isinstance(x, Tensor) else x, function(*args, **kwargs))


def unwrap(x: Any) -> Any:
    return x.held if isinstance(x, Wrapper) else x


def floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
