"""Mamba-2 against its equations, its second direction against two layers of one, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from moved import both_ways, moved_mixer

import ssmzoo
from ssmkernels import use

D_MODEL = 24
SMALL = {"d_state": 3, "headdim": 4, "ngroups": 2}


def build(**options):
    return moved_mixer("mamba2", D_MODEL, names=("D", "dt_bias", "norm.weight"), **SMALL | options)


def by_equation(m, u):
    """The paper's equations, token by token, written without any op of ours."""
    b, l, _ = u.shape
    h, p, g, n = m.n_heads, m.headdim, m.ngroups, m.d_state
    mlp_gate, mlp, z, xBC, dt = (u @ m.in_proj.weight.T).split(m.splits, dim=-1)
    padded = F.pad(xBC.mT, (m.d_conv - 1, 0))
    xBC = F.silu(F.conv1d(padded, m.conv1d.weight, m.conv1d.bias, groups=xBC.shape[-1])).mT
    x, B, C = xBC.split([h * p, g * n, g * n], dim=-1)
    x = x.reshape(b, l, h, p)
    B, C = (t.reshape(b, l, g, n).repeat_interleave(h // g, dim=2) for t in (B, C))
    delta = F.softplus(dt + m.dt_bias).clamp(*m.dt_limit)
    state, ys = u.new_zeros(b, h, p, n), []
    for t in range(l):
        decay = torch.exp(-delta[:, t] * m.A_log.exp())[..., None, None]
        state = decay * state + delta[:, t, :, None, None] * x[:, t, ..., None] * B[:, t, :, None]
        ys.append((state * C[:, t, :, None]).sum(-1) + m.D.view(h, -1) * x[:, t])
    y = torch.stack(ys, dim=1).reshape(b, l, h * p)

    def norm(y):
        grouped = y.unflatten(-1, (m.norm_groups, -1))
        grouped = grouped / torch.sqrt(grouped.square().mean(-1, keepdim=True) + m.norm.eps)
        return grouped.flatten(-2) * m.norm.weight

    if m.norm is None:
        y = y * F.silu(z)
    else:
        y = norm(y) * F.silu(z) if m.norm.norm_before_gate else norm(y * F.silu(z))
    return torch.cat([F.silu(mlp_gate) * mlp, y], dim=-1) @ m.out_proj.weight.T


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_before_gate": True, "norm_groups": 3, "norm_eps": 0.1, "conv_bias": False, "d_conv": 1},
        {"rmsnorm": False, "D_has_hdim": True, "dt_limit": (0.01, 0.05)},
        {"d_ssm": 16, "ngroups": 1, "norm_groups": 2, "expand": 1.5, "chunk_size": 2},
    ],
    ids=["default", "norm first", "no norm", "beside an MLP"],
)
def test_the_equations(options):
    mixer, x = build(**options), torch.randn(2, 9, D_MODEL, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), by_equation(mixer, x))
    with torch.no_grad():  # token by token, by the way that has no gradients
        state, outputs = mixer.initial_state(2), []
        for t in range(9):
            y, state = mixer(x[:, t : t + 1], state)
            outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), by_equation(mixer, x))


def test_both_directions_are_two_layers_added():
    both = build(bidirectional=True, rmsnorm=False)
    ways = [build(rmsnorm=False) for _ in range(2)]
    both_ways(both, ways, {"A_b_log": "A_log", "D_b": "D", "dt_bias_b": "dt_bias", "conv1d_b": "conv1d"})
    x = torch.randn(2, 11, D_MODEL, dtype=torch.float64)
    torch.testing.assert_close(both(x), ways[0](x) + ways[1](x.flip(1)).flip(1))
    assert not torch.equal(both.conv1d.weight, both.conv1d_b.weight)
    assert both.float32_parameters == ("A_log", "D", "dt_bias", "A_b_log", "D_b", "dt_bias_b")
    with pytest.raises(ValueError, match="sees the whole sequence at once"):
        both.initial_state(1)


def test_how_its_weights_start():
    torch.manual_seed(0)
    mixer = ssmzoo.build_mixer("mamba2", 512, A_init_range=(2.0, 3.0), dt_min=0.01, dt_max=0.02, conv_init=1e-3)
    A = mixer.A_log.exp()
    assert ((A >= 1.9999) & (A <= 3.0001)).all()
    dt = F.softplus(mixer.dt_bias)
    assert ((dt >= 0.00999) & (dt <= 0.02001)).all()
    assert 0 < mixer.conv1d.weight.abs().max() <= 1e-3
    assert (mixer.D == 1).all()


def test_half_precision_keeps_what_decays_in_float32():
    mixer = build().bfloat16()
    assert {n for n, p in mixer.named_parameters() if p.dtype != torch.bfloat16} == {"A_log", "D", "dt_bias"}
    assert mixer(torch.randn(1, 5, D_MODEL).bfloat16()).dtype == torch.bfloat16


def test_a_chunk_size_changes_only_rounding():
    x = torch.randn(1, 20, D_MODEL, dtype=torch.float64)
    with use("tiled"):
        torch.testing.assert_close(build(chunk_size=7)(x), build(chunk_size=64)(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"headdim": 5}, r"`headdim` must divide the 48 channels"),
        ({"ngroups": 5}, r"`ngroups` must divide the 12 heads"),
        ({"norm_groups": 5}, r"`norm_groups` must divide the 48 channels"),
        ({"d_ssm": 52}, r"`d_ssm` must be between 1 and d_inner, 48; got 52"),
        ({"expand": 0.01}, r"`expand` · d_model must be a whole number"),
        ({"dt_limit": (1.0, 0.5)}, r"`dt_limit` must be \(least, most\)"),
        ({"dt_limit": (1.0,)}, r"`dt_limit` must be \(least, most\)"),
        ({"dt_limit": (math.nan, 1.0)}, r"`dt_limit` must be \(least, most\)"),
        ({"A_init_range": (0.0, 1.0)}, r"`A_init_range` must be finite and above 0"),
        ({"A_init_range": ("a", 1.0)}, r"`A_init_range` must be \(least, most\)"),
        ({"dt_min": 0.0}, r"0 < `dt_min` <= `dt_max`"),
        ({"d_state": 0}, r"`d_state` must be at least 1"),
        ({"chunk_size": 0}, r"`chunk_size` must be at least 1"),
    ],
)
def test_what_it_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
