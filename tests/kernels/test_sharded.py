"""Distributed tensors: ops run where they are local to each process's sequences, and are refused elsewhere."""

from pathlib import Path

import pytest
import torch.distributed


@pytest.mark.op
@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed")
def test_every_op_on_two_processes_that_share_a_batch(on_two_processes):
    on_two_processes(Path(__file__).with_name("distributed_calls.py"))
