"""flash-linear-attention's further functions and its modules, beside their formulas."""

import pytest
import torch
import torch.nn.functional as F

from ssmkernels.compat.fla import modules, ops
from ssmkernels.compat.fla.modules.convolution import causal_conv1d, causal_conv1d_update
from ssmkernels.compat.fla.modules.fused_norm_gate import layer_norm_gated, rms_norm_gated
from ssmkernels.compat.fla.modules.l2norm import l2_norm
from ssmkernels.compat.fla.modules.layernorm import layer_norm, rms_norm
from ssmkernels.compat.fla.ops.hgrn import chunk_hgrn
from ssmkernels.compat.fla.ops.rwkv7 import fused_mul_recurrent_rwkv7

pytestmark = pytest.mark.op("linear_attention", "generalized_delta_rule")


def drawn(*shapes):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def same(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def generalized(q, k, v, a, b, w, S, scale):
    """S_t = diag(exp(w_t)) S_{t-1} + b_t (a_tᵀ S_{t-1}) + k_t v_tᵀ, for each head (k v)."""
    os = []
    for t in range(q.shape[1]):
        read = torch.einsum("bhk,bhkv->bhv", a[:, t], S)
        S = (
            w[:, t].exp()[..., None] * S
            + b[:, t, :, :, None] * read[..., None, :]
            + k[:, t, ..., None] * v[:, t, :, None]
        )
        os.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    return torch.stack(os, 1), S


def test_generalized_delta_rules():
    q, k, a, b, w, v, S = drawn(*[(2, 7, 3, 4)] * 5, (2, 7, 3, 5), (2, 3, 4, 5))
    a, w = 0.3 * a, -w.abs()
    none = torch.zeros_like(w)
    half = generalized(q, k, v, a, b, w, S, 0.5)  # 4^-½
    whole = generalized(q, k, v, a, b, w, S, 1.0)
    state = {"initial_state": S, "output_final_state": True}
    same(ops.chunk_rwkv7(q, w, k, v, a, b, **state), whole)
    same(ops.fused_recurrent_rwkv7(q, w, k, v, a, b, initial_state=S), half)
    same(ops.chunk_dplr_delta_rule(q, k, v, a, b, w, **state), half)
    same(ops.fused_recurrent_dplr_delta_rule(q, k, v, a, b, w, 1.0, **state), whole)
    same(ops.chunk_iplr_delta_rule(q, k, v, a, b, **state), generalized(q, k, v, a, b, none, S, 0.5))
    same(
        fused_mul_recurrent_rwkv7(q, w, k, v, a, 0.1 * b, **state),
        generalized(q, k, v, -a, a * 0.1 * b, w, S, 1.0),
    )
    o, last = ops.chunk_rwkv7(q[:1], w[:1], k[:1], v[:1], a[:1], b[:1], cu_seqlens=torch.tensor([0, 3, 7]))
    assert last is None
    cut = [generalized(*(t[:1, s] for t in (q, k, v, a, b, w)), 0 * S[:1], 1.0)[0] for s in (slice(3), slice(3, 7))]
    torch.testing.assert_close(o, torch.cat(cut, 1))


def test_rwkv6_lightning_and_hgrn():
    r, k, w, v, u, S = drawn(*[(2, 7, 3, 4)] * 3, (2, 7, 3, 5), (3, 4), (2, 3, 4, 5))
    w = -w.abs()
    outs, state = [], S
    for t in range(7):
        new = k[:, t, ..., None] * v[:, t, :, None]
        outs.append(0.5 * torch.einsum("bhk,bhkv->bhv", r[:, t], state + u[..., None] * new))
        state = w[:, t].exp()[..., None] * state + new
    for function in (ops.chunk_rwkv6, ops.fused_recurrent_rwkv6):
        same(function(r, k, v, w, u, initial_state=S, output_final_state=True), (torch.stack(outs, 1), state))
    decay = -8 / 3 * (1 - 1 / 4) * torch.arange(3).double()
    expected = ops.chunk_simple_gla(r, k, v, g_gamma=decay, output_final_state=True)
    same(ops.chunk_lightning_attn(r, k, v, 1, 4, output_final_state=True), expected)
    assert torch.equal(
        ops.parallel_simple_gla(r, k, v, w[..., 0])[0], ops.fused_chunk_simple_gla(r, k, v, w[..., 0])[0]
    )
    assert torch.equal(ops.parallel_retention(r, k, v)[0], ops.chunk_retention(r, k, v)[0])
    x, g, h = drawn((2, 7, 3), (2, 7, 3), (2, 3))
    g, hs, state = -g.abs(), [], h
    for t in range(7):
        state = g[:, t].exp() * state + x[:, t]
        hs.append(state)
    for function in (ops.fused_recurrent_hgrn, chunk_hgrn):
        same(function(x, g, h, True), (torch.stack(hs, 1), state))


def test_attention():
    q, k, v, sink = drawn((1, 7, 4, 8), (1, 7, 2, 8), (1, 7, 2, 8), 4)
    heads = [t.transpose(1, 2) for t in (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2))]
    expected = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(ops.parallel_attn(q, k, v), expected)
    distance = torch.arange(7) - torch.arange(7)[:, None]
    near = F.scaled_dot_product_attention(*heads, attn_mask=(distance <= 0) & (distance > -3)).transpose(1, 2)
    torch.testing.assert_close(ops.parallel_attn(q, k, v, window_size=3), near)
    s = (heads[0] @ heads[1].mT * 8**-0.5).masked_fill(distance > 0, -torch.inf)
    weights = torch.cat([s, sink[:, None, None].expand(1, 4, 7, 1)], -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(ops.parallel_attn(q, k, v, sink_bias=sink), (weights @ heads[2]).transpose(1, 2))


def decaying(q, k, v, g, scale=None, window=None, sink=None):
    """Attention of one sequence, (b l h d), whose logits have the decays after a key added, one by one."""
    l, shared = q.shape[1], q.shape[2] // k.shape[2]
    heads = [t.transpose(1, 2) for t in (q, k.repeat_interleave(shared, 2), v.repeat_interleave(shared, 2))]
    s = heads[0] @ heads[1].mT * (q.shape[3] ** -0.5 if scale is None else scale)
    added = [[g[:, min(j, i) + 1 : i + 1].sum(1) for j in range(l)] for i in range(l)]
    s = s + torch.stack([torch.stack(row, -1) for row in added], 2)
    distance = torch.arange(l)[:, None] - torch.arange(l)
    s = s.masked_fill((distance < 0) | (distance >= (window or l)), -torch.inf)
    if sink is not None:
        s = torch.cat([s, sink[:, None, None].expand(len(q), -1, l, 1)], -1)
    return (s.softmax(-1)[..., :l] @ heads[2]).transpose(1, 2)


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"scale": 0.0}, {"window": 3}, {"sink": True}], ids=str)
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (4, 1)], ids=str)
def test_attention_that_forgets(heads, options):
    h, shared = heads
    q, k, v, g, sink = drawn((2, 7, h, 8), (2, 7, shared, 8), (2, 7, shared, 5), (2, 7, h), h)
    q, k, v, g, sink = leaves = [t.requires_grad_() for t in (q, k, v, -g.detach().abs(), sink)]
    named = {"sink": sink} if "sink" in options else options
    others = {{"window": "window_size", "sink": "sink_bias"}.get(name, name): t for name, t in named.items()}
    expected, found = decaying(q, k, v, g, **named), ops.parallel_attn(q, k, v, g, **others)
    torch.testing.assert_close(found, expected)
    wanted = leaves if "sink" in options else leaves[:4]
    weight = torch.randn_like(expected)
    same(torch.autograd.grad(found, wanted, weight), torch.autograd.grad(expected, wanted, weight))
    if "sink" not in options:
        assert torch.equal(ops.parallel_forgetting_attn(q, k, v, g, **others), found)


