"""A process in which Triton interprets its kernels on the CPU, and which runs each program that it is sent in a fork.

Triton reads ``TRITON_INTERPRET`` when it is imported, so the tests' own process cannot do this; and a new process for
each program would spend much of its time on imports. The fixture ``interpret`` in conftest.py starts this one and sends
a line for each program: its file, the file for what it prints, and its arguments. The answer is the exit status.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch._dynamo
import torch.testing._internal.optests
from quick_interpreter import patch

import ssmkernels.testing  # noqa: F401 (for the forks)


def run(program: str, output: str, arguments: list[str]) -> int:
    """The exit status of a fork that runs a program as ``python -c`` would."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.argv = [program, *arguments]
        exec(compile(Path(program).read_text(), program, "exec"), {"__name__": "__main__"})
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    torch.set_num_threads(1)  # a fork would wait for others in vain
    patch()
    for line in sys.stdin:
        print(run(*json.loads(line)), flush=True)
