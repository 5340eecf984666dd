"""H3 against its paper's equations, token by token."""

from __future__ import annotations

import pytest
import torch

import ssmzoo

D, N = 6, 4


def build(**options):
    torch.manual_seed(0)
    return ssmzoo.build_mixer("h3", D, **{"d_state": N} | options).double()


def by_hand(mixer, x):
    """Shift and diagonal state spaces with explicit states; a dense outer product for each head."""
    p, heads = mixer.head_dim, D // mixer.head_dim
    weights = dict(mixer.named_parameters())
    B_k, C_k = weights["ssm_k_kernel.kernel.B"], weights["ssm_k_kernel.kernel.C"][0]
    A = torch.complex(-weights["kernel.kernel.inv_A_real"].exp(), weights["kernel.kernel.A_imag"])
    B, C = (torch.view_as_complex(weights[f"kernel.kernel.{name}"]) for name in "BC")
    dt = weights["kernel.kernel.log_dt"].exp()[:, None]
    if mixer.discretization == "bilinear":
        A_bar, B_bar = (1 + dt * A / 2) / (1 - dt * A / 2), dt * B / (1 - dt * A / 2)
    else:
        A_bar, B_bar = (dt * A).exp(), ((dt * A).exp() - 1) / A * B
    shift = torch.diag(torch.ones(N - 1, dtype=torch.float64), -1)
    h_k = torch.zeros(D, N, dtype=torch.float64)
    h = torch.zeros(heads, p, p, N // 2, dtype=torch.complex128)
    outputs = []
    for token in x[0]:
        q, k, v = (getattr(mixer, f"{name}_proj")(token) for name in "qkv")
        h_k = h_k @ shift.T + B_k * k[:, None]
        k = (C_k * h_k).sum(1) + mixer.ssm_k_D * k
        q, k, v = (t.view(heads, p) for t in (q, k, v))
        u = torch.einsum("hi,hj->hij", k, v)
        h = A_bar[:, None, None] * h + B_bar[:, None, None] * u[..., None]
        y = 2 * torch.einsum("hn,hijn->hij", C[0], h).real + mixer.D[:, None, None] * u
        y = torch.einsum("hi,hij->jh", q, y)  # the published order: heads innermost
        outputs.append(mixer.output_linear(y.flatten()))
    return torch.stack(outputs)[None]


@pytest.mark.parametrize("options", [{}, {"head_dim": 2}, {"discretization": "zoh", "init": "inv"}], ids=str)
def test_the_papers_equations(options):
    mixer, x = build(**options), torch.randn(1, 9, D, dtype=torch.float64)
    with torch.no_grad():
        mixer.get_parameter("ssm_k_kernel.kernel.B").normal_()
        torch.testing.assert_close(mixer(x), by_hand(mixer, x), rtol=1e-10, atol=1e-10)


def test_it_starts_as_published():
    mixer = ssmzoo.build_mixer("h3", 64)
    weights = dict(mixer.named_parameters())
    assert torch.equal(weights["ssm_k_kernel.kernel.B"], torch.eye(64)[:1].expand(64, 64))
    assert weights["ssm_k_kernel.kernel.C"].abs().max() <= 1 / 8
    torch.testing.assert_close(weights["kernel.kernel.inv_A_real"], torch.full((64, 32), 0.5).log())
    torch.testing.assert_close(weights["kernel.kernel.A_imag"], torch.pi * torch.arange(32.0).expand(64, 32))
    dt = weights["kernel.kernel.log_dt"].exp()
    assert 0.001 <= dt.min() < dt.max() <= 0.1


def test_its_state_does_not_grow():
    mixer = build()
    state = mixer.initial_state(2, max_length=1000)
    before = state.nbytes
    with torch.no_grad():
        _, state = mixer(torch.randn(2, 100, D, dtype=torch.float64), state)
    assert state.nbytes == before == 2 * D * ((N - 1) * 8 + N // 2 * 16)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"d_state": 3}, "`d_state` must be positive and even, as pairs; got 3"),
        ({"head_dim": 4}, "`head_dim` must divide d_model=6; got 4"),
        ({"dt_min": 0.2}, "0 < `dt_min` <= `dt_max` must hold; got 0.2 and 0.1"),
        ({"init": "legs"}, "init"),
    ],
)
def test_errors(options, match):
    with pytest.raises((ValueError, TypeError), match=match):
        build(**options)
