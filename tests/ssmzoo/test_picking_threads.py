"""Tokens are picked on one thread, as PyTorch's others would spin on while the model's next call wants their cores."""

from __future__ import annotations

import pytest
import torch
from threads import needs_openmp

import ssmzoo
from ssmkernels.native.alone import GRAIN
from ssmzoo.generate.sampling import Sampling

pytestmark = [needs_openmp, pytest.mark.usefixtures("two_threads")]


def build():
    torch.manual_seed(0)
    return ssmzoo.build("mamba-hybrid-tiny", d_model=32, n_layers=1, vocab_size=GRAIN).eval()


OPTIONS = {
    "greedy": {"temperature": 0},
    "drawn": {},
    "sorted": {"top_p": 0.9},
    "draft": {"draft": "lookup", "temperature": 0},
    "beams": {"num_beams": 2},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_tokens_are_picked_on_one_thread_and_are_the_same(name, monkeypatch):
    model = build()
    met, amax = [], torch.Tensor.amax
    monkeypatch.setattr(
        torch.Tensor, "amax", lambda *args, **options: (met.append(torch.get_num_threads()), amax(*args, **options))[1]
    )
    options = OPTIONS[name] | ({} if name in ("beams", "greedy", "draft") else {"seed": 3})
    found = model.generate([[1, 2, 3]], 4, **options)
    assert {*met} == {1}
    torch.set_num_threads(1)
    assert model.generate([[1, 2, 3]], 4, **options) == found


def test_requests_of_an_engine_are_picked_for_on_one_thread(monkeypatch):
    model = build()
    met, pick = [], Sampling.pick
    monkeypatch.setattr(Sampling, "pick", lambda *args: (met.append(torch.get_num_threads()), pick(*args))[1])
    engine = ssmzoo.Engine(model)
    requests = [engine.submit([1, 2], max_tokens=3, temperature=t, seed=1) for t in (0, 0, 1.0)]
    engine.run()
    assert all(len(request.result()) == 3 for request in requests)
    assert {*met} == {1}
