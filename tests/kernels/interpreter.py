"""Prepares a process in which Triton interprets its kernels on the CPU. tests/shared/forks.py runs programs in it.

Triton reads ``TRITON_INTERPRET`` when it is imported, so the tests' own process cannot do this.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch._dynamo
import torch.testing._internal.optests
from quick_interpreter import patch

import ssmkernels.testing  # noqa: F401 (for the forks)

torch.set_num_threads(1)  # a fork would wait for others in vain
patch()
