"""Attention's token in a model's one native call: wherever its cache lies, and however far each sequence has come."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

import ssmzoo
from ssmkernels import native
from ssmkernels.native.prepared import Program
from ssmzoo.cache.elastic import elastic
from ssmzoo.state import State

pytestmark = pytest.mark.skipif(native.missing() is not None, reason="needs the native CPU library")

CONFIG = {"d_model": 16, "n_layers": 3, "vocab_size": 20, "pattern": ["mamba", "attention"]}


@pytest.fixture
def programs(monkeypatch):
    """The programs that run, one after another."""
    runs, run = [], Program.run
    monkeypatch.setattr(Program, "run", lambda self: (runs.append(self), run(self)))
    return runs


def build(**options):
    torch.manual_seed(0)
    mixers = {"mamba": {"d_state": 4}, "attention": {"head_dim": 4, "n_kv_heads": 2} | options}
    return ssmzoo.build(CONFIG | {"mixers": mixers, "mlp": {"kind": "swiglu"}}).eval()


def by_layers(model, ids, state):
    """The same call, in which each layer is called: a hook that does nothing is somebody who wants to see them."""
    handle = model.layers[0].register_forward_hook(lambda *_: None)
    result = model(ids, state)
    handle.remove()
    return result


def held(state):
    """What the state of each sequence holds; of a cache all of its own tokens."""
    return [t for i in range(state.n_sequences) for t in state.select([i]).stored().tensors()]


def follow(model, state, count, tolerance=1e-5):
    """So many tokens, each against that of the layers; the state after them."""
    for t in range(count):
        ids = (torch.arange(state.n_sequences)[:, None] + t) % 20
        expected, after = by_layers(model, ids, state.clone())
        found, state = model(ids, state)
        pairs = [(found, expected), *zip(held(state), held(after), strict=True)]
        assert all(torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance) for a, b in pairs)
    return state


OPTIONS = {
    "whole": {},
    "window": {"window": 5},
    "pages": {"page_size": 4},
    "window in pages": {"page_size": 4, "window": 5},
}


@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_sequences_of_several_lengths_as_their_caches_grow(name, programs):
    """Past what a cache set aside, and past what a window keeps, which is then moved about."""
    model = build(**OPTIONS[name])
    states = [model(torch.arange(length)[None] % 20, model.initial_state(1))[1] for length in (1, 7, 62)]
    state = State.concatenate(states)
    count = 150 if name == "window" else 20
    state = follow(model, state, count)
    assert len(programs) >= count - 4
    state = State.concatenate([state.select([2, 0]), states[1]])
    follow(model, state, 12)


@torch.no_grad()
def test_states_in_one_pool_share_pages_until_they_write(programs):
    model = build()
    with elastic(4, 2**20):
        empty = model.initial_state(1)
    state = follow(model, empty.clone(), 6)
    assert programs
    other = state.clone()
    before = held(state)
    other = follow(model, other, 5)
    assert all(map(torch.equal, held(state), before))
    joined = State.concatenate([state, other, empty.clone()])
    assert joined.layers[1].pages.pool is state.layers[1].pages.pool
    follow(model, joined, 9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@torch.no_grad()
def test_other_precisions_are_no_further_off_than_layer_by_layer(dtype, programs):
    """Measured from a model with the same weights in float64; sinks are read in float32."""
    model = build(sinks=True, window=3, qk_norm=True).to(dtype)
    truth = copy.deepcopy(model).double()
    state, true_state = model.initial_state(2), truth.initial_state(2)
    own, layers = [], []
    for t in range(6):
        ids = torch.tensor([[1], [2]]) + t
        expected, _ = by_layers(model, ids, state.clone())
        logits, state = model(ids, state)
        exact, true_state = by_layers(truth, ids, true_state)
        own.append(logits - exact)
        layers.append(expected - exact)
    assert len(programs) == 6
    assert torch.stack(own).norm() <= 1.5 * torch.stack(layers).norm() + 1e-14


@pytest.mark.parametrize(
    "options",
    [
        {"cache": "hidden", "rope": False},
        {"d_conv": 3},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 4}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}},
    ],
    ids=["hidden", "d_conv", "dynamic", "yarn"],
)
@torch.no_grad()
def test_what_is_more_than_these_calls_is_called(options, programs):
    model = build(**options)
    follow(model, model.initial_state(2), 6)
    assert not programs


@torch.no_grad()
def test_a_change_between_two_tokens_takes_effect(programs):
    model = build(qk_norm="centred", gate="headwise")
    state = follow(model, model.initial_state(1), 4)
    mixer = model.layers[1].mixer

    def cache(state):
        return state.layers[1]

    def keys_of_another(state):
        cache(state).keys = torch.randn_like(cache(state).keys)

    def channels_apart(state):
        cache(state).values = 2 * cache(state).values.mT.contiguous().mT

    changes = [
        lambda _: setattr(mixer, "rope_base", 100.0),
        lambda _: setattr(mixer, "window", 2),
        lambda _: setattr(mixer, "softcap", 0.1),
        lambda _: mixer.q_norm.weight.data.add_(3.0),
        keys_of_another,
        channels_apart,
    ]
    for change in changes:
        before, _ = model(torch.ones(1, 1, dtype=torch.long), state.clone())
        change(state)
        after, _ = model(torch.ones(1, 1, dtype=torch.long), state.clone())
        assert not torch.equal(before, after)
        state = follow(model, state, 3)
    assert len(programs) > 3 * len(changes)


@torch.no_grad()
def test_lengths_beyond_a_cache_are_refused(programs):
    """By hand, as no call makes them: nothing is written beyond the cache."""
    model = build()
    states = [model(torch.arange(length)[None], model.initial_state(1))[1] for length in (3, 5)]
    state = follow(model, State.concatenate(states), 3)
    count = len(programs)
    assert count
    state.layers[1].lengths += 1000
    with pytest.raises(ValueError, match=r"KVCache: `lengths` must be from 0 to 8 beyond `starts`"):
        model(torch.ones(2, 1, dtype=torch.long), state)
    assert len(programs) == count


@torch.no_grad()
def test_answers_of_a_hybrid_are_those_of_generate_however_requests_come_and_go(programs):
    model = build(window=6)
    engine = ssmzoo.Engine(model, memory=2**22, max_batch=5, page_size=4, chunk=8)
    prompts = [[i % 20 for i in range(1 + 3 * n)] for n in range(9)]
    requests = [engine.submit(p, max_tokens=4 + n, temperature=0) for n, p in zip(itertools.count(), prompts)]
    engine.run()
    assert programs
    for n, (prompt, request) in enumerate(zip(prompts, requests, strict=True)):
        assert request.result() == model.generate([prompt], 4 + n, temperature=0)[0][len(prompt) :]
