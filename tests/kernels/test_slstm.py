"""The scalar memory against a plain loop without a stabiliser, in steps and pieces, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from gradients import check_same_with_gradients, leaves
from implementations import every_implementation, with_final_state
from pieces import check_steps_and_pieces

from ssmkernels import slstm, slstm_step

EVERY = every_implementation("slstm")
network = with_final_state(slstm)


@pytest.fixture
def arguments(randn):
    def make(*, b=2, l=9, h=2, p=5, state=True, biased=True, **given):
        made = {"x": randn(b, l, 4, h, p), "R": 0.4 * randn(h, p, 4, p)}
        if biased:
            made["bias"] = randn(h, 4, p)
        if state:
            made["initial_state"] = (randn(b, h, p), 1 + randn(b, h, p).abs(), randn(b, h, p), randn(b, h, p))
        return made | given

    return make


def plain(x, R, bias=0.0, initial_state=None):
    """c and n as what they stand for, c exp(m) and n exp(m): y, and these two and h after the last token."""
    b, length, _, heads, p = x.shape
    zero = x.new_zeros(b, heads, p)
    c, n, h, m = initial_state or (zero,) * 4
    c, n = c * torch.exp(m), n * torch.exp(m)
    outputs = []
    for t in range(length):
        seen = (h[:, :, :, None] * R.flatten(2)).sum(2).view(b, heads, 4, p) + bias
        i, f, z, o = (x[:, t].transpose(1, 2) + seen).unbind(2)
        keep = torch.sigmoid(f)
        c, n = keep * c + torch.exp(i) * torch.tanh(z), keep * n + torch.exp(i)
        h = torch.sigmoid(o) * c / n
        outputs.append(h)
    return torch.stack(outputs, dim=1), c, n, h


@EVERY
@pytest.mark.parametrize(
    "sizes", [{}, {"l": 1}, {"b": 9, "l": 12, "h": 1}, {"p": 8, "state": False}, {"biased": False, "p": 17}], ids=str
)
def test_a_plain_loop_gives_the_same(network, arguments, randn, sizes):
    """Outputs, final states, and all gradients, which come in through each of them."""

    def ours(**made):
        y, (c, n, h, m) = network(**made)
        return y, c * torch.exp(m), n * torch.exp(m), h

    check_same_with_gradients(ours, plain, arguments(**sizes), randn)


@EVERY
def test_steps_and_pieces_are_the_whole(network, arguments):
    made = arguments(l=20)
    inputs, state = {"x": made.pop("x")}, made.pop("initial_state")
    check_steps_and_pieces(network, slstm_step, inputs, state, cuts=(1, 1, 13), **made)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_gates(network, arguments, dtype):
    """Gates of ±100 side by side, and at the first token, where there is nothing yet: all finite, gradients too."""
    made = arguments(l=12, state=False)
    sign = torch.tensor([-1.0, 1.0, -1.0, -1.0, 1.0, 1.0]).repeat(2)[:, None, None]
    made["x"][:, :, 0] += 100 * sign
    made["x"][:, :, 1] += 100 * sign.roll(1, 0)
    ours, variables = leaves({name: t.to(dtype) for name, t in made.items()})
    y, state = network(**ours)
    gradients = torch.autograd.grad([y, *state], variables, [torch.ones_like(t) for t in (y, *state)])
    assert all(t.isfinite().all() for t in (y, *state, *gradients))
    z, o = (made["x"][:, 0, gate] + made["bias"][:, gate] for gate in (2, 3))
    torch.testing.assert_close(y[:, 0], (torch.sigmoid(o) * torch.tanh(z)).to(dtype), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"initial_state": 3}, TypeError, r"`initial_state` must be a tuple of 4 tensors, \(c, n, h, m\); got int"),
        ({"x": torch.zeros(2, 9, 3, 2, 5).double()}, ValueError, r"`x` must have shape \(b l 4 h p\)"),
        ({"R": torch.zeros(2, 5, 4, 6).double()}, ValueError, r"`R` must have shape \(h p 4 p\)"),
        ({"bias": torch.zeros(2, 4, 5).int()}, TypeError, "`bias` must be float64; got int32"),
    ],
    ids=str,
)
def test_refusals(changes, error, words, arguments):
    with pytest.raises(error, match=words) as raised:
        slstm(**arguments(**changes))
    assert str(raised.value).startswith("slstm: ")
