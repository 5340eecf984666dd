"""Checks that are not made again for a call like one that has passed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def once(check: Callable[..., None], *arguments: Any) -> None:
    """Calls ``check(*arguments)``, unless arguments of the same shapes, dtypes, layouts, devices and values passed.

    For checks that look at nothing else of a tensor, in calls so short that the check itself would take the time.
    """
    if torch.compiler.is_compiling():
        return check(*arguments)
    try:
        key = (
            check,
            *[(a.shape, a.dtype, a.layout, a.device) if isinstance(a, Tensor) else (type(a), a) for a in arguments],
        )
        if key in _passed:
            return None
    except (TypeError, RuntimeError):  # an argument without hash, or a nested tensor without shape: none that passes
        return check(*arguments)
    check(*arguments)
    if not all(isinstance(a, _LIGHT) for a in arguments):  # the record would keep an object such as a mask alive
        return None
    if len(_passed) >= MOST_PASSED:
        _passed.clear()
    _passed.add(key)
    return None


MOST_PASSED = 4096
_LIGHT = (Tensor, int, float, str, tuple, type(None))

_passed: set[tuple[Any, ...]] = set()
