"""How ops scale: lengths that take turns, threads that must give the same bits, memory as the system counts it."""

from __future__ import annotations

import mmap

import pytest
import torch

import ssmkernels
from ssmkernels import bench
from ssmkernels.bench import scaling
from ssmkernels.bench.resident import CLEAR
from ssmkernels.check.spec import spec_of

LIMITS = bench.Limits(bandwidth=1e10, flops=1e11)
SMALL = {"l": 32, "d": 8, "n": 4}
NEEDS_PROC = pytest.mark.skipif(not CLEAR.exists(), reason="needs Linux's /proc, where a process reads its memory")


def plan(**changed):
    given = {"seconds": 1e-4, "quick": True, "changes": SMALL, **changed}
    return bench.Plan(torch.device("cpu"), torch.float32, LIMITS, **given)


@pytest.mark.parametrize(
    ("longest", "lengths"),
    [(65536, [1024, 4096, 16384, 65536]), (5000, [1024, 4096, 5000]), (2048, [512, 2048]), (4, [1, 4])],
)
def test_lengths_go_up_to_the_longest(longest, lengths):
    assert scaling.lengths_to(longest) == lengths


def test_a_length_too_short_to_scale_is_refused():
    with pytest.raises(ValueError, match="`length` must be at least 4; got 3"):
        scaling.lengths_to(3)


@pytest.mark.usefixtures("two_threads")
def test_an_op_scales_with_length_and_threads(monkeypatch):
    monkeypatch.setattr(scaling, "resident_memory", lambda *_, **__: (1234, 56))
    contests = list(bench.scale_op("selective_scan", plan()))
    assert {row.kind for rows in contests for row in rows} == {"scaling"}
    short, long, fit, forward, both, memory = contests
    assert [row.length for row in (*short, *long, *fit)] == [8, 32, 0]
    per_token = [row.median / row.length for row in (*short, *long)]
    assert fit[0].per_token == pytest.approx(per_token[1] / per_token[0])
    for rows, work in ((forward, bench.FORWARD), (both, bench.BOTH)):
        assert [row.work for row in rows] == [work, work]
        assert [row.implementation.partition(", ")[2] for row in rows] == ["1 thread", "2 threads"]
        assert all(row.note == "the same bits" and row.of_ours >= 1 for row in rows)
    assert (memory[0].resident_bytes, memory[0].result_bytes) == (1234, 56)
    assert "l 32" in memory[0].shape
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_other_bits_on_other_threads_are_told_and_not_timed():
    spec, setting = spec_of("selective_scan"), bench.ops.setting_of("selective_scan")

    def by_hand(u, *args, **kwargs):
        u = u * (1 + 2e-7) if torch.get_num_threads() == 2 else u
        return ssmkernels.selective_scan(u, *args, **kwargs, implementation="reference")

    case = bench.ops.real_use(spec, setting, plan())
    (row,) = scaling.by_threads(spec, setting, case, bench.FORWARD, "mine", by_hand, plan())
    assert row.median is None
    assert row.refused == "on 1 thread and on 2 its bits differ: y"
    assert torch.get_num_threads() == 2


def test_one_thread_alone_is_told():
    spec, setting = spec_of("selective_scan"), bench.ops.setting_of("selective_scan")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        (row,) = scaling.by_threads(spec, setting, {}, bench.FORWARD, "mine", dict, plan())
    finally:
        torch.set_num_threads(before)
    assert "PyTorch has one thread" in row.refused


def test_an_op_without_a_length_is_told():
    (rows,) = bench.scale_op("rms_norm", plan(changes={}))
    assert rows[0].refused == "it has no length"


@NEEDS_PROC
def test_memory_that_no_allocator_of_pytorch_sees_counts():
    size = 64 * 2**20
    resident = bench.Resident()
    # From the system: malloc may keep what it was given back.
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        for page in range(0, size, mmap.PAGESIZE):
            memory[page] = 1
    assert 0.99 * size <= resident.grown() <= 1.2 * size  # the system counts by the page, and some pages later
    assert resident.now() < resident.before + size / 2
    assert bench.Resident().grown() < size / 2  # the peak is reset


@NEEDS_PROC
def test_the_memory_of_a_call_in_a_process_of_its_own():
    """The plain convolution holds some more tensors of the size of x beside y and the gradients."""
    spec = spec_of("causal_conv1d")
    case = spec.case({"b": 1, "l": 4096, "d": 512})
    above, results = bench.resident_memory("causal_conv1d", case, torch.float32, "reference", backward=True)
    x = 4096 * 512 * 4
    assert 2 * x <= results < 2.1 * x  # y and the gradient of x, and small ones
    assert x < above < 20 * x


@NEEDS_PROC
def test_a_process_that_fails_is_told():
    spec = spec_of("ssd")
    case = spec.case({"l": 8})  # with an infinite limit of step sizes, which has to get there
    with pytest.raises(RuntimeError, match="unknown implementation.*'nobody'"):
        bench.resident_memory("ssd", case, torch.float32, "nobody", backward=False)
