"""The attention mixer's options beside heads, windows and rotary angles: each against its definition."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import yaml
from attention_layers import D_MODEL, check_same_calls, inputs, make_mixer

import ssmzoo
from ssmzoo.cache.calls import FEW
from ssmzoo.cache.hidden import HiddenCache
from ssmzoo.mixers._alibi import alibi_slopes
from ssmzoo.mixers._rope import rotary_angles, rotate
from ssmzoo.mixers.attention import Attention


def make(**options):
    return make_mixer("attention", **{"head_dim": 8, **options})


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def heads(x, head_dim=8):
    """(b l h·k) → (b h l k)"""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


class TestAlibi:
    def test_slopes_of_the_paper(self):
        """Section 3: of 8 heads 1/2, 1/4, … 1/256; of 16 the geometric means between them too."""
        same(alibi_slopes(8, inputs()), 0.5 ** torch.arange(1, 9, dtype=torch.float64))
        same(alibi_slopes(16, inputs()), 0.5 ** (torch.arange(1, 17, dtype=torch.float64) / 2))

    @pytest.mark.parametrize("n_heads", [1, 2, 3, 6, 12, 32, 71])
    def test_parity_with_bloom(self, n_heads):
        bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
        expected = bloom._get_alibi_slopes(n_heads, torch.device("cpu"))
        torch.testing.assert_close(alibi_slopes(n_heads, expected), expected, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_logits_fall_with_distance(self, bidirectional):
        mixer, x = make(alibi=True, rope=False, n_heads=3, bidirectional=bidirectional), inputs(2, 11)
        q, k, v = (heads(p(x)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        place = torch.arange(11)
        distance = place[:, None] - place
        bias = -torch.tensor([2**-4, 2**-8, 2**-2])[:, None, None].double() * distance.abs()
        if not bidirectional:
            bias = bias.masked_fill(distance < 0, -math.inf)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        same(mixer(x), mixer.out_proj(out.transpose(1, 2).flatten(2)))

    def test_slopes_stay_exact_in_half_precision(self):
        assert make(alibi=True, rope=False, n_heads=3).bfloat16().logits.alibi_slopes.dtype == torch.float32


class TestGate:
    @pytest.mark.parametrize("gate", ["elementwise", "headwise"])
    def test_multiplies_what_the_heads_give(self, gate):
        """Equation 5 of the paper: Y' = Y ⊙ σ(X W)."""
        mixer, plain, x = make(gate=gate, n_heads=3), make(n_heads=3), inputs(2, 7)
        plain.load_state_dict({k: v for k, v in mixer.state_dict().items() if not k.startswith("gate")})
        plain.out_proj = torch.nn.Identity()
        weight = torch.sigmoid(x @ mixer.gate_proj.weight.T)
        if gate == "headwise":
            weight = weight.repeat_interleave(8, dim=-1)
        same(mixer(x), mixer.out_proj(plain(x) * weight))

    def test_parity_with_qwen3_next(self):
        modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
        configuration = pytest.importorskip("transformers.models.qwen3_next.configuration_qwen3_next")
        config = configuration.Qwen3NextConfig(
            hidden_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            attn_implementation="eager",
        )
        torch.manual_seed(0)
        theirs = modeling.Qwen3NextAttention(config, layer_idx=3).eval()
        weights = {key.replace("o_proj", "out_proj"): value for key, value in theirs.state_dict().items()}
        both = weights.pop("q_proj.weight").view(4, 2, 16, 64)  # each head's query, then its gate
        weights |= {"q_proj.weight": both[:, 0].flatten(0, 1), "gate_proj.weight": both[:, 1].flatten(0, 1)}
        for name in ("q_norm.weight", "k_norm.weight"):
            weights[name].normal_(std=0.1)
            weights[name] = weights[name] + 1  # theirs multiplies by 1 + weight
        ours = Attention(64, head_dim=16, n_kv_heads=2, rope_dim=8, qk_norm=True, gate="elementwise")
        ours.load_state_dict(weights)
        x = torch.randn(2, 13, 64)
        angles = modeling.Qwen3NextRotaryEmbedding(config)(x, torch.arange(13)[None])
        mask = torch.full((13, 13), torch.finfo(torch.float32).min).triu(1)
        expected, _ = theirs(x, position_embeddings=angles, attention_mask=mask[None, None])
        torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)


