"""Memory of the CPU: large pages under large tensors, and freed memory that stays at hand.

What the system gives out is zeroed first, page by page, as it is touched; on a virtual machine the host may have to
find it before. For kernels that are bound by memory that takes as long as their work.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import sys
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

MAPPED = 2**22  # bytes from which large pages are worth a call: two of them
PAGE = mmap.PAGESIZE
MADV_HUGEPAGE = 14  # Linux
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4  # glibc
KEEPING = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 2**26))  # map nothing, trim never, grow by 64 MiB
# What glibc comes to by itself: after it has freed a block of 32 MiB it maps no smaller ones.
USUAL = ((M_MMAP_MAX, 2**16), (M_MMAP_THRESHOLD, 2**25), (M_TRIM_THRESHOLD, 2**26), (M_TOP_PAD, 2**17))
APART = ((M_MMAP_MAX, 2**16), (M_MMAP_THRESHOLD, 2**17), (M_TOP_PAD, 2**17))  # map every block of 128 KiB and more
SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")

_kept = False  # whether keep_memory took effect
_apart: set[object] = set()  # one for each block of code under blocks_apart that has not ended, in whatever thread
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_apart.clear)  # the threads that would end them are not in the child


def keep_memory() -> bool:
    """Lets the process keep what it frees, for the next call: for work that asks for the same memory again and again.

    A step of training does; the commands `ssmzoo train`, `generate` and `bench` call this. By default glibc gives large
    blocks back to the system when they are freed, every block of more than 32 MiB at once, and each layer's activations
    are faulted in again: a fifth of a Mamba layer's forward pass. After this the process stays as large as it has ever
    been, and a little more, as blocks of many sizes leave gaps. Call it at the start: blocks that are there already
    stay mapped. Nothing else in this library changes the allocator's settings, but for :func:`blocks_apart` while
    memory is measured, and after this function while weights are loaded.

    Returns:
        Whether it will. Not where the C library is another than glibc, nor where somebody has set glibc's thresholds
        from outside, by ``MALLOC_TRIM_THRESHOLD_`` and its like or in ``GLIBC_TUNABLES``.
    """
    global _kept
    _kept = _tunable() and _tell(KEEPING)
    return _kept


@contextlib.contextmanager
def blocks_apart(only_if_kept: bool = False) -> Iterator[None]:
    """Maps large blocks one by one meanwhile, where glibc's settings are ours to change.

    For work that frees large blocks while it collects small ones, as under a profiler. Otherwise the small ones settle
    in the gaps of the large ones, the next large one no longer fits, and the process grows by each that it ever asks
    for. What :func:`keep_memory` kept goes back to the system first, as blocks that fit in there would not be mapped.
    The settings are the process's: where calls are nested, or overlap in several threads, the last to end puts them
    back.

    Args:
        only_if_kept: do nothing unless :func:`keep_memory` took effect.
    """
    if only_if_kept and not _kept:
        yield
        return
    this = object()
    _apart.add(this)
    apart = _tunable() and _tell(APART)
    if apart and _kept:
        _trim()
    try:
        yield
    finally:
        _apart.discard(this)
        if apart and not _apart:
            _tell(KEEPING if _kept else USUAL)


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


def _tunable() -> bool:
    """Whether the C library is glibc, and nobody has set its thresholds from outside."""
    tuned = any(name in os.environ for name in SETTINGS) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    return _glibc() is not None and not tuned


def _tell(settings: Sequence[tuple[int, int]]) -> bool:
    libc = _glibc()
    assert libc is not None
    libc.mallopt.restype, libc.mallopt.argtypes = ctypes.c_int, (ctypes.c_int, ctypes.c_int)
    return all(libc.mallopt(*setting) for setting in settings)


def _trim() -> None:
    libc = _glibc()
    assert libc is not None
    libc.malloc_trim.restype, libc.malloc_trim.argtypes = ctypes.c_int, (ctypes.c_size_t,)
    libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if libc is not None and hasattr(libc, "gnu_get_libc_version") else None
