"""PyTorch's operations on one thread where its others would spin on after them."""

from __future__ import annotations

import threading

import pytest
import torch
from threads import needs_openmp

from ssmkernels.native.alone import GRAIN, WORTH, alone

pytestmark = [needs_openmp, pytest.mark.usefixtures("two_threads")]


def test_little_work_is_the_calling_threads_alone():
    met = []
    with alone(torch.zeros(GRAIN)):
        assert torch.get_num_threads() == 1
        other = threading.Thread(target=lambda: met.append(torch.get_num_threads()))
        other.start()
        other.join()
        with alone(torch.zeros(GRAIN)):
            pass
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    assert met[0] >= 2


def test_what_shares_nothing_or_is_much_stays_as_it_is():
    for x, operations in ((torch.zeros(GRAIN - 1), 1), (torch.zeros(WORTH + 1), 1), (torch.zeros(GRAIN), WORTH)):
        with alone(x, operations):
            assert torch.get_num_threads() == 2
    with alone(torch.zeros(GRAIN, device="meta")):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 2


def test_an_error_puts_the_threads_back():
    with pytest.raises(ZeroDivisionError), alone(torch.zeros(GRAIN)):
        raise ZeroDivisionError
    assert torch.get_num_threads() == 2
