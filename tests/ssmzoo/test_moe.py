"""Mixture of experts against a loop over tokens; its load, its balance and its half precision."""

import pytest
import torch
import torch.nn.functional as F

import ssmzoo
from ssmzoo import testing
from ssmzoo.mlp import build_mlp, grouped


def build(**options):
    torch.manual_seed(0)
    moe = build_mlp(8, {"kind": "moe", "n_experts": 6, "top_k": 3, "d_intermediate": 12, **options})
    if moe.router.correction is not None:
        moe.router.correction.normal_(std=0.3)
    return moe


def by_tokens(moe, x):
    """The docstring's equations, one token after another."""
    rows = []
    for u in x:
        logits = moe.router.proj.weight @ u
        s = logits.softmax(0) if moe.scoring == "softmax" else logits.sigmoid()
        if moe.norm == "before":
            s = s / s.sum()
        chosen = (s if moe.router.correction is None else s + moe.router.correction).topk(moe.top_k).indices
        w = s[chosen] / (s[chosen].sum() if moe.norm == "after" else 1)
        inner = u if moe.latent_in is None else moe.latent_in(u)
        y = 0
        for i, weight in zip(chosen.tolist(), w, strict=True):
            inside = moe.experts.fc1.weight[i] @ inner
            if moe.experts.gated:
                a, b = inside.chunk(2)
                inside = moe.experts.f(a) * b
            else:
                inside = moe.experts.f(inside)
            y = y + moe.scale * weight * (moe.experts.fc2.weight[i] @ inside)
        y = y if moe.latent_out is None else moe.latent_out(y)
        shared = 0 if moe.shared is None else moe.shared(u)
        rows.append(y + (shared if moe.shared_gate is None else torch.sigmoid(moe.shared_gate(u)) * shared))
    return torch.stack(rows)


SETTINGS = {
    "mixtral": {},
    "jamba": {"norm": None},
    "shared": {"shared_intermediate": 10, "activation": "reglu"},
    "qwen": {"shared_intermediate": 10, "shared_gate": True},
    "sigmoid": {"scoring": "sigmoid", "norm": "before", "activation": "gelu"},
    "nemotron": {
        "scoring": "sigmoid",
        "scale": 2.5,
        "bias_update_rate": 0.001,
        "activation": "relu2",
        "shared_intermediate": 20,
        "d_latent": 4,
    },
    "one of one": {"n_experts": 1, "top_k": 1},
    "all": {"top_k": 6, "d_intermediate": 7},  # a width that PyTorch's grouped product does not take
}


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_equations_and_gradients(options):
    moe = build(**options)
    x, weight = torch.randn(2, 9, 8), torch.randn(18, 8)
    x.requires_grad_()
    found, expected = moe(x).reshape(18, 8), by_tokens(moe, x.reshape(18, 8))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    inputs = [x, *moe.parameters()]
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), inputs) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_pytorchs_grouped_product(monkeypatch):
    if not hasattr(F, "grouped_mm"):
        pytest.skip("needs a PyTorch with torch.nn.functional.grouped_mm")
    moe = build(d_intermediate=16).eval().bfloat16()
    x = torch.randn(2, 5, 8, dtype=torch.bfloat16)
    y = moe(x)
    monkeypatch.setattr(grouped, "_fits", lambda x, weight: False)
    torch.testing.assert_close(moe(x), y, rtol=2e-2, atol=2e-3)


def test_transforms_of_functions():
    moe, x, tangent = build(d_intermediate=16), torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    gradient = torch.func.grad(lambda x: moe(x).square().sum())(x)
    x.requires_grad_()
    expected = torch.autograd.grad(moe(x).square().sum(), x)[0]
    torch.testing.assert_close(gradient, expected)
    y, forward = torch.func.jvp(moe, (x.detach(),), (tangent,))
    torch.testing.assert_close((2 * y * forward).sum(), (expected * tangent).sum(), rtol=1e-4, atol=1e-4)
    assert moe.load.counts.sum() == 2 * 3 * 3  # of the one call outside


def test_no_tokens():
    assert build()(torch.randn(2, 0, 8)).shape == (2, 0, 8)


def test_the_router_stays_float32():
    moe = build(**SETTINGS["nemotron"])
    correction = moe.router.correction.clone()
    moe.to(torch.bfloat16)
    assert moe.router.proj.weight.dtype == moe.router.correction.dtype == torch.float32
    assert torch.equal(moe.router.correction, correction)
    assert moe.experts.fc1.weight.dtype == torch.bfloat16
    assert moe(torch.randn(1, 3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_load_and_balance():
    moe = build(bias_update_rate=0.5, aux_loss=0.1)
    x = torch.randn(1, 40, 8)
    moe.eval()
    moe(x)
    assert moe.load.counts.sum() == 0
    assert moe.balancing is None
    moe.train()
    moe(x)
    moe(x)
    chosen, _ = moe.eval().route(x[0])
    counts = chosen.flatten().bincount(minlength=6)
    assert torch.equal(moe.load.counts, 2 * counts)
    p = (x[0] @ moe.router.proj.weight.T).softmax(-1).mean(0)
    torch.testing.assert_close(moe.balancing, 0.1 * 6 * (counts / 40 * p).sum())
    before = moe.router.correction.clone()
    moe.rebalance(counts)
    torch.testing.assert_close(moe.router.correction - before, 0.5 * (20 - counts).sign().float())


def test_bias_evens_the_load_out():
    torch.manual_seed(0)
    moe = build_mlp(8, {"kind": "moe", "n_experts": 6, "bias_update_rate": 0.01}).train()
    with torch.no_grad():
        x = torch.randn(1, 300, 8) + 1.0
        loads = []
        for _ in range(80):
            moe.load.reset_parameters()
            moe(x)
            loads.append(moe.load.counts.max() / moe.load.counts.float().mean())
            moe.rebalance(moe.load.counts)
    assert loads[-1] < 1.15 < 1.5 < loads[0]


def test_a_model_of_experts():
    options = {"kind": "moe", "n_experts": 4, "d_intermediate": 16, "bias_update_rate": 0.01}
    config = {"d_model": 16, "n_layers": 2, "pattern": ["gru"], "vocab_size": 11, "mlp": options}
    model = ssmzoo.build(config).eval()
    assert model.flops_per_token(1) > ssmzoo.build(config, mlp={"top_k": 1}).flops_per_token(1)
    ids = torch.randint(11, (2, 6))
    with torch.no_grad():
        logits, state = model(ids[:, :4], model.initial_state(2))
        rest, _ = model(ids[:, 4:], state)
        torch.testing.assert_close(torch.cat([logits, rest], 1), model(ids))
    testing.check_mixer(ssmzoo.build_mixer("channel", 8, mlp=options | {"norm": None}))
    bound = 16**-0.5 / model.config.n_residuals**0.5
    assert model.blocks[0].mlp.experts.fc2.weight.abs().max().item() == pytest.approx(bound, rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 9}, "`top_k` must be at most n_experts=6; got 9"),
        ({"n_experts": 0}, "`n_experts` must be at least 1"),
        ({"shared_intermediate": -1}, "`shared_intermediate` must be at least 1, or 0"),
        ({"shared_gate": True}, "`shared_gate` has no meaning without `shared_intermediate`"),
        ({"aux_loss": -1.0}, "`aux_loss` must be at least 0"),
        ({"scoring": "relu"}, "`scoring` of mlp 'moe' must be 'softmax' or 'sigmoid'; got 'relu'"),
        ({"experts": 3}, "unknown option of mlp 'moe': 'experts'"),
    ],
)
def test_errors(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build(**options)
