"""What the backward pass computes again instead of keeping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Again:
    """Inside ``with``, autograd keeps no tensor that ``leave`` was told of: ``compute()`` gives them once more.

    ``compute`` returns them in the order of ``leave``. They must live until the end of ``with``, as they are known by
    their memory. Does nothing where it is not active, nor under a compiler, which chooses what to compute again itself.
    """

    def __init__(self, active: bool, compute: Callable[[], Sequence[Tensor]]):
        self.active = active and not torch.compiler.is_compiling()
        self.compute = compute
        self.places: dict[int, int] = {}  # address → position
        self.found: Sequence[Tensor] = ()
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack) if self.active else None

    def leave(self, t: Tensor) -> Tensor:
        if self.active:
            self.places[t.untyped_storage().data_ptr()] = len(self.places)
        return t

    def __enter__(self) -> Again:
        if self.hooks is not None:
            self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self.hooks is not None:
            self.hooks.__exit__(*error)

    def _pack(self, t: Tensor) -> Any:
        place = self.places.get(t.untyped_storage().data_ptr())
        return t if place is None or t.numel() == 0 else (place, t.size(), t.stride(), t.storage_offset())

    def _unpack(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if not self.found:
            with torch.no_grad():
                self.found = self.compute()
        place, *layout = kept
        return self.found[place].as_strided(*layout)
