"""flash-linear-attention's functions, beside the recurrences written in their terms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ssmkernels.compat import fla

pytestmark = pytest.mark.op("delta_rule", "linear_attention")


def recurrence(q, k, v, decay, beta=None, state=None, scale=None):
    """decay (b l h k), in float64: outputs (b l h v) and the state (b h k v)."""
    q, k, v, decay = (t.double() for t in (q, k, v, decay))
    heads = v.shape[2] // q.shape[2]
    q, k = (t.repeat_interleave(heads, dim=2) for t in (q, k))
    S = v.new_zeros(len(v), v.shape[2], k.shape[3], v.shape[3]) if state is None else state.double()
    os = []
    for t in range(v.shape[1]):
        S = decay[:, t].exp()[..., None] * S
        new = v[:, t]
        if beta is not None:
            new = beta[:, t, :, None].double() * (new - torch.einsum("bhk,bhkv->bhv", k[:, t], S))
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], new)
        os.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S) * (q.shape[3] ** -0.5 if scale is None else scale))
    return torch.stack(os, dim=1), S


def made():
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 21, 2, 5)
    v, beta = torch.randn(2, 21, 4, 3), torch.rand(2, 21, 4)
    return q, F.normalize(k, dim=-1), v, beta


def agree(found, expected, state_v_first=False):
    (o, S), (other, T) = found, expected
    torch.testing.assert_close(o.double(), other, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((S.mT if state_v_first else S).double(), T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["chunk", "fused_recurrent"])
@pytest.mark.parametrize("rule", ["delta_rule", "gated_delta_rule", "kda"])
def test_delta_rules(rule, how):
    q, k, v, beta = made()
    decay = {"delta_rule": torch.zeros(2, 21, 4, 1), "kda": -torch.rand(2, 21, 4, 5)}.get(
        rule, -torch.rand(2, 21, 4, 1)
    )
    state = torch.randn(2, 4, 5, 3)
    expected = recurrence(q, k, v, decay.expand(2, 21, 4, 5), beta, state)
    options = {"beta": beta, "initial_state": state, "output_final_state": True}
    if rule != "delta_rule":
        options["g"] = decay[..., 0] if rule == "gated_delta_rule" else decay
    function = getattr(fla, f"{how}_{rule}")
    agree(function(q, k, v, **options), expected)
    assert function(q, k, v, **options | {"output_final_state": False})[1] is None
    normed = q.double() / q.double().square().sum(-1, keepdim=True).add(1e-6).sqrt()
    long = recurrence(normed, k, v, decay.expand(2, 21, 4, 5), beta, state)
    torch.testing.assert_close(
        function(q, 3 * k, v, use_qk_l2norm_in_kernel=True, **options)[0].double(), long[0], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_gates_within(lower_bound):
    q, k, v, beta = made()
    g, A_log, dt_bias = torch.randn(2, 21, 4, 5), torch.randn(1, 1, 4, 1), torch.randn(20)
    x, rate = g + dt_bias.view(4, 5), A_log.exp()
    decay = -rate * F.softplus(x) if lower_bound is None else lower_bound * torch.sigmoid(rate * x)
    state = torch.randn(2, 4, 3, 5)
    expected = recurrence(q, k, v, decay, 2 * torch.sigmoid(beta), state.mT)
    options = {"use_gate_in_kernel": True, "A_log": A_log, "dt_bias": dt_bias, "lower_bound": lower_bound}
    options |= {"use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": True, "state_v_first": True}
    for function in (fla.chunk_kda, fla.fused_recurrent_kda):
        found = function(q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True, **options)
        agree(found, expected, state_v_first=True)


def test_linear_attention():
    q, k, v, _ = made()
    g, gk, gamma = -torch.rand(2, 21, 4), -torch.rand(2, 21, 4, 5), -torch.rand(4)
    state = torch.randn(2, 4, 5, 3)
    options = {"initial_state": state, "output_final_state": True, "scale": 0.3}
    wide = (2, 21, 4, 5)
    for function, given, decay in (
        (fla.chunk_gla, {"g": gk}, gk),
        (fla.fused_chunk_gla, {"g": gk}, gk),
        (fla.fused_recurrent_gla, {"gk": gk}, gk),
        (fla.chunk_simple_gla, {"g": g, "g_gamma": gamma}, (g + gamma)[..., None].expand(wide)),
        (fla.fused_recurrent_simple_gla, {"g_gamma": gamma}, gamma[:, None].expand(wide)),
        (fla.chunk_retention, {}, torch.log(1 - 2.0 ** -(5 + torch.arange(4.0)))[:, None].expand(wide)),
        (fla.chunk_linear_attn, {"normalize": False}, torch.zeros(wide)),
    ):
        agree(function(q, k, v, **given, **options), recurrence(q, k, v, decay, None, state, 0.3))


def test_normalized_linear_attention_in_pieces():
    q, k, v, _ = made()
    q, k = q.abs(), k.abs()
    weights = torch.einsum("blgk,bmgk->bglm", q, k).tril().double().repeat_interleave(2, dim=1)
    expected = torch.einsum("bhlm,bmhv->blhv", weights / weights.sum(-1, keepdim=True), v.double())
    state, parts = None, []
    for part in (slice(0, 8), slice(8, 21)):
        o, state = fla.chunk_linear_attn(
            q[:, part], k[:, part], v[:, part], initial_state=state, output_final_state=True
        )
        parts.append(o)
    torch.testing.assert_close(torch.cat(parts, dim=1).double(), expected, rtol=1e-4, atol=1e-5)
    assert state[1].shape == (2, 1, 2, 5)


def test_packed_sequences_and_gradients():
    q, k, v, beta = (t[:1].clone().requires_grad_() for t in made())
    g = (-torch.rand(1, 21, 4)).requires_grad_()
    borders = torch.tensor([0, 5, 21])  # int64, as there
    o, S = fla.chunk_gated_delta_rule(q, k, v, g, beta, output_final_state=True, cu_seqlens=borders)
    parts = [
        recurrence(*(t[:, a:b] for t in (q, k, v)), g[:, a:b, :, None].expand(-1, -1, -1, 5), beta[:, a:b])
        for a, b in ((0, 5), (5, 21))
    ]
    expected = torch.cat([part for part, _ in parts], dim=1), torch.cat([state for _, state in parts])
    agree((o, S), expected)
    inputs = (q, k, v, g, beta)
    found = torch.autograd.grad(o.sum() + S.square().sum(), inputs)
    for a, b in zip(found, torch.autograd.grad(expected[0].sum() + expected[1].square().sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cp_context": object()}, "`cp_context`: sequences that are cut over processes are not supported"),
        ({"g": torch.zeros(2, 21, 3)}, r"chunk_gated_delta_rule: `g`"),
        ({"use_gate_in_kernel": True}, "`use_gate_in_kernel` needs `A_log`, or `lower_bound` without it; got neither"),
        ({"use_gate_in_kernel": True, "A_log": torch.zeros(3)}, r"`A_log` must have 4 numbers; got shape \(3,\)"),
        ({"output_final_state": 1}, "`output_final_state`"),
        ({"cu_seqlens": torch.tensor([0.0, 21.0])}, "`cu_seqlens`"),
        ({"cu_seqlens": torch.tensor([0, 2**32 + 21])}, "`cu_seqlens`"),
        ({"initial_state": torch.zeros(2, 4, 3, 5)}, "`initial_state`"),
        *(
            ({name: torch.zeros(shape, dtype=torch.int64)}, f"`{name}` must be float32 or .*; got int64")
            for name, shape in {
                "q": (2, 21, 2, 5),
                "beta": (2, 21, 4),
                "initial_state": (2, 4, 5, 3),
                "A_log": 4,
            }.items()
        ),
    ],
)
def test_refusals(change, message):
    q, k, v, beta = made()
    with pytest.raises((ValueError, TypeError), match=message):
        fla.chunk_gated_delta_rule(**{"q": q, "k": k, "v": v, "g": torch.zeros(2, 21, 4), "beta": beta} | change)
    with pytest.raises(ValueError, match="`gv`: decays of values are not supported"):
        fla.fused_recurrent_gla(q, k, v, gv=torch.zeros(1))
