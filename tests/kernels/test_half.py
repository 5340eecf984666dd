"""Numbers in half precision as the native kernels read and write them: to the nearest, ties to even, NaN stays NaN.

The program half.cpp takes all upper halves of a float through the header that all kernels share. What the kernels make
of it is seen where a float32 parameter goes into a result unchanged.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ssmkernels import native
from ssmkernels.native import build, sources

CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
HERE = [isa for isa in sources.flags_by_isa(platform.machine()) if isa not in sources.ADDED]


def program(compiler, flags, isa, folder, extra=()):
    """The program for an instruction set; skips where the compiler cannot make it."""
    own = [flag for flag in sources.FLAGS if flag not in ("-O3", "-fvisibility=hidden")]
    command = [*compiler, *own, "-O1", "-Wno-maybe-uninitialized", "-Wno-uninitialized", *flags, *extra]
    command += [f"-DSSMZOO_ISA_{isa}", f"-I{sources.PACKAGE}", str(Path(__file__).with_name("half.cpp"))]
    answer = subprocess.run([*command, "-o", str(folder / isa)], capture_output=True, text=True)
    if answer.returncode and flags and "unrecognized" in answer.stderr:
        pytest.skip(f"needs a compiler that knows {' '.join(flags)}")
    assert answer.returncode == 0, answer.stderr[-4000:]
    return str(folder / isa)


def run(*command):
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout[-4000:] + answer.stderr[-4000:]


@pytest.mark.parametrize("isa", HERE)
def test_every_pattern(isa, tmp_path):
    try:
        made = program(build.find_compiler(), sources.flags_by_isa(platform.machine())[isa], isa, tmp_path)
    except build.BuildError as error:
        pytest.skip(f"needs a C++ compiler: {error}")
    handle = native.library().handle
    if isa != "baseline" and (handle is None or not handle.ssmzoo_can_run(isa.encode())):
        pytest.skip(f"compiled; to run it needs a CPU with {isa}")
    run(made)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(CROSS), reason=f"needs {CROSS}")
@pytest.mark.skipif(not shutil.which(EMULATOR), reason=f"needs {EMULATOR}")
def test_every_pattern_on_arm(tmp_path):
    run(EMULATOR, program([CROSS], [], "baseline", tmp_path, ["-static"]))


# All instruction sets in one process of their own, since the library chooses once.
RESULTS = """
import os, sys, torch
from ssmkernels import (
    causal_conv1d, causal_conv1d_step, native, quantized_linear, rms_norm, selective_scan, selective_scan_step, ssd,
)
from ssmkernels.native.products import of_rows

torch.set_num_threads(1)
upper, lower = torch.arange(2**16) << 16, torch.tensor([0, 0x1000, 0x3000, 0x7fff, 0x8000, 0x8001])
every = (upper[:, None] | lower).flatten().to(torch.int32).view(torch.float32)
every = torch.where(every.abs() < torch.finfo(torch.float32).tiny, 0.0, every)  # kernels take subnormal ones for 0
v = torch.cat([every, every[5000:5037]])  # no whole vectors at the end
d = len(v)


def ways(dtype):
    one, none = torch.ones(1, 2, d, dtype=dtype), torch.zeros(1, 2, 1, dtype=dtype)
    nothing, A = torch.zeros(d, 4), -torch.ones(d, 1)
    yield "causal_conv1d", causal_conv1d(one, nothing, v)
    yield "causal_conv1d_step", causal_conv1d_step(torch.zeros(1, 3, d), one[:, 0], nothing, v)[:, None]
    yield "rms_norm", rms_norm(one, v, eps=0.0)
    yield "selective_scan", selective_scan(one, one, A, none, none, v)
    token, state = one[:, 0], torch.zeros(1, d, 1)
    yield "selective_scan_step", selective_scan_step(state, token, token, A, none[:, 0], none[:, 0], v)
    heads, state = one.view(1, 2, 1, d), torch.zeros(1, 2, 1, 8, dtype=dtype)
    yield "ssd", ssd(heads, one[..., :1], -torch.ones(1), state, state, v[None]).view(1, 2, d)
    weight = torch.zeros(d, 8, dtype=dtype)
    for rows in (1, 20, 50):
        x = one[..., :8].reshape(-1, 8)[:1].expand(rows, 8)
        if rows < 17:
            yield "quantized_linear", quantized_linear(x, weight, bias=v)[None]
        else:
            yield f"a product of {rows} rows", of_rows(x, weight, v)[None]


for isa in sys.argv[1].split():
    os.environ["SSMZOO_CPU_ISA"] = isa
    native.library.cache_clear()
    native.kernel.cache_clear()
    assert native.missing() is None and native.info()["isa"] == isa
    for dtype in (torch.bfloat16, torch.float16):
        wanted = v.to(dtype)
        for name, y in ways(dtype):
            assert y.dtype == dtype, name
            wrong = ~((y == wanted) | (y.isnan() & wanted.isnan()))
            assert not wrong.any(), (isa, dtype, name, int(wrong.sum()), v[wrong.flatten(0, 1).any(0)][:5])
"""


@pytest.mark.op("causal_conv1d", "rms_norm", "selective_scan", "ssd", "quantized_linear")
@pytest.mark.skipif(native.missing() is not None, reason=f"needs the native library: {native.missing()}")
def test_results_of_ops(tmp_path):
    handle = native.library().handle
    able = [isa for isa in native.info()["isas"] if handle.ssmzoo_can_run(isa.encode())]
    run(sys.executable, "-c", RESULTS, " ".join(able))
