"""Freed memory stays at hand where it should, and large tensors lie in large pages."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys

import pytest
import torch

from ssmkernels.core import memory

GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc, whose allocator this is about")

# Tensors of so many MB, touched and given back, over and over: how often the system has to give a page each time.
ROUNDS = """
import resource, sys, torch
import ssmkernels
from ssmkernels import native
assert native.missing() is None, native.missing()
if "keep" in sys.argv:
    print(ssmkernels.keep_memory())
def use():
    tensors = [torch.ones(int(size) * 250_000) for size in sys.argv[1].split(",")]
for _ in range(3):
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10)
"""
BY_HAND = {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}


def untouched():
    """The environment without settings of the allocator."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}


def rounds(*arguments, **own):
    """What the program prints, a line each; without thresholds from outside but ``own``."""
    command = [sys.executable, "-c", ROUNDS, *arguments]
    run = subprocess.run(command, env=untouched() | own, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


# Whether the system maps a new block: glibc does, as long as nobody has changed its thresholds.
MAPS = """
import ctypes
libc = ctypes.CDLL(None)
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd u f o k t".split()]
libc.mallinfo2.restype = Info
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
def maps(size=24):
    before = libc.mallinfo2().hblkhd
    assert libc.malloc(size * 2**20)
    return libc.mallinfo2().hblkhd > before
import torch
assert maps()
import ssmkernels
from ssmkernels import native
assert native.missing() is None, native.missing()
x = torch.ones(1, 64, 32)
ssmkernels.causal_conv1d(x, torch.ones(32, 4), implementation="cpu")
print(maps(), ssmkernels.keep_memory(), maps())
from ssmkernels.bench import peak_memory
peak_memory(lambda: print(maps(200)))  # more than is free
print(maps(200))
"""


@GLIBC
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs mallinfo2, which glibc has since 2.33")
def test_only_keep_memory_changes_how_the_process_allocates():
    """Loading the library and calling a kernel do not, and blocks are mapped again while memory is measured."""
    command = [sys.executable, "-c", MAPS]
    run = subprocess.run(command, env=untouched(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["True", "True", "False", "True", "False"]


def test_the_last_call_to_end_puts_the_settings_back(monkeypatch):
    """Nested calls, calls that overlap in two threads, and one that fails."""
    told = []
    monkeypatch.setattr(memory, "_tunable", lambda: True)
    monkeypatch.setattr(memory, "_tell", lambda settings: told.append(settings) or True)
    with memory.blocks_apart():
        with pytest.raises(KeyError), memory.blocks_apart():
            raise KeyError
        assert told == [memory.APART, memory.APART]
    first, second = memory.blocks_apart(), memory.blocks_apart()
    for begin_or_end in (first.__enter__, second.__enter__, lambda: first.__exit__(None, None, None)):
        begin_or_end()
    assert told[2:] == [memory.USUAL, memory.APART, memory.APART]
    second.__exit__(None, None, None)
    assert told[5:] == [memory.USUAL]


@GLIBC
def test_all_memory_is_kept_where_that_is_wanted():
    """200 MB are 48828 pages."""
    assert float(rounds("100,60,40")[0]) > 40000
    kept, faults = rounds("100,60,40", "keep")
    assert kept == "True"
    assert float(faults) < 5000


@GLIBC
@pytest.mark.parametrize(
    "own", [BY_HAND, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}], ids=["env", "tunable"]
)
def test_what_was_set_from_outside_stays(own):
    kept, faults = rounds("100,60,40", "keep", **own)
    assert kept == "False"
    assert float(faults) > 40000


def test_other_allocators_are_left_alone(monkeypatch):
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert not memory.keep_memory()


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, which has the call")
def test_large_pages_are_asked_for_under_whole_pages_of_large_tensors_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "_madvise", lambda: lambda *call: asked.append(call))
    large, small = torch.empty(memory.MAPPED // 4 + 1000), torch.empty(100)
    memory.large_pages(large, small, None, large[:-1])
    assert len(asked) == 1 + (large[:-1].nbytes >= memory.MAPPED)
    start, size, advice = asked[0]
    assert advice == 14
    assert start % memory.PAGE == size % memory.PAGE == 0
    assert large.data_ptr() <= start < start + size <= large.data_ptr() + large.nbytes
    monkeypatch.undo()
    memory.large_pages(large)  # the system's own answer
    assert torch.equal(large.fill_(1.0), torch.ones_like(large))
