"""What is multi-head latent attention's own; the properties that every mixer shares stand in test_mixers.py."""

from __future__ import annotations

import functools
import math

import attention_checks
import pytest
import torch
from attention_layers import D_MODEL, call_by_call, gradients, in_pieces, inputs, make_mixer, packed
from their_attention import TheirAttention

import ssmzoo
from ssmzoo import build_mixer
from ssmzoo.cache.calls import FEW
from ssmzoo.mixers.mla import LatentCache
from ssmzoo.registry import mixer_class

SIZES = {"n_heads": 3, "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "mscale": 0.7, "mscale_all_dim": 1.3}
SETTINGS = {
    "plain": {},
    "latent queries": {"q_lora_rank": 7, "bias": True, "out_bias": True},
    "narrow latent": {"kv_lora_rank": 3},
    "wide values": {"v_head_dim": 16, "kv_lora_rank": 40},
    "halves": {"rope_interleave": False, "n_heads": 1},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}, "rope_base": 50.0},
    "yarn": {"rope_scaling": YARN, "q_lora_rank": 5},
}


@pytest.fixture(params=SETTINGS)
def mixer(request):
    return make(**SETTINGS[request.param])


@pytest.fixture
def plain():
    return make()


def make(**options):
    return make_mixer("mla", std=0.5, **{**SIZES, **options})


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


class TestTwoForms:
    """Expanded keys and values, and attention over the latents themselves, are the same function."""

    def test_at_once(self, mixer):
        x = inputs(2, 14)
        q, kept = mixer._project(x, torch.arange(14)[None])
        absorbed, lengths = mixer._absorbed(q), torch.full((2,), 14, dtype=torch.int32)
        results = []
        for out in (
            mixer._expanded(q, kept),
            mixer._unabsorbed(mixer.logits.attention(absorbed, kept, kept)),
            mixer._unabsorbed(mixer.logits.decode(absorbed, kept, kept, lengths)),
        ):
            grads = torch.autograd.grad((out * out).sum(), [mixer.kv_b_proj.weight, q, kept], retain_graph=True)
            results.append([out, *grads])
        same(results[1], results[0])
        same(results[2], results[0])

    @pytest.mark.parametrize("kv_lora_rank", [4, 12, 40])
    @torch.no_grad()
    def test_which_one_runs(self, kv_lora_rank, monkeypatch):
        """Above ``absorbs_up_to`` new tokens on a filled cache, and on an empty one, the expanded one."""
        mixer = make(kv_lora_rank=kv_lora_rank, qk_nope_head_dim=16, v_head_dim=16)
        limit = {4: math.inf, 12: math.inf, 40: 40 * 32 / 48}[kv_lora_rank]
        assert mixer.absorbs_up_to == limit
        ran = []
        for name in ("_expanded", "_absorbed"):
            form = getattr(mixer, name)
            monkeypatch.setattr(mixer, name, lambda *args, form=form, name=name: ran.append(name) or form(*args))
        _, state = mixer(inputs(2, 5), mixer.initial_state(2))
        for length in (1, FEW, FEW + 1, 26, 27):
            _, state = mixer(inputs(2, length), state)
        for lengths in ([20, 32], [20, 35]):
            _, state = mixer(inputs(1, sum(lengths)), state, cu_seqlens=packed(lengths))
        last = "_absorbed" if limit == math.inf else "_expanded"
        assert ran == ["_expanded", *["_absorbed"] * 4, last, "_absorbed", last]


