"""Memory of the CPU: large pages under large tensors, and freed memory that stays at hand.

What the system gives out is zeroed first, page by page, as it is touched; on a virtual machine the host may have to
find it before. For kernels that are bound by memory that takes as long as their work.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
from collections.abc import Callable

from torch import Tensor

MAPPED = 2**22  # bytes from which large pages are worth a call: two of them
PAGE = mmap.PAGESIZE
MADV_HUGEPAGE = 14  # Linux
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # glibc
SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")


def keep_memory() -> bool:
    """Lets the process keep what it frees, for the next call: for work that asks for the same memory again and again.

    A step of training does; the commands `ssmzoo train`, `generate` and `bench` call this. By default glibc gives large
    blocks back to the system when they are freed, every block of more than 32 MiB at once, and each layer's activations
    are faulted in again: a fifth of a Mamba layer's forward pass. After this the process stays as large as it has ever
    been, and a little more, as blocks of many sizes leave gaps. Call it at the start: blocks that are there already
    stay mapped. Nothing else in this library changes the allocator's settings.

    Returns:
        Whether it will. Not where the C library is another than glibc, nor where somebody has set glibc's thresholds
        from outside, by ``MALLOC_TRIM_THRESHOLD_`` and its like or in ``GLIBC_TUNABLES``.
    """
    libc = _glibc()
    tuned = any(name in os.environ for name in SETTINGS) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if libc is None or tuned:
        return False
    libc.mallopt.restype, libc.mallopt.argtypes = ctypes.c_int, (ctypes.c_int, ctypes.c_int)
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 2**26))  # map nothing, trim never, grow by 64 MiB
    done = [libc.mallopt(*setting) for setting in settings]
    return all(done)


def large_pages(*tensors: Tensor | None) -> None:
    """Asks for large pages under large tensors that nobody has written to yet; does nothing where there are none.

    The allocator maps such memory afresh for many a call. In pages of 4 KiB the system's work on the first touch
    takes longer than a kernel that is bound by memory; in those of 2 MiB a fraction of it.
    """
    advise = _madvise()
    for x in tensors:
        if advise is not None and x is not None and x.nbytes >= MAPPED and x.device.type == "cpu":
            start = -(-x.data_ptr() // PAGE) * PAGE
            advise(start, (x.data_ptr() + x.nbytes - start) // PAGE * PAGE, MADV_HUGEPAGE)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if libc is not None and hasattr(libc, "gnu_get_libc_version") else None
