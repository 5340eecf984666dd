from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F

from ssmkernels.compat.causal_conv1d import (
    causal_conv1d_fn,
    causal_conv1d_ref,
    causal_conv1d_update,
    causal_conv1d_update_ref,
    causal_conv1d_varlen_states,
)


def windows(x, weight, bias=None, seq_idx=None, initial_states=None, activation=None):
    """The formula: for each token, the w inputs up to it that are of its sequence. All as published: x (b d l)."""
    w, l = weight.shape[1], x.shape[2]
    before = torch.zeros_like(x[..., :1]).expand(-1, -1, w - 1) if initial_states is None else initial_states
    y = []
    for t in range(l):
        seen = torch.cat([before, x], dim=2)[:, :, t : t + w]
        if seq_idx is not None:
            first = seq_idx[:, :1] if initial_states is not None else torch.full_like(seq_idx[:, :1], -1)
            numbers = torch.cat([first.expand(-1, w - 1), seq_idx], dim=1)[:, t : t + w]
            seen = seen * (numbers == seq_idx[:, t : t + 1])[:, None]
        y.append((seen * weight).sum(-1) + (0 if bias is None else bias))
    y = torch.stack(y, dim=2)
    y = F.silu(y) if activation else y
    return y if seq_idx is None else y * (seq_idx >= 0)[:, None]


def last_inputs(x, w, initial_states=None):
    before = x.new_zeros(*x.shape[:2], w - 1) if initial_states is None else initial_states
    return torch.cat([before, x], dim=2)[..., x.shape[2] :]


# A base case, and what each further one varies.
CASES = {
    "base": {},
    "plain": {"bias": False, "initial_states": False, "activation": None},
    "swish": {"activation": "swish"},
    "width 1": {"w": 1},
    "width 2": {"w": 2},
    "wider than long": {"w": 6, "l": 3},
    "one token": {"l": 1},
    "eight channels": {"d": 8},
}


@pytest.fixture
def arguments(randn):
    def make(dtype=torch.float64, *, b=2, d=3, l=11, w=4, activation="silu", **given):
        made = {
            "x": randn(b, d, l, dtype=dtype),
            "weight": randn(d, w, dtype=dtype),
            "bias": randn(d, dtype=dtype),
            "initial_states": randn(b, d, w - 1, dtype=dtype),
        }
        return {k: v for k, v in made.items() if given.get(k, True)} | {"activation": activation}

    return make


@pytest.mark.parametrize("function", [causal_conv1d_fn, causal_conv1d_ref])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_formula(case, function, arguments, run, assert_same):
    made = arguments(**CASES[case])

    def expected(x, weight, bias=None, initial_states=None, activation=None):
        y = windows(x, weight, bias, initial_states=initial_states, activation=activation)
        return y, last_inputs(x, weight.shape[1], initial_states)

    if made["weight"].shape[1] == 1:  # an empty state has an empty gradient
        made.pop("initial_states")
    found = run(lambda **a: function(**a, return_final_states=True), **made)
    assert_same(found, run(expected, **made))


SEQUENCES = {
    "two rows": [[0, 0, 0, 1, 1, 2, 2, 2], [5, 5, 5, 5, 5, 5, 3, 3]],
    "short ones": [[0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 1, 1, 2, 2, 3, 3]],
    "padding": [[-1, -1, 0, 0, 0, -1, 1, 1], [0, 0, 0, 0, 0, -1, -1, -1]],
    "a number that comes back far away": [[0, 0, 1, 1, 1, 1, 0, 0], [4, 4, 4, 4, 4, 4, 4, 4]],
}


@pytest.mark.parametrize("initial", [False, True], ids=["from zero", "from a state"])
@pytest.mark.parametrize("case", SEQUENCES)
def test_sequences_do_not_see_one_another(case, initial, arguments, run, assert_same):
    seq_idx = torch.tensor(SEQUENCES[case], dtype=torch.int32)
    made = arguments(l=8, initial_states=initial)
    found = run(lambda **a: causal_conv1d_fn(**a, seq_idx=seq_idx), **made)
    assert_same(found, run(lambda **a: windows(**a, seq_idx=seq_idx), **made))


def test_an_interrupted_sequence_is_refused_where_it_would_matter(randn):
    x, weight = randn(1, 3, 5), randn(3, 3)
    seq_idx = torch.tensor([[0, 0, 1, 0, 0]], dtype=torch.int32)
    with pytest.raises(ValueError, match="`seq_idx`, row 0, number 0 stops after position 1 and comes back by .* 3"):
        causal_conv1d_fn(x, weight, seq_idx=seq_idx)
    # With a width of 2 no window reaches over the one between.
    narrow = causal_conv1d_fn(x, weight[:, :2], seq_idx=seq_idx)
    torch.testing.assert_close(narrow, windows(x, weight[:, :2], seq_idx=seq_idx))


