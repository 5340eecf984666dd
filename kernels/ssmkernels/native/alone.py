"""PyTorch's operations on the calling thread alone.

Its other threads spin for milliseconds after each operation that they had a part in, on the cores that the native
library's threads want next: a greedy token's maximum over a vocabulary takes little time itself, and held up the
model's next call.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator

from torch import Tensor

from ssmkernels import native

GRAIN = 2**15  # numbers from which PyTorch shares an operation out
WORTH = 2**22  # simple operations that take less time on one thread than the others' spinning


@contextlib.contextmanager
def alone(x: Tensor, operations: int = 1) -> Iterator[None]:
    """So many simple operations on each number of x, if that is little work on a CPU; on all threads otherwise.

    It holds for the calling thread. Without OpenMP in the library nothing changes.
    """
    little = x.device.type == "cpu" and GRAIN <= x.numel() <= WORTH // operations
    tell = _teller() if little else None
    before = tell(1) if tell is not None else 0
    try:
        yield
    finally:
        if tell is not None:
            tell(before)


@functools.cache
def _teller() -> Callable[[int], int] | None:
    """Sets how many threads OpenMP uses for the calling thread, and returns how many these were; None without it."""
    handle = native.library().handle
    if handle is None or not handle.ssmzoo_openmp():
        return None
    handle.ssmzoo_set_threads.argtypes, handle.ssmzoo_set_threads.restype = [ctypes.c_int], ctypes.c_int
    return handle.ssmzoo_set_threads
