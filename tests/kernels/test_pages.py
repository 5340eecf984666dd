"""Large pages come under memory that is there: the bits stay, and what others have a part in is left alone."""

from __future__ import annotations

import errno
import mmap
import os
import re
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from ssmkernels.core import pages
from ssmkernels.core.pages import Blocks, ask, spans_of

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, whose pages these are")
SIZE = 2**21


def collapses() -> bool:
    """Whether this system puts large pages under memory that is there, tried by hand."""
    if pages._size() != SIZE:
        return False
    some = torch.ones(4 * SIZE, dtype=torch.uint8)
    return pages._madvise()(-(-some.data_ptr() // SIZE) * SIZE, SIZE, pages.MADV_COLLAPSE) == 0


COLLAPSES = pytest.mark.skipif(not collapses(), reason="needs Linux 6.1 or later, with large pages to give")


def in_large_pages(tensor: torch.Tensor) -> int:
    """Bytes of the mappings around a tensor that lie in large pages."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            first, last = (int(address, 16) for address in span.groups())
            inside = first < tensor.data_ptr() + tensor.nbytes and last > tensor.data_ptr()
        elif inside and line.startswith(("AnonHugePages", "ShmemPmdMapped", "FilePmdMapped")):
            found += int(line.split()[1]) * 1024
    return found


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * pages.PAGE


def mapped(count: int, **options) -> torch.Tensor:
    """A tensor of so many large pages' bytes in a mapping of its own."""
    return torch.frombuffer(mmap.mmap(-1, count * SIZE, **options), dtype=torch.uint8)


@pytest.fixture
def advised(monkeypatch):
    """Each piece of advice; the system hears none, and agrees."""
    given = []
    monkeypatch.setattr(pages, "_size", lambda: SIZE)
    monkeypatch.setattr(pages, "_madvise", lambda: lambda *call: given.append(call) or 0)
    return given


@COLLAPSES
def test_bits_and_addresses_stay_and_memory_does_not_grow():
    torch.manual_seed(0)
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    weight = mapped(9, **private)
    weight.copy_(torch.randint(256, (len(weight),), dtype=torch.uint8))
    expected, address = weight.clone(), weight.data_ptr()
    blocks = Blocks(spans_of([weight, weight[: SIZE // 2], torch.nn.Parameter(torch.ones(3))]))
    before, waiting = resident(), len(blocks)
    assert waiting >= 8
    assert blocks.collapse(3) == 3
    assert len(blocks) == waiting - 3
    assert blocks.collapse(100) == waiting - 3
    assert not blocks
    assert in_large_pages(weight) >= waiting * SIZE
    assert weight.data_ptr() == address
    assert torch.equal(weight, expected)
    assert resident() - before < SIZE


@LINUX
def test_blocks_that_tensors_fill_by_half(advised):
    """Weights that lie beside one another share one; what is small and lies alone gets none."""
    whole = mapped(6, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole.fill_(1)
    start = -whole.data_ptr() % SIZE
    first = whole.data_ptr() + start
    spans = {(first + 10, first + SIZE // 4), (first + SIZE // 3, first + SIZE)}  # half of the first block together
    spans |= {(first + SIZE + 5, first + SIZE + SIZE // 4)}  # less of the second
    spans |= {(first + 3 * SIZE, first + 5 * SIZE - 1)}
    Blocks(frozenset(spans)).collapse(100)
    assert advised == [(first + i * SIZE, SIZE, pages.MADV_COLLAPSE) for i in (0, 3, 4)]


@LINUX
def test_memory_of_files_and_of_other_processes_is_left_alone(advised, tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"\1" * 4 * SIZE)
    shared = torch.ones(4 * SIZE, dtype=torch.uint8).share_memory_()
    of_file = torch.from_file(str(path), size=4 * SIZE, dtype=torch.uint8)
    writable = torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c"))
    writable.add_(1)  # the pages are this process's now, and the mapping still a file's
    common = mapped(4)
    common.fill_(1)
    empty = mapped(4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    empty[::SIZE] = 1  # a few pages of each block are there
    elsewhere = torch.empty(4 * SIZE, device="meta")
    for tensor in (shared, of_file, writable, common, empty, elsewhere):
        Blocks(spans_of([tensor])).collapse(100)
    assert advised == []


@LINUX
def test_pages_in_common_with_a_forked_process_are_left_alone(advised):
    weight = mapped(4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    weight.fill_(1)
    ready, end = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:  # holds the pages until told to end, and would not take them either
        Blocks(spans_of([weight])).collapse(100)
        os.write(ready[1], b"%d" % len(advised))
        os.read(end[0], 1)
        os._exit(0)
    assert os.read(ready[0], 9) == b"0"
    Blocks(spans_of([weight])).collapse(100)
    assert advised == []
    os.write(end[1], b"1")
    os.waitpid(child, 0)
    Blocks(spans_of([weight])).collapse(100)
    assert len(advised) >= 3


@LINUX
def test_threads_share_the_blocks(advised):
    """Each block is put into a large page once, whoever comes to it."""
    weight = mapped(40, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    weight.fill_(1)
    blocks = Blocks(spans_of([weight]))
    waiting = len(blocks)

    def until_none_waits(_):
        done = 0
        while blocks:
            done += blocks.collapse(1)
        return done

    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(until_none_waits, range(4)))
    assert sum(done) == waiting == len({start for start, *_ in advised})


@LINUX
def test_a_process_forked_while_a_thread_was_at_it_goes_on(advised):
    weight = mapped(4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    weight.fill_(1)
    blocks = Blocks(spans_of([weight]))
    with blocks._lock:
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # ends it if it waits
            blocks.collapse(1)
            os._exit(len(advised))
    assert os.waitpid(child, 0)[1] == 0


CANNOT = [(errno.EINVAL, 1), (errno.ENOMEM, 1), (errno.EAGAIN, 3), (errno.EBUSY, 3)]  # and how often it is asked


@LINUX
@pytest.mark.parametrize(("number", "tried"), CANNOT)
def test_a_system_that_cannot_is_not_asked_again(number, tried, monkeypatch):
    """An old one, or one without memory; a page that somebody holds for a moment is passed over alone."""
    calls = []
    monkeypatch.setattr(pages, "_size", lambda: SIZE)
    monkeypatch.setattr(pages, "_madvise", lambda: lambda *call: calls.append(call) or -1)
    monkeypatch.setattr(pages.ctypes, "get_errno", lambda: number)
    weight = mapped(4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    weight.fill_(1)
    blocks = Blocks(spans_of([weight]))
    assert blocks.collapse(3) == 0
    assert len(calls) == tried
    assert bool(blocks) == (tried == 3 and weight.data_ptr() % SIZE == 0)


@pytest.mark.parametrize("why", ["another system", "never", "no such setting", "no table"])
def test_elsewhere_nothing_happens(why, monkeypatch, tmp_path):
    pages._size.cache_clear()
    if why == "another system":
        monkeypatch.setattr(pages.sys, "platform", "darwin")
    elif why == "no table":
        monkeypatch.setattr(pages, "TABLE", tmp_path / "none")
    else:
        monkeypatch.setattr(pages, "SETTINGS", tmp_path)
        (tmp_path / "hpage_pmd_size").write_text(f"{SIZE}\n")
        if why == "never":
            (tmp_path / "enabled").write_text("always madvise [never]\n")
        else:
            (tmp_path / "hpage_pmd_size").unlink()
    monkeypatch.setattr(pages, "_madvise", lambda: lambda *call: pytest.fail(f"asked for {call}"))
    weight = torch.ones(4 * SIZE, dtype=torch.uint8)
    assert Blocks(spans_of([weight])).collapse(100) == 0
    if why != "no table":
        ask(weight)
    monkeypatch.undo()
    pages._size.cache_clear()


def test_weights_that_are_kept_are_asked_for_up_to_the_ends_of_their_pages(advised):
    large, small = torch.ones(pages.MAPPED + 4321, dtype=torch.uint8), torch.ones(100)
    for tensor in (large, small, torch.empty(SIZE, 8, device="meta")):
        ask(tensor)
    ((start, size, advice),) = advised
    assert advice == pages.MADV_HUGEPAGE
    assert start % pages.PAGE == size % pages.PAGE == 0
    assert start <= large.data_ptr() < start + pages.PAGE
    assert 0 <= start + size - (large.data_ptr() + large.nbytes) < pages.PAGE


def test_a_tensor_of_no_memory_lies_nowhere():
    assert spans_of([torch._efficientzerotensor(SIZE)]) == frozenset()