def test_empty_inputs(randn):
    weight = randn(3, 4)
    for b, l in ((0, 5), (2, 0)):
        seq_idx = torch.zeros(b, l, dtype=torch.int64)
        assert causal_conv1d_fn(randn(b, 3, l), weight).shape == (b, 3, l)
        assert causal_conv1d_fn(randn(b, 3, l), weight, seq_idx=seq_idx).shape == (b, 3, l)


def test_final_states_are_written_where_one_wants_them(randn):
    x, weight = randn(2, 3, 7, dtype=torch.bfloat16), randn(3, 4, dtype=torch.float32)
    out = torch.empty(2, 3, 3, dtype=torch.bfloat16)
    y, final = causal_conv1d_fn(x, weight, return_final_states=True, final_states_out=out)
    assert final is out
    assert torch.equal(out, x[..., -3:])
    assert y.dtype == torch.bfloat16
    untold = torch.zeros_like(out)
    causal_conv1d_fn(x, weight, final_states_out=untold)
    assert torch.equal(untold, x[..., -3:])


def test_dtypes_may_be_mixed(randn):
    x, weight, bias = randn(2, 3, 7, dtype=torch.float32), randn(3, 4, dtype=torch.bfloat16), randn(3).half()
    expected = windows(x.double(), weight.double(), bias.double(), activation="silu")
    found = causal_conv1d_fn(x, weight, bias, activation="silu")
    torch.testing.assert_close(found, expected.float())


@pytest.mark.parametrize("m", [3, 4, 9], ids=["w - 1", "w", "longer"])
@pytest.mark.parametrize("length", [None, 1, 2, 7])
def test_an_update_continues_a_convolution(m, length, randn):
    before, new = randn(2, 3, m), randn(2, 3, length or 1)
    weight, bias = randn(3, 4), randn(3)
    whole = torch.cat([before, new], dim=2)
    expected = windows(whole, weight, bias, activation="silu")[..., m:]
    for function in (causal_conv1d_update, causal_conv1d_update_ref):
        state = before.clone()
        y = function(new[..., 0] if length is None else new, state, weight, bias, "silu")
        torch.testing.assert_close(y, expected[..., 0] if length is None else expected)
        assert torch.equal(state, whole[..., -m:])


@pytest.mark.parametrize("m", [3, 5])
def test_a_ring_gives_the_same_outputs(m, randn):
    x, weight, b = randn(2, 3, 20), randn(3, 4), 2
    expected = windows(x, weight, activation="silu")
    ring, tokens = torch.zeros(b, 3, m, dtype=x.dtype), 0
    for length in (1, 2, 7, 1, 3, 6):
        part = x[..., tokens : tokens + length]
        seen = torch.full((b,), tokens, dtype=torch.int32)
        y = causal_conv1d_update(part, ring, weight, activation="silu", cache_seqlens=seen)
        torch.testing.assert_close(y, expected[..., tokens : tokens + length])
        tokens += length
    for token in range(tokens - m, tokens):
        assert torch.equal(ring[..., token % m], x[..., token])


def test_sequences_of_a_ring_stand_at_different_places(randn):
    x, weight = randn(2, 3, 9), randn(3, 4)
    ring = torch.zeros(2, 3, 4, dtype=x.dtype)
    for token in range(5):  # the second sequence begins five tokens later
        rows = torch.tensor([0, -1])
        causal_conv1d_update(
            x[..., token], ring, weight, cache_seqlens=torch.tensor([token, 0]), conv_state_indices=rows
        )
    y = causal_conv1d_update(x[..., 5], ring, weight, cache_seqlens=torch.tensor([5, 0]))
    torch.testing.assert_close(y[0], windows(x, weight)[0, :, 5])
    torch.testing.assert_close(y[1], weight[:, 3] * x[1, :, 5])


def test_rows_of_a_cache(randn):
    cache, x, weight = randn(5, 3, 4), randn(3, 3), randn(3, 4)
    rows = torch.tensor([4, -1, 0], dtype=torch.int32)
    before, whole = cache.clone(), cache[rows.long()].clone()
    y = causal_conv1d_update(x, cache, weight, conv_state_indices=rows)
    expected = causal_conv1d_update(x, whole, weight)
    assert torch.equal(y[[0, 2]], expected[[0, 2]])
    assert not y[1].any()
    assert torch.equal(cache[[4, 0]], whole[[0, 2]])
    assert torch.equal(cache[1:4], before[1:4])


def test_an_update_has_gradients(randn):
    before, weight = randn(2, 3, 4), randn(3, 4)
    leaves = [t.requires_grad_() for t in (randn(2, 3), before.clone(), weight, randn(3))]

    def step(x, state, weight, bias):
        state = state.clone()
        return causal_conv1d_update(x, state, weight, bias, "silu"), state

    assert torch.autograd.gradcheck(step, leaves)


