"""No short call waits for a thread that has not begun a part of the work: here such threads never do."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading

import pytest

from ssmkernels import native

PTRACE_SEIZE, PTRACE_INTERRUPT, WALL = 0x4206, 0x4207, 0x40000000

STEPS = ("linear", "mamba_step", "mamba2_step", "selective_scan_step", "causal_conv1d_step", "decode_attention")

# Calls everything on two threads, twice: first as it is, then after a line on its input. With other threads' help some
# tasks of a call are theirs, without it all are the caller's, and what comes out has the same bits.
CALLS = """
import ctypes, sys, time
import torch
from ssmkernels import native
from ssmkernels.check.spec import spec_of, tensors_of
from ssmkernels.native.products import linear

ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(2**64 - 1), 0, 0, 0)  # anyone may trace this process
torch.manual_seed(0)
torch.set_grad_enabled(False)
torch.set_num_threads(2)
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
    "mamba2_step": call_of("mamba2_step", b=1, m=128, h=8, p=16),
    "selective_scan_step": call_of("selective_scan_step", b=4, d=512),
    "causal_conv1d_step": call_of("causal_conv1d_step", b=4, d=512),
    "decode_attention": call_of("decode_attention", s=64, h=8, h_kv=2),
}
before = {name: call() for name, call in steps.items()}
print("ready", flush=True)
sys.stdin.readline()
for name, call in steps.items():
    time.sleep(0.1)  # the calls after those that nobody helped with are done alone, for less than this
    print(name, torch.equal(call(), before[name]), flush=True)
"""


@pytest.fixture
def calls():
    process = subprocess.Popen(
        [sys.executable, "-c", CALLS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stopped = []
    yield process
    process.kill()
    for thread in process.stopped:
        os.waitpid(thread, WALL)  # a tracer has to take note of each thread's end
    process.communicate()


def stop_all_but_first(process):
    """Stops every thread but the main one, as a system does that has no core for them."""
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    ptrace.restype = ctypes.c_long
    for thread in map(int, os.listdir(f"/proc/{process.pid}/task")):
        if thread == process.pid:
            continue
        for request in (PTRACE_SEIZE, PTRACE_INTERRUPT):
            if ptrace(request, thread, None, None):
                pytest.skip(f"needs the right to stop another process's threads: {os.strerror(ctypes.get_errno())}")
        os.waitpid(thread, WALL)
        process.stopped.append(thread)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, where one thread can be stopped alone")
@pytest.mark.skipif(native.missing() is not None, reason=f"needs the native library: {native.missing()}")
def test_steps_do_not_wait_for_threads_that_do_not_run(calls):
    if len(os.sched_getaffinity(0)) < 2 or native.quota.cores() == 1:
        pytest.skip("needs two cores: with one, no call is shared")
    assert calls.stdout.readline() == "ready\n", calls.stderr.read()[-4000:]
    stop_all_but_first(calls)
    assert calls.stopped
    watch = threading.Timer(300, calls.kill)  # a call that waits for a stopped thread does so for ever
    watch.start()
    calls.stdin.write("go\n")
    calls.stdin.flush()
    said = [calls.stdout.readline() for _ in STEPS]
    watch.cancel()
    assert said == [f"{name} True\n" for name in STEPS]
