"""S5 and LRU against their convolutional form, in float64, and how they start."""

from __future__ import annotations

import math

import pytest
import torch

import ssmzoo
from ssmzoo.train.config import TrainConfig

D_MODEL, LENGTH = 6, 20


def build(name, **options):
    torch.manual_seed(0)
    return ssmzoo.build_mixer(name, D_MODEL, **options).double()


def response(A, B, C, u):
    """y_t = Re Σ_{j≤t} C A^(t-j) B u_j, by the powers of the dense matrix A: no recurrence."""
    power, taps = torch.eye(A.shape[0], dtype=A.dtype), []
    for _ in range(u.shape[1]):
        taps.append((C @ power @ B).real)
        power = A @ power
    taps = torch.stack(taps)  # (l d d)
    lag = torch.arange(u.shape[1])[:, None] - torch.arange(u.shape[1])
    kernel = torch.where((lag >= 0)[..., None, None], taps[lag.clamp(min=0)], 0)  # (t j d d)
    return torch.einsum("tjoi,bji->bto", kernel, u)


def complex_pair(pairs):
    return torch.complex(pairs[..., 0], pairs[..., 1])


def discrete(m):
    """S5's matrices by the definitions: the exponential of the system with its input held, or the trapezoidal rule."""
    Lambda = torch.complex(m.Lambda_re, m.Lambda_im)
    if m.clip_eigs:
        Lambda = torch.complex(m.Lambda_re.clamp(max=-1e-4), m.Lambda_im)
    A, B = torch.diag(Lambda), complex_pair(m.B)
    step = torch.diag(m.rate * m.log_step[:, 0].exp()).to(A.dtype)
    n, d = B.shape
    if m.discretization == "zoh":
        held = torch.zeros(n + d, n + d, dtype=A.dtype)
        held[:n, :n], held[:n, n:] = step @ A, step @ B
        whole = torch.linalg.matrix_exp(held)
        return whole[:n, :n], whole[:n, n:]
    left = torch.eye(n, dtype=A.dtype) - step @ A / 2
    return torch.linalg.solve(left, torch.eye(n, dtype=A.dtype) + step @ A / 2), torch.linalg.solve(left, step @ B)


def s5_system(m):
    return (*discrete(m), [complex_pair(getattr(m, name)) for name in (("C1", "C2") if m.bidirectional else ("C",))])


def lru_system(m):
    eigenvalues = torch.exp(torch.complex(-m.nu_log.exp(), m.theta_log.exp()))
    B = m.gamma_log.exp()[:, None] * torch.complex(m.B_re, m.B_im)
    names = ("C", "C2")[: 1 + m.bidirectional]
    return torch.diag(eigenvalues), B, [torch.complex(getattr(m, f"{c}_re"), getattr(m, f"{c}_im")) for c in names]


def expected(m, system, u):
    A, B, ways = system(m)
    y = response(A, B, ways[0], u)
    if len(ways) == 2:
        y = y + response(A, B, ways[1], u.flip(1)).flip(1)
    return (2 if m.twice else 1) * y + m.D * u


@pytest.mark.parametrize(
    ("name", "system", "options"),
    [
        ("lru", lru_system, {"d_hidden": 5}),
        ("lru", lru_system, {"d_hidden": 7, "r_min": 0.9, "r_max": 0.99, "max_phase": 0.3, "bidirectional": True}),
        ("s5", s5_system, {"d_state": 8, "blocks": 2}),
        ("s5", s5_system, {"d_state": 8, "blocks": 2, "bidirectional": True, "clip_eigs": True}),
        ("s5", s5_system, {"d_state": 12, "blocks": 1, "conj_sym": False, "step_rescale": 2.0}),
        ("s5", s5_system, {"d_state": 4, "blocks": 2, "discretization": "bilinear", "C_init": "complex_normal"}),
        ("s5", s5_system, {"d_state": 8, "blocks": 4, "C_init": "lecun_normal"}),
    ],
)
def test_the_convolution_gives_the_same_outputs_and_gradients(name, system, options):
    m = build(name, activation="none", **options)
    u = torch.randn(2, LENGTH, D_MODEL, dtype=torch.float64, requires_grad=True)
    found, wanted = m(u), expected(m, system, u)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    leaves, dy = [u, *m.parameters()], torch.randn_like(found)
    for f, w in zip(torch.autograd.grad(found, leaves, dy), torch.autograd.grad(wanted, leaves, dy), strict=True):
        torch.testing.assert_close(f, w, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("activation", "after"),
    [
        ("gelu", lambda m, y, g: g),
        ("full_glu", lambda m, y, g: m.out1(g) * m.out2(g).sigmoid()),
        ("half_glu1", lambda m, y, g: g * m.out2(g).sigmoid()),
        ("half_glu2", lambda m, y, g: y * m.out2(g).sigmoid()),
    ],
)
def test_activations(activation, after):
    m = build("s5", d_state=4, blocks=1, activation=activation)
    u = torch.randn(1, 5, D_MODEL, dtype=torch.float64)
    y = expected(m, s5_system, u)
    g = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    torch.testing.assert_close(m(u), after(m, y, g), rtol=1e-9, atol=1e-9)


def test_s5_starts_from_blocks_of_the_normal_part_of_hippo():
    """V Λ V⁻¹ is real: -1/2 on the diagonal, ∓√((i + 1/2) (j + 1/2)) below and above it, and 0 between blocks."""
    from ssmzoo.mixers.s5 import hippo_blocks

    Lambda, V = hippo_blocks(8, 2, conj_sym=False)
    matrix = V @ torch.diag(Lambda) @ torch.linalg.inv(V)
    root = torch.sqrt(torch.arange(4, dtype=torch.float64) + 0.5)
    outer = torch.outer(root, root)
    block = outer.triu(1) - outer.tril(-1) - 0.5 * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(matrix, torch.block_diag(block, block).to(matrix.dtype), rtol=1e-8, atol=1e-8)
    half = hippo_blocks(8, 2, conj_sym=True)[0]
    assert len(half) == 4
    assert bool((half.imag > 0).all()) or bool((half.imag < 0).all())


