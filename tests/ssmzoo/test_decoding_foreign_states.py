"""What a model's native calls cannot run on: states of other models, or changed by hand, and weights that do not fit.

A fault: calls wrote past the end of a cache that had fewer heads, or fewer sequences, than the layer; and they read and
wrote beyond weights that had been replaced by smaller ones, where the layers raise an error.
"""

from __future__ import annotations

import copy

import pytest
import torch

import ssmzoo
from ssmkernels import native
from ssmkernels.native.prepared import Program
from ssmzoo.linear import Linear
from ssmzoo.state import State

pytestmark = pytest.mark.skipif(native.missing() is not None, reason="needs the native CPU library")

CACHES = {"whole": {}, "pages": {"page_size": 4}, "window": {"window": 3}}
HEADS = [{"n_kv_heads": 1}, {"n_kv_heads": 4}, {"head_dim": 8, "n_kv_heads": 1}, {"head_dim": 2, "n_kv_heads": 4}]
MAMBA = ("mamba", "attention")


@pytest.fixture
def programs(monkeypatch):
    """The programs that run, one after another."""
    runs, run = [], Program.run
    monkeypatch.setattr(Program, "run", lambda self: (runs.append(self), run(self)))
    return runs


def build(pattern=("attention",), mlp="swiglu", **options):
    torch.manual_seed(0)
    mixers = {"mamba": {"d_state": 4}, "attention": {"head_dim": 4, "n_kv_heads": 2} | options}
    config = {"d_model": 16, "n_layers": 2, "vocab_size": 20, "pattern": [*pattern], "mlp": {"kind": mlp}}
    return ssmzoo.build(config | {"mixers": {name: mixers[name] for name in pattern}}).eval()


@torch.no_grad()
def decoded(model, rows=2, count=4):
    """The state after some tokens of each of several sequences."""
    state = model.initial_state(rows)
    for t in range(count):
        _, state = model(torch.arange(rows)[:, None] + t, state)
    return state


@torch.no_grad()
def called(model, state):
    """A token's logits, and the error in their place, without and with native calls."""
    ids, found = torch.ones(state.n_sequences, 1, dtype=torch.long), []
    handle = model.layers[0].register_forward_hook(lambda *_: None)  # somebody who wants to see the layers
    for _ in range(2):
        try:
            found.append((model(ids, copy.deepcopy(state))[0], None))
        except (RuntimeError, TypeError, ValueError) as error:
            found.append((None, error))
        handle.remove()
    return found


def check_refused(model, state, match, kind=ValueError):
    for _ in range(2):  # at the second time calls would be prepared
        for logits, error in called(model, state):
            assert logits is None
            assert type(error) is kind
            assert match in str(error)


@pytest.mark.parametrize("empty", [True, False], ids=["empty", "filled"])
@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_a_cache_of_other_heads_is_refused(heads, name, empty, programs):
    model, other = build(**CACHES[name]), build(**CACHES[name] | heads)
    state = decoded(model)
    state_of_other = other.initial_state(2) if empty else decoded(other)
    count = len(programs)
    check_refused(model, state_of_other, "`state` must have keys and values of 2 heads of 4")
    assert len(programs) == count
    (expected, _), (found, _) = called(model, state)
    torch.testing.assert_close(found, expected)
    assert len(programs) == count + 1, "the model's own states go on as before"


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("pattern", [MAMBA, ("attention",)], ids=" ".join)
def test_a_layer_with_fewer_or_more_sequences_is_refused(pattern, name, rows, programs):
    model = build(pattern, **CACHES[name])
    state = decoded(model)
    state.layers[1] = decoded(model, rows).layers[1]
    count = len(programs)
    check_refused(model, state, f"Attention: `state` must have 2 sequences, as many as `x`; got {rows}")
    assert len(programs) == count


