"""The native kernels in each instruction set that the library was built for, on sizes that fill vectors and do not."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ssmkernels import OPS, native

# In a process of its own, since the library chooses its instruction set once; one for all of them, since most of the
# time goes into what results should be, which is the same for each.
PROGRAM = """
import os, sys, torch
from ssmkernels import native
from ssmkernels.testing import check

torch.set_num_threads(1)


def each_set():
    for isa in sys.argv[1].split():
        os.environ["SSMZOO_CPU_ISA"] = isa
        native.library.cache_clear()
        native.kernel.cache_clear()
        assert native.missing() is None, native.missing()
        assert native.info()["isa"] == isa, native.info()
        yield isa


single, both = [torch.float32], [torch.float32, torch.float64]
halves = [*both, torch.bfloat16, torch.float16]  # all kernels read and write them by the same header
scans = [dict(b=1, l=67, d=37, n=7), dict(fixed="BC"), dict(delta=30.0), dict(packed=True, b=1, l=21), dict(g=3)]
scans += [dict(b=1, l=67, d=37, n=7, complex=True), dict(fixed="C", complex=True, frequency=1e3)]
states = (1, 2, 3, 5, 7, 8, 16, 17, 32, 64, 100, 255, 256)
steps = [dict(d=37, n=7), dict(d=5, n=17), dict(g=3), dict(d=5, n=17, complex=True)]
convolutions = [dict(w=3), dict(w=4, d=37, l=67), dict(w=7), dict(w=4, x=1e-3), dict(packed=True, b=1, l=21)]
diagonals = [dict(n=1), dict(n=9, length=70), dict(n=17, complex=False), dict(length=500, d=1)]
dplr = [dict(n=n, length=l, rank=r) for n, l, r in ((1, 1, 1), (17, 37, 2), (33, 127, 1), (64, 200, 3))]
duals = [dict(b=1, l=67, h=5, p=7, n=5, g=1), dict(p=33, n=17, D="hp"), dict(packed=True, b=1, l=21)]
duals += [dict(chunk=16, l=50)]
rotated = [dict(b=1, l=40, h=1, p=7, n=5, g=1, chunk=16), dict(l=9, r=2, p=17, n=17, a=8, interleaved=False)]
recurrences = [dict(d=37), dict(log=True, d=261), dict(fixed=True), dict(complex=True, decay="complex")]
deltas = [dict(b=1, l=67, h=2, g=1, k=7, v=5), dict(k=17, v=33, decay="k"), dict(packed=True, b=1, l=21, decay="")]
attentions = [dict(b=1, l=67, h=2, g=1, k=7, v=5), dict(k=17, v=33, bonus=True), dict(packed=True, b=1, l=21)]
attentions += [dict(decay="token", off=0.3), dict(decay="head")]
same = dict(bits="same", zeros=False, group_size=None, k=37)
rules = [dict(b=1, l=70, h=2, k=7, v=5), dict(k=33, v=37), dict(packed=True, b=1, l=21)]
for op, dtypes, cases in (
    ("delta_rule", halves, deltas),
    ("delta_rule_step", both, [dict(k=7, v=5), dict(k=17, v=33, decay="k"), dict(k=1, v=1, decay="")]),
    ("selective_scan", single, [dict(b=1, l=9, d=5, n=n, complex=n % 2 == 1) for n in states]),
    ("selective_scan", halves, scans),
    ("selective_scan_step", both, steps),
    ("ssd", both, duals),
    ("ssd_step", both, [dict(p=7, n=5), dict(p=33, n=17, D="hp"), dict(p=1, n=1)]),
    ("mamba3_scan", both, rotated),
    ("mamba3_scan_step", both, [dict(p=7, n=5), dict(p=33, n=17, a=8, r=2, interleaved=False)]),
    ("mlstm", halves, [dict(l=67, h=9, k=7, v=5), dict(packed=True, b=1, l=21), dict(k=33, v=17, h=1)]),
    ("mlstm_step", both, [dict(h=9, k=7, v=5), dict(k=33, v=17)]),
    ("linear_attention", halves, attentions),
    ("linear_attention_step", both, [dict(k=7, v=5), dict(k=17, v=33, bonus=True), dict(k=1, v=1, decay="head")]),
    ("generalized_delta_rule", halves, rules),
    ("generalized_delta_rule_step", both, [dict(k=7, v=5), dict(k=33, v=37)]),
    ("slstm", both, [dict(b=9, l=12, p=5, h=1), dict(packed=True, b=1, l=21), dict(p=33, h=1, l=9)]),
    ("slstm_step", halves, [dict(p=5), dict(p=33, h=1)]),
    ("linear_recurrence", both, recurrences),
    ("fft_conv", both, [dict(l=70, l_k=70, l_r=9, d=17), dict(b=1, l=180, l_k=180, d=1), dict(b=1, l=400, l_k=5, d=3)]),
    ("attention", halves, [dict(l=70, m=80, k=33, v=17, window=(40, 3)), dict(l=9, h=1, h_kv=1, k=1)]),
    ("selected_attention", both, [dict(l=70, k=33, v=17, n=3, block_size=16), dict(h=1, h_kv=1, g=1, k=1)]),
    ("quantized_linear", both, [dict(k=300, o=9), dict(l=9, k=33), dict(bits="8", zeros=False), same]),
    ("quantized_linear", halves, [dict(k=300, o=9, activations="int8")]),
    ("rglru_gates", both, [dict(p=7), dict(p=33, h=1, first=False, decay=200.0)]),
    ("swiglu", both, [dict(shape=(3, 7)), dict(shape=(2, 33), gate=50.0)]),
    ("causal_conv1d", halves, convolutions),
    ("causal_conv1d_step", both, [dict(w=1), dict(w=4, d=37), dict(w=6)]),
    ("diagonal_kernel", both, [*diagonals, dict(discretization="dss")]),
    ("dplr_kernel", both, [*dplr, dict(complex=False, n=19, length=70)]),
):
    if op in sys.argv[2:]:
        for isa in each_set():
            try:
                check(op, "cpu", cases=cases, dtypes=dtypes, quick=True)
            except AssertionError as error:
                raise AssertionError(f"{isa}: {error}") from None
