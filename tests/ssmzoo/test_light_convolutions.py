"""What is the own of lightweight and dynamic convolutions; what every mixer has stands in test_mixers.py."""

from __future__ import annotations

import pytest
import torch

import ssmzoo.mixers.dynamicconv as dynamic
from ssmzoo import build_mixer

NAMES = ("lightconv", "dynamicconv")
SETTINGS = {
    "plain": {},
    "one head": {"n_heads": 1},
    "a head a channel": {"n_heads": 8},
    "without glu": {"glu": False, "bias": False},
    "even": {"kernel_size": 4},
    "centred": {"bidirectional": True},
    "centred, even": {"bidirectional": True, "kernel_size": 4},
    "centred, of two": {"bidirectional": True, "kernel_size": 2},
}


def make(name, **options):
    torch.manual_seed(0)
    mixer = build_mixer(name, 8, **{"kernel_size": 5, "n_heads": 2, **options}).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer


def inputs(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def reference(mixer, x):
    """The paper's equations 1 to 3 (sections 3 and 4), one output after another."""
    K, H, d = mixer.kernel_size, mixer.n_heads, mixer.d_model
    a = x @ mixer.in_proj.weight.T
    if mixer.in_proj.bias is not None:
        a = a + mixer.in_proj.bias
    u = a[..., :d] * torch.sigmoid(a[..., d:]) if mixer.glu else a
    behind = K - 1 if mixer.causal else (K - 1) // 2
    rows = []
    for t in range(x.shape[1]):
        channels = []
        for c in range(d):
            h = c * H // d
            if hasattr(mixer, "weight"):
                logits = mixer.weight[h].expand(x.shape[0], K)
            else:
                logits = u[:, t] @ mixer.weight_proj.weight[h * K : (h + 1) * K].T
            kernel = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
            seen = [(j, t - behind + j) for j in range(K) if 0 <= t - behind + j < x.shape[1]]
            channels.append(sum(kernel[:, j] * u[:, i, c] for j, i in seen))
        rows.append(torch.stack(channels, dim=-1))
    y = torch.stack(rows, dim=1) @ mixer.out_proj.weight.T
    return y if mixer.out_proj.bias is None else y + mixer.out_proj.bias


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [1, 4, 13])
def test_is_the_papers_equation(length, name, setting, monkeypatch):
    monkeypatch.setattr(dynamic, "CHUNK", 4)
    mixer = make(name, **SETTINGS[setting])
    x = inputs(2, length, 8).requires_grad_()
    results = []
    for y in (mixer(x), reference(mixer, x)):
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()])])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_state_is_the_last_inputs_of_the_convolution(name):
    mixer = make(name)
    x = inputs(2, 9, 8)
    _, state = mixer(x, mixer.initial_state(2))
    u = torch.nn.functional.glu(mixer.in_proj(x))
    torch.testing.assert_close(state.last, u[:, -4:])
    _, short = mixer(x[:, :1], mixer.initial_state(2))
    torch.testing.assert_close(short.last, torch.cat([torch.zeros_like(u[:, :3]), u[:, :1]], dim=1))


@pytest.mark.parametrize("name", NAMES)
def test_drop_connect_leaves_out_taps_in_training_alone(name):
    """With the channels passed on as they are, and all inputs 1, an output is the sum of the taps that are left."""
    mixer = make(name, glu=False, bias=False, n_heads=4, kernel_size=8, weight_dropout=0.25)
    with torch.no_grad():
        mixer.in_proj.weight.copy_(torch.eye(8))
        mixer.out_proj.weight.copy_(torch.eye(8))
        dict(mixer.named_parameters())["weight" if name == "lightconv" else "weight_proj.weight"].zero_()
    x = torch.ones(1, 2000, 8, dtype=torch.float64)
    torch.testing.assert_close(mixer.eval()(x)[:, 7:], x[:, 7:])
    sums = torch.stack([mixer.train()(x)[0, 7:] for _ in range(200 if name == "lightconv" else 1)])
    left = sums * 8 * 0.75  # of eight taps of 1/8, each kept with probability 3/4 and divided by it
    torch.testing.assert_close(left, left.round())
    assert left.min() >= 0
    assert left.max() <= 8
    assert left.unique().numel() >= 2
    draws = 200 * 4 if name == "lightconv" else 1993 * 4
    assert abs(float(sums.detach().mean()) - 1) < 5 * (0.25 / 0.75 / 8 / draws) ** 0.5
    assert torch.equal(sums[..., ::2], sums[..., 1::2])  # two channels a head


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 1}, "`kernel_size` must be at least 2"),
        ({"n_heads": 3}, "`n_heads` must divide d_model=8; got 3"),
        ({"n_heads": 0}, "`n_heads` must divide d_model=8; got 0"),
        ({"weight_dropout": 1.0}, "`weight_dropout` < 1 must hold; got 1.0"),
    ],
)
def test_values(name, options, message):
    with pytest.raises(ValueError, match=message):
        make(name, **options)


@pytest.mark.parametrize("name", NAMES)
def test_bidirectional_has_no_state(name):
    with pytest.raises(ValueError, match="sees the whole sequence at once"):
        make(name, bidirectional=True).initial_state(1)


@pytest.mark.parametrize("name", NAMES)
def test_defaults_are_the_papers(name):
    mixer = build_mixer(name, 64)
    assert (mixer.kernel_size, mixer.n_heads, mixer.glu) == (31, 16, True)