def test_a_state_of_another_kind_is_refused_by_the_layer(programs):
    """A fault: it was an AttributeError."""
    hybrid, attention, mamba = build(MAMBA), build(), build(["mamba"])
    states = {model: decoded(model) for model in (hybrid, attention, mamba)}
    turned = copy.deepcopy(states[hybrid])
    turned.layers.reverse()
    count = len(programs)
    for model, state, name in ((hybrid, turned, "Mamba"), (attention, states[mamba], "Attention")):
        check_refused(model, state, f"{name}: `state` must come from initial_state() or an earlier call", TypeError)
    check_refused(mamba, states[attention], "Mamba: `state` must come from initial_state()", TypeError)
    assert len(programs) == count


def lengths_of_64_bits(cache):
    cache.lengths = cache.lengths.long()


def lengths_apart(cache):
    cache.lengths = torch.stack([cache.lengths, -cache.lengths], dim=1)[:, 0]


def starts_apart(cache):
    cache.starts = torch.stack([cache.starts, -cache.starts], dim=1)[:, 0]


def short_values(cache):
    cache.values = cache.values[:, :3]


def negative_lengths(cache):
    cache.lengths = cache.lengths - 9


def on_no_device(cache):
    cache.keys = cache.keys.to("meta")


@pytest.mark.parametrize(
    "change", [lengths_of_64_bits, lengths_apart, starts_apart, short_values, negative_lengths, on_no_device]
)
def test_what_is_changed_by_hand_is_read_as_the_layers_read_it(change, programs):
    model = build(window=6)
    state = decoded(model)
    for cache in state.layers:
        change(cache)
    for _ in range(2):
        (expected, error), (found, own) = called(model, state)
        assert type(own) is type(error)
        assert found is expected is None or torch.allclose(found, expected, atol=1e-6)


def test_pages_of_several_pools_and_wide_caches_are_read_rightly(programs):
    """A cache may have another dtype than the layer, as one of a model before it was converted; it is converted."""
    model = build(page_size=3)
    for state in (decoded(model), State.concatenate([decoded(model, 1), decoded(model, 1, 7)])):
        for dtype in (torch.float64, torch.bfloat16):
            count = len(programs)
            (expected, _), (found, _) = called(model, state.to(dtype))
            torch.testing.assert_close(found, expected)
            assert len(programs) == count + 1


def replaced(name, *shape):
    """The change of a map of each layer for one of another shape, ``(inputs, outputs)``, or of a parameter."""

    def change(model):
        for layer in model.layers:
            owner, _, last = name.rpartition(".")
            new = (
                Linear(*shape, bias=False)
                if last.endswith(("proj", "fc1", "fc2"))
                else torch.nn.Parameter(torch.ones(shape))
            )
            setattr(layer.get_submodule(owner), last, new)

    return change


def options(**values):
    """The change of options of each layer's mixer."""

    def change(model):
        for layer in model.layers:
            vars(layer.mixer).update(values)

    return change


MISFITS = [
    replaced("mixer.q_proj", 16, 20),
    replaced("mixer.q_proj", 16, 24),
    replaced("mixer.q_proj", 12, 16),
    replaced("mixer.q_proj", 32, 16),
    replaced("mixer.out_proj", 32, 16),
    replaced("mixer.out_proj", 16, 12),
    replaced("mixer.sinks", 1),
    replaced("mixer.gate_proj", 16, 2),
    replaced("mixer.q_proj.bias", 8),
    replaced("mlp.fc1", 12, 64),
    replaced("mlp.fc2", 16, 16),
    replaced("norm.weight", 1),
    options(rope_dim=8),
    options(scale=float("nan")),
    options(softcap=-1.0),
]


@pytest.mark.parametrize("change", range(len(MISFITS)))
def test_weights_that_do_not_fit_are_refused_as_by_the_layers(change, programs):
    model = build(sinks=True, gate="headwise")
    state, count = decoded(model), len(programs)
    MISFITS[change](model)
    for _ in range(2):
        for logits, error in called(model, state):
            assert logits is None
            assert isinstance(error, RuntimeError | ValueError)
    assert len(programs) == count
