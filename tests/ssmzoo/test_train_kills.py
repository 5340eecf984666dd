"""A run that is killed at any call by which it changes its files ends as if it had never been."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="needs accelerate")
pytest.importorskip("matplotlib", reason="needs matplotlib")

KILLS = Path(__file__).with_name("kills")
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


@pytest.fixture
def library(tmp_path):
    """kill_at.c, compiled."""
    path = tmp_path / "kill_at.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-o", path, KILLS / "kill_at.c", "-ldl"], check=True)
    return path


@pytest.mark.skipif(platform.system() != "Linux", reason="needs Linux: a library is preloaded to count system calls")
@pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")
@pytest.mark.slow
def test_kills_at_any_change_of_files_leave_no_trace(library, tmp_path):
    """SSMZOO_KILLS=100 makes that many in place of 6."""
    kills = int(os.environ.get("SSMZOO_KILLS", "6"))
    environment = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    folder = tmp_path / "runs"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, KILLS / "killed_runs.py", folder, str(kills)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(counts))
    assert not counts["faults"], "\n".join(counts["faults"])
    assert sum(counts["killed"].values()) >= kills
    assert counts["killed"]["train"] > 0
    assert counts["killed"]["resume"] > 0
