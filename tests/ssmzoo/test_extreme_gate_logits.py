"""Mixers whose gates are at their ends: outputs and all gradients are finite, and those of float64."""

from __future__ import annotations

import copy

import pytest
import torch

import ssmzoo

D_MODEL = 16
# The bias that stands in a gate's logit, by mixer
GATES = {
    "gla": ({"n_heads": 2}, "gk_proj.1.bias"),
    "kda": ({"n_heads": 2, "head_dim": 8}, "dt_bias"),
    "kda bounded": ({"n_heads": 2, "head_dim": 8, "gate_lower_bound": -5.0}, "dt_bias"),
    "rwkv6": ({"n_heads": 2}, "w_proj.linear.lora.2.bias"),
    "rwkv7": ({"head_dim": 8}, "w_lora.lora.2.bias"),
    "gated_deltanet": ({"n_heads": 2, "head_dim": 8}, "dt_bias"),
    "gated_deltaproduct": ({"n_heads": 2, "head_dim": 8}, "dt_bias"),
}
LOGITS = (0.0, -1e4, 100.0, -100.0, 1e4, 3.0, -30.0, 12.0)


def results(mixer, x):
    x = x.detach().clone().requires_grad_()
    y = mixer(x)
    generator = torch.Generator().manual_seed(2)
    incoming = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    leaves = {"x": x, **dict(mixer.named_parameters())}
    gradients = torch.autograd.grad(y, list(leaves.values()), incoming, allow_unused=True)
    return {"y": y.detach()} | {n: g for n, g in zip(leaves, gradients, strict=True) if g is not None}


@pytest.mark.parametrize("logit", [*LOGITS, None])
@pytest.mark.parametrize("name", GATES)
def test_gates_at_their_ends(name, logit):
    options, bias = GATES[name]
    torch.manual_seed(0)
    mixer = ssmzoo.build_mixer(name.split()[0], D_MODEL, **options)
    with torch.no_grad():
        gate = mixer.get_parameter(bias)
        values = torch.tensor(LOGITS if logit is None else [logit])
        gate.copy_(values.repeat(-(-gate.numel() // len(values)))[: gate.numel()].view_as(gate))
    x = torch.randn(2, 70, D_MODEL, generator=torch.Generator().manual_seed(1))
    exact = results(copy.deepcopy(mixer).double(), x.double())
    for what, actual in results(mixer, x).items():
        assert actual.isfinite().all(), what
        assert (actual - exact[what]).abs().max() <= 1e-4 * exact[what].abs().max() + 1e-10, what