def test_half_precision_states(randn):
    state, x = randn(2, 3, 3, dtype=torch.bfloat16), randn(2, 3, dtype=torch.bfloat16)
    weight, whole = randn(3, 4, dtype=torch.float32), torch.cat([state, x[..., None]], dim=2)
    y = causal_conv1d_update(x, state, weight)
    assert y.dtype == state.dtype == torch.bfloat16
    assert torch.equal(state, whole[..., 1:])
    expected = (whole.double() * weight).sum(-1)
    assert (y.double() - expected).abs().max() <= torch.finfo(torch.bfloat16).eps * expected.abs().max()


def test_it_is_transformers_slow_path(randn):
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    x, weight, bias = (randn(*s, dtype=torch.float32) for s in ((2, 3, 9), (3, 4), (3,)))
    torch.testing.assert_close(
        causal_conv1d_fn(x, weight, bias, activation="silu"),
        modeling.causal_conv1d_fn(x, weight, bias, activation="silu"),
    )
    states = randn(2, 3, 4, dtype=torch.float32), None
    states = states[0], states[0].clone()
    found, expected = (
        f(x[..., :1], state, weight, bias, activation="silu")
        for f, state in zip((causal_conv1d_update, modeling.causal_conv1d_update), states, strict=True)
    )
    torch.testing.assert_close(found, expected)
    assert torch.equal(*states)


def test_last_inputs_of_packed_sequences(randn):
    x, borders = randn(9, 3), [0, 2, 2, 8, 9]
    states = causal_conv1d_varlen_states(x, torch.tensor(borders, dtype=torch.int32), 3)
    assert states.shape == (4, 3, 3)
    for i, state in enumerate(states):
        assert torch.equal(state, last_inputs(x[borders[i] : borders[i + 1]].T[None], 4)[0])
    assert causal_conv1d_varlen_states(x[:0], torch.tensor([0, 0]), 2).shape == (1, 3, 2)


def test_it_compiles(arguments, assert_compiles):
    assert_compiles(lambda **a: causal_conv1d_fn(**a, return_final_states=True), **arguments())


@pytest.mark.parametrize(
    ("function", "published"),
    [
        (
            causal_conv1d_fn,
            "(x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, "
            "final_states_out=None, activation=None)",
        ),
        (
            causal_conv1d_update,
            "(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, conv_state_indices=None)",
        ),
        (causal_conv1d_varlen_states, "(x, cu_seqlens, state_len)"),
    ],
)
def test_signatures_are_those_of_the_package(function, published):
    parameters = inspect.signature(function).parameters.values()
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    assert str(inspect.Signature(plain)) == published


def bad(change, randn):
    made = {"x": randn(2, 3, 7), "weight": randn(3, 4), "bias": randn(3)} | change(randn)
    return lambda: causal_conv1d_fn(**made)


ERRORS = {
    "time-major input": (
        lambda r: {"x": r(2, 7, 3)},
        ValueError,
        r"causal_conv1d_fn: `weight` must have shape \(d w\)",
    ),
    "activation": (
        lambda r: {"activation": "gelu"},
        ValueError,
        "`activation` must be None, 'silu' or 'swish'; got 'gelu'",
    ),
    "seq_idx of the wrong shape": (
        lambda r: {"seq_idx": torch.zeros(2, 6).int()},
        ValueError,
        "`seq_idx` must have shape",
    ),
    "seq_idx of floats": (lambda r: {"seq_idx": torch.zeros(2, 7)}, TypeError, "`seq_idx` must be int32 or int64"),
    "seq_idx and final states": (
        lambda r: {"seq_idx": torch.zeros(2, 7).int(), "return_final_states": True},
        ValueError,
        "with `seq_idx` there are no final states",
    ),
    "initial states too long": (
        lambda r: {"initial_states": r(2, 3, 4)},
        ValueError,
        r"`initial_states` .*\(b d w-1\)",
    ),
    "no tensor": (lambda r: {"weight": [1.0]}, TypeError, "`weight` must be a tensor"),
    "a flag": (lambda r: {"return_final_states": 1}, TypeError, "`return_final_states` must be a bool"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case, randn):
    change, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message):
        bad(change, randn)()


def test_errors_of_updates(randn):
    x, weight = randn(2, 3), randn(3, 4)
    with pytest.raises(ValueError, match="`conv_state` must hold at least 3 inputs"):
        causal_conv1d_update(x, randn(2, 3, 2), weight)
    with pytest.raises(ValueError, match="`conv_state` must have shape"):
        causal_conv1d_update(x, randn(5, 3, 3), weight)
    with pytest.raises(TypeError, match="`cache_seqlens` must be int32 or int64"):
        causal_conv1d_update(x, randn(2, 3, 3), weight, cache_seqlens=torch.zeros(2))
    with pytest.raises(ValueError, match="causal_conv1d_update: `activation`"):
        causal_conv1d_update(x, randn(2, 3, 3), weight, activation="relu")
