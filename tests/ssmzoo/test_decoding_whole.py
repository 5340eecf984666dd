"""A token through layers, last norm and head in one native call, and models that are said to stay as they are."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import ssmzoo
from ssmkernels import native
from ssmkernels.native.prepared import Program
from ssmzoo import decoding
from ssmzoo.decoding.decoder import Decoder
from ssmzoo.decoding.parts import Parts
from ssmzoo.steady import period_of, steady

pytestmark = pytest.mark.skipif(native.missing() is not None, reason="needs the native CPU library")

CONFIG = {"d_model": 16, "n_layers": 2, "pattern": ["mamba"], "mixers": {"mamba": {"d_state": 4}}}
LARGE = 2**15  # tokens, whose head PyTorch does not multiply by


@pytest.fixture
def programs(monkeypatch):
    """The programs that run, one after another."""
    runs, run = [], Program.run
    monkeypatch.setattr(Program, "run", lambda self: (runs.append(self), run(self)))
    return runs


@pytest.fixture
def looks(monkeypatch):
    """How often somebody looks whether a model has changed."""
    found, unchanged = [], Parts.unchanged
    monkeypatch.setattr(Parts, "unchanged", lambda self: (found.append(self), unchanged(self))[1])
    return found


def build(vocab_size=LARGE, **changes):
    torch.manual_seed(0)
    return ssmzoo.build(CONFIG | {"vocab_size": vocab_size} | changes).eval()


def has_head(program):
    return any(call.values.get("outputs", 0) >= LARGE for call in program._calls)


@pytest.mark.parametrize(
    ("dtype", "rows", "whole"),
    [
        (torch.float32, 1, True),
        (torch.bfloat16, 2, True),
        (torch.float32, 2, True),
        (torch.float32, native.FEW, True),
        (torch.float64, 1, False),
    ],
    ids=str,
)
def test_the_head_is_in_the_program_where_its_bits_stay(dtype, rows, whole, programs):
    model = build(logit_softcap=2.0, logit_multiplier=3.0).to(dtype)
    state, kept = model.initial_state(rows), []
    with torch.no_grad():
        for t in range(4):
            ids = torch.full((rows, 1), t)
            handle = model.layers[0].register_forward_hook(lambda *_: None)  # wants to see each layer called
            expected, after = model(ids, state.clone())
            handle.remove()
            found, state = model(ids, state)
            assert torch.equal(found, expected)
            assert all(map(torch.equal, state.tensors(), after.tensors()))
            kept.append((found, expected))
    assert programs
    assert all(has_head(program) == whole for program in programs)
    assert all(torch.equal(found, expected) for found, expected in kept)  # later tokens have memory of their own


def a_hook(model):
    model.lm_head.register_forward_hook(lambda module, args, y: 2 * y)


def another_eps(model):
    model.norm_f.eps = 0.5


def another_weight(model):
    model.lm_head.weight = torch.nn.Parameter(2 * model.lm_head.weight)


def another_norm(model):
    model.norm_f = torch.nn.Identity()


@pytest.mark.parametrize("change", [a_hook, another_eps, another_weight, another_norm], ids=lambda f: f.__name__)
def test_changes_at_the_end_take_effect(change):
    model, ids = build(), torch.tensor([[1]])
    with torch.no_grad():
        state = model.initial_state(1)
        for _ in range(3):
            _, state = model(ids, state)
        before, _ = model(ids, state.clone())
        change(model)
        after, _ = model(ids, state)
    assert not torch.allclose(before, after)


def test_what_the_head_is_given_is_not_its_outputs():
    model, ids = build(), torch.tensor([[1]])
    with torch.no_grad():
        state = model.initial_state(1)
        for _ in range(3):
            _, state = model(ids, state)
        hidden, _ = model(ids, state, hidden=True)
    assert hidden.shape == (1, 1, 16)


@pytest.mark.parametrize("vocab_size", [20, LARGE])
def test_generation_looks_once(vocab_size, looks):
    model = build(vocab_size)
    first = model.generate([[1, 2]], 12, temperature=0)
    seen = len(looks)
    assert seen <= 3  # at the second token and the third, of layers with a head and of layers alone
    with torch.no_grad():
        model.layers[0].mixer.out_proj.weight.data = -model.layers[0].mixer.out_proj.weight.data
    second = model.generate([[1, 2]], 12, temperature=0)
    assert len(looks) > seen
    fresh = build(vocab_size)
    fresh.load_state_dict(model.state_dict())
    assert fresh.generate([[1, 2]], 12, temperature=0) == second != first


def test_other_states_are_looked_at_meanwhile(looks):
    model, ids = build(), torch.tensor([[1]])
    with torch.no_grad(), steady(model):
        state = model.initial_state(1)
        for _ in range(4):
            _, state = model(ids, state)
        seen, branch = len(looks), state.clone()
        expected, state = model(ids, state)
        assert len(looks) == seen
        found, _ = model(ids, branch)
        assert len(looks) > seen
        assert torch.equal(found, expected)


def test_a_period_notes_weights_once_however_often_states_change():
    model = build()
    with torch.no_grad(), steady(model):
        states = [model.initial_state(rows) for rows in (1, 2)]
        for turn in range(12):
            ids = torch.ones(turn % 2 + 1, 1, dtype=torch.int64)
            _, states[turn % 2] = model(ids, states[turn % 2])
        assert len(period_of(model).kept) == 1


def test_weights_stay_in_memory_as_long_as_calls_read_them_unasked():
    model, ids = build(), torch.tensor([[1]])
    weight = model.layers[0].mixer.in_proj.weight
    with torch.no_grad():
        with steady(model):
            with steady(model):
                state = model.initial_state(1)
                for _ in range(4):
                    _, state = model(ids, state)
            expected, _ = model(ids, state.clone())
            held = weakref.ref(period_of(model))
            assert any(weight.data_ptr() == storage.data_ptr() for kept in held().kept.values() for storage in kept)
            weight.data = torch.zeros_like(weight)
            found, _ = model(ids, state.clone())  # another state: it is looked at
            assert not torch.equal(found, expected)
            kept = held().kept
        assert kept == {}
        assert period_of(model) is None
        assert not decoding._of_models[model].trusts(period_of(model), state.layers, torch.zeros(1, 1, 16))
    del model, state
    gc.collect()
    assert not decoding._of_models


@pytest.fixture
def trusted(monkeypatch):
    """The tensors of states that calls have run on unasked, by weak references."""
    found, trust = [], Decoder.trust

    def noting(self, period, states, tensors):
        found.extend(map(weakref.ref, tensors))
        trust(self, period, states, tensors)

    monkeypatch.setattr(Decoder, "trust", noting)
    return found


def stopped_by_an_error(model):
    steps = iter(range(6))
    with pytest.raises(StopIteration):
        model.generate([[1, 2]], 12, stream=lambda _: next(steps))


def through_an_engine(model):
    engine = ssmzoo.Engine(model)
    engine.submit([1, 2], max_tokens=12)
    engine.run()


def with_a_draft(model):
    draft = build(20, n_layers=1)
    model.generate([[1, 2]], 12, draft=draft)
    return draft


WAYS = {
    "alone": lambda model: model.generate([[1, 2]], 12, temperature=0),
    "rows": lambda model: model.generate([[1, 2], [3, 4]], 12),
    "beams": lambda model: model.generate([[1, 2]], 12, num_beams=3),
    "draft": with_a_draft,
    "error": stopped_by_an_error,
    "engine": through_an_engine,
}


@pytest.mark.parametrize("way", WAYS)
def test_no_state_outlives_what_it_was_made_for(way, trusted):
    model = build(20)
    left = WAYS[way](model)
    gc.collect()
    assert trusted
    assert not any(ref() is not None for ref in trusted)
    del left


def test_states_may_be_let_go_meanwhile(trusted, looks):
    model, ids = build(), torch.tensor([[1]])
    with torch.no_grad(), steady(model):
        state = model.initial_state(1)
        for _ in range(4):
            _, state = model(ids, state)
        other = state.clone()
        expected, _ = model(ids, state)
        decoding.let_go(model)
        del state, _
        assert not any(ref() is not None for ref in trusted)
        seen = len(looks)
        found, _ = model(ids, other)
        assert len(looks) > seen
        assert torch.equal(found, expected)


def test_a_head_that_is_left_out_is_left_out_once(monkeypatch):
    """A fault: with each change of a batch the layers' calls were prepared again, up to a head that is too small."""
    made, prepare = [], Decoder._prepare_block
    monkeypatch.setattr(Decoder, "_prepare_block", lambda self, *args: (made.append(self), prepare(self, *args))[1])
    model = build(vocab_size=16)
    with torch.no_grad():
        for rows in (1, 2, 1, 2, 1):
            state = model.initial_state(rows)
            for t in range(4):
                _, state = model(torch.full((rows, 1), t), state)
    assert len(made) == 2 * len(model.layers), "one program for each number of rows, of the layers alone"
