"""S4 and S4D as functions: one in three views, at any length, with every init, discretisation and option."""

import copy

import pytest
import torch
from lti_layers import build, plain, run

from ssmkernels import fft_conv
from ssmzoo.testing import check_mixer

SYSTEMS = [
    *(("s4", init, how) for init in ("legs", "legt", "fourier") for how in ("bilinear", "zoh")),
    *(("s4d", init, how) for init in ("legs", "lin", "inv", "real") for how in ("zoh", "bilinear")),
]
OPTIONS = [
    {"channels": 3},
    {"gate": 2, "channels": 2},
    {"bottleneck": 2},
    {"dt_tie": False},
    {"n_ssm": 2},
    {"n_ssm": 1, "dt_tie": False, "channels": 2, "gate": 1, "bottleneck": 2, "activation": "tanh"},
    {"bidirectional": True},
    {"bidirectional": True, "channels": 2, "gate": 2, "n_ssm": 4},
    {"activation": "none", "dropout": 0.5},
]


def dense(mixer):
    """The continuous system of each channel as real matrices (d N N), (d N), its C (c d N), all in float64."""
    A, B, dt, P, Q = (x.to(torch.promote_types(x.dtype, torch.float64)) for x in mixer._continuous())
    C = mixer.C.double() if mixer.A_imag is None else torch.view_as_complex(mixer.C.double())
    C = C.view(mixer.channels, *A.shape)
    if not A.is_complex():
        return torch.diag_embed(A), B, C, dt
    A = torch.diag_embed(A)
    A = torch.cat([torch.cat([A.real, -A.imag], 2), torch.cat([A.imag, A.real], 2)], 1)
    column, row = torch.cat([P.real, P.imag], -1), torch.cat([2 * Q.real, 2 * Q.imag], -1)
    return A - column.mT @ row, torch.cat([B.real, B.imag], -1), torch.cat([2 * C.real, -2 * C.imag], -1), dt


@torch.no_grad()
def recurrence(mixer, x):
    """The outputs (b l c·d) with the skip, one token at a time by dense matrices in float64."""
    A, B, C, dt = dense(mixer)
    eye = torch.eye(A.shape[-1], dtype=A.dtype)
    system, push = A * dt[:, None, None], B * dt[:, None]
    if mixer.discretization == "bilinear":
        step, push = (torch.linalg.solve(eye - system / 2, m) for m in (eye + system / 2, push[..., None]))
    else:
        both = torch.linalg.matrix_exp(torch.nn.functional.pad(torch.cat([system, push[..., None]], -1), (0, 0, 0, 1)))
        step, push = both[:, :-1, :-1], both[:, :-1, -1:]
    h, outputs = torch.zeros(len(x), *B.shape, dtype=A.dtype), []
    for u in x.double().unbind(1):
        h = torch.einsum("dmn,bdn->bdm", step, h) + push[..., 0] * u[..., None]
        outputs.append(torch.einsum("cdn,bdn->bcd", C, h).flatten(1) + mixer.D.double() * u.repeat(1, mixer.channels))
    return torch.stack(outputs, dim=1)


@pytest.mark.parametrize(("name", "init", "how"), SYSTEMS)
def test_three_views_of_one_function(name, init, how):
    mixer = plain(build(name, 4, d_state=64, init=init, discretization=how))
    x = torch.randn(2, 601, 4)
    with torch.no_grad():
        at_once = mixer(x)
        steps, after_steps = run(mixer, x, list(range(1, 601)))
        chunks, after_chunks = run(mixer, x, [0, 97, 98, 354, 354])
    largest = at_once.abs().max()
    assert (at_once - recurrence(mixer, x)).abs().max() <= 1e-5 * largest
    assert (steps - at_once).abs().max() <= 1e-5 * largest
    assert (chunks - at_once).abs().max() <= 1e-5 * largest
    assert (after_steps.ssm - after_chunks.ssm).abs().max() <= 1e-5 * after_steps.ssm.abs().max()


@pytest.mark.parametrize(("name", "init", "how"), SYSTEMS)
def test_the_layer_is_the_dense_system_in_float64(name, init, how):
    mixer = plain(build(name, 4, init=init, discretization=how, channels=2, dt_tie=False, n_ssm=2).double())
    x = torch.randn(2, 40, 4, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), recurrence(mixer, x), rtol=0, atol=1e-10)
    torch.testing.assert_close(run(mixer, x, [1, 18])[0], recurrence(mixer, x), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("name", "init", "how"), SYSTEMS)