class TestState:
    @torch.no_grad()
    def test_in_chunks_of_any_length(self, mixer):
        x = inputs(2, 70)
        state, outputs = mixer.initial_state(2), []
        for piece in x.split([0, 3, 1, 1, FEW, FEW + 1, 0, 1, 47], dim=1):
            y, state = mixer(piece, state)
            outputs.append(y)
        same(torch.cat(outputs, dim=1), mixer(x))
        assert state.lengths.tolist() == [70, 70]

    @torch.no_grad()
    def test_sequences_of_several_lengths(self, mixer):
        """Packed chunks, single tokens, a few and many, in whatever order, are each sequence alone."""
        calls = [[3, 0, 9, 1], [0, 4, 1, 0], 1, 3, FEW + 5, [2, 1, 0, 40], 1, 33, [50, 60, 0, 70]]
        fed, outputs, state = call_by_call(mixer, calls)
        for i, whole in enumerate(fed):
            same(outputs[i], mixer(whole[None])[0])
            assert state.lengths[i] == len(whole)

    @torch.no_grad()
    @pytest.mark.parametrize("lengths", [[4, 4, 4], [4, 0, 7]], ids=["even", "uneven"])
    def test_select_and_clone_go_their_own_ways(self, plain, lengths):
        x = inputs(1, sum(lengths))
        _, state = plain(x, plain.initial_state(3), cu_seqlens=packed(lengths))
        chosen = [2, 0, 0]
        kept, branch = state.select(chosen), state.clone()
        assert type(kept) is type(branch) is LatentCache
        plain(inputs(3, 2, seed=1), state)  # must reach neither
        fed = inputs(3, FEW + 3, seed=2)
        outputs = []
        for taken in (kept, branch):
            for piece in fed.split([1, FEW + 1, 1], dim=1):
                y, taken = plain(piece, taken)
            outputs.append(y)
        for order, y in zip((chosen, range(3)), outputs, strict=True):
            for row, i in enumerate(order):
                whole = torch.cat([x[0].split(lengths)[i], fed[row]])
                same(y[row], plain(whole[None])[0, -1:])

    @torch.no_grad()
    def test_what_lies_past_the_lengths_does_not_matter(self, plain):
        x, results = inputs(1, 20), []
        for filling in (0.0, torch.nan):
            state = plain.initial_state(3, max_length=64)
            state.keys.fill_(filling)
            first, state = plain(x, state, cu_seqlens=packed([4, 0, 16]))
            steps = [plain(inputs(3, n, seed=n), state)[0] for n in (1, 2, FEW + 1)]
            results.append(torch.cat([first.flatten(), *(y.flatten() for y in steps)]))
        assert torch.equal(*results)

    @torch.no_grad()
    def test_it_keeps_the_latent_and_the_rotary_key_alone(self):
        mixer = build_mixer("mla", 256)
        full = build_mixer("attention", 256, n_heads=mixer.n_heads, head_dim=64)
        states = [m(torch.randn(2, 40, 256), m.initial_state(2, max_length=100))[1] for m in (mixer, full)]
        numbers = mixer.kv_lora_rank + mixer.rope
        assert (numbers, mixer.n_heads) == (128 + 32, 4)
        assert states[0].nbytes == 2 * 100 * numbers * 4 + 2 * 4
        assert states[1].nbytes == 2 * 100 * 2 * 4 * 64 * 4 + 2 * 4
        assert states[0].nbytes < states[1].nbytes / 3

    @pytest.mark.parametrize("even", [True, False])
    @torch.no_grad()
    def test_single_tokens_wait_for_no_device(self, even):
        attention_checks.single_tokens_on_meta(make(rope_scaling=YARN), even)

    def test_the_state_of_attention_is_another(self, plain):
        state = build_mixer("attention", D_MODEL, head_dim=8).double().initial_state(2)
        with pytest.raises(TypeError, match="MLA: `state` must come from .* or an earlier call; got KVCache"):
            plain(inputs(2, 3), state)


@pytest.mark.parametrize("max_length", [None, 64])
def test_chunks_have_the_gradients_of_the_whole(mixer, max_length):
    x, chunks = inputs(2, 20), functools.partial(in_pieces, mixer, lengths=[4, 1, 1, 12, 2], max_length=max_length)
    same(gradients(mixer, chunks, x), gradients(mixer, mixer, x))


