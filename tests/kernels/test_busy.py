"""On a busy machine no short call waits for a thread that has not begun a part of the work."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ssmkernels import native

STEPS = ("mamba_step", "selective_scan_step", "causal_conv1d_step", "decode_attention")

# On one core, beside a busy program, with all other threads of this process so far back that they hardly ever run: a
# call on two threads that waited for one of them would take hundreds of times as long as one on a single thread.
ALONE = """
import os, statistics, subprocess, sys, time
core = min(os.sched_getaffinity(0))
os.sched_setaffinity(0, {core})
busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
try:
    import torch
    from ssmkernels import native
    from ssmkernels.core.products import linear
    from ssmkernels.check.spec import spec_of, tensors_of

    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    native.SMALL = 0  # multiply-adds from which several threads share a call

    def call_of(name, **sizes):
        spec = spec_of(name)
        arguments = spec.inputs(spec.case(sizes), torch.float32, "cpu", 0)
        states = {k: v for k, v in arguments.items() if k.endswith("state")}

        def call():
            own = {k: v.clone() for k, v in states.items()}
            result = spec.function()(**arguments | own, implementation="cpu")
            return torch.cat([t.flatten() for t in (*tensors_of(result), *own.values())])

        return call

    x, weight = torch.randn(1, 512), torch.randn(1024, 512)
    steps = {
        "linear": lambda: linear(x, weight),
        "mamba_step": call_of("mamba_step", b=1, m=128, d=256),
        "selective_scan_step": call_of("selective_scan_step", b=4, d=512),
        "causal_conv1d_step": call_of("causal_conv1d_step", b=4, d=512),
        "decode_attention": call_of("decode_attention", s=256, h=8, h_kv=2),
    }
    for name, call in steps.items():
        times, results = {}, {}
        for threads in (2, 1):
            torch.set_num_threads(threads)
            results[threads] = call()
            own = os.getpid()
            for thread in map(int, os.listdir("/proc/self/task")):
                if thread != own:
                    os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
            samples = []
            for _ in range(21):
                start = time.perf_counter()
                call()
                samples.append(time.perf_counter() - start)
            times[threads] = statistics.median(samples)
        print(name, times[2] / times[1], torch.equal(results[1], results[2]))
finally:
    busy.kill()
"""


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="needs Linux, which can put single threads back")
@pytest.mark.skipif(native.missing() is not None, reason=f"needs the native library: {native.missing()}")
def test_steps_do_not_wait_for_threads_that_do_not_run():
    run = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    lines = [line.split() for line in run.stdout.splitlines()]
    assert [name for name, *_ in lines] == ["linear", *STEPS]
    for name, ratio, same in lines:
        assert same == "True", f"{name}: other bits on two threads"
        assert float(ratio) < 3, f"{name}: {ratio} times as long on two threads as on one"
