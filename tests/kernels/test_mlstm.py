"""The matrix memory against its parallel form, in steps and pieces, with extreme gates, and what it refuses."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from gradients import check_same_with_gradients, leaves
from implementations import every_implementation, with_final_state
from pieces import check_steps_and_pieces

from ssmkernels import mlstm, mlstm_step, native
from ssmkernels.ops.mlstm import cpu_arguments

TIMED = ("q", "k", "v", "i", "f")
EVERY = every_implementation("mlstm")
memory = with_final_state(mlstm)


@pytest.fixture
def arguments(randn):
    def make(*, b=2, l=9, h=2, k=5, v=7, state=True, **given):
        made = {
            "q": randn(b, l, h, k),
            "k": randn(b, l, h, k),
            "v": randn(b, l, h, v),
            "i": randn(b, l, h),
            "f": 2 + randn(b, l, h),
        }
        if state:
            made["initial_state"] = (randn(b, h, k, v), randn(b, h, k), randn(b, h))
        return made | given

    return make


def parallel(q, k, v, i, f, initial_state):
    """All tokens at once by a matrix over pairs of tokens, with sums of logarithms from the first token on."""
    C, n, m = initial_state
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (b h l ...)
    total = torch.nn.functional.logsigmoid(f.transpose(1, 2)).cumsum(-1)  # (b h l)
    length = total.shape[-1]
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = total[..., :, None] - total[..., None, :] + i.transpose(1, 2)[..., None, :]
    weights = weights.masked_fill(later, -math.inf)
    carried = total + m[..., None]
    most = torch.maximum(weights.max(-1).values, carried)
    weights, carried = torch.exp(weights - most[..., None]), torch.exp(carried - most)
    scores = weights * (q @ k.mT) / math.sqrt(q.shape[-1])
    from_state = carried[..., None] * q / math.sqrt(q.shape[-1])
    sums = scores.sum(-1) + (from_state * n[..., None, :]).sum(-1)
    y = (scores @ v + from_state @ C) / (torch.maximum(sums.abs(), torch.exp(-most)) + 1e-6)[..., None]
    last, left = weights[..., -1, :, None] * k, carried[..., -1, None, None]
    return y.transpose(1, 2), left * C + last.mT @ v, left[..., 0] * n + last.sum(-2), most[..., -1]


@EVERY
@pytest.mark.parametrize(
    "sizes",
    [
        {"l": 1},
        {"l": 63, "h": 1},
        {"l": 64},
        {"l": 65, "k": 7, "v": 3},
        {"l": 130, "b": 1, "h": 1},
        {"l": 170, "b": 1, "k": 19, "v": 21},  # wide enough for a state to be kept before each chunk
    ],
    ids=str,
)
def test_the_parallel_form_gives_the_same(memory, arguments, randn, sizes):
    """Outputs, final states, and all gradients, which come in through each of them."""

    def ours(**made):
        y, state = memory(**made)
        return (y, *state)

    check_same_with_gradients(ours, parallel, arguments(**sizes), randn)


@pytest.mark.skipif(native.missing() is not None, reason="needs the native CPU library")
def test_large_states_are_saved_more_seldom(arguments, monkeypatch):
    """And the gradients are the same."""
    made, gradients = arguments(l=200, b=1, k=24, v=24), []
    for most, chunk, segment in ((1.0, 80, 1), (0.1, 48, 2), (0.0, 48, 4)):
        monkeypatch.setattr(cpu_arguments, "MOST", most)
        call = SimpleNamespace(**made)
        assert (cpu_arguments.chunk_length(call), cpu_arguments.segment(call)) == (chunk, segment)
        given = {name: made[name].detach().requires_grad_() for name in TIMED}
        y = mlstm(**given, implementation="cpu")
        gradients.append(torch.autograd.grad(y.square().sum(), [*given.values()]))
    for others in gradients[1:]:
        torch.testing.assert_close(others, gradients[0], rtol=1e-10, atol=1e-12)
    monkeypatch.setattr(cpu_arguments, "MOST", 1.0)
    half = SimpleNamespace(**made | {name: made[name].half() for name in "qkv"})  # which takes less memory itself
    assert (cpu_arguments.chunk_length(half), cpu_arguments.segment(half)) == (48, 2)


@pytest.mark.skipif(native.missing() is not None, reason="needs the native CPU library")
def test_narrow_heads_have_short_chunks(arguments, monkeypatch):
    made, gradients = arguments(l=100, b=1), []
    for most, segment in ((1.0, 2), (0.0, 4)):
        monkeypatch.setattr(cpu_arguments, "MOST", most)
        call = SimpleNamespace(**made)
        assert (cpu_arguments.chunk_length(call), cpu_arguments.segment(call)) == (16, segment)
        given = {name: made[name].detach().requires_grad_() for name in TIMED}
        gradients.append(torch.autograd.grad(mlstm(**given, implementation="cpu").square().sum(), [*given.values()]))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@EVERY
def test_steps_and_pieces_are_the_whole(memory, arguments):
    inputs = arguments(l=70, b=1)
    state = inputs.pop("initial_state")
    check_steps_and_pieces(memory, mlstm_step, inputs, state, cuts=(1, 40, 40))


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_gates(memory, arguments, dtype):
    """Gates of ±100 side by side: all finite, gradients too, and what an open input gate writes is read back."""
    made = arguments(l=40, state=False)
    sign = torch.tensor([1.0, -1.0, -1.0, 1.0]).repeat(10)[None, :, None]
    made |= {"i": 100 * sign + made["i"], "f": 100 * sign.roll(1, 1) + made["f"]}
    made["k"][:, 0] = made["q"][:, 0]
    made = {name: t.to(dtype) for name, t in made.items()}
    ours, variables = leaves(made)
    y, state = memory(**ours)
    gradients = torch.autograd.grad([y, *state], variables, [torch.ones_like(t) for t in (y, *state)])
    assert all(t.isfinite().all() for t in (y, *state, *gradients))
    torch.testing.assert_close(y[:, 0], made["v"][:, 0], rtol=1e-3, atol=1e-4)


@EVERY
def test_epsilon_stands_beside_the_scaled_sum(memory):
    """With m = 30, exp(-m) is next to nothing; a query that meets no key then divides by ε alone."""
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    q, k = torch.tensor([[[[1e-6, 0.0]]], [[[1.0, 0.0]]]]), torch.tensor([[[[1.0, 0.0]]]]).expand(2, 1, 1, 2)
    gate = torch.full((2, 1, 1), 30.0, dtype=torch.float64)
    y, _ = memory(q.double(), k.double(), one.expand(2, 1, 1, 1), gate, gate, scale=1.0)
    torch.testing.assert_close(y.flatten(), torch.tensor([0.5, 1 / (1 + 1e-6)], dtype=torch.float64))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"initial_state": 3}, TypeError, r"`initial_state` must be a tuple of 3 tensors, \(C, n, m\); got int"),
        ({"initial_state": (None,) * 3}, TypeError, r"got tuple of 3: \(NoneType, NoneType, NoneType\)"),
        ({"initial_state": (torch.zeros(2, 2, 5, 7),) * 2}, TypeError, r"got tuple of 2: \(Tensor, Tensor\)"),
        ({"i": torch.zeros(2, 9, 3, dtype=torch.float64)}, ValueError, r"`i` must have shape \(b l h\)"),
        ({"initial_state": (torch.zeros(1).double(),) * 3}, ValueError, r"`initial_C` must have shape \(s h k v\)"),
        ({"scale": "1"}, TypeError, "`scale` must be a number or None; got str"),
    ],
    ids=str,
)
def test_refusals(changes, error, words, arguments):
    with pytest.raises(error, match=words) as raised:
        mlstm(**arguments(**changes))
    assert str(raised.value).startswith("mlstm: ")


def test_a_step_needs_its_state(arguments):
    one = {name: arguments()[name][:, 0] for name in TIMED}
    with pytest.raises(TypeError, match=r"mlstm_step: `state` must be a tuple of 3 tensors, \(C, n, m\); got NoneType"):
        mlstm_step(None, **one)
