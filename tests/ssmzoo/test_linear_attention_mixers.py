"""The mixers of linear attention against their papers' formulas over all pairs of tokens, and against transformers'."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from linear_attention_parallel import parallel
from moved import moved_mixer

import ssmzoo
from ssmzoo.config import load_config
from ssmzoo.footprint import footprint

D_MODEL, LENGTH = 24, 19


def build(name, **options):
    return moved_mixer(name, D_MODEL, **options)


@pytest.fixture
def x():
    return torch.randn(2, LENGTH, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def heads(t, h):
    return t.unflatten(-1, (h, -1))


def rms(t, weight, eps=1e-5):
    return t / (t.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def linear(x, mixer, name):
    return x @ mixer.get_parameter(f"{name}.weight").mT


def same(mixer, x, expected):
    torch.testing.assert_close(mixer(x), expected, atol=1e-10, rtol=1e-10)


def retention(x, m, h):
    """arXiv 2307.08621, equations 5 to 8: rotations as complex numbers, γ^(i - j) below the diagonal."""
    q, k, v = (heads(linear(x, m, f"{n}_proj"), h) for n in "qkv")
    d = q.shape[-1]
    theta = 10000.0 ** (-torch.arange(d // 2, dtype=torch.float64) * 2 / d)
    turn = torch.polar(torch.ones(LENGTH, d // 2, dtype=torch.float64), torch.arange(LENGTH)[:, None] * theta)[:, None]
    q, k = (torch.complex(t[..., : d // 2], t[..., d // 2 :]) * turn for t in (q, k))
    scores = torch.einsum("bihc,bjhc->bhij", q, k.conj()).real / math.sqrt(d)
    gamma = 1 - 2.0 ** (-5 - torch.arange(h, dtype=torch.float64))
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    D = torch.where(distance >= 0, gamma[:, None, None] ** distance, 0.0)
    return torch.einsum("bhij,bjhv->bihv", D * scores, v)


def test_retnet(x):
    m, h = build("retnet", n_heads=3, expand_k=0.5), 3
    o = rms(retention(x, m, h), m.g_norm_swish_gate.weight).flatten(2)
    same(m, x, linear(o * F.silu(linear(x, m, "g_proj")), m, "o_proj"))


def test_gla(x):
    m, h = build("gla", n_heads=3, gate_low_rank_dim=5), 3
    q, k, v = (heads(linear(x, m, f"{n}_proj"), h) for n in "qkv")
    logits = x @ m.gk_proj[0].weight.mT @ m.gk_proj[1].weight.mT + m.gk_proj[1].bias
    o, _ = parallel(q, k, v, torch.log(torch.sigmoid(heads(logits, h)) ** (1 / 16)))
    o = rms(o, m.g_norm_swish_gate.weight).flatten(2)
    same(m, x, linear(o * F.silu(linear(x, m, "g_proj")), m, "o_proj"))


def test_gla_with_fewer_heads_of_keys_and_values(x):
    m, h = build("gla", n_heads=4, n_kv_heads=2, feature_map="relu", use_output_gate=False, clamp_min=-0.05), 4
    q, k, v = (heads(linear(x, m, f"{n}_proj"), g) for n, g in (("q", h), ("k", 2), ("v", 2)))
    log = F.logsigmoid(heads(m.gk_proj(x), 2)) / 16
    assert (log < -0.05).any()
    k, v, log = (t.repeat_interleave(2, dim=2) for t in (k.relu(), v, log.clamp(min=-0.05)))
    same(m, x, linear(rms(parallel(q.relu(), k, v, log)[0], m.g_norm.weight).flatten(2), m, "o_proj"))


def test_based(x):
    """Attention whose weights are 1 + s + s²/2 in the place of exp(s)."""
    m, h = build("based", n_heads=4, n_kv_heads=2, feature_dim=3), 4
    q = heads(linear(x, m, "q_proj"), h)
    k, v = (heads(linear(x, m, f"{n}_proj"), 2).repeat_interleave(2, dim=2) for n in "kv")
    s = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(3)
    weights = (1 + s + s.square() / 2).tril()
    o = torch.einsum("bhij,bjhp->bihp", weights / weights.sum(-1, keepdim=True), v)
    same(m, x, linear(o.flatten(2), m, "o_proj"))


def test_hgrn2(x):
    m, h = build("hgrn2", expand_ratio=4), 6
    f = torch.sigmoid(heads(linear(x, m, "f_proj"), h))
    q, i = F.silu(heads(linear(x, m, "q_proj"), h)), heads(linear(x, m, "i_proj"), h)
    o, _ = parallel(q, 1 - f, i, torch.log(f))
    same(m, x, linear(rms(o.flatten(2), m.g_norm.weight), m, "o_proj"))


def test_hgrn2_has_bounds_that_rise_with_depth(x):
    model = ssmzoo.build(
        {
            "d_model": D_MODEL,
            "n_layers": 3,
            "pattern": ["hgrn2"],
            "mixers": {"hgrn2": {"expand_ratio": 4}},
            "d_input": 2,
        }
    ).double()
    m = model.blocks[2].mixer
    with torch.no_grad():
        m.lower_bounds.weight.normal_()
    bound = torch.softmax(m.lower_bounds.weight, dim=0)[1:].sum(0)
    f = bound + (1 - bound) * torch.sigmoid(linear(x, m, "f_proj"))
    torch.testing.assert_close(m.log_forget_gate(linear(x, m, "f_proj")), torch.log(f))
    o, _ = parallel(
        *(heads(t, 6) for t in (F.silu(linear(x, m, "q_proj")), 1 - f, linear(x, m, "i_proj"), torch.log(f)))
    )
    same(m, x, linear(rms(o.flatten(2), m.g_norm.weight), m, "o_proj"))


def test_rwkv6(x):
    """arXiv 2404.05892, equations 11 to 19."""
    m, h = build("rwkv6", n_heads=3, expand_k=1.0, proj_low_rank_dim=2, gate_low_rank_dim=5), 3
    delta = F.pad(x, (0, 0, 1, -1)) - x
    low = torch.tanh((x + m.x_proj[0].mu * delta) @ m.x_proj[0].linear.weight.mT)
    shifted = {}
    for i, name in enumerate("rwkvg"):
        part = slice(2 * i, 2 * i + 2)
        shifted[name] = x + delta * (m.x_bias[i] + low[..., part] @ m.x_proj[2].weight[:, part].mT)
    r, k, v = (heads(linear(shifted[n], m, f"{n}_proj.linear"), h) for n in "rkv")
    lora = m.w_proj.linear.lora
    w = torch.tanh(shifted["w"] @ lora[0].weight.mT) @ lora[2].weight.mT + lora[2].bias
    o, _ = parallel(r, k, v, heads(-torch.exp(w), h), bonus=m.bonus, scale=1.0)
    o = F.group_norm(o.flatten(0, 1).flatten(1), h, m.g_norm.weight, m.g_norm.bias, eps=1e-5).view_as(x)
    same(m, x, linear(o * F.silu(linear(shifted["g"], m, "g_proj.linear")), m, "o_proj"))


def test_rwkv6_starts_by_its_depth():
    config = {"d_model": 16, "n_layers": 3, "pattern": ["rwkv6"], "mixers": {"rwkv6": {"n_heads": 2}}, "d_input": 2}
    first, _, last = (block.mixer for block in ssmzoo.build(config).blocks)
    decays = [m.w_proj.linear.lora[2].bias for m in (first, last)]
    for decay in decays:
        torch.testing.assert_close(decay[[0, -1]], torch.tensor([-6.0, -1.0]))
        assert decay.dtype == torch.float32
    assert (decays[1][1:-1] < decays[0][1:-1]).all()  # deeper layers remember for longer
    assert (first.x_bias > last.x_bias)[:, 1:].all()  # and look back less
    assert isinstance(first.x_proj[2], ssmzoo.linear.Linear)


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_lightning_against_transformers(layer, x):
    minimax = pytest.importorskip("transformers.models.minimax.modeling_minimax", reason="needs transformers")
    config = minimax.MiniMaxConfig(
        hidden_size=D_MODEL, num_attention_heads=3, head_dim=6, num_hidden_layers=4, block_size=8
    )
    theirs = minimax.MiniMaxLightningAttention(config, layer).double()
    ours = build("lightning", n_heads=3, head_dim=6)
    ours.at_layer(layer, 4)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    torch.testing.assert_close(ours(x), theirs(x, None, None)[0], rtol=1e-6, atol=1e-6)  # theirs has float32 slopes


def test_lightning_learns_its_layer_from_the_model():
    mixers = {"lightning": {"head_dim": 8}, "both": {"kind": "parallel", "branches": {"lightning": {"head_dim": 8}}}}
    config = {"d_model": 16, "n_layers": 4, "pattern": ["lightning", "both"], "mixers": mixers, "d_input": 2}
    model = ssmzoo.build(config)
    slow = [m.slowness for b in model.blocks for m in b.mixer.modules() if hasattr(m, "slowness")]
    assert slow == pytest.approx([1, 2 / 3, 1 / 3, 0], abs=1e-4)
    ssmzoo.swap_mixers(model, {"layers.2": {"kind": "lightning", "head_dim": 4}})
    assert model.blocks[2].mixer.slowness == pytest.approx(1 / 3, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("retnet", {"n_heads": 5}, "`expand_k` · d_model must be whole channels"),
        ("retnet", {"n_heads": 8, "expand_k": 1.0, "n_kv_heads": 3}, "`n_kv_heads` must divide the 8 heads"),
        ("retnet", {"n_heads": 8, "expand_k": 1.0}, "an even number of channels"),
        ("gla", {"clamp_min": 0.1}, "`clamp_min` must be at most 0"),
        ("gla", {"expand_v": 0.3}, "`expand_v` · d_model must be whole channels"),
        ("based", {"n_heads": 5}, "`n_heads` must divide d_model"),
        ("hgrn2", {"expand_ratio": 7}, "`expand_ratio` must divide d_model"),
        ("hgrn2", {"expand_ratio": 7, "n_heads": 5}, "`n_heads` must divide d_model=24"),
        ("rwkv6", {"n_heads": 7}, "`expand_k` · d_model must be whole channels"),
        ("lightning", {"head_dim": 7}, "`head_dim` must divide d_model"),
    ],
)
def test_refusals(name, options, words):
    with pytest.raises(ValueError, match=r"^\w+: ") as error:
        ssmzoo.build_mixer(name, D_MODEL, **options)
    assert words in str(error.value)


def test_the_state_says_what_it_needs(x):
    """RetNet alone counts tokens, and convolutions alone are remembered."""
    for name, counts in (("gla", False), ("retnet", True)):
        state = build(name, n_heads=3, expand_k=0.5).initial_state(2)
        assert (state.lengths is not None, len(state.convs)) == (counts, 0)
    mixer = build("gla", n_heads=4, use_short_conv=True)
    _, state = mixer(x, mixer.initial_state(2))
    assert [conv.shape[1:] for conv in state.convs] == [(3, 12), (3, 12), (3, 24)]


def test_sizes_of_published_models():
    """From the matrices and vectors of the published code of RWKV-6, and of the papers of GLA and RetNet."""
    d, l, v = 2048, 24, 65536
    inner, shifts, decay = 3.5 * d, 5 * 32, 64
    layer = 5 * d**2 + 2 * d * shifts + 2 * d * decay + 2 * d * inner + d**2  # time mixing, then channel mixing
    vectors = (1 + 5 + 1 + 1 + 2 + 4 + 2) * d  # shifts, decay, bonus, group norm, two layer norms, two more shifts
    assert total("rwkv6-1.6b") == l * (layer + vectors) + 2 * v * d + 4 * d
    gla = 2 * d * d // 2 + 3 * d**2 + 16 * d + 17 * d // 2 + 512 + 3 * d * 5632 + 2 * d
    assert total("gla-1.3b") == l * gla + 2 * 32000 * d + d
    retnet = 2 * d**2 + 3 * 2 * d**2 + 512 + 3 * d * 2816 + 2 * d
    assert total("retnet-1.3b") == l * retnet + 2 * 32000 * d + d


def total(name):
    return footprint(load_config(name)).parameters
