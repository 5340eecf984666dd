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
import triton.language as tl
from triton.runtime import interpreter

import ssmkernels.testing  # noqa: F401 (for the forks)


def patch_once_a_launch() -> None:
    """Triton replaces the functions of its language at every call of a function inside a kernel: a quarter of the time.

    Once a launch is enough, for each of the two modules that a function may have the language from.
    """
    patch, patched = interpreter._patch_lang, set()

    def once(function):
        languages = {module.__name__ for module in function.__globals__.values() if module is tl or module is tl.core}
        if languages <= patched:
            return None
        scope = patch(function)
        if not patched:  # a launch: all others are inside of one

            def restore(before=scope.restore):
                patched.clear()
                before()

            scope.restore = restore
        patched.update(languages)
        return scope

    interpreter._patch_lang = once


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
    patch_once_a_launch()
    for line in sys.stdin:
        print(run(*json.loads(line)), flush=True)
