"""Mamba-3 against masked attention with complex numbers, its published sizes, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from mamba3_parallel import mamba3_parallel
from moved import moved_mixer

import ssmzoo

D_MODEL = 16
SMALL = {"d_state": 6, "headdim": 8, "ngroups": 2}


def build(**options):
    return moved_mixer("mamba3", D_MODEL, **SMALL | options)


def in_parallel(m, u):
    """The whole layer at once, written without any op of ours."""
    b, l, _ = u.shape
    h, p, r, n, g = m.n_heads, m.headdim, m.mimo_rank, m.d_state, m.ngroups
    projected = u @ m.in_proj.weight.T
    z, x, B, C, dt, A, trap, angles = projected.split([h * p, h * p, r * g * n, r * g * n, h, h, h, m.n_angles], dim=-1)
    A = F.softplus(A) if m.A_activation == "softplus" else torch.where(A >= 0, 1 + A, 1 / (1 + A.abs()))
    x, z = (t.reshape(b, l, 1, h, p) for t in (x, z))
    if m.is_mimo:
        x, z = x * m.mimo_x.transpose(0, 1), z * m.mimo_z.transpose(0, 1)

    def norm(t, weight):
        return t / torch.sqrt(t.square().mean(-1, keepdim=True) + 1e-5) * weight

    y = mamba3_parallel(
        x,
        F.softplus(dt + m.dt_bias),
        -A.clamp(min=m.A_floor),
        norm(B.reshape(b, l, r, g, n), m.B_norm.weight),
        norm(C.reshape(b, l, r, g, n), m.C_norm.weight),
        torch.sigmoid(trap),
        math.pi * torch.tanh(angles),
        m.B_bias,
        m.C_bias,
        m.D,
        None if m.norm else z,
        interleaved=not m.is_mimo,
    )[0]
    if m.norm:
        y = norm(y, m.norm.weight.view(h, p)) * F.silu(z)
    y = (y * m.mimo_o.transpose(0, 1)).sum(2) if m.is_mimo else y[:, :, 0]
    return y.reshape(b, l, h * p) @ m.out_proj.weight.T


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"A_activation": "heavy_tail", "rope_fraction": 1.0, "is_outproj_norm": True, "A_floor": 0.5},
        {"is_mimo": True, "mimo_rank": 2},
        {"is_mimo": True, "mimo_rank": 3, "is_outproj_norm": True, "ngroups": 1, "A_activation": "heavy_tail"},
    ],
    ids=str,
)
def test_masked_attention(options):
    mixer = build(**options)
    u = torch.randn(2, 7, D_MODEL, dtype=torch.float64)
    y, expected = mixer(u), in_parallel(mixer, u)
    torch.testing.assert_close(y, expected)
    weights = torch.randn_like(y)
    found, wanted = (torch.autograd.grad((t * weights).sum(), list(mixer.parameters())) for t in (y, expected))
    for (name, _), one, other in zip(mixer.named_parameters(), found, wanted, strict=True):
        torch.testing.assert_close(one, other, msg=lambda m, name=name: f"{name}: {m}")


def test_published_names_and_shapes():
    mixer = ssmzoo.build_mixer("mamba3", 64, is_mimo=True, mimo_rank=4, headdim=32, d_state=16, is_outproj_norm=True)
    shapes = {name: tuple(p.shape) for name, p in mixer.named_parameters()}
    assert shapes == {
        "in_proj.weight": (2 * 128 + 2 * 16 * 4 + 3 * 4 + 4, 64),
        "dt_bias": (4,),
        "B_bias": (4, 4, 16),
        "C_bias": (4, 4, 16),
        "B_norm.weight": (16,),
        "C_norm.weight": (16,),
        "mimo_x": (4, 4, 32),
        "mimo_z": (4, 4, 32),
        "mimo_o": (4, 4, 32),
        "D": (4,),
        "norm.weight": (128,),
        "out_proj.weight": (64, 128),
    }
    assert (mixer.B_bias == 1).all()
    assert (mixer.mimo_x == 0.25).all()
    assert (mixer.mimo_z == 1).all()
    assert (mixer.mimo_o == 0.25).all()
    steps = F.softplus(mixer.dt_bias)
    assert steps.min() >= 0.001 * (1 - 1e-4)
    assert steps.max() <= 0.1 * (1 + 1e-4)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("mamba3-siso-187m", 187e6),
        ("mamba3-mimo-187m", 187e6),
        ("mamba3-siso-893m", 893e6),
        ("mamba3-siso-1.5b", 1.49e9),
        ("mamba3-mimo-1.5b", 1.50e9),
    ],
)
def test_published_sizes(name, parameters):
    with torch.device("meta"):
        model = ssmzoo.build(name)
    count = sum(p.numel() for p in model.parameters())
    assert float(f"{count:.3g}") == parameters


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"headdim": 7}, "`headdim` must divide the 32 channels inside"),
        ({"ngroups": 3}, "`ngroups` must divide the 4 heads"),
        ({"rope_fraction": 0.1}, "`rope_fraction` must be at most 1 and turn at least 2 of the 6 dimensions"),
        ({"rope_fraction": 1.5}, "`rope_fraction` must be at most 1"),
        ({"dt_min": 0.2}, "0 < `dt_min` <= `dt_max` must hold"),
        ({"mimo_rank": 0}, "`mimo_rank` must be at least 1"),
        ({"expand": 1.03}, "`expand` · d_model must be a whole number"),
    ],
    ids=str,
)
def test_refusals(options, words):
    with pytest.raises(ValueError, match="Mamba3") as error:
        build(**options)
    assert words in str(error.value)
