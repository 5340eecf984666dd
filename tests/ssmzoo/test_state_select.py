"""Which rows ``State.select`` takes: indices, masks, and what it refuses, for states of every kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ssmzoo

PATTERNS = {
    "mamba": {},
    "attention": {"attention": {"head_dim": 8}},
    "paged": {"paged": {"kind": "attention", "head_dim": 8, "page_size": 16}},
    "s4d": {"s4d": {"d_state": 8}},
    "lstm": {},
}


@pytest.fixture(scope="module", params=PATTERNS)
def state(request):
    """The state of three sequences after two tokens."""
    torch.manual_seed(0)
    pattern = {"pattern": [request.param], "mixers": PATTERNS[request.param]}
    model = ssmzoo.build({"d_model": 16, "n_layers": 1, "vocab_size": 11, **pattern}).eval()
    with torch.no_grad():
        return model(torch.tensor([[1, 2], [3, 4], [5, 6]]), model.initial_state(3, 4))[1]


MASKS = [
    [True, False, True],
    (True, False, True),
    np.array([True, False, True]),
    list(np.array([True, False, True])),
    torch.tensor([True, False, True]),
]


@pytest.mark.parametrize("mask", MASKS, ids=["list", "tuple", "numpy", "list of numpy", "tensor"])
def test_a_mask_keeps_the_rows_where_it_is_true(state, mask):
    for rows in (state, state.layers[0]):
        kept, expected = rows.select(mask), rows.select([0, 2])
        assert kept.n_sequences == 2
        for a, b in zip(kept.tensors(), expected.tensors(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "indices", [[2, 0, 2], torch.tensor([2, 0, 2]), torch.tensor([2, 0, 2], dtype=torch.uint8), np.array([2, 0, 2])]
)
def test_indices_of_any_integer_kind(state, indices):
    for a, b in zip(state.select(indices).tensors(), state.select([2, 0, 2]).tensors(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("indices", "kind", "message"),
    [
        ([0.0, 1.5], TypeError, "got 0.0 among them"),
        (torch.tensor([0.0, 1.0]), TypeError, "got a tensor of torch.float32"),
        (np.array([1.0]), TypeError, "among them"),
        ([True, 0, 1], TypeError, "got True among them"),
        (1, TypeError, "got int"),
        ("01", TypeError, "got str"),
        ([True, False], ValueError, "a mask of 3 bools; got 2"),
        (torch.tensor([True]), ValueError, "a mask of 3 bools; got 1"),
        ([0, 3], IndexError, "from 0 to 2; got 3"),
        ([-1], IndexError, "from 0 to 2; got -1"),
        (torch.tensor([[0, 1]]), ValueError, r"got shape \(1, 2\)"),
    ],
)
def test_what_is_refused(state, indices, kind, message):
    for rows in (state, state.layers[0]):
        with pytest.raises(kind, match=r"State.select: `indices` must be .*" + message):
            rows.select(indices)


def test_no_rows(state):
    assert state.select([]).n_sequences == state.select([False] * 3).n_sequences == 0
