"""Linear attention against its parallel form, at its edges, in pieces and packed, and what it refuses."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from implementations import every_implementation, with_final_state
from linear_attention_parallel import parallel

from ssmkernels import linear_attention, linear_attention_step, native

EVERY = every_implementation("linear_attention")
scan = with_final_state(linear_attention)
DECAYS = pytest.mark.parametrize("decay", ["none", "head", "token", "key"])


@pytest.fixture
def arguments(randn):
    def make(b=2, l=17, h=4, g=2, k=5, v=3, decay="key", state=True, dtype=torch.float64, **given):
        shape = {"none": None, "head": (h,), "token": (b, l, h), "key": (b, l, h, k)}[decay]
        made = {
            "q": randn(b, l, g, k, dtype=dtype),
            "k": randn(b, l, g, k, dtype=dtype),
            "v": randn(b, l, h, v, dtype=dtype),
            "log_decay": None if shape is None else -randn(*shape, dtype=dtype).abs(),
            "initial_state": randn(b, h, k, v, dtype=dtype) if state else None,
        }
        return {name: a for name, a in (made | given).items() if a is not None}

    return make


@EVERY
@DECAYS
@pytest.mark.parametrize("bonus", [False, True], ids=["plain", "bonus"])
def test_the_parallel_form(decay, bonus, scan, arguments, randn, run, assert_same):
    made = arguments(decay=decay, l=37, bonus=randn(4, 5) if bonus else None)
    assert_same(run(scan, **made), run(parallel, **made))


@EVERY
@pytest.mark.parametrize("l", [1, 63, 64, 65])
def test_lengths_around_a_chunk(l, scan, arguments, run, assert_same):
    made = arguments(b=1, l=l, h=1, g=1, k=2, v=3, scale=0.7)
    assert_same(run(scan, **made), run(parallel, **made))


@EVERY
@DECAYS
def test_a_decay_that_nobody_differentiates_changes_no_other_gradient(decay, scan, arguments):
    """The layers of MiniMax have one, and kernels leave out what it would take."""
    made = arguments(decay=decay, l=37)
    found = []
    for leaves in (made, {name: a for name, a in made.items() if name != "log_decay"}):
        given = made | {name: a.clone().requires_grad_() for name, a in leaves.items()}
        sum(x.sin().sum() for x in scan(**given)).backward()
        found.append({name: given[name].grad for name in leaves})
    assert all(torch.equal(gradient, found[0][name]) for name, gradient in found[1].items())


@EVERY
@pytest.mark.parametrize("decay", ["token", "key"])
def test_decays_of_0_and_minus_100_in_one_chunk(decay, scan, arguments, run, assert_same):
    """Gradients included; whatever follows a decay of 0 has lost no digits to one of -100 before it."""
    made = arguments(decay=decay, l=40, h=2, g=1)
    log = torch.zeros_like(made["log_decay"])
    log[:, 5], log[:, 11] = -100.0, -30.0
    assert_same(run(scan, **made | {"log_decay": log}), run(parallel, **made | {"log_decay": log}))


@EVERY
@pytest.mark.parametrize("bonus", [False, True], ids=["plain", "bonus"])
def test_a_decay_of_minus_infinity_forgets(bonus, scan, arguments, randn):
    """What comes after is what a sequence that begins there gives, and no gradient is NaN."""
    made = arguments(l=20, bonus=randn(4, 5) if bonus else None)
    made["log_decay"][:, 9] = -math.inf
    leaves = {n: t.requires_grad_() for n, t in made.items() if isinstance(t, torch.Tensor)}
    o, final = scan(**leaves)
    first = 10 if bonus else 9  # with a bonus, the query at the decay itself still sees what was before
    after = {n: t[:, 9:] if n in ("q", "k", "v", "log_decay") else t for n, t in made.items() if n != "initial_state"}
    o_after, final_after = scan(**after)
    torch.testing.assert_close(o[:, first:], o_after[:, first - 9 :])
    torch.testing.assert_close(final, final_after)
    gradients = torch.autograd.grad(o[:, first:].sum() + final.sum(), list(leaves.values()))
    assert all(g.isfinite().all() for g in gradients)
    assert (dict(zip(leaves, gradients, strict=True))["initial_state"] == 0).all()


@EVERY
@DECAYS
def test_step_by_step_and_cut_are_at_once(decay, implementation, scan, arguments, randn):
    made = arguments(decay=decay, l=9, bonus=randn(4, 5))
    o, final = scan(**made)
    timed = [name for name in ("q", "k", "v", "log_decay") if name in made and made[name].ndim > 1]
    state = made["initial_state"].clone()
    rest = {name: t for name, t in made.items() if name != "initial_state"}
    step = functools.partial(
        linear_attention_step, implementation=None if implementation == "tiled" else implementation
    )
    for t in range(9):
        now = {name: a[:, t] if name in timed else a for name, a in rest.items()}
        torch.testing.assert_close(step(state, **now), o[:, t])
    torch.testing.assert_close(state, final)
    state, parts = made["initial_state"], []
    for time in (slice(0, 1), slice(1, 4), slice(4, 4), slice(4, 9)):
        part, state = scan(**{n: a[:, time] if n in timed else a for n, a in rest.items()}, initial_state=state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, dim=1), o)
    torch.testing.assert_close(state, final)


@EVERY
@DECAYS
def test_packed_with_empty_sequences(decay, scan, arguments, run, assert_same):
    borders = [0, 0, 4, 4, 5, 90]
    made = arguments(decay=decay, b=1, l=90, h=2, g=1)
    made["initial_state"] = arguments(b=5, l=1, h=2)["initial_state"]
    timed = [name for name in ("q", "k", "v", "log_decay") if name in made and made[name].ndim > 1]

    def one_by_one(initial_state, **given):
        results = []
        for i, (start, end) in enumerate(zip(borders, borders[1:], strict=False)):
            part = {n: t[:, start:end] if n in timed else t for n, t in given.items()}
            results.append(scan(**part, initial_state=initial_state[i : i + 1]))
        os, states = zip(*results, strict=True)
        return torch.cat(os, dim=1), torch.cat(states)

    packed = functools.partial(scan, cu_seqlens=torch.tensor(borders, dtype=torch.int32))
    assert_same(run(packed, **made), run(one_by_one, **made))


@EVERY
def test_any_strides(scan, arguments, run, assert_same, spread):
    made = arguments()
    assert_same(run(scan, **spread(made)), run(scan, **made))


@pytest.mark.skipif(native.missing() is not None, reason=f"needs the native library: {native.missing()}")
def test_results_do_not_depend_on_threads_or_neighbours(arguments):
    made = arguments(b=3, l=70, dtype=torch.float32)
    results = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            results.append(linear_attention(**made, return_final_state=True, implementation="cpu"))
        finally:
            torch.set_num_threads(before)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    alone = linear_attention(**{n: t[1:2] for n, t in made.items()}, implementation="cpu")
    assert torch.equal(alone, results[0][0][1:2])


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("log_decay", (2, 17, 3), "`log_decay` must have shape"),
        ("bonus", (4, 4), "`bonus` must have shape"),
        ("initial_state", (2, 4, 3, 5), "`initial_state` must have shape"),
        ("q", (2, 16, 2, 5), "`k` must have shape"),
    ],
)
def test_refusals(name, shape, words, arguments, randn):
    with pytest.raises(ValueError, match=r"^linear_attention: ") as error:
        linear_attention(**arguments(**{name: randn(*shape)}))
    assert words in str(error.value)


def test_heads_must_fit(arguments):
    with pytest.raises(ValueError, match="the 3 heads of `q` and `k` must divide the 4 heads of `v`"):
        linear_attention(**arguments(g=3))
