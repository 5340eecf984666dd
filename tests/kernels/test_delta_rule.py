"""The delta rule against the explicit products of its transition matrices, at its edges, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from implementations import every_implementation, with_final_state

from ssmkernels import delta_rule, native

EVERY = every_implementation("delta_rule")
rule = with_final_state(delta_rule)
DECAYS = pytest.mark.parametrize("decay", ["none", "head", "key"])


@pytest.fixture
def arguments(randn):
    def make(b=2, l=9, h=4, g=2, k=5, v=3, decay="key", norm=1.0, **given):
        shape = {"none": None, "head": (b, l, h), "key": (b, l, h, k)}[decay]
        made = {
            "q": randn(b, l, g, k),
            "k": norm * F.normalize(randn(b, l, g, k), dim=-1),
            "v": randn(b, l, h, v),
            "beta": 2 * torch.sigmoid(randn(b, l, h)),
            "log_decay": None if shape is None else -randn(*shape).abs(),
            "initial_state": randn(b, h, k, v),
        }
        return {name: a for name, a in (made | given).items() if a is not None}

    return make


def explicit(q, k, v, beta, log_decay=None, *, initial_state):
    """Every output from the products of (I - β k kᵀ) diag(α) between two tokens, and no recurrence of a state."""
    (b, l, h), heads = v.shape[:3], v.shape[2] // k.shape[2]
    q, k = (t.repeat_interleave(heads, dim=2) for t in (q, k))
    alpha = torch.ones_like(k) if log_decay is None else log_decay.exp()
    alpha = alpha if alpha.ndim == 4 else alpha[..., None].expand_as(k)
    eye = torch.eye(k.shape[-1], dtype=k.dtype)
    kk = torch.einsum("blhk,blhm->blhkm", k, k)
    transition = (eye - beta[..., None, None] * kk) @ torch.diag_embed(alpha)
    written = torch.einsum("blh,blhk,blhv->blhkv", beta, k, v)

    def after(i):
        """The state after token i, as a sum over what each token wrote and the initial state."""
        total, product = torch.zeros_like(initial_state), eye.expand(b, h, -1, -1)
        for j in range(i, -1, -1):
            total = total + product @ written[:, j]
            product = product @ transition[:, j]
        return total + product @ initial_state

    states = torch.stack([initial_state, *(after(i) for i in range(l))], dim=1)
    return torch.einsum("blhk,blhkv->blhv", q, states[:, 1:]) * k.shape[-1] ** -0.5, states[:, -1]


@EVERY
@DECAYS
def test_products_of_transition_matrices(decay, rule, arguments, run, assert_same):
    made = arguments(decay=decay)
    assert_same(run(rule, **made), run(explicit, **made))


@EVERY
@pytest.mark.parametrize("l", [1, 63, 64, 65])
def test_lengths_around_a_chunk(l, rule, arguments, run, assert_same):
    made = arguments(b=1, l=l, h=1, g=1, k=3, v=2)
    assert_same(run(rule, **made), run(explicit, **made), roundings=512)


@EVERY
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("decay", ["none", "key"])
def test_one_key_at_all_tokens(beta, decay, rule, arguments, randn, run, assert_same):
    """The triangular systems are at their worst then: with β = 2 and no decay, every token reflects the state."""
    keys = F.normalize(randn(1, 1, 1, 4), dim=-1).expand(1, 70, 1, 4)
    made = arguments(b=1, l=70, h=2, g=1, k=4, decay=decay, beta=torch.full((1, 70, 2), beta).double())
    assert_same(run(rule, **made | {"k": keys}), run(explicit, **made | {"k": keys}), roundings=4096)


@EVERY
@pytest.mark.parametrize("norm", [0.0, 30.0])
def test_norms_of_keys(norm, rule, arguments, run, assert_same):
    made = arguments(l=5, norm=norm)
    assert_same(run(rule, **made), run(explicit, **made), roundings=512)


@EVERY
@pytest.mark.parametrize("decay", ["head", "key"])
def test_decays_of_0_and_minus_100_in_one_chunk(decay, rule, arguments, run, assert_same):
    made = arguments(decay=decay, b=1, l=40, h=2, g=1, k=3)
    log = torch.zeros_like(made["log_decay"])
    log[:, 5], log[:, 11] = -100.0, -30.0
    assert_same(run(rule, **made | {"log_decay": log}), run(explicit, **made | {"log_decay": log}), roundings=512)


@EVERY
def test_a_decay_of_minus_infinity_forgets(rule, arguments):
    made = arguments(l=20)
    made["log_decay"][:, 9] = -torch.inf
    leaves = {name: t.requires_grad_() for name, t in made.items()}
    o, final = rule(**leaves)
    fresh = {name: t[:, 9:] for name, t in made.items() if name != "initial_state"}
    for whole, own in zip((o[:, 9:], final), rule(**fresh), strict=True):
        torch.testing.assert_close(whole, own)
    gradients = torch.autograd.grad(o[:, 9:].sum() + final.sum(), list(leaves.values()))
    for name, gradient in zip(leaves, gradients, strict=True):
        before = gradient if name == "initial_state" else gradient[:, :9]
        assert gradient.isfinite().all(), name
        assert (before == 0).all(), name


def test_beta_1_replaces_what_was_held_for_a_key(arguments):
    """With keys of norm 1 and no decay, the state gives the newest value for its key, whatever was there before."""
    made = arguments(decay="none", beta=torch.ones(2, 9, 4).double())
    o = delta_rule(**made | {"q": made["k"]}, scale=1.0)
    torch.testing.assert_close(o, made["v"])


@pytest.mark.skipif(native.missing() is not None, reason=f"needs the native library: {native.missing()}")
def test_threads_and_neighbours_change_no_bit(arguments):
    made = {name: t.float() for name, t in arguments(b=3, l=70, v=150).items()}

    def on(threads, given):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return delta_rule(**given, implementation="cpu")
        finally:
            torch.set_num_threads(before)

    alone = on(1, {name: t[1:2] for name, t in made.items()})
    assert torch.equal(on(2, made), on(1, made))
    assert torch.equal(on(2, made)[1:2], alone)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("beta", (2, 9, 2), "`beta` must have shape"),
        ("log_decay", (2, 9, 4, 3), "`log_decay` must have shape"),
        ("initial_state", (2, 4, 3, 5), "`initial_state` must have shape"),
        ("v", (2, 9, 3, 3), "the 2 heads of `q` and `k` must divide the 3 heads of `v`"),
    ],
)
def test_refusals(name, shape, words, arguments, randn):
    given = arguments() | {name: randn(*shape)}
    if name == "v":
        given |= {"beta": randn(2, 9, 3), "log_decay": None, "initial_state": None}
    with pytest.raises(ValueError, match=r"^delta_rule: ") as error:
        delta_rule(**given)
    assert words in str(error.value)
