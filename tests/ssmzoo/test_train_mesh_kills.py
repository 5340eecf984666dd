"""A sharded run, processes of which are killed, ends as if they had never been."""

from __future__ import annotations

import json
import os
import platform
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="needs accelerate")
pytest.importorskip("matplotlib", reason="needs matplotlib")

PROGRAM = Path(__file__).parent / "kills" / "killed_mesh.py"


@pytest.mark.skipif(platform.system() != "Linux", reason="needs Linux, whose /proc tells the processes of a job")
@pytest.mark.slow
def test_kills_of_random_processes_leave_no_trace(tmp_path, launch, monkeypatch):
    """SSMZOO_KILLS=20 makes that many in place of 1, and SSMZOO_SEED=7 others than 0 does."""
    kills, seed = int(os.environ.get("SSMZOO_KILLS", "1")), os.environ.get("SSMZOO_SEED", "0")
    program = runpy.run_path(str(PROGRAM))
    program["prepared"](tmp_path)
    monkeypatch.chdir(tmp_path)
    launch(*program["training"]("whole", kills))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, PROGRAM, tmp_path, str(kills), seed]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found))
    assert not found["faults"], "\n".join(found["faults"])
    assert found["killed"] == kills
    if kills >= 20:
        assert found["told"] > 0, "by a process that was left: one alone may be ended before it has noticed"
        assert all(found["phases"].values()), found
