"""minGRU and minLSTM against the paper's log-space form, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import ssmzoo

D_MODEL = 10


def build(name, **options):
    torch.manual_seed(0)
    return ssmzoo.build_mixer(name, D_MODEL, **options).double()


def cumulative(log_f, log_values, log_start):
    """h by sums of exponentials: log h_t = F_t + log(e^log_start + Σ_{s≤t} e^(log_values_s - F_s)), F = Σ log f."""
    summed = log_f.cumsum(1)
    terms = torch.cat([log_start[:, None], log_values - summed], dim=1)
    return torch.exp(summed + torch.logcumsumexp(terms, dim=1)[:, 1:])


def log_g(v):
    return torch.where(v >= 0, torch.log(F.relu(v) + 0.5), F.logsigmoid(v))


def log_space(mixer, x, h):
    """The output and the last state, from the state h before; all of it positive."""
    if hasattr(mixer, "to_hidden_and_gate"):
        v, k = mixer.to_hidden_and_gate(x).chunk(2, dim=-1)
        log_f, log_i = F.logsigmoid(-k), F.logsigmoid(k)
    else:
        v, p, q = mixer.to_hidden_and_f_i_gate(x).chunk(3, dim=-1)
        log_f, log_i = F.logsigmoid(p + mixer.forget_bias), F.logsigmoid(q)
        if mixer.normalize:
            both = torch.logaddexp(log_f, log_i)
            log_f, log_i = log_f - both, log_i - both
    h = cumulative(log_f, log_i + log_g(v), torch.log(h))
    return mixer.to_out(h), h[:, -1]


@pytest.mark.parametrize("name", ["mingru", "minlstm"])
@pytest.mark.parametrize(
    "options", [{}, {"expansion_factor": 1.7, "bias": True}, {"normalize": False, "forget_bias": 1}]
)
def test_the_log_space_form(name, options):
    options = {
        key: value for key, value in options.items() if name == "minlstm" or key not in ("normalize", "forget_bias")
    }
    mixer = build(name, **options)
    x = torch.randn(2, 19, D_MODEL, dtype=torch.float64, requires_grad=True)
    state = mixer.initial_state(2)
    state.h = torch.rand_like(state.h).requires_grad_()
    y, after = mixer(x, state)
    expected, last = log_space(mixer, x, state.h)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(after.h, last)
    inputs = [x, state.h, *mixer.parameters()]
    weight = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad((y * weight).sum() + after.h.sum(), inputs),
        torch.autograd.grad((expected * weight).sum() + last.sum(), inputs),
    )


def test_linear_candidates():
    mixer = build("mingru", positive=False)
    x = torch.randn(1, 1, D_MODEL, dtype=torch.float64)
    v, k = mixer.to_hidden_and_gate(x).chunk(2, dim=-1)
    torch.testing.assert_close(mixer(x), torch.sigmoid(k) * v)
    assert (mixer(x) < 0).any()


def test_weights_of_the_published_code():
    assert {name: tuple(p.shape) for name, p in build("mingru", expansion_factor=1.5).named_parameters()} == {
        "to_hidden_and_gate.weight": (30, D_MODEL),
        "to_out.weight": (D_MODEL, 15),
    }
    assert {name: tuple(p.shape) for name, p in build("minlstm").named_parameters()} == {
        "to_hidden_and_f_i_gate.weight": (30, D_MODEL)
    }


def test_gates_close_to_one_in_half_precision():
    """A decay of 1 - 1e-4 is 1 in bfloat16; its logarithm is kept in float32."""
    mixer = ssmzoo.build_mixer("mingru", 4, bias=True, positive=False)
    with torch.no_grad():
        mixer.to_hidden_and_gate.weight.zero_()
        mixer.to_hidden_and_gate.bias.copy_(torch.tensor([0.0] * 4 + [-9.25] * 4))
    mixer = mixer.to(torch.bfloat16)
    state = mixer.initial_state(1)
    state.h += 1
    with torch.no_grad():
        _, state = mixer(torch.zeros(1, 2000, 4, dtype=torch.bfloat16), state)
    wanted = (1 - torch.sigmoid(torch.tensor(-9.25)).item()) ** 2000
    rounding = 2000 * 2**-24  # of a decay in float32, once for each step
    torch.testing.assert_close(state.h, torch.full((1, 4), wanted), rtol=rounding, atol=0)


@pytest.mark.parametrize("name", ["mingru", "minlstm"])
def test_errors(name):
    with pytest.raises(ValueError, match="`proj_out` must be True where `expansion_factor` makes 15 channels"):
        build(name, expansion_factor=1.5, proj_out=False)
    with pytest.raises(ValueError, match="`expansion_factor` · d_model must be at least 1; got 0.01 · 10"):
        build(name, expansion_factor=0.01)