class TestSinks:
    def test_a_logit_without_a_value(self):
        mixer, x = make(sinks=True, rope=False, n_kv_heads=4), inputs(2, 6)
        q, k, v = (heads(p(x)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        logits = (q @ k.mT / math.sqrt(8)).masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf)
        sinks = mixer.sinks.view(1, 4, 1, 1).expand(2, 4, 6, 1)
        out = torch.cat([logits, sinks], dim=-1).softmax(-1)[..., :-1] @ v
        same(mixer(x), mixer.out_proj(out.transpose(1, 2).flatten(2)))

    def test_start_near_nought(self):
        torch.manual_seed(0)
        sinks = Attention(4096, head_dim=4, sinks=True).sinks
        assert abs(sinks.mean()) < 0.002
        assert sinks.std().item() == pytest.approx(0.02, rel=0.1)


class TestConvolution:
    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_of_queries_keys_and_values(self, bidirectional):
        """As in mamba_ssm: PyTorch's convolution, cut to its length, of all three together; no activation."""
        mixer, x = make(d_conv=4, n_kv_heads=2, bidirectional=bidirectional), inputs(2, 9)
        qkv = torch.cat([p(x) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)], dim=-1)
        assert mixer.conv1d.weight.shape == (64, 1, 4)
        qkv = F.conv1d(qkv.mT, mixer.conv1d.weight, mixer.conv1d.bias, padding=3, groups=64)[..., :9].mT
        q, k, v = (t.unflatten(-1, (-1, 8)) for t in qkv.split([32, 16, 16], dim=-1))
        angles = rotary_angles(torch.arange(9)[None], 8, 10000.0, torch.float64)
        q, k, v = (t.transpose(1, 2) for t in (rotate(q, *angles), rotate(k, *angles), v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=not bidirectional, enable_gqa=True)
        same(mixer(x), mixer.out_proj(out.transpose(1, 2).flatten(2)))

    @torch.no_grad()
    def test_its_state_goes_where_the_cache_goes(self):
        mixer, x = make(d_conv=4), inputs(3, 10)
        _, state = mixer(x, mixer.initial_state(3, 32))
        assert state.n_sequences == 3
        assert state.conv.shape == (3, 3, 96)
        assert state.nbytes == state.conv.nbytes + state.cache.nbytes
        kept = state.clone().select([2, 0])
        mixer(-x, state)
        y, _ = mixer(x[:2], kept)
        same(y, mixer(torch.cat([x[[2, 0]], x[:2]], dim=1))[:, 10:])

    def test_its_taps_count(self):
        assert make(d_conv=4).mixing_flops(10) == make().mixing_flops(10) + 2 * 4 * 96


HIDDEN = {
    "plain": {},
    "biases": {"bias": True, "out_bias": True},
    "grouped": {"n_kv_heads": 2, "bias": True},
    "wide": {"n_heads": 3, "head_dim": 16},
    "alibi": {"alibi": True, "window": 5},
    "gate": {"gate": "elementwise"},
    "softcap and sinks": {"softcap": 1.5, "sinks": True},
}


class TestHidden:
    """Hidden states in the cache: the outputs of keys and values, from less memory."""

    @pytest.fixture(params=HIDDEN)
    def pair(self, request):
        options = {"rope": False, **HIDDEN[request.param]}
        hidden, ordinary = make(cache="hidden", **options), make(**options)
        ordinary.load_state_dict(hidden.state_dict())
        return hidden, ordinary

    @pytest.mark.parametrize("lengths", [[12, 1, 1], [3, FEW, 1, FEW + 1, 40, 1], [70, 20]], ids=str)
    @torch.no_grad()
    def test_chunks(self, pair, lengths):
        hidden, ordinary = pair
        x = inputs(2, sum(lengths))
        a, b = (mixer.initial_state(2) for mixer in pair)
        for piece in x.split(lengths, dim=1):
            y, a = hidden(piece, a)
            expected, b = ordinary(piece, b)
            same(y, expected)
        same(hidden(x), ordinary(x))

    @torch.no_grad()
    def test_packed_chunks_and_tokens_of_several_lengths(self, pair):
        calls = [[5, 0, 9], [1, 12, 40], 1, FEW + 3, [0, 2, 1], "select", 2, [1, 1, 1]]
        for _ in check_same_calls(*pair, [mixer.initial_state(3) for mixer in pair], calls):
            pass

    def test_gradients(self, pair):
        found = []
        for mixer in pair:
            x, state, outputs = inputs(2, 24).requires_grad_(), mixer.initial_state(2, 32), []
            for piece in x.split([6, 1, 3, 14], dim=1):
                y, state = mixer(piece, state)
                outputs.append(y)
            loss = torch.cat(outputs, dim=1).square().sum()
            found.append(torch.autograd.grad(loss, [x, *mixer.parameters()]))
        for mine, theirs in zip(*found, strict=True):
            same(mine, theirs)

    @torch.no_grad()
    def test_takes_half_the_memory_of_many_heads(self):
        sizes = []
        for cache in ("hidden", "kv"):
            mixer = make(cache=cache, rope=False)
            _, state = mixer(inputs(2, 9), mixer.initial_state(2, 50))
            sizes.append(state.nbytes - state.lengths.nbytes)
        assert sizes == [2 * 50 * D_MODEL * 8, 2 * 2 * 50 * D_MODEL * 8]
        assert isinstance(make(cache="hidden", rope=False).initial_state(1), HiddenCache)

    @pytest.mark.parametrize("options", [{}, {"n_heads": 1, "head_dim": 24}, {"n_kv_heads": 1}], ids=str)
    @torch.no_grad()
    def test_which_form_runs(self, options, monkeypatch):
        """Up to ``folds_up_to`` new tokens, and where they are few in any case, no keys are made of the cache."""
        mixer, made = make(cache="hidden", rope=False, **options), []
        direct = Attention._keys_values
        monkeypatch.setattr(Attention, "_keys_values", lambda self, x: made.append(x.shape[1]) or direct(self, x))
        bound = mixer.folds_up_to
        for length in (1, FEW, FEW + 1, math.floor(bound) + 1):
            _, state = mixer(inputs(2, 30), mixer.initial_state(2))
            made.clear()
            mixer(inputs(2, length), state)
            assert made == ([] if length <= max(FEW, bound) else [30 + length])

    def test_folding_pays_up_to_where_it_takes_fewer_operations(self):
        mixer, m = make(cache="hidden", rope=False, n_kv_heads=2), 1000
        for length in (1, 5, 6, 20):
            expanded = m * D_MODEL * 2 * mixer.n_kv_heads * 8 + length * m * mixer.n_heads * 2 * 8
            folded = length * m * mixer.n_heads * 2 * D_MODEL
            assert (folded <= expanded) == (length <= mixer.folds_up_to)

    def test_another_cache_is_refused(self):
        with pytest.raises(TypeError, match="`state` must come from .* or an earlier call; got KVCache"):
            make(cache="hidden", rope=False)(inputs(1, 2), make(rope=False).initial_state(1))


EVERYTHING = {
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    "sinks": True,
    "gate": "elementwise",
    "d_conv": 3,
    "n_kv_heads": 2,
}
FOLDED = {"cache": "hidden", "rope": False, "alibi": True, "gate": "headwise"}


@pytest.mark.parametrize("options", [EVERYTHING, FOLDED], ids=["everything", "hidden"])
class TestTogether:
    @torch.no_grad()
    def test_a_model_comes_back_from_its_config(self, options):
        torch.manual_seed(0)
        options = {"head_dim": 8, **options}
        model = ssmzoo.build("transformer++-tiny", d_model=D_MODEL, n_layers=2, mixers={"attention": options}).double()
        written = ssmzoo.ModelConfig.from_dict(yaml.safe_load(model.config.to_yaml()))
        again = ssmzoo.build(written).double()
        assert again.config == model.config
        again.load_state_dict(model.state_dict())
        ids = torch.arange(24).view(2, 12)
        whole = again(ids)
        same(whole, model(ids))
        _, state = model(ids[:, :7], model.initial_state(2))
        swapped = state.select([1, 0])
        same(model(ids.flip(0)[:, 7:], swapped)[0], whole.flip(0)[:, 7:])

    @torch.no_grad()
    def test_compiles_with_a_state(self, options):
        mixer = make(**options)
        torch._dynamo.reset()
        compiled = torch.compile(mixer, fullgraph=True, backend="eager")
        x = inputs(2, 22)
        state, outputs = mixer.initial_state(2, 64), []
        for piece in x.split([5, 1, 1, FEW + 6, 1], dim=1):
            y, state = compiled(piece, state)
            outputs.append(y)
        same(torch.cat(outputs, dim=1), mixer(x))

    @torch.no_grad()
    def test_single_tokens_wait_for_no_device(self, options):
        mixer = make(**options).to("meta")
        x = torch.empty(2, 12, D_MODEL, device="meta", dtype=torch.float64)
        _, state = mixer(x, mixer.initial_state(2))
        for length in (1, 3):
            y, state = mixer(x[:, :length], state)
            assert y.shape == (2, length, D_MODEL)

    @torch.no_grad()
    def test_autocast(self, options):
        mixer, x = make(**options).float(), inputs(2, 20).float()
        with torch.autocast("cpu", torch.bfloat16):
            whole = mixer(x)
            _, state = mixer(x[:, :12], mixer.initial_state(2, 64))
            token, state = mixer(x[:, 12:13], state)
            chunk, state = mixer(x[:, 13:], state)
        assert whole.dtype == torch.bfloat16
        torch.testing.assert_close(torch.cat([token, chunk], dim=1), whole[:, 12:], rtol=0.05, atol=0.05)
        torch.testing.assert_close(whole.float(), mixer(x), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"alibi": True}, "`alibi` takes the place of the rotary embedding; give rope=False with it"),
        ({"d_conv": -1}, "`d_conv` must be at least 1, or 0 for no convolution; got -1"),
        ({"rope_base": 1.0}, "`rope_base` must be above 1; got 1.0"),
        ({"rope": False, "rope_scaling": {"rope_type": "linear"}}, "`rope_scaling` has no meaning with `rope` false"),
        ({"cache": "hidden"}, "`cache` 'hidden' excludes `rope`: .*; give rope=False"),
        (
            {"cache": "hidden", "rope": False, "qk_norm": True},
            "excludes `qk_norm`: it divides each key",
        ),
        ({"cache": "hidden", "rope": False, "d_conv": 4}, "excludes `d_conv`: it mixes neighbouring keys"),
        ({"cache": "hidden", "rope": False, "bidirectional": True}, "excludes `bidirectional`: there is then no state"),
        ({"cache": "hidden", "rope": False, "bias": True, "sinks": True}, "excludes `bias`: with `sinks` a key's bias"),
        ({"cache": "hidden", "rope": False, "bias": True, "softcap": 2.0}, "excludes `bias`: with `softcap` a key's"),
    ],
)
def test_values_that_do_not_go_together(options, match):
    with pytest.raises(ValueError, match="Attention: .*" + match):
        ssmzoo.build_mixer("attention", 64, **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"gate": "both"},
            "`gate` of mixer 'attention' must be 'elementwise' or 'headwise' or None; got 'both'",
        ),
        ({"gate": True}, "`gate` .* got True"),
        ({"cache": "pages"}, "option `cache` of mixer 'attention' must be 'kv' or 'hidden'; got 'pages'"),
        ({"sinks": 4}, "option `sinks` of mixer 'attention' must be bool; got 4"),
        ({"rope_scaling": {"rope_type": "linear", "factr": 2.0}}, "unknown option .*: 'factr'. Did you mean 'factor'"),
    ],
)
def test_values_of_the_wrong_type(options, match):
    with pytest.raises(TypeError, match=match):
        ssmzoo.build_mixer("attention", 64, **options)
