"""Large pages under memory that is in use, such as the weights of a model that decodes.

A token reads each weight once, and in pages of 4 KiB the machine has to find out every 64 lines where the next page
lies. In those of 2 MiB a product of one row, which memory bounds, reads more in a second.
:func:`ssmkernels.core.memory.large_pages` asks for them before memory is touched. Here they are put under what is
there already, which the system copies; no address changes.
"""

from __future__ import annotations

import array
import ctypes
import errno
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from ssmkernels.core.memory import MADV_HUGEPAGE, MAPPED, PAGE

MADV_COLLAPSE = 25  # Linux, since 6.1
SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
MAPS, TABLE = Path("/proc/self/maps"), Path("/proc/self/pagemap")
ENTRY = 8  # bytes of the table for each page
# Bits of an entry: the page is there, no other process has it, it is of a file or of shared memory, it is swapped out.
PRESENT, ALONE, OF_FILE, SWAPPED = 1 << 63, 1 << 56, 1 << 61, 1 << 62

Spans = frozenset[tuple[int, int]]  # where memory begins and ends


class Blocks:
    """Memory, block by block of a large page's size, as it comes into large pages.

    Only blocks of which at least half is asked for, in memory that is private to the process and of no file: what is
    mapped from files or shared with other processes stays as it is. So do pages that a forked process has in common
    with this one, as each would get a copy, and blocks that are there in part. Memory therefore never grows.

    Args:
        spans: as :func:`spans_of` gives them.
    """

    def __init__(self, spans: Spans):
        size = _size()
        self._waiting = _private(_covered(spans, size), size) if size else []
        self._waiting.reverse()
        self._lock = threading.Lock()  # two threads may decode with one model

    def __len__(self) -> int:
        """How many are still to come."""
        return len(self._waiting)

    def collapse(self, most: int) -> int:
        """Puts large pages under the next blocks, at most so many; returns under how many there are some now.

        If the system has none to give, or cannot do it, no block waits any longer. While another thread is at it, this
        does nothing.
        """
        advise, size, done = _madvise(), _size(), 0
        if not self._lock.acquire(blocking=False):  # for ever where this process was forked meanwhile
            return done
        try:
            for _ in range(min(most, len(self._waiting))):
                start = self._waiting.pop()
                if not _own_pages(start, size):
                    continue
                failure = advise(start, size, MADV_COLLAPSE)
                done += not failure
                if failure and ctypes.get_errno() not in (errno.EAGAIN, errno.EBUSY):  # somebody holds one of its pages
                    self._waiting.clear()
                    break
        finally:
            self._lock.release()
        return done


def spans_of(tensors: Iterable[Tensor]) -> Spans:
    """Where the memory of tensors lies that are PyTorch's own and on the CPU; others are passed over."""
    storages = (
        tensor.untyped_storage()
        for tensor in tensors
        if type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not tensor._is_zerotensor()  # which has no memory
    )
    return frozenset((storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages)


def ask(x: Tensor) -> None:
    """Asks for large pages under a tensor that will be kept and that nobody has written to, where there are any.

    Unlike outputs, weights lie beside each other for long: asked for to the ends of their pages, they are one mapping,
    and large pages lie across their borders too.
    """
    if x.nbytes >= MAPPED and x.device.type == "cpu" and _size():
        start = x.data_ptr() // PAGE * PAGE
        _madvise()(start, -(-(x.data_ptr() + x.nbytes) // PAGE) * PAGE - start, MADV_HUGEPAGE)


def _covered(spans: Spans, size: int) -> list[int]:
    """Where the blocks begin of which the spans take at least half."""
    covered: dict[int, int] = {}
    for first, last in spans:
        while first < last:
            end = min((first // size + 1) * size, last)
            covered[first // size] = covered.get(first // size, 0) + end - first
            first = end
    return [block * size for block in sorted(covered) if covered[block] >= size // 2]


def _private(starts: list[int], size: int) -> list[int]:
    """Those of the blocks, in rising order, that lie in writable memory of the process alone and of no file."""
    found: list[int] = []
    waiting = iter(starts)
    start = next(waiting, None)
    for line in _text(MAPS).splitlines():
        span, permissions, _, _, inode, *_ = line.split(maxsplit=5)
        first, last = (int(address, 16) for address in span.split("-"))
        while start is not None and start < last:
            if first <= start and start + size <= last and permissions == "rw-p" and inode == "0":
                found.append(start)
            start = next(waiting, None)
    return found


def _own_pages(start: int, size: int) -> bool:
    """Whether all pages of a block are there and are this process's alone."""
    try:
        with TABLE.open("rb", buffering=0) as table:
            table.seek(start // PAGE * ENTRY)
            entries = array.array("Q", table.read(size // PAGE * ENTRY))
    except (OSError, ValueError):
        return False
    asked = PRESENT | ALONE | OF_FILE | SWAPPED
    return len(entries) == size // PAGE and {entry & asked for entry in entries} == {PRESENT | ALONE}


@functools.cache
def _size() -> int:
    """Bytes of a large page; 0 where there are none, or where whoever keeps the system wants none."""
    if sys.platform != "linux" or "[never]" in _text(SETTINGS / "enabled"):
        return 0
    size = _text(SETTINGS / "hpage_pmd_size").strip()
    return int(size) if size.isdigit() and _madvise() is not _nothing else 0


@functools.cache
def _madvise() -> Callable[[int, int, int], int]:
    function = getattr(ctypes.CDLL(None, use_errno=True), "madvise", None) if os.name == "posix" else None
    if function is None:
        return _nothing
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def _nothing(_start: int, _size: int, _advice: int) -> int:
    return -1


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
