"""Distributed tensors: ops run where they are local to each process's sequences, and are refused elsewhere."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed

PROGRAM = Path(__file__).with_name("distributed_calls.py")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed")
def test_every_op_on_two_processes_that_share_a_batch(tmp_path):
    commands = [
        [sys.executable, "-W", "ignore", str(PROGRAM), str(rank), "2", str(tmp_path / "store")] for rank in range(2)
    ]
    running = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for c in commands]
    for process in running:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-3000:]
        assert output == ""
