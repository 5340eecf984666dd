"""The pool of threads where the system gives none, where they do not begin, and where sharing does not pay."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ssmkernels.native import build

EXPECTED = [
    *["no threads: 0 by others"] * 5,
    "asked for 1",  # and not again for a second
    *["none begin: 0 by others"] * 5,
    "asked for 3 more",
    "they begin: some by others",
    "one core's time: 0 by others",
    "shared: 1",
    "shared: 0",
    "waited for less than it worked: shared 1",
    "waited for longer: shared 0",
    "waited for longer than others saved: shared 0",
    "waited for less than others saved: shared 1",
    "and for longer: shared 0",
]


def test_the_caller_does_what_nobody_has_begun(tmp_path):
    try:
        compiler = build.find_compiler()
    except build.BuildError as error:
        pytest.skip(f"needs a C++ compiler: {error}")
    source, program = Path(__file__).with_name("threads.cpp"), tmp_path / "threads"
    flags = [*build.FLAGS, f"-I{build.PACKAGE}", "-O1", "-pthread"]
    subprocess.run([*compiler, *flags, str(source), "-o", str(program)], check=True)
    said = subprocess.run([str(program)], capture_output=True, text=True, timeout=300, check=True)
    assert said.stdout.splitlines() == EXPECTED
