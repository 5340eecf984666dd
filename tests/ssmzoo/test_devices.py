"""How many threads the commands give PyTorch in a container."""

import pytest
import torch

from ssmkernels.native import quota
from ssmzoo.devices import fit_threads


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("cores", "variable", "expected"), [(1, None, 1), (None, None, 3), (8, None, 3), (1, "OMP_NUM_THREADS", 3)]
)
def test_no_more_threads_than_the_container_has_cores(monkeypatch, threads, cores, variable, expected):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    if variable is not None:
        monkeypatch.setenv(variable, "3")
    monkeypatch.setattr(quota, "cores", lambda: cores)
    threads(3)
    fit_threads()
    assert torch.get_num_threads() == expected
