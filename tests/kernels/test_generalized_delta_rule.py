"""The general delta rule against products of its transition matrices, at its edges, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from ssmkernels import OPS, generalized_delta_rule, generalized_delta_rule_step

IMPLEMENTATIONS = [name for name in ("reference", "tiled", "cpu") if name in OPS["generalized_delta_rule"].names]
EVERY = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def inputs(l, h=2, k=4, v=3, b=1, dtype=torch.float64):
    torch.manual_seed(0)
    q, key, along = (torch.randn(b, l, h, k, dtype=dtype) for _ in range(3))
    along = torch.nn.functional.normalize(along, dim=-1)
    rate = torch.rand(b, l, h, 1, dtype=dtype)
    return {
        "q": q,
        "k": key,
        "v": torch.randn(b, l, h, v, dtype=dtype),
        "a": -along,
        "b": rate * along,
        "log_decay": -torch.rand(b, l, h, k, dtype=dtype),
        "initial_state": torch.randn(b, h, k, v, dtype=dtype),
    }


def by_matrices(q, k, v, a, b, log_decay, initial_state):
    """o_t = Σ_j (T_t … T_{j+1} k_j · q_t) v_j + …, with each token's T = diag(w) + b aᵀ as a matrix; scale 1."""
    T = torch.diag_embed(torch.exp(log_decay)) + b[..., None] * a[..., None, :]  # (b l h k k)
    outputs, final = [], None
    for t in range(q.shape[1]):
        product = torch.eye(q.shape[3], dtype=q.dtype).expand(*T.shape[:1], T.shape[2], -1, -1)
        S = torch.zeros_like(initial_state)
        for j in range(t, -1, -1):
            S = S + torch.einsum("bhij,bhj,bhv->bhiv", product, k[:, j], v[:, j])
            product = product @ T[:, j]
        final = S + product @ initial_state
        outputs.append(torch.einsum("bhkv,bhk->bhv", final, q[:, t]))
    return torch.stack(outputs, dim=1), final


@EVERY
@pytest.mark.parametrize("l", [1, 15, 16, 17, 35])
def test_products_of_transition_matrices(implementation, l):
    given = {name: x.requires_grad_() for name, x in inputs(l).items()}
    expected = by_matrices(**given)
    found = generalized_delta_rule(**given, scale=1.0, return_final_state=True, implementation=implementation)
    weights = [torch.randn_like(x) for x in expected]
    grads = [
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(results, weights, strict=True)), list(given.values()))
        for results in (expected, found)
    ]
    for name, x, y in zip([*given, "o", "S"], (*grads[0], *expected), (*grads[1], *found), strict=True):
        torch.testing.assert_close(y, x, msg=lambda m, name=name: f"{name}: {m}")


@EVERY
def test_a_key_that_comes_again_replaces_its_value(implementation):
    """The delta rule, β = 1 and keys of norm 1: what was stored under a key is what is read there."""
    given = inputs(20, k=8)
    key = given["a"][:, :1].expand_as(given["a"])
    one_key = given | {"k": -key, "a": key, "b": -key, "q": -key, "log_decay": None, "initial_state": None}
    o = generalized_delta_rule(**one_key, scale=1.0, implementation=implementation)
    torch.testing.assert_close(o, given["v"])


@EVERY
def test_a_decay_of_minus_infinity_forgets(implementation):
    given = inputs(40)
    given["log_decay"][:, 20], given["b"][:, 20] = -torch.inf, 0
    given = {name: x.requires_grad_() for name, x in given.items()}
    o, final = generalized_delta_rule(**given, return_final_state=True, implementation=implementation)
    later = {name: x[:, 20:] for name, x in given.items() if name != "initial_state"}
    torch.testing.assert_close(o[:, 20:], generalized_delta_rule(**later, implementation="reference"))
    grads = torch.autograd.grad(o[:, 20:].sum() + final.sum(), list(given.values()))
    assert all(x.isfinite().all() for x in grads)
    for x in (grads[2][:, :20], grads[-1]):
        assert not x.any(), "what was forgotten has no gradient"


def test_token_by_token_is_the_same():
    given = inputs(9, b=2, dtype=torch.float32)
    whole, last = generalized_delta_rule(**given, return_final_state=True)
    state = given.pop("initial_state").clone()
    steps = [generalized_delta_rule_step(state, **{name: x[:, t] for name, x in given.items()}) for t in range(9)]
    torch.testing.assert_close(torch.stack(steps, dim=1), whole)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"a": torch.zeros(1, 5, 2, 3)}, ValueError, r"`a` must have shape .*got \(1, 5, 2, 3\)"),
        ({"v": torch.zeros(1, 5, 3, 3)}, ValueError, "`v` must have shape"),
        ({"b": torch.zeros(1, 5, 2, 4, dtype=torch.float64)}, TypeError, "`b`.*float64"),
        ({"log_decay": torch.zeros(1, 5, 2)}, ValueError, "`log_decay` must have shape"),
        ({"scale": "1"}, TypeError, "`scale`"),
        ({"initial_state": torch.zeros(2, 2, 4, 3)}, ValueError, "`initial_state` must have shape"),
    ],
)
def test_errors_name_the_argument(change, error, match):
    with pytest.raises(error, match=match):
        generalized_delta_rule(**inputs(5, dtype=torch.float32) | change)
