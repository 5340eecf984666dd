"""Ctrl-C, or memory that is refused, anywhere within a token: what comes after it is right."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from decoding_models import build, same

import ssmzoo
from ssmkernels import native
from ssmzoo.steady import steady

pytestmark = pytest.mark.skipif(native.missing() is not None, reason="needs the native CPU library")

WATCHED = ("ssmzoo/decoding/", "ssmzoo/steady.py", "native/prepared.py", "native/calls.py")
POINTS = 10  # of each call, evenly spread over its lines


class Stops:
    """Runs a call up to its nth line of the watched files, and raises there."""

    def __init__(self, error: type[BaseException], at: int | None):
        self.error, self.at, self.lines = error, at, 0

    def __call__(self, call):
        sys.settrace(self._call)
        try:
            return call()
        except self.error:
            return None
        finally:
            sys.settrace(None)

    def _call(self, frame, event, arg):
        path = Path(frame.f_code.co_filename).as_posix()
        return self._line if any(part in path for part in WATCHED) else None

    def _line(self, frame, event, arg):
        if event == "line":
            if self.lines == self.at:
                sys.settrace(None)
                raise self.error
            self.lines += 1
        return self._line


def token(model, state, id):
    with torch.no_grad():
        return model(torch.full((state.n_sequences, 1), id), state)


def continued(model, state, count=3):
    found = []
    for id in range(count):
        logits, state = token(model, state, id)
        found.append((logits, state.clone()))
    return found


def check_stopped(make, expected):
    """A call is stopped at each of some lines, ``make`` gives what is to be called and what is to be right then."""
    counted = Stops(KeyboardInterrupt, None)
    call, _ = make()
    counted(call)
    assert counted.lines > 20
    step = max(1, counted.lines // POINTS)
    for i, at in enumerate(range(0, counted.lines, step)):
        call, then = make()
        assert Stops((KeyboardInterrupt, MemoryError)[i % 2], at)(call) is None
        for _ in range(2):
            assert all(map(same, then(), expected)), f"after line {at} of {counted.lines}"


KINDS = ["mamba2_mlp", "attention"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_token(kind):
    """A fault: a program that was half prepared stayed so."""
    expected = continued(build(kind), build(kind).initial_state(2))

    def make():
        model = build(kind)
        state = model.initial_state(2)
        return lambda: token(model, state, 0), lambda: continued(model, model.initial_state(2))

    check_stopped(make, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_of_another_state(kind):
    """A fault: a program that was on its way to another state worked on parts of both."""
    model = build(kind)
    mine = token(model, model.initial_state(2), 5)[1]
    expected = continued(model, mine.clone())

    def make():
        own, other = mine.clone(), model.initial_state(2)
        token(model, mine.clone(), 0)  # the program is there

        def then():
            before = [t.clone() for t in other.stored().tensors()]
            found = continued(model, own.clone())
            assert all(map(torch.equal, other.stored().tensors(), before)), "the other state is left alone"
            return found

        return lambda: token(model, other, 0), then

    check_stopped(make, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_of_before_goes_on(kind):
    """A program stands at one state, is stopped on its way to another, and comes back to the first."""
    model = build(kind)
    start = token(model, model.initial_state(2), 5)[1]
    expected = continued(model, token(model, start.clone(), 0)[1])

    def make():
        state, other = token(model, start.clone(), 0)[1], start.clone()
        states = iter([state, state.clone()])
        return lambda: token(model, other, 0), lambda: continued(model, next(states))

    check_stopped(make, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_of_generation(kind):
    model = build(kind)
    expected = model.generate([[1, 2, 3]], 6, temperature=0)
    counted = Stops(KeyboardInterrupt, None)
    counted(lambda: model.generate([[1, 2, 3]], 6, temperature=0))
    for at in range(0, counted.lines, max(1, counted.lines // POINTS)):
        assert Stops(KeyboardInterrupt, at)(lambda: model.generate([[1, 2, 3]], 6, temperature=0)) is None
        with steady(model):
            assert model.generate([[1, 2, 3]], 6, temperature=0) == expected
        assert model.generate([[1, 2, 3]], 6, temperature=0) == expected


def test_an_engine_ends_what_was_under_way_and_goes_on():
    model = build("attention")
    prompts = [[1, 2, 3], [4, 5], [6]]
    expected = [model.generate([p], 6, temperature=0)[0][len(p) :] for p in prompts]
    engine = ssmzoo.Engine(model, page_size=4, chunk=4)
    counted = Stops(KeyboardInterrupt, None)
    for at in (None, *range(0, 2000, 400)):
        for prompt in prompts:
            engine.submit(prompt, max_tokens=6, temperature=0)
        (counted if at is None else Stops(KeyboardInterrupt, at))(engine.run)
        engine.run()  # what is left
        requests = [engine.submit(prompt, max_tokens=6, temperature=0) for prompt in prompts]
        engine.run()
        assert [request.result() for request in requests] == expected
    assert counted.lines > 500
