"""Every Triton kernel compiles for chips that are not there, spills nothing, and its shared memory fits.

Triton's own launcher then launches those for Hopper above a stand-in for the driver, which compares what arrives.
Every case is compiled for one of the chips, and every op for all of them. ``SSMZOO_CHIPS=all`` compiles each case for
each chip, in four times the time. What was compiled stays in ``build/triton`` by Triton's own digest of the kernel's
source, its options and the compiler: only what has changed is compiled again.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import launching
import pytest
import torch

from ssmkernels.check.offline import CHIPS, compiling_for, offline_cases
from ssmkernels.core.names import OPS

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

# In a process of its own: there Triton has no driver but the stand-in, and nothing has imported it for the interpreter
PROGRAM = """
import gc
import sys
import torch
from ssmkernels.check.offline import CHIPS, compiling_for, offline_cases

torch.set_num_threads(1)
gc.freeze()
gc.disable()  # it would take a tenth of the time of compiling
chip, wanted, found = sys.argv[1], eval(sys.argv[2]), 0
for number, (name, launch) in enumerate(offline_cases()):
    if number not in wanted:
        continue
    with compiling_for(chip) as reports:
        launch()
    assert reports, f"{name}: no kernel"
    for report in reports:
        print(f"{name}: {report}")
        assert report.spills == 0, f"{name}: {report}"
        assert report.shared <= CHIPS[chip].shared, f"{name}: {report}"
        threads = report.num_warps * CHIPS[chip].warp_size
        assert chip == "gfx942" or report.registers * threads <= 65536, f"{name}: {report}"  # of a multiprocessor
    found += len(reports)
