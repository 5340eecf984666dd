"""What a part's outputs ask of the state before it, against the op's own gradient of its first state."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ssmkernels import delta_rule, native
from ssmkernels.ops.delta_rule.asked import Rule, asked

BORDERS = torch.tensor([0, 70, 70, 71, 200], dtype=torch.int32)  # longer than a tile, empty, of one token


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("decay", [None, "head", "channels", "whole"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 2e-5)])
def test_it_is_the_gradient_of_the_first_state(plain, decay, dtype, tolerance, monkeypatch):
    if plain:
        monkeypatch.setattr("ssmkernels.ops.delta_rule.asked.readable", lambda _: False)
    elif native.missing() is not None:
        pytest.skip(f"needs the native library: {native.missing()}")
    torch.manual_seed(0)
    length, groups, heads, keys, values = 200, 2, 4, 9, 21
    q, k = (F.normalize(torch.randn(1, length, groups, keys), dim=-1).to(dtype) for _ in range(2))
    v, grad = (torch.randn(1, length, heads, values).to(dtype) for _ in range(2))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    beta = 2 * torch.rand(1, length, heads, dtype=wide)
    log_decay = None if decay is None else -torch.rand(1, length, heads, *[keys] * (decay == "channels"), dtype=wide)
    if decay == "whole" and log_decay is not None:
        log_decay[:, ::40] = -torch.inf
    state = torch.zeros(4, heads, keys, values, dtype=torch.float64, requires_grad=True)
    given = [None if t is None else t.double() for t in (q, k, v, beta, log_decay)]
    y = delta_rule(*given, initial_state=state, cu_seqlens=BORDERS, implementation="reference")
    (expected,) = torch.autograd.grad(y, state, grad.double())
    found = asked(Rule(q, k, grad, beta, log_decay, None, BORDERS))
    assert found.dtype == wide
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance * float(expected.abs().max()))
