"""What programs of the tests import, for the process that ``forks`` keeps: see forks.py."""

import importlib
import importlib.util

import torch
import torch._dynamo
import torch.distributed.fsdp

torch.set_num_threads(1)  # a fork would wait for others in vain
for name in ("accelerate", "matplotlib.pyplot", "sklearn.datasets"):
    if importlib.util.find_spec(name.partition(".")[0]):
        importlib.import_module(name)
