"""What all tests share."""

from __future__ import annotations

import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def _threads():
    """Puts the number of threads back after each test: with more threads than cores, all later tests would be slow."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _mixers():
    """Mixers that a test registers, by names that begin with "test-", are gone after it."""
    yield
    registry = sys.modules.get("ssmzoo.registry")
    for name in list(registry._registered) if registry else ():
        if name.startswith("test-"):
            del registry._registered[name]
