"""Hyena and StripedHyena's modal Hyena against their equations, and the filters' length and rate."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import ssmzoo
from ssmzoo.testing import check_property

D = 6


def build(name="hyena", **options):
    torch.manual_seed(0)
    small = {"l_max": 12, "filter_order": 5, "emb_dim": 5} if name == "hyena" else {}
    return ssmzoo.build_mixer(name, D, **small | options).double()


def short(conv, u):
    taps = conv.weight.shape[-1]
    return F.conv1d(F.pad(u.mT, (taps - 1, 0)), conv.weight, conv.bias, groups=u.shape[2]).mT


def long(kernel, bias, u):
    """Σ_j h_j u_{t-j} + bias u_t as a sum over lags."""
    y = bias * u
    for j in range(u.shape[1]):
        y = y + F.pad(u[:, : u.shape[1] - j] * kernel[:, j], (0, 0, j, 0))
    return y


def filters(mixer, length):
    """The implicit filters within l_max, (order - 1, d, length), by their definition."""
    weights = {name.removeprefix("filter_fn."): p for name, p in mixer.named_parameters()}
    h = weights["pos_emb.z"][0, :length]
    for layer in (0, 2, 4):
        linear = F.linear(h, weights[f"implicit_filter.{layer}.weight"], weights[f"implicit_filter.{layer}.bias"])
        h = torch.sin(weights["implicit_filter.1.freq"] * linear)
    h = F.linear(h, weights["implicit_filter.6.weight"])
    t = torch.arange(length, dtype=torch.float64)[:, None] / (mixer.filter_fn.pos_emb.l_max - 1)
    rates = torch.linspace(math.log(0.01) / 1.5, math.log(0.01) / 0.3, h.shape[1], dtype=torch.float64)
    h = h * torch.exp(-t * rates.abs())
    return h.view(length, -1, mixer.order - 1).permute(2, 1, 0).repeat(1, mixer.num_heads, 1)


@pytest.mark.parametrize("options", [{}, {"order": 3, "w": 3.0}, {"num_heads": 2, "inner_factor": 2}], ids=str)
def test_hyenas_equations(options):
    mixer, x = build(**options), torch.randn(2, 11, D, dtype=torch.float64)
    with torch.no_grad():
        *gates, v = short(mixer.short_filter, mixer.in_proj(x)).chunk(mixer.order + 1, dim=-1)
        kernels = filters(mixer, 11)
        bias = mixer.filter_fn.bias.view(-1, mixer.order - 1).T.repeat(1, mixer.num_heads)
        for o, gate in enumerate(reversed(gates[1:])):
            v = long(kernels[o], bias[o], gate * v)
        torch.testing.assert_close(mixer(x), mixer.out_proj(gates[0] * v), rtol=1e-10, atol=1e-10)


def test_a_filter_of_a_higher_order_goes_through_states():
    for name in ("step by step", "cut anywhere", "packed with a state", "gradients", "gradients through a state"):
        check_property(name, build(order=3, num_heads=2, filter_length=6, rate=1.5))


def test_positions_start_as_published_and_go_on_beyond_the_last():
    positions = build().filter_fn.pos_emb
    t = torch.linspace(0, 1, 12).double()
    w = 2 * math.pi * torch.arange(12).double() / 12
    f = torch.tensor([1e-4, 1.0]).double()
    wave = torch.exp(-1j * f * w[:, None])
    torch.testing.assert_close(positions.z[0], torch.cat([t[:, None], wave.real, wave.imag], 1), atol=1e-7, rtol=0)
    lag = torch.arange(30).double()
    torch.testing.assert_close(positions(lag, first=None), positions.features(lag), atol=1e-6, rtol=0)


def test_the_rate_resamples_the_filters():
    mixer = build(modulate=False)
    whole = mixer.kernels(11)
    ssmzoo.set_rate(mixer, 2.0)
    torch.testing.assert_close(mixer.kernels(6), 2 * whole[..., ::2])
    ssmzoo.set_rate(mixer, 0.5)
    torch.testing.assert_close(mixer.kernels(21)[..., ::2], whole / 2)


def test_a_shorter_filter_is_the_same_one_cut_off():
    x = torch.randn(1, 11, D, dtype=torch.float64)
    mixer, cut = build(), build(filter_length=4)
    with torch.no_grad():
        torch.testing.assert_close(cut(x)[:, :4], mixer(x)[:, :4])
        assert not torch.allclose(cut(x)[:, 4:], mixer(x)[:, 4:])


def test_the_history_takes_the_bytes_it_is_said_to():
    x = torch.randn(2, 40, D, dtype=torch.float64)
    mixer = build(order=3)
    with torch.no_grad():
        _, state = mixer(x, mixer.initial_state(2))
        assert state.nbytes == 2 * 8 * (2 * 40 * D + 2 * 4 * D)
        state = mixer.initial_state(2, max_length=41)
        rows = state.inputs[0].rows
        for t in range(40):
            _, state = mixer(x[:, t : t + 1], state)
        assert state.inputs[0].rows is rows
        _, state = (cut := build(filter_length=5))(x, cut.initial_state(2))
        assert state.nbytes == 2 * 8 * (4 * D + 2 * 3 * D)


@pytest.mark.parametrize("weight", ["filter_fn.pos_emb.z", "filter_fn.implicit_filter.1.freq"])
def test_a_changed_filter_changes_the_next_token(weight):
    mixer, x = build(), torch.randn(1, 5, D, dtype=torch.float64)
    with torch.no_grad():
        _, state = mixer(x, mixer.initial_state(1))
        before, _ = mixer(x[:, :1], state.clone())
        mixer.get_parameter(weight).data.mul_(1.5)
        now, _ = mixer(x[:, :1], state.clone())
        fresh = build()
        fresh.load_state_dict(mixer.state_dict())
        torch.testing.assert_close(now, fresh(x[:, :1], state.clone())[0], rtol=0, atol=0)
        assert not torch.equal(now, before)


@pytest.mark.parametrize("options", [{}, {"n_heads": 2, "num_filters": 3, "state_size": 3}], ids=str)
def test_modal_hyenas_equations(options):
    mixer, x = build("modal_hyena", **options), torch.randn(2, 11, D, dtype=torch.float64)
    with torch.no_grad():
        z = short(mixer.short_filter, mixer.projections(x)).unflatten(-1, (mixer.n_heads, 3, -1))
        x2, x1, v = (z[:, :, :, i].flatten(2) for i in range(3))
        poles, residues = (torch.view_as_complex(w[:, :, 0]) for w in (mixer.filter.poles, mixer.filter.residues))
        h = (residues[..., None] * poles[..., None] ** torch.arange(11)).real.sum(1)
        y = x2 * long(h.repeat_interleave(D // len(h), 0), mixer.filter.D, x1 * v)
        torch.testing.assert_close(mixer(x), mixer.out_filter_dense(y), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("hyena", {"order": 1}, "`order` must be at least 2; got 1"),
        ("hyena", {"l_max": 1}, "`l_max` must be at least 2; got 1"),
        ("hyena", {"emb_dim": 4}, "`emb_dim` must be odd and at least 3: time, cosines and sines; got 4"),
        ("hyena", {"num_heads": 4}, "`num_heads` must divide the 6 channels inside; got 4"),
        ("hyena", {"filter_length": 0}, "`filter_length` must be at least 1; got 0"),
        ("hyena", {"rate": 0.0}, "`rate` must be above 0; got 0.0"),
        ("modal_hyena", {"num_filters": 4}, "`num_filters` must divide d_model=6; got 4"),
        ("modal_hyena", {"n_heads": 4}, "`n_heads` must divide d_model=6; got 4"),
        ("modal_hyena", {"dt_max": 1e-4}, "0 < `dt_min` <= `dt_max` must hold; got 0.001 and 0.0001"),
    ],
)
def test_errors(name, options, match):
    with pytest.raises(ValueError, match=match):
        build(name, **options)


@pytest.mark.parametrize(("name", "millions"), [("h3-125m", 126.4), ("hyena-153m", 153.7), ("stripedhyena-7b", 7644.9)])
def test_published_sizes(name, millions):
    with torch.device("meta"):
        model = ssmzoo.build(name)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=1e-3)