def test_every_init_and_discretization_has_every_property(name, init, how):
    check_mixer(build(name, 4, init=init, discretization=how))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["s4", "s4d"])
def test_every_option_has_every_property(name, options):
    init = {"init": "legt"} if name == "s4" else {"init": "lin"}
    check_mixer(build(name, **init, **options))


def test_dss_has_every_property_but_a_state():
    mixer = build("s4d", discretization="dss")
    check_mixer(mixer)
    with pytest.raises(ValueError, match="no `initial_state` with `discretization='dss'`"):
        mixer.initial_state(1)
    with pytest.raises(ValueError, match="`state` must be None, as this mixer sees the whole sequence at once"):
        mixer(torch.randn(1, 2, 8), build("s4d").initial_state(1))


def test_dss_nears_zoh_as_the_length_grows():
    dss, zoh = plain(build("s4d", discretization="dss", init="lin")).double(), plain(build("s4d", init="lin")).double()
    torch.nn.init.zeros_(dss.D), torch.nn.init.zeros_(zoh.D)
    x = torch.randn(1, 20000, 8, dtype=torch.float64)
    x[:, 50:] = 0
    torch.testing.assert_close(dss(x)[:, :50], -zoh(x)[:, :50], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["s4", "s4d"])
@pytest.mark.parametrize("length", [1, 2, 3, 13, 16, 17, 97, 128])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_lengths_odd_and_prime(name, length, bidirectional):
    """Against the sums themselves; with a kernel ahead, its first tap meets the next input."""
    mixer = plain(build(name, 4, bidirectional=bidirectional).double())
    x = torch.randn(2, length, 4, dtype=torch.float64)
    expected = recurrence(mixer, x)
    if bidirectional:
        ahead = copy.deepcopy(mixer)
        ahead.C = mixer.C_reverse
        torch.nn.init.zeros_(ahead.D)
        back = recurrence(ahead, x.flip(1)).flip(1)
        expected[:, :-1] += back[:, 1:]
    torch.testing.assert_close(mixer(x), expected, rtol=0, atol=1e-10)
    if bidirectional:
        return
    for t in range(0, length, max(1, length // 5)):
        changed = x.clone()
        changed[:, t:] += 1e3
        torch.testing.assert_close(mixer(changed)[:, :t], expected[:, :t], rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["s4", "s4d"])
@pytest.mark.parametrize("taps", [1, 2, 7, 12, 13, 14, 29])
@pytest.mark.parametrize("both_ways", [False, True])
def test_kernels_of_other_lengths_than_the_input(name, taps, both_ways):
    mixer = build(name, 4).double()
    system = mixer._continuous()
    kernels = [mixer.kernel(system, torch.view_as_complex(C), taps) for C in torch.randn(2, 4, 4, 2).double()]
    u = torch.randn(2, 13, 4, dtype=torch.float64)
    expected = torch.zeros_like(u)
    for t in range(13):
        for j in range(taps):
            if t - j >= 0:
                expected[:, t] += kernels[0][:, j] * u[:, t - j]
            if both_ways and t + 1 + j < 13:
                expected[:, t] += kernels[1][:, j] * u[:, t + 1 + j]
    y = fft_conv(u, kernels[0], kernel_reverse=kernels[1] if both_ways else None)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["s4", "s4d"])
def test_packed_chunks_have_the_gradients_of_each_alone(name):
    mixer = build(name, 4, init="legs").double()
    cu = torch.tensor([0, 3, 3, 20, 31], dtype=torch.int32)
    x = torch.randn(1, 31, 4, dtype=torch.float64)
    before = torch.randn_like(mixer.initial_state(4).ssm).requires_grad_()
    weights = [before, *mixer.parameters()]

    def loss(y, state):
        return y.square().sum() + state.ssm.abs().square().sum()

    kind = mixer.state_class
    packed = torch.autograd.grad(loss(*mixer(x, kind(before), cu_seqlens=cu)), weights)
    alone = sum(
        loss(*mixer(x[:, a:b], kind(before[i : i + 1])))
        for i, (a, b) in enumerate(zip(cu.tolist(), cu.tolist()[1:], strict=False))
    )
    for got, expected in zip(packed, torch.autograd.grad(alone, weights), strict=True):
        torch.testing.assert_close(got, expected)