print(f"{found} kernels")
"""


CACHE = Path(__file__).parents[2] / "build" / "triton"
KEPT = 30 * 24 * 3600  # seconds for which a compiled kernel stays


def spread(names):
    """By chip, the numbers of the cases to compile for it: each case for one of them, and some of each op for all.

    Consecutive cases of an op are for consecutive chips, and each op begins with another chip than the one before it.
    """
    chips = list(CHIPS)
    if os.environ.get("SSMZOO_CHIPS") == "all":
        return {chip: set(range(len(names))) for chip in chips}
    found = {chip: set() for chip in chips}
    by_op = itertools.groupby(enumerate(names), lambda case: case[1].partition(":")[0])
    for first, (_, cases) in enumerate(by_op):
        numbers = [number for number, _ in cases]
        for i in range(max(len(numbers), len(chips))):
            found[chips[(first + i) % len(chips)]].add(numbers[i % len(numbers)])
    return found


@pytest.fixture(scope="module")
def names():
    """Of all cases, as the process that compiles them sees them."""
    return [name for name, _ in offline_cases()]


@pytest.fixture(scope="module")
def ops(request, names):
    """Those to compile."""
    chosen = request.config.getoption("op")
    return {OPS[op].package.rpartition(".")[2] for op in chosen} or {name.partition(":")[0] for name in names}


def test_each_case_has_a_chip_and_each_op_has_all(names, monkeypatch):
    monkeypatch.delenv("SSMZOO_CHIPS", raising=False)
    found = spread(names)
    assert set().union(*found.values()) == set(range(len(names)))
    for numbers in found.values():
        assert len(numbers) <= len(names) // 3
        assert {names[i].partition(":")[0] for i in numbers} == {name.partition(":")[0] for name in names}
    monkeypatch.setenv("SSMZOO_CHIPS", "all")
    assert all(numbers == set(range(len(names))) for numbers in spread(names).values())


def forget(cache, now):
    """Deletes kernels that were compiled long ago: most of them nobody needs any more."""
    for folder in cache.iterdir() if cache.exists() else ():
        if folder.stat().st_mtime < now - KEPT:
            shutil.rmtree(folder, ignore_errors=True)  # another worker may be deleting it as well


def test_old_kernels_are_forgotten(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    os.utime(tmp_path / "old", (0, 0))
    forget(tmp_path, time.time())
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    forget(tmp_path / "none", time.time())


@pytest.mark.op
@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_without_spills(chip, names, ops):
    cases = {i for i in spread(names)[chip] if names[i].partition(":")[0] in ops}
    if not cases:
        pytest.skip("needs an op with Triton kernels")
    forget(CACHE, time.time())
    print(alone("-c", PROGRAM, chip, repr(cases)))
    if chip == "sm_90" and launching.compiler() is not None:  # where they find all kernels compiled
        print(alone(launching.__file__, repr(cases)))


def alone(*program):
    """What a program of a new process prints, which finds the kernels compiled so far."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "SSMZOO_DISABLE")}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(launching.__file__).parent), *sys.path])
    environment |= {"TRITON_CACHE_DIR": str(CACHE), "TRITON_DISABLE_LINE_INFO": "1"}
    run = subprocess.run([sys.executable, *program], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.slow
def test_the_report_sees_spills(tmp_path):
    """A kernel that is forced to spill is reported as one."""
    (tmp_path / "greedy.py").write_text(
        """
import torch, triton, triton.language as tl
from ssmkernels.check.offline import compiling_for

@triton.jit
def kernel(x, y):
    at = tl.arange(0, 4096)
    rows = ()
    for i in tl.static_range(8):
        rows = rows + (tl.load(x + i * 4096 + at),)
    total = tl.sum(rows[0], 0)
    for i in tl.static_range(8):
        tl.store(y + i * 4096 + at, rows[7 - i] * total)

for chip in ("sm_90", "gfx942"):
    with compiling_for(chip) as reports:
        kernel[(1,)](torch.empty(1, device="meta"), torch.empty(1, device="meta"), num_warps=1)
    assert reports[0].spills > 0, reports[0]
"""
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "greedy.py"],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.slow
@pytest.mark.skipif(launching.compiler() is None, reason="needs a C compiler")
def test_a_launch_with_other_arguments_is_seen(tmp_path):
    (tmp_path / "wrong.py").write_text(
        """
import dataclasses, torch, triton, triton.language as tl
from launching import launching

@triton.jit
def kernel(x, n, scale, size: tl.constexpr):
    tl.store(x + tl.arange(0, size), n * scale)

with launching() as launches:
    kernel[(70_000, 2)](torch.empty(128), 3, 0.1, size=128, num_warps=2)
    kernel[(2, 70_000)](torch.empty(128), 3, 0.1, size=128, num_warps=2)
    kernel[(1,)](torch.empty(200, device="meta")[3:], 3, 0.1, size=128, num_warps=2)
    kernel[(1,)](torch.empty(200, device="meta"), 3, 0.1, size=128, num_warps=2)
first, second, third, fourth = launches
first.check()
third.check()
fourth.check()
assert third.values[0] % 16 == 12 and fourth.values[0] % 16 == 0 and fourth.values[0] not in (0, third.values[0] - 12)
assert first.grid == (70_000, 2, 1) and first.block == (64, 1, 1)
for wrong in (second, first._replace(given=[0, *first.given[1:]]), first._replace(compiled_sizes=first.sizes[1:])):
    try:
        wrong.check()
    except AssertionError:
        continue
    raise SystemExit(f"{wrong} passed")
"""
    )
    alone(tmp_path / "wrong.py")


def test_an_unknown_chip_is_named():
    with pytest.raises(ValueError, match="sm_90"), compiling_for("sm_91"):
        pass


def test_the_cases_of_one_op(names):
    folder = [name for name in names if name.startswith("causal_conv1d:")]
    assert folder
    assert [name for name, _ in offline_cases("causal_conv1d")] == folder
    assert [name for name, _ in offline_cases("causal_conv1d_step")] == folder
    with pytest.raises(ValueError, match="unknown op: 'scan'"):
        next(offline_cases("scan"))


def test_importing_brings_no_triton_along():
    lines = (
        "import sys, torch, ssmkernels",
        "ssmkernels.causal_conv1d(torch.ones(1, 2, 3), torch.ones(3, 2))",
        "assert 'triton' not in sys.modules or torch.cuda.is_available()",
    )
    run = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch):
    import ssmkernels

    arguments = torch.ones(1, 2, 3), torch.ones(3, 2)
    if os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        assert "no GPU" in ssmkernels.explain("causal_conv1d", *arguments).reasons["triton"]
