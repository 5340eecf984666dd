"""xLSTM's mixers written from the papers in another form, and how they start."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from moved import moved_mixer

import ssmzoo

D_MODEL = 24


def build(name, **options):
    return moved_mixer(name, D_MODEL, 0.2, **options)


def head_norm(x, eps):
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + eps)


def memory(q, k, v, i, f):
    """Each output a weighted mean of all values before it, without a stabiliser: (b l h ...) → (b l h v)."""
    keep = torch.cumprod(torch.sigmoid(f), dim=1)  # (b l h)
    weights = torch.exp(i)[:, None] * keep[:, :, None] / keep[:, None]  # (b t j h)
    seen = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()[None, :, :, None]
    scores = torch.where(seen, weights, 0) * torch.einsum("bthk,bjhk->btjh", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("btjh,bjhv->bthv", scores, v) / scores.sum(2).abs().clamp(min=1)[..., None]


@pytest.mark.mixer("mlstm_v1")
@pytest.mark.parametrize("options", [{}, {"conv_bias": False, "bias": True, "d_conv": 3}], ids=str)
def test_the_first_block(options):
    m = build("mlstm_v1", n_heads=2, multiple_of=8, qkv_proj_blocksize=4, **options)
    u = torch.randn(2, 11, D_MODEL, dtype=torch.float64)
    x, z = m.proj_up(u).chunk(2, dim=-1)
    conv, width = m.conv1d.conv, m.d_conv
    taps = conv.weight[:, 0]  # (d w)
    padded = F.pad(x, (0, 0, width - 1, 0))
    c = sum(padded[:, j : j + 11] * taps[:, j] for j in range(width))
    c = F.silu(c if conv.bias is None else c + conv.bias)
    q, k, v = (
        t @ torch.block_diag(*p.weight).T + (0 if p.bias is None else p.bias)
        for p, t in ((m.q_proj, c), (m.k_proj, c), (m.v_proj, x))
    )
    i, f = (gate(torch.cat([q, k, v], -1)) for gate in (m.mlstm_cell.igate, m.mlstm_cell.fgate))
    y = head_norm(memory(*(t.unflatten(-1, (2, -1)) for t in (q, k, v)), i, f), 1e-5)
    y = y.flatten(2) * (1 + m.mlstm_cell.outnorm.weight) + m.learnable_skip * c
    torch.testing.assert_close(m(u), m.proj_down(y * F.silu(z)), rtol=1e-4, atol=1e-6)


@pytest.mark.mixer("mlstm")
@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_the_block_of_7b(cap):
    m = build("mlstm", n_heads=2, gate_soft_cap=cap, igate_bias_init=0.0, bias=True, v_dim_factor=1.5)
    u = torch.randn(2, 11, D_MODEL, dtype=torch.float64)
    q, k, v = (linear(u).unflatten(-1, (2, -1)) for linear in (m.q, m.k, m.v))
    i, f = m.igate_preact(u), m.fgate_preact(u)
    if cap:
        i, f = cap * torch.tanh(i / cap), cap * torch.tanh(f / cap)
    y = head_norm(memory(q, k, v, i, f), 1e-6).flatten(2) * m.multihead_norm.weight + m.multihead_norm.bias
    torch.testing.assert_close(m(u), m.out_proj(torch.sigmoid(m.ogate_preact(u)) * y), rtol=1e-4, atol=1e-6)


@pytest.mark.mixer("slstm")
@pytest.mark.parametrize("d_conv", [0, 3])
def test_the_scalar_memory(d_conv):
    """Gates without a stabiliser, one channel after another."""
    m = build("slstm", n_heads=2, d_conv=d_conv)
    u = torch.randn(2, 9, D_MODEL, dtype=torch.float64)
    c = u
    if d_conv:
        conv, padded = m.conv1d.conv, F.pad(u, (0, 0, d_conv - 1, 0))
        c = F.silu(sum(padded[:, j : j + 9] * conv.weight[:, 0, j] for j in range(d_conv)) + conv.bias)
    sources = {"igate": c, "fgate": c, "zgate": u, "ogate": u}
    inputs = [x @ torch.block_diag(*m.get_parameter(f"{name}.weight")).T for name, x in sources.items()]
    weights = [torch.block_diag(*m.slstm_cell.recurrent_kernel[:, :, gate]) for gate in range(4)]
    biases = [m.slstm_cell.bias[:, gate].flatten() for gate in range(4)]
    cell = norm = h = torch.zeros(2, D_MODEL, dtype=torch.float64)
    outputs = []
    for t in range(9):
        i, f, z, o = (x[:, t] + h @ w + b for x, w, b in zip(inputs, weights, biases, strict=True))
        cell = torch.sigmoid(f) * cell + torch.exp(i) * torch.tanh(z)
        norm = torch.sigmoid(f) * norm + torch.exp(i)
        h = torch.sigmoid(o) * cell / norm
        outputs.append(h)
    y = head_norm(torch.stack(outputs, dim=1).unflatten(-1, (2, -1)), 1e-5).flatten(2)
    torch.testing.assert_close(m(u), y * (1 + m.group_norm.weight))


@pytest.mark.mixer("slstm")
def test_the_forget_gate_starts_as_published():
    for depth in (0.0, 1.0):
        bias = ssmzoo.build_mixer("slstm", 32, n_heads=2, depth=depth).slstm_cell.bias
        place = torch.arange(16) / 15
        torch.testing.assert_close(bias[1, 1].detach(), -(-5 + 12 * place ** (0.3 + 1.3 * depth)))
        assert not bias[:, [0, 2, 3]].any()


@pytest.mark.mixer("mlstm")
def test_gates_start_as_published():
    gates = ssmzoo.build_mixer("mlstm", 64)
    assert not any(gate.weight.any() for gate in (gates.igate_preact, gates.fgate_preact, gates.ogate_preact))
    assert gates.igate_preact.bias.tolist() == [-10] * 8
    torch.testing.assert_close(gates.fgate_preact.bias.detach(), torch.linspace(3, 6, 8))
    model = ssmzoo.build({"d_model": 64, "n_layers": 1, "pattern": ["mlstm"], "vocab_size": 8})
    assert model.layers[0].mixer.igate_preact.bias.tolist() == [-10] * 8


@pytest.mark.mixer("mlstm", "mlstm_v1", "slstm")
@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("mlstm", {"n_heads": 5}, "`qk_dim_factor` must give each of the 5 heads as many channels; got 0.5 of 24, 12"),
        ("mlstm", {"n_heads": 2, "v_dim_factor": 0.0}, "`v_dim_factor` must give each of the 2 heads"),
        ("mlstm", {"n_heads": 2, "gate_soft_cap": -1.0}, "`gate_soft_cap` must be at least 0; got -1.0"),
        ("slstm", {"n_heads": 5}, "`n_heads` must divide d_model, 24; got 5"),
        ("slstm", {"depth": 1.5}, "`depth` must be from 0 to 1; got 1.5"),
        ("mlstm_v1", {"n_heads": 5}, "`n_heads` must divide the 64 channels inside; got 5"),
        ("mlstm_v1", {"qkv_proj_blocksize": 3}, "`qkv_proj_blocksize` must divide the 64 channels inside; got 3"),
        ("mlstm_v1", {"proj_factor": 0.0}, "`proj_factor` must give at least one channel; got 0.0 of 24"),
    ],
)
def test_refusals(name, options, words):
    with pytest.raises(ValueError, match=words):
        ssmzoo.build_mixer(name, D_MODEL, **options)