def test_both_ways_of_keeping_states_are_the_same_system():
    """With all of the conjugate states, Re(C̃ h) is what 2 Re(C̃ h) is with one of each pair."""
    halves, whole = (build("s5", d_state=8, blocks=2, conj_sym=c, activation="none") for c in (True, False))
    with torch.no_grad():
        order = [i + 4 * b for b in range(2) for i in range(2)]  # a block's states are followed by their conjugates
        for name in ("Lambda_re", "Lambda_im", "log_step", "B"):
            t = getattr(whole, name)
            for b in range(2):
                t[4 * b : 4 * b + 2] = getattr(halves, name)[2 * b : 2 * b + 2]
                t[4 * b + 2 : 4 * b + 4] = getattr(halves, name)[2 * b : 2 * b + 2]
        conjugates = [i + 2 for i in order]
        whole.Lambda_im[conjugates] *= -1
        whole.B[conjugates, :, 1] *= -1
        whole.C[:, order] = halves.C
        whole.C[:, conjugates] = halves.C * torch.tensor([1.0, -1.0], dtype=torch.float64)
        whole.D.copy_(halves.D)
    u = torch.randn(2, LENGTH, D_MODEL, dtype=torch.float64)
    torch.testing.assert_close(whole(u), halves(u), rtol=1e-9, atol=1e-9)


def test_lru_starts_on_its_ring():
    torch.manual_seed(0)
    m = ssmzoo.build_mixer("lru", 4, d_hidden=20_000, r_min=0.5, r_max=0.9, max_phase=1.5)
    size, phase = torch.exp(-m.nu_log.exp()), m.theta_log.exp()
    assert 0.5 <= size.min() < 0.501
    assert 0.899 < size.max() <= 0.9
    assert abs((size**2).mean() - (0.5**2 + 0.9**2) / 2) < 0.005  # uniform over the ring's area
    assert phase.min() >= 0
    assert 1.49 < phase.max() <= 1.5
    torch.testing.assert_close(m.gamma_log.exp(), torch.sqrt(1 - size**2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        ({}, {"Lambda_re", "Lambda_im", "log_step", "B"}),
        ({"opt_config": "BfastandCdecay"}, {"Lambda_re", "Lambda_im", "log_step"}),
        ({"opt_config": "noBCdecay", "dt_global": True}, {"Lambda_re", "Lambda_im", "B", "C", "D"}),
    ],
)
def test_weights_of_s5_with_a_rate_of_their_own(options, groups):
    m = ssmzoo.build_mixer("s5", 4, d_state=4, blocks=1, **options)
    assert set(m.learning_rates) == set(m.no_weight_decay) == groups


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("s5", {"d_state": 12, "blocks": 5}, "`blocks` must divide"),
        ("s5", {"d_state": 6, "blocks": 2}, "even sizes"),
        ("s5", {"dt_min": 0.2}, "`dt_min` <= `dt_max`"),
        ("s5", {"step_rescale": 0.0}, "`step_rescale` must be above 0"),
        ("lru", {"r_min": 0.9, "r_max": 0.5}, "`r_min` < `r_max`"),
        ("lru", {"max_phase": -1.0}, "`max_phase` must be above 0"),
        ("lru", {"d_hidden": 0}, "`d_hidden`"),
    ],
)
def test_wrong_options_are_named(name, options, said):
    with pytest.raises(ValueError, match=said):
        ssmzoo.build_mixer(name, 8, **options)


@pytest.mark.parametrize(
    ("C_init", "variance"), [("trunc_standard_normal", 2 / 64), ("lecun_normal", 2 / (64 * 96)), ("complex_normal", 1)]
)
def test_how_large_s5_starts(C_init, variance):
    """V is unitary, so that a number of C̃ has the variance of one of C, both of its parts together; B likewise."""
    torch.manual_seed(0)
    m = ssmzoo.build_mixer("s5", 96, d_state=64, blocks=4, C_init=C_init)
    assert abs(m.C.square().sum(-1).mean() / variance - 1) < 0.1
    assert abs(m.B.square().sum(-1).mean() * 64 - 1) < 0.1


def test_the_rate_stretches_the_steps_of_s5():
    m = build("s5", d_state=4, blocks=1, step_rescale=0.5)
    with torch.no_grad():
        once = m.system()[0]
        ssmzoo.set_rate(m, 1.0)
        torch.testing.assert_close(m.system()[0], once**2)


def test_s5_models_of_the_long_range_arena():
    """Layers, width and conjugate pairs of states of the published runs, and the weights with a rate of their own."""
    sizes = {
        "listops": (8, 128, 8, "log_step"),
        "imdb": (6, 256, 96, "B"),
        "aan": (6, 128, 128, "B"),
        "cifar": (6, 512, 192, "log_step"),
        "pathfinder": (6, 192, 128, "log_step B"),
        "pathx": (6, 128, 128, "log_step B"),
    }
    for task, (*size, slow) in sizes.items():
        model = ssmzoo.build(f"lra-s5-{task}", device="meta")
        mixer = model.blocks[0].mixer
        assert [len(model.blocks), model.config.d_model, mixer.n] == size
        assert not mixer.causal
        assert set(mixer.learning_rates) == {"Lambda_re", "Lambda_im", *slow.split()}
        TrainConfig.of(model.config.train)
