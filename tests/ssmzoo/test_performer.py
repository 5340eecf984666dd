"""What is the Performer's own; the properties that it shares with every mixer stand in test_mixers.py."""

from __future__ import annotations

import math

import pytest
import torch

import ssmzoo.mixers.performer as module
from ssmkernels import attention
from ssmzoo import build_mixer

KINDS = ("positive", "hyperbolic")


def make(d_model=16, **options):
    torch.manual_seed(0)
    return build_mixer("performer", d_model, **{"head_dim": 8, "n_features": 12, **options}).double()


def inputs(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def features(x, w, kind):
    """Lemma 1 of the paper, as it stands there."""
    d = x.shape[-1]
    x = x / d**0.25
    along = torch.einsum("...d,md->...m", x, w)
    h = torch.exp(-x.square().sum(-1, keepdim=True) / 2)
    if kind == "positive":
        return h / math.sqrt(len(w)) * torch.exp(along)
    return h / math.sqrt(2 * len(w)) * torch.cat([torch.exp(along), torch.exp(-along)], dim=-1)


def reference(mixer, x, kind):
    """Equation 4 of the paper with the whole matrix Â = Q' (K')ᵀ."""
    q, k, v = (
        (x @ p.weight.mT).unflatten(-1, (mixer.n_heads, mixer.head_dim))
        for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    q, k = (features(t, mixer.projection, kind) for t in (q, k))
    weights = torch.einsum("bihm,bjhm->bhij", q, k)
    if mixer.causal:
        weights = weights.tril()
    out = torch.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdim=True), v)
    return out.flatten(2) @ mixer.out_proj.weight.mT


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 100])
def test_is_the_papers_equation(length, bidirectional, kind, monkeypatch):
    monkeypatch.setattr(module, "SEGMENT", 64)
    mixer = make(features=kind, bidirectional=bidirectional)
    x = inputs(2, length, 16).requires_grad_()
    weight = inputs(2, length, 16, seed=1)
    results = []
    for y in (mixer(x), reference(mixer, x, kind)):
        wanted = [x, *mixer.parameters()]
        results.append([y, *torch.autograd.grad((y * weight).sum(), wanted)])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_unbiased(kind):
    """The mean over many draws of the estimated kernel comes to exp(q · k / √d)."""
    mixer = make(features=kind, n_features=8)
    q, k = inputs(5, 8) * 0.5, inputs(5, 8, seed=1) * 0.5
    estimates = []
    for _ in range(4000):
        mixer.redraw()
        estimates.append((features(q, mixer.projection, kind) * features(k, mixer.projection, kind)).sum(-1))
    estimates = torch.stack(estimates)
    exact = torch.exp((q * k).sum(-1) / math.sqrt(8))
    standard_error = estimates.std(0) / math.sqrt(len(estimates))
    assert ((estimates.mean(0) - exact).abs() < 4.5 * standard_error).all()
    assert (standard_error < 0.03 * exact).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_comes_near_softmax_attention_as_features_grow(bidirectional, kind):
    x = inputs(1, 64, 16) * 0.5

    def error(n_features):
        mixer = make(n_features=n_features, features=kind, bidirectional=bidirectional)
        q, k, v = ((p(x)).unflatten(-1, (2, 8)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        exact = mixer.out_proj(attention(q, k, v, causal=not bidirectional).flatten(2))
        squares = []
        for _ in range(8):
            mixer.redraw()
            squares.append((mixer(x) - exact).square().mean())
        return float(torch.stack(squares).mean().sqrt() / exact.square().mean().sqrt())

    with torch.no_grad():
        few, more, many = (error(n) for n in (16, 256, 4096))
    # 1/√m: four times less for sixteen times the features; half of that must show.
    assert more < few / 2
    assert many < more / 2
    assert many < 0.02


def test_random_features_are_orthogonal_with_norms_of_normal_vectors():
    mixer = make(8, head_dim=8, n_features=20)
    for block in mixer.projection.split(8):
        products = block @ block.mT
        assert (products - products.diag().diag()).abs().max() < 1e-5
    norms = torch.cat([make(8, head_dim=8, n_features=4096).projection.norm(dim=1)])
    assert abs(float(norms.square().mean()) - 8) < 0.3  # chi-squared of 8 degrees: deviation 4 / √4096
    assert float(norms.std()) > 0.5


def test_projection_is_saved_and_only_redraw_changes_it():
    mixer = make()
    before = mixer.projection.clone()
    assert "projection" in mixer.state_dict()
    mixer(inputs(1, 5, 16))
    assert torch.equal(mixer.projection, before)
    kept = mixer.projection
    mixer.redraw()
    assert mixer.projection is kept
    assert not torch.equal(kept, before)
    other = make()
    other.load_state_dict(mixer.state_dict())
    assert torch.equal(other.projection, mixer.projection)


@torch.no_grad()
@pytest.mark.parametrize("growing", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stays_finite_and_right_where_features_span_hundreds_of_orders_of_magnitude(dtype, growing):
    """Keys so unequal that exponentials of one would vanish, or those of another overflow, at any common scale."""
    mixer = make(bidirectional=False).to(dtype)
    sizes = torch.logspace(-1, 2.5, 100, dtype=dtype)
    x = inputs(1, 100, 16).to(dtype) * (sizes if growing else sizes.flip(0))[:, None]
    whole = mixer(x)
    assert whole.isfinite().all()
    state = mixer.initial_state(1)
    steps = []
    for t in range(100):
        y, state = mixer(x[:, t : t + 1], state)
        steps.append(y)
    q, k, v = (
        (x.double() @ p.weight.double().mT).unflatten(-1, (2, 8)).transpose(1, 2)
        for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    q, k, w = q / 8**0.25, k / 8**0.25, mixer.projection.double()
    b, a = q @ w.mT, k @ w.mT - k.square().sum(-1, keepdim=True) / 2
    logits = torch.logsumexp(b[..., :, None, :] + a[..., None, :, :], dim=-1)
    hidden = torch.ones(100, 100, dtype=torch.bool).triu(1)
    exact = (logits.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)
    exact = exact @ mixer.out_proj.weight.double().mT
    # Exponents of 1e4 and more: their rounding is what remains.
    assert float(a.max() - a.min()) > 1e4
    size = exact.abs().amax(-1, keepdim=True)
    tolerance = 0.05 if dtype == torch.float32 else 1e-9
    assert ((whole.double() - exact).abs() / size).max() < tolerance
    assert ((torch.cat(steps, dim=1).double() - exact).abs() / size).max() < tolerance


def test_gradients_stay_finite_for_keys_of_unequal_length():
    mixer = make().float()
    x = (inputs(1, 70, 16) * torch.logspace(-1, 2, 70, dtype=torch.float64).flip(0)[:, None]).float().requires_grad_()
    mixer(x).sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in mixer.parameters())


def test_the_state_has_one_size_whatever_the_length():
    mixer = make()
    with torch.no_grad():
        _, few = mixer(inputs(2, 3, 16), mixer.initial_state(2))
        _, many = mixer(inputs(2, 300, 16), mixer.initial_state(2, max_length=300))
    assert few.nbytes == many.nbytes == 2 * 2 * 12 * (9 + 1) * 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_features": 0}, "`n_features` must be at least 1; got 0"),
        ({"n_features": 7, "features": "hyperbolic"}, "`n_features` must be even for hyperbolic features; got 7"),
        ({"head_dim": 5}, "`head_dim` must divide d_model"),
        ({"n_heads": 0}, "`n_heads` must be at least 1; got 0"),
    ],
)
def test_values(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_unknown_features_name_the_option():
    with pytest.raises(TypeError, match="`features`.*'positive' or 'hyperbolic'; got 'relu'"):
        make(features="relu")


def test_bidirectional_has_no_state():
    with pytest.raises(ValueError, match="sees the whole sequence at once"):
        make(bidirectional=True).initial_state(1)


@torch.no_grad()
def test_autocast_rounds_projections_but_no_exponents():
    mixer = make().float()
    x = inputs(1, 40, 16).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = mixer(x, mixer.initial_state(1))
        seen = mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x)
    assert y.dtype == torch.bfloat16
    assert state.sums.dtype == state.logs.dtype == torch.float32
    for name, value in zip(("q_proj", "k_proj", "v_proj"), seen, strict=True):
        getattr(mixer, name).forward = lambda _, value=value: value.float()
    torch.testing.assert_close(y.float(), mixer(x), rtol=0, atol=2**-8 * float(y.abs().max()) * 2)
    torch.testing.assert_close(state.logs, mixer(x, mixer.initial_state(1))[1].logs, rtol=1e-6, atol=1e-6)


def test_projections_are_drawn_again_after_to_empty():
    mixer = build_mixer("performer", 16, head_dim=8, n_features=8).to("meta").to_empty(device="cpu")
    mixer.projection.fill_(torch.nan)  # what to_empty leaves may be anything
    mixer.reset_parameters()
    directions = torch.nn.functional.normalize(mixer.projection, dim=-1)
    torch.testing.assert_close(directions @ directions.mT, torch.eye(8))