class TestParity:
    """Against transformers, with the same weights, at odd settings."""

    NAMES = (
        ("q_a_layernorm", "q_a_norm"),
        ("kv_a_layernorm", "kv_a_norm"),
        ("kv_a_proj_with_mqa", "kv_a_proj"),
        ("o_proj", "out_proj"),
    )

    @pytest.mark.parametrize(
        ("version", "given", "options"),
        [
            (2, {}, {}),
            (2, {"q_lora_rank": 11, "attention_bias": True}, {"q_lora_rank": 11, "bias": True, "out_bias": True}),
            (2, {"rope_theta": 300.0}, {"rope_base": 300.0}),
            (3, {"q_lora_rank": 11, "attention_bias": True}, {"q_lora_rank": 11, "bias": True, "out_bias": True}),
            (3, {"rope_interleave": False}, {"rope_interleave": False}),
            (3, {"rope": YARN}, {"rope_scaling": YARN}),
            (2, {"rope": YARN}, {"rope_scaling": YARN}),
            (
                3,
                {"rope": {"rope_type": "linear", "factor": 2.5}},
                {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
            ),
        ],
        ids=str,
    )
    def test_transformers(self, version, given, options):
        heads = {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3, "v_head_dim": 7}
        latent = {"q_lora_rank": None, "kv_lora_rank": 14}  # their complex view wants it even
        parts = {"qk_nope_head_dim": 10, "qk_rope_head_dim": 6}
        theirs = TheirAttention(f"deepseek_v{version}", f"DeepseekV{version}", heads | latent | parts | given)
        sizes = {"n_heads": 3, "kv_lora_rank": 14, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 7}
        ours = build_mixer("mla", 48, **sizes, **options)
        with torch.no_grad():
            for value in theirs.layer.parameters():
                value.add_(torch.randn_like(value), alpha=0.2)  # biases and norms that are not 0 or 1
        ours.load_state_dict({self.our_name(name): value for name, value in theirs.layer.state_dict().items()})

        x = torch.randn(2, 19, 48)
        expected, found = theirs(x, torch.ones(19, 19).tril().bool()), ours(x)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

        weight = torch.randn_like(expected)
        weights = dict(theirs.layer.named_parameters())
        wanted = torch.autograd.grad((expected * weight).sum(), list(weights.values()))
        named = {self.our_name(name): g for name, g in zip(weights, wanted, strict=True)}
        (found * weight).sum().backward()
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(parameter.grad, named.pop(name), rtol=1e-4, atol=1e-4)
        assert not named

    def our_name(self, name):
        for theirs, ours in self.NAMES:
            name = name.replace(theirs, ours)
        return name


@torch.no_grad()
def test_autocast():
    mixer = make(q_lora_rank=16, rope_scaling=YARN).float()
    for parameter in mixer.parameters():
        parameter.mul_(0.5)
    attention_checks.autocast(mixer, 10)


def test_to_another_dtype():
    mixer = make().bfloat16()
    with torch.no_grad():
        y, state = mixer(inputs(2, 9).bfloat16(), mixer.initial_state(2))
        step, _ = mixer(inputs(2, 1).bfloat16(), state.to(torch.bfloat16))
    assert y.dtype == step.dtype == state.keys.dtype == torch.bfloat16


@pytest.mark.parametrize("options", [{}, {"n_heads": 1, "v_head_dim": 9}])
def test_flops_count_what_is_seen(options):
    sizes = {**SIZES, **options}
    heads, width = sizes["n_heads"], 6 + 4 + sizes["v_head_dim"]
    for n in (1, 10):
        assert make(**options).mixing_flops(n) == pytest.approx(sum(2 * heads * width * t for t in range(1, n + 1)) / n)


def test_sizes_follow_from_the_width():
    mixer = build_mixer("mla", 1024)
    assert (mixer.n_heads, mixer.kv_lora_rank, mixer.q_lora_rank) == (16, 256, None)
    assert build_mixer("mla", 128).kv_lora_rank == 64


def test_compiles_packed():
    attention_checks.compiles_packed(make(rope_scaling=YARN, q_lora_rank=5))


def test_compiles_with_a_state(plain):
    attention_checks.compiles_with_a_state(plain, [5, 1, 1, 1, 12])


def test_the_tiny_model_learns_and_generates():
    torch.manual_seed(0)
    model = ssmzoo.build("mla-tiny", n_layers=2, d_model=64)
    assert ssmzoo.build(model.config).config == model.config
    ids = torch.arange(24).repeat(2, 2)[:, :40] + 40
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 < 4 < losses[0]
    found = model.generate(ids[:, :20], max_new_tokens=12, temperature=0.0)
    assert torch.equal(found[:, -12:], ids[:, 20:32])


def test_scaling_in_a_config_comes_back():
    config = ssmzoo.build("mla-tiny", n_layers=1, mixers={"mla": {"rope_scaling": YARN}}).config
    again = ssmzoo.build(config)
    assert again.layers[0].mixer.scaling.factor == 4.0
    assert again.config == config


class TestErrors:
    @pytest.mark.parametrize(
        ("d_model", "options", "match"),
        [
            (100, {}, "`v_head_dim` must divide d_model, or `n_heads` be given; got v_head_dim=64 and d_model=100"),
            (64, {"n_heads": 0}, "`n_heads` must be at least 1; got 0"),
            (64, {"q_lora_rank": 0}, "`q_lora_rank` must be at least 1; got 0"),
            (64, {"kv_lora_rank": -1}, "`kv_lora_rank` must be at least 1; got -1"),
            (64, {"qk_nope_head_dim": 0}, "`qk_nope_head_dim` must be at least 1; got 0"),
            (64, {"qk_rope_head_dim": 5}, "`qk_rope_head_dim` must be even and at least 2; got 5"),
            (64, {"qk_rope_head_dim": 0}, "`qk_rope_head_dim` must be even and at least 2; got 0"),
            (64, {"v_head_dim": 0}, "`v_head_dim` must be at least 1; got 0"),
            (64, {"rope_base": 1.0}, "`rope_base` must be above 1; got 1.0"),
            (64, {"norm_eps": -1e-6}, "`norm_eps` must not be negative; got -1e-06"),
        ],
    )
    def test_sizes(self, d_model, options, match):
        with pytest.raises(ValueError, match="MLA: " + match):
            mixer_class("mla")(d_model, **options)

    def test_scaling(self):
        with pytest.raises(TypeError, match="option `rope_scaling` of mixer 'mla' must be dict or None; got 'yarn'"):
            build_mixer("mla", 64, rope_scaling="yarn")
        with pytest.raises(TypeError, match="unknown option of `rope_scaling` of type 'yarn': 'beta'"):
            build_mixer("mla", 64, rope_scaling={**YARN, "beta": 2.0})
        with pytest.raises(ValueError, match="`factor` must be at least 1; got 0.5"):
            build_mixer("mla", 64, rope_scaling={**YARN, "factor": 0.5})