if "selected_attention" in sys.argv[2:]:
    from ssmkernels.ops.selected_attention.selection import Sizes, by_kernel, by_pytorch

    sizes = Sizes(300, 6, 2, 4, 9, 1, 2)
    for dtype in halves:
        q, k = torch.randn(1, 300, 6, 17).to(dtype), torch.randn(1, 148, 2, 17).to(dtype)
        wanted = by_pytorch(q, k, sizes).sort(-1).values
        for isa in each_set():
            assert torch.equal(by_kernel(q, k, sizes).sort(-1).values, wanted), (isa, dtype)
"""


BUILT = native.info().get("isas", [])
HERE = [isa for isa in BUILT if native.library().handle.ssmzoo_can_run(isa.encode())]
ABLE = [" ".join(HERE)]
UNABLE = [
    pytest.param(isa, marks=pytest.mark.skip(reason=f"needs a CPU with {isa}")) for isa in BUILT if isa not in HERE
]


@pytest.mark.slow
@pytest.mark.op(
    "selective_scan",
    "ssd",
    "mamba3_scan",
    "delta_rule",
    "mlstm",
    "slstm",
    "linear_attention",
    "generalized_delta_rule",
    "linear_recurrence",
    "causal_conv1d",
    "fft_conv",
    "diagonal_kernel",
    "dplr_kernel",
)
@pytest.mark.skipif(native.missing() is not None, reason=f"needs the native library: {native.missing()}")
@pytest.mark.parametrize("isas", ABLE + UNABLE)
def test_every_instruction_set(isas, request):
    folders = {OPS[op].package for op in request.config.getoption("op") or OPS}
    ops = [op for op in OPS if OPS[op].package in folders]
    run = subprocess.run([sys.executable, "-c", PROGRAM, isas, *ops], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
