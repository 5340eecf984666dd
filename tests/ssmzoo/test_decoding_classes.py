"""Methods that somebody replaces in a class, while models of it decode."""

from __future__ import annotations

import functools
import gc
import types
import weakref
from unittest import mock

import pytest
import torch
from decoding_models import ROUNDED, build, decoded
from torch import nn

import ssmzoo
from ssmkernels import native
from ssmkernels.native.prepared import Program
from ssmzoo.quantized import QuantizedLinear
from ssmzoo.written import Classes, is_as_written

pytestmark = pytest.mark.skipif(native.missing() is not None, reason="needs the native CPU library")

CALLED = ("__call__", "__getattr__", "_call_impl", "_wrapped_call_impl")


@pytest.fixture
def programs(monkeypatch):
    """The programs that run, one after another."""
    runs, run = [], Program.run
    monkeypatch.setattr(Program, "run", lambda self: (runs.append(self), run(self)))
    return runs


def kinds_of(model, state):
    """The classes of a model's layers and their states, with what they are derived from."""
    states = [part for s in state.layers for part in (s, *vars(s).values()) if isinstance(part, ssmzoo.State)]
    modules = [module for block in model.blocks for module in block.modules()]
    kinds = dict.fromkeys(by for each in (*modules, *states) for by in type(each).__mro__[:-1])
    return [kind for kind in kinds if kind is not nn.Module]


def methods_of(kind):
    found = {name for name, value in vars(kind).items() if isinstance(value, types.FunctionType)}
    return sorted(name for name in found if not name.startswith("__"))


def same_by_another_name(function, named):
    def another(*args, **kwargs):
        return function(*args, **kwargs)

    return functools.wraps(function)(another) if named else another


def shadowed(kind, name, model, state):
    """Whether every layer or state of this kind has another method of the name before this one."""
    used = [type(m) for block in model.blocks for m in block.modules()]
    used += [type(part) for s in state.layers for part in (s, *vars(s).values())]
    return all(next(by for by in k.__mro__ if name in vars(by)) is not kind for k in used if issubclass(k, kind))


@pytest.mark.parametrize("kind", sorted({"mamba", "mamba2", "gated_deltanet", *ROUNDED}))
@torch.no_grad()
def test_no_method_of_a_layer_or_state_may_be_replaced_unnoticed(kind, programs):
    """A fault: of mixers ``forward`` and ``mix`` were looked at, and of other classes ``forward``."""
    model, ids = build(kind), torch.tensor([[1]])
    state = decoded(model, model.initial_state(1), tolerance=1e-5)[1]
    assert programs
    tried = 0
    for each in kinds_of(model, state):
        for name in methods_of(each):
            if shadowed(each, name, model, state):
                continue
            with mock.patch.object(each, name, same_by_another_name(vars(each)[name], named=tried % 2 == 0)):
                programs.clear()
                state = model(ids, state)[1]
                assert not programs, f"{each.__name__}.{name}"
                tried += 1
    assert tried > 20
    state = model(ids, state)[1]
    assert len(programs) == 1, "once all is as it was, the program runs again"


@pytest.mark.parametrize("name", CALLED)
@torch.no_grad()
def test_neither_may_those_of_all_modules(name, programs):
    model, ids = build("mamba"), torch.tensor([[1]])
    state = decoded(model, model.initial_state(1))[1]
    count = len(programs)
    with mock.patch.object(nn.Module, name, same_by_another_name(vars(nn.Module)[name], named=False)):
        state = model(ids, state)[1]
    assert len(programs) == count
    model(ids, state)
    assert len(programs) == count + 1


def of_a_property(kind):
    return mock.patch.object(kind, "multiplier", property(lambda self: 1.0), create=True)


def of_a_partial(kind):
    return mock.patch.object(kind, "mix", functools.partialmethod(kind.mix))


@torch.no_grad()
def test_what_stands_in_a_methods_place_counts_whatever_it_is(programs):
    model, ids = build("mamba2"), torch.tensor([[1]])
    state = decoded(model, model.initial_state(1))[1]
    kind = type(model.blocks[0].mixer)
    for replaced in (of_a_property, of_a_partial):
        programs.clear()
        with replaced(kind):
            state = model(ids, state)[1]
        assert not programs, replaced.__name__
    with mock.patch.object(kind, "_over_tokens", mock.Mock(), create=True):
        state = model(ids, state)[1]
    assert not programs


@torch.no_grad()
def test_a_base_that_nobody_calls_may_change(programs):
    """``nn.Linear.forward`` is none of ours, which ``accelerate()`` replaces."""
    model, ids = build("mamba2_mlp"), torch.tensor([[1]])
    state = decoded(model, model.initial_state(1), tolerance=1e-5)[1]
    with mock.patch.object(nn.Linear, "forward", same_by_another_name(nn.Linear.forward, named=True)):
        for _ in range(3):
            programs.clear()
            state = model(ids, state)[1]
    assert len(programs) == 1


@torch.no_grad()
def test_a_method_that_is_replaced_in_one_cache_is_called(programs):
    model, ids = build("attention"), torch.tensor([[1]])
    state = decoded(model, model.initial_state(1), tolerance=1e-5)[1]
    cache, asked = state.layers[1], []
    append = cache.append
    cache.append = lambda *args: (asked.append(1), append(*args))[1]
    count = len(programs)
    model(ids, state)
    assert asked == [1]
    assert len(programs) == count


@torch.no_grad()
def test_a_quantised_map_of_a_class_derived_from_ours_is_called():
    """A fault: its ``prepare_step``, of which its own ``forward`` knows nothing, stood for it."""

    class Doubled(QuantizedLinear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = build("mamba2_mlp")
    ssmzoo.quantize(model, "int8")
    state = decoded(model, model.initial_state(1), tolerance=1e-5)[1]
    before = decoded(model, state.clone(), 1, tolerance=1e-5)[0][0]
    model.blocks[1].mlp.fc2.__class__ = Doubled
    after = decoded(model, state, 3, tolerance=1e-5)[0][0]
    assert not torch.allclose(before, after)


def test_every_class_here_is_as_it_was_written():
    """Or its models would be decoded layer by layer, which no test of results sees."""
    for name in ROUNDED:
        model = build(name)
        wrong = [k for k in kinds_of(model, model.initial_state(1)) if not is_as_written(k)]
        assert not wrong


def test_classes_are_let_go():
    class Own(nn.Module):
        def forward(self, x):
            return super().forward(x)

    ref = weakref.ref(Own)
    assert Classes([Own]).as_written()
    del Own
    gc.collect()
    assert ref() is None