def test_packed_attention_that_forgets():
    """Each sequence as alone; decays that come to thousands by its start do not blur it."""
    q, k, v, g = drawn((1, 9, 4, 8), (1, 9, 2, 8), (1, 9, 2, 5), (1, 9, 4))
    g = torch.cat([-3e6 * g[:, :4].abs(), -g[:, 4:].abs()], 1)
    q, k, v, g = (t.float() for t in (q, k, v, g))
    found = ops.parallel_forgetting_attn(q, k, v, g, cu_seqlens=torch.tensor([0, 4, 9]))
    alone = [ops.parallel_forgetting_attn(*(t[:, s] for t in (q, k, v, g))) for s in (slice(0, 4), slice(4, 9))]
    torch.testing.assert_close(found, torch.cat(alone, 1))
    narrow = ops.parallel_forgetting_attn(q.half(), k.half(), v.half(), g.clamp(-9))
    wide = ops.parallel_forgetting_attn(q.half().float(), k.half().float(), v.half().float(), g.clamp(-9))
    assert torch.equal(narrow, wide.half())
    nothing = ops.parallel_forgetting_attn(q, k, v, g, window_size=0)
    assert torch.equal(nothing, torch.zeros(1, 9, 4, 5))


def test_wrong_decays():
    q, k, v, g = drawn((1, 7, 4, 8), (1, 7, 3, 8), (1, 7, 3, 8), (1, 7, 4))
    with pytest.raises(ValueError, match="parallel_attn: `g` must have shape .b l h. with b=1, l=7, h=4; got .4"):
        ops.parallel_attn(q, k, v, g=g[0, 0])
    with pytest.raises(ValueError, match="parallel_attn: `q` must have a multiple of `k`'s 3 heads; got 4"):
        ops.parallel_attn(q, k, v, g)
    with pytest.raises(TypeError, match="parallel_forgetting_attn: `scale` must be a number.*; got str"):
        ops.parallel_forgetting_attn(q, k[:, :, :2], v[:, :, :2], g, "1")
    with pytest.raises(TypeError, match="parallel_forgetting_attn: `g` must be .*; got "):
        ops.parallel_forgetting_attn(q, k[:, :, :2], v[:, :, :2], None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sunk", [False, True])
def test_a_window_of_nothing_gives_zeros(sunk, dtype):
    *given, sink = (t.requires_grad_() for t in drawn((1, 7, 4, 8), (1, 7, 2, 8), (1, 7, 2, 5), 4))
    y = ops.parallel_attn(*(t.to(dtype) for t in given), window_size=0, sink_bias=sink if sunk else None)
    assert torch.equal(y, torch.zeros(1, 7, 4, 5, dtype=dtype))
    wanted = [*given, sink] if sunk else given
    assert not any(g.any() for g in torch.autograd.grad(y.sum(), wanted))
    with pytest.raises(
        ValueError, match="parallel_attn: `window_size` must be 0 or more, or None for all keys; got -1"
    ):
        ops.parallel_attn(*given, window_size=-1)


@pytest.mark.parametrize("activation", [None, "swish"])
def test_convolutions(activation):
    x, weight, bias, residual, cache = drawn((2, 5, 3), (3, 4), 3, (2, 5, 3), (2, 3, 4))
    before = torch.cat([cache, x.mT], -1)  # (b d w+l)
    y = F.conv1d(before[..., 1:], weight[:, None], bias, groups=3).mT
    y = F.silu(y) if activation else y
    found = causal_conv1d(x, weight, bias, residual, cache, True, activation)
    same(found, (y + residual, before[..., -4:]))
    layer = modules.ShortConvolution(3, 4, bias=True, activation=activation, dtype=torch.float64)
    layer.load_state_dict({"weight": weight[:, None], "bias": bias})
    assert layer.state_size == 12
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    masked = causal_conv1d(x * mask[..., None], weight, bias, activation=activation)[0]
    torch.testing.assert_close(layer(x, mask=mask)[0], masked)
    held = cache.clone()
    parts = [layer(x[:, :2], cache=held, output_final_state=True)]  # whole pieces leave their cache as it is
    assert torch.equal(held, cache)
    held = parts[0][1]
    for t in range(2, 5):
        one, after = layer(x[:, t : t + 1], residual[:, t : t + 1], cache=held, output_final_state=True)
        assert after is held  # single tokens write into it
        parts.append((one - residual[:, t : t + 1], after))
    torch.testing.assert_close(torch.cat([part for part, _ in parts], 1), y)
    torch.testing.assert_close(held, before[..., -4:])
    packed, borders = torch.cat([x[0, :2], x[1]])[None], torch.tensor([0, 2, 7])
    out, last = layer(packed, cache=cache, output_final_state=True, cu_seqlens=borders)
    torch.testing.assert_close(out, torch.cat([y[0, :2], y[1]])[None])
    torch.testing.assert_close(last, torch.stack([before[0, :, 2:6], before[1, :, -4:]]))
    token, after = layer(packed[:, :2], cu_seqlens=torch.tensor([0, 1, 2]), output_final_state=True)
    torch.testing.assert_close(
        token[0], causal_conv1d(packed[0, :2, None], weight, bias, activation=activation)[0][:, 0]
    )
    assert torch.equal(after[..., -1], packed[0, :2])


def test_norms():
    x, g, residual, weight, bias = drawn((2, 3, 8), (2, 3, 8), (2, 3, 8), 8, 8)
    total = x + residual
    centred = total - total.mean(-1, keepdim=True)
    rms = total / (total.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    layer = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight + bias
    same(rms_norm(x, weight, bias, residual, 1e-3, prenorm=True), (rms * weight + bias, total))
    torch.testing.assert_close(rms_norm(total, weight, None, eps=1e-3), rms * weight)
    torch.testing.assert_close(layer_norm(x, weight, bias, residual, 1e-3), layer)
    torch.testing.assert_close(rms_norm(total, None, None, eps=1e-3), rms)
    for activation, gate in (("swish", F.silu(g)), ("sigmoid", torch.sigmoid(g))):
        torch.testing.assert_close(rms_norm_gated(total, g, weight, None, activation, eps=1e-3), rms * weight * gate)
        torch.testing.assert_close(layer_norm_gated(x, g, weight, bias, activation, residual, eps=1e-3), layer * gate)
        module = modules.FusedRMSNormGated(8, eps=1e-3, activation=activation, dtype=torch.float64)
        torch.testing.assert_close(module(x, g, residual), rms * gate)
    torch.testing.assert_close(modules.FusedRMSNormSwishGate(8, eps=1e-3).double()(total, g), rms * F.silu(g))
    half = modules.RMSNorm(8, eps=1e-3, dtype=torch.bfloat16)
    y, kept = half(x.bfloat16(), prenorm=True, residual_in_fp32=True)
    assert (y.dtype, kept.dtype) == (torch.bfloat16, torch.float32)
    made = modules.LayerNorm(8, bias=True, dtype=torch.float64)
    assert list(made.state_dict()) == ["weight", "bias"]
    torch.testing.assert_close(made(x), F.layer_norm(x, (8,)))
    assert not modules.FusedLayerNormGated(8, elementwise_affine=False).state_dict()
    torch.testing.assert_close(modules.L2Norm()(x), x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt())
    assert l2_norm(x, output_dtype=torch.float32).dtype == torch.float32


def test_refusals():
    x, weight = torch.randn(2, 5, 3), torch.randn(3, 4)
    with pytest.raises(ValueError, match="causal_conv1d: `activation` must be None, 'silu' or 'swish'; got 'relu'"):
        causal_conv1d(x, weight, activation="relu")
    with pytest.raises(ValueError, match=r"`x` must be one token for each of 3 caches; got \(1, 2, 3\)"):
        causal_conv1d_update(x[:1, :2], torch.zeros(3, 3, 4), weight=weight)
    with pytest.raises(ValueError, match="ShortConvolution: `mask` must be None where `cu_seqlens` is given"):
        modules.ShortConvolution(3, 4)(x[:1], mask=torch.ones(1, 5), cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="ShortConvolution: `activation` must be None, 'silu' or 'swish'"):
        modules.ShortConvolution(3, 4, activation="gelu")
    with pytest.raises(
        ValueError, match="rms_norm_gated: `activation` must be one of silu, swish, sigmoid; got 'relu'"
    ):
        rms_norm_gated(x, x, None, None, "relu")
    q = torch.randn(1, 5, 2, 4)
    with pytest.raises(ValueError, match=r"chunk_rwkv7: `w` must have shape \(b l h k\)"):
        ops.chunk_rwkv7(q, q[..., :2], q, q, q, q)
    with pytest.raises(ValueError, match="`reverse`: sequences from their end are not supported"):
        ops.fused_recurrent_rwkv6(q, q, q, q, q[0, 0], reverse=True)
    with pytest.raises(ValueError, match="`output_attentions`: weights of attention are not supported"):
        ops.parallel_retention(q, q, q, output_attentions=True)
    with pytest.raises(ValueError, match="chunk_lightning_attn: `layer_idx` must be from 0 to 3; got 4"):
        ops.chunk_lightning_attn(q, q, q, 4, 4)
