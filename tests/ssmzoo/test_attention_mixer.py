"""What is attention's own; the properties that it shares with every mixer stand in test_mixers.py."""

from __future__ import annotations

import functools
import itertools

import attention_checks
import pytest
import torch
from attention_layers import D_MODEL, cache_of, call_by_call, gradients, in_pieces, inputs, make_mixer, packed
from their_attention import TheirAttention

from ssmzoo import build_mixer
from ssmzoo.cache.calls import FEW
from ssmzoo.cache.kv import SMALLEST
from ssmzoo.mixers.attention import Attention
from ssmzoo.registry import mixer_class

SETTINGS = {
    "plain": {},
    "grouped": {"n_kv_heads": 2},
    "window": {"window": 5, "n_kv_heads": 1},
    "window of one": {"window": 1},
    "qk_norm": {"qk_norm": True},
    "qk_norm over all heads": {"qk_norm": "whole", "n_kv_heads": 2},
    "qk_norm of 1 + w": {"qk_norm": "centred", "qk_norm_eps": 1e-3},
    "partial rope": {"rope_dim": 4, "bias": True, "out_bias": True},
    "no rope": {"rope": False},
    "softcap": {"softcap": 1.5},
    "wide heads": {"n_heads": 3, "head_dim": 16},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}},
    "sinks": {"sinks": True, "n_kv_heads": 2},
    "sinks, window": {"sinks": True, "window": 3},
    "alibi": {"alibi": True, "rope": False},
    "alibi, window": {"alibi": True, "rope": False, "n_heads": 5, "window": 6},
    "gate": {"gate": "elementwise", "bias": True},
    "gated heads": {"gate": "headwise"},
    "convolution": {"d_conv": 4, "n_kv_heads": 2, "qk_norm": True},
    "convolution, window": {"d_conv": 3, "window": 5},
    "hidden": {"cache": "hidden", "rope": False, "bias": True},
    "hidden, window": {"cache": "hidden", "rope": False, "alibi": True, "n_kv_heads": 2, "window": 6},
    "hidden, sinks": {"cache": "hidden", "rope": False, "n_kv_heads": 1, "sinks": True, "softcap": 1.5},
}


@pytest.fixture(params=itertools.product(SETTINGS, [None, 3]), ids=lambda p: p[0] + ("" if p[1] is None else ", paged"))
def mixer(request):
    name, page_size = request.param
    return make(**SETTINGS[name], page_size=page_size)


@pytest.fixture
def plain():
    return make(n_kv_heads=2, window=6)


def make(**options):
    return make_mixer("attention", **{"head_dim": 8, **options})


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


class TestState:
    @torch.no_grad()
    def test_in_chunks_of_any_length(self, mixer):
        x = inputs(2, 40)
        state = mixer.initial_state(2)
        outputs = []
        for piece in x.split([0, 3, 1, 1, FEW, FEW + 1, 0, 1, 17], dim=1):
            y, state = mixer(piece, state)
            outputs.append(y)
        same(torch.cat(outputs, dim=1), mixer(x))
        assert cache_of(state).lengths.tolist() == [40, 40]

    @torch.no_grad()
    def test_sequences_of_several_lengths(self, mixer):
        """Packed chunks, single tokens, a few and many, in whatever order, are each sequence alone."""
        calls = [[3, 0, 9, 1], [0, 4, 1, 0], 1, 3, FEW + 5, [2, 1, 0, 12], 1, [1, 1, 1, 1]]
        fed, outputs, state = call_by_call(mixer, calls)
        for i, whole in enumerate(fed):
            same(outputs[i], mixer(whole[None])[0])
            assert cache_of(state).lengths[i] == len(whole)

    @torch.no_grad()
    def test_packed_without_a_state(self, mixer):
        lengths = [5, 0, 1, 9]
        x = inputs(1, 15)
        alone = [mixer(part) for part in x.split(lengths, dim=1)]
        same(mixer(x, cu_seqlens=packed(lengths)), torch.cat(alone, dim=1))

    @torch.no_grad()
    def test_no_tokens_at_all(self, plain):
        y, state = plain(inputs(1, 0), plain.initial_state(3), cu_seqlens=packed([0, 0, 0]))
        assert y.shape == (1, 0, D_MODEL)
        y, state = plain(inputs(3, 0), state)
        assert y.shape == (3, 0, D_MODEL)
        y, state = plain(inputs(3, 2), state)
        same(y, plain(inputs(3, 2)))

    @torch.no_grad()
    @pytest.mark.parametrize("lengths", [[4, 4, 4], [4, 0, 7]], ids=["even", "uneven"])
    def test_select_reorders_repeats_and_drops(self, plain, lengths):
        x = inputs(1, sum(lengths))
        _, state = plain(x, plain.initial_state(3), cu_seqlens=packed(lengths))
        chosen = [2, 0, 0, 1][: None if len(set(lengths)) == 1 else 3]
        kept = state.select(chosen)
        plain(inputs(3, 2, seed=1), state)  # must not reach the selection
        fed = inputs(len(chosen), FEW + 3, seed=2)
        for piece in fed.split([1, FEW + 1, 1], dim=1):
            y, kept = plain(piece, kept)
        for row, i in enumerate(chosen):
            whole = torch.cat([x[0].split(lengths)[i], fed[row]])
            same(y[row], plain(whole[None])[0, -1:])

    @torch.no_grad()
    def test_dropping_the_longest(self, plain):
        """Then ``longest`` is only a bound, above what the others need."""
        x = inputs(1, 30)
        _, state = plain(x, plain.initial_state(2), cu_seqlens=packed([3, 27]))
        state = state.select([0])
        y, state = plain(inputs(1, 2, seed=1), state, cu_seqlens=packed([2]))
        same(y, plain(torch.cat([x[:, :3], inputs(1, 2, seed=1)], dim=1))[:, 3:])
        assert (state.longest, state.even) == (5, True)

    @torch.no_grad()
    def test_a_clone_goes_its_own_way(self, plain):
        x = inputs(2, 12)
        _, state = plain(x, plain.initial_state(2, 100))
        branch = state.clone()
        capacity = 5 + SMALLEST  # of the 100 asked for: with its window it will never need more
        assert branch.nbytes == state.nbytes == 2 * 2 * capacity * 2 * 8 * 8 + 2 * 2 * 4
        plain(-x, state)
        y, _ = plain(x[:, :1], branch)
        same(y, plain(torch.cat([x, x[:, :1]], dim=1))[:, 12:])

    def test_to_another_dtype(self, plain):
        with torch.no_grad():
            _, state = plain(inputs(2, 9), plain.initial_state(2))
            half = state.to(torch.bfloat16)
            assert (half.keys.dtype, half.values.dtype, half.lengths.dtype) == (torch.bfloat16,) * 2 + (torch.int32,)
            y, half = plain.to(torch.bfloat16)(inputs(2, 1).bfloat16(), half)
        assert (y.dtype, half.keys.dtype, half.longest) == (torch.bfloat16, torch.bfloat16, 10)


class TestMemory:
    @torch.no_grad()
    def test_grows_by_doubling(self):
        mixer = make(n_kv_heads=2)
        _, state = mixer(inputs(1, 100), mixer.initial_state(1))
        capacities = set()
        for _ in range(250):
            _, state = mixer(inputs(1, 1), state)
            capacities.add(state.keys.shape[1])
        assert capacities == {200, 400}

    @torch.no_grad()
    def test_set_aside_it_stays_in_place(self):
        plain = make(n_kv_heads=2)
        x = inputs(2, 51)
        state = plain.initial_state(2, max_length=50)
        place = state.keys.data_ptr(), state.values.data_ptr()
        for piece in x[:, :50].split([38, 1, 3, 8], dim=1):
            _, state = plain(piece, state)
            assert (state.keys.data_ptr(), state.values.data_ptr()) == place
        y, state = plain(x[:, 50:], state)  # beyond: it grows
        assert state.keys.shape[1] == 100
        same(y, plain(x)[:, 50:])

    @torch.no_grad()
    def test_what_lies_past_the_lengths_does_not_matter(self, plain):
        x = inputs(1, 20)
        results = []
        for filling in (0.0, torch.nan):
            state = plain.initial_state(3, max_length=64)
            state.keys.fill_(filling)
            state.values.fill_(filling)
            first, state = plain(x, state, cu_seqlens=packed([4, 0, 16]))
            steps = [plain(inputs(3, n, seed=n), state)[0] for n in (1, 2, FEW + 1)]
            results.append(torch.cat([first.flatten(), *(y.flatten() for y in steps)]))
        assert torch.equal(*results)

    @pytest.mark.parametrize("even", [True, False])
    @torch.no_grad()
    def test_single_tokens_wait_for_no_device(self, even):
        attention_checks.single_tokens_on_meta(make(window=5), even)


class TestBoundedMemory:
    """With a window the cache stays small for ever, and nobody can tell."""

    WINDOWS = pytest.mark.parametrize("window", [1, 2, 30, 70])

    def bytes_for(self, window, sequences=2):
        return 2 * sequences * (window - 1 + max(window - 1, SMALLEST)) * 1 * 8 * 8 + 2 * sequences * 4

    @WINDOWS
    @torch.no_grad()
    def test_token_by_token_over_ten_windows(self, window):
        mixer = make(window=window, n_kv_heads=1)
        x = inputs(2, 10 * window + 2 * SMALLEST)
        state, outputs = mixer.initial_state(2), []
        for piece in x.split([1, 3] + [1] * (x.shape[1] - 4), dim=1):
            y, state = mixer(piece, state)
            outputs.append(y)
            assert state.nbytes <= self.bytes_for(window)
        same(torch.cat(outputs, dim=1), mixer(x))
        assert state.lengths.tolist() == [x.shape[1]] * 2

    @WINDOWS
    @torch.no_grad()
    def test_long_and_short_chunks(self, window):
        mixer = make(window=window, n_kv_heads=1)
        lengths = [4 * window + 100, 1, FEW + 1, 1, 200, 3, 5 * window, *[FEW] * 20, 1]
        x = inputs(2, sum(lengths))
        state, outputs = mixer.initial_state(2, 10**6), []
        for piece in x.split(lengths, dim=1):
            y, state = mixer(piece, state)
            outputs.append(y)
            assert state.nbytes <= self.bytes_for(window) + 2 * 2 * FEW * 8 * 8
        same(torch.cat(outputs, dim=1), mixer(x))

    @WINDOWS
    @torch.no_grad()
    def test_sequences_of_several_lengths(self, window):
        """Packed chunks, tokens, a selection and clones, where each sequence has dropped another number of tokens."""
        mixer = make(window=window, n_kv_heads=1)
        calls = [[3, 190, 0], [0, 11, 1], *[1] * 80, [150, 0, 2], "select", 3, *[1] * 90, FEW + 3, [9, 0, 170], 2]
        state, fed = mixer.initial_state(3), [inputs(0) for _ in range(3)]
        for number, call in enumerate(calls):
            if call == "select":
                state, fed = state.select([2, 0, 2]), [fed[i] for i in (2, 0, 2)]
                continue
            lengths = [call] * 3 if isinstance(call, int) else call
            pieces = inputs(sum(lengths), seed=number).split(lengths)
            fed = [torch.cat(both) for both in zip(fed, pieces, strict=True)]
            branch = state.clone()
            if isinstance(call, int):
                y, state = mixer(torch.stack(pieces), state)
                found = list(y)
                mixer(-torch.stack(pieces), branch)  # must not reach the state
            else:
                y, state = mixer(torch.cat(pieces)[None], state, cu_seqlens=packed(lengths))
                found = y[0].split(lengths)
                mixer(-torch.cat(pieces)[None], branch, cu_seqlens=packed(lengths))
            if number % 20 == 0 or not isinstance(call, int):
                for out, whole in zip(found, fed, strict=True):
                    same(out, mixer(whole[None])[0, len(whole) - len(out) :])
            assert state.nbytes <= self.bytes_for(window, 3) + 3 * 2 * FEW * 8 * 8
        assert state.lengths.tolist() == [len(whole) for whole in fed]

    def test_gradients_across_what_has_been_dropped(self):
        mixer = make(window=4, n_kv_heads=1)
        x = inputs(2, 120).requires_grad_()
        state, outputs = mixer.initial_state(2), []
        for piece in x.split([60, 1, 20, 1, 1, 30, 7], dim=1):
            y, state = mixer(piece, state)
            outputs.append(y)
        wanted = [x, *mixer.parameters()]
        found = torch.autograd.grad(torch.cat(outputs, dim=1).square().sum(), wanted)
        assert state.starts.min() > 0
        same(found, torch.autograd.grad(mixer(x).square().sum(), wanted))


class TestGradients:
    """Chunks have the gradients of the whole: nothing that a backward pass needs is overwritten."""

    @pytest.mark.parametrize("max_length", [None, 64])
    @pytest.mark.parametrize("options", [{"window": 5}, {"n_kv_heads": 2, "qk_norm": True}], ids=str)
    def test_chunks(self, options, max_length):
        mixer = make(**options)
        x, chunks = inputs(2, 17), functools.partial(in_pieces, mixer, lengths=[4, 1, 1, 9, 2], max_length=max_length)
        same(gradients(mixer, chunks, x), gradients(mixer, mixer, x))

    def test_packed_chunks_of_several_lengths(self, plain):
        lengths = ([3, 5], [12, 0], [1, 1])

        def chunks(x):
            state, outputs = plain.initial_state(2), []
            for piece, of_each in zip(x.split([sum(n) for n in lengths], dim=1), lengths, strict=True):
                y, state = plain(piece, state, cu_seqlens=packed(of_each))
                outputs.append(y)
            y, state = plain(x[0, -2:, None], state)
            return torch.cat([*outputs, y.view(1, 2, -1)], dim=1)

        def whole(x):
            order = [0, 1, 2, *range(8, 20), 20, 20], [3, 4, 5, 6, 7, 21, 21]
            first, second = (plain(x[:, rows]) for rows in order)
            parts = first[:, :3], second[:, :5], first[:, 3:15], first[:, 15:16], second[:, 5:6]
            return torch.cat([*parts, first[:, 16:], second[:, 6:]], dim=1)

        x = inputs(1, 22)
        same(gradients(plain, chunks, x), gradients(plain, whole, x))

    def test_frozen_keys_and_values(self, plain):
        for projection in (plain.k_proj, plain.v_proj):
            projection.requires_grad_(False)
        fixed = inputs(2, 12)

        def chunks(_):
            state, outputs = plain.initial_state(2, 12), []
            for piece in fixed.split([5, 1, 6], dim=1):
                y, state = plain(piece, state)
                outputs.append(y)
            return torch.cat(outputs, dim=1)

        trained = [plain.q_proj.weight, plain.out_proj.weight]
        found = torch.autograd.grad(chunks(None).square().sum(), trained)
        same(found, torch.autograd.grad(plain(fixed).square().sum(), trained))

    def test_generating_from_a_state_leaves_its_graph_alone(self, plain):
        x = inputs(2, 6)
        expected = torch.autograd.grad(plain(x).square().sum(), plain.k_proj.weight)
        _, state = plain(x[:, :3], plain.initial_state(2, 64))
        first = _
        second, state = plain(x[:, 3:], state)
        loss = first.square().sum() + second.square().sum()
        with torch.no_grad():
            for _ in range(3):
                _, state = plain(x[:, :1], state)
        assert not state.keys.requires_grad
        same(torch.autograd.grad(loss, plain.k_proj.weight), expected)


LINEAR = {"rope_type": "linear", "factor": 2.5}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


class TestParity:
    """Against transformers, with the same weights."""

    @pytest.mark.parametrize(
        ("name", "given", "options"),
        [
            ("Llama", {}, {}),
            (
                "Llama",
                {"attention_bias": True, "rope_theta": 500.0},
                {"bias": True, "out_bias": True, "rope_base": 500.0},
            ),
            ("Mistral", {"sliding_window": 5}, {"window": 5}),
            ("Qwen3", {"rms_norm_eps": 1e-5}, {"qk_norm": True}),
            ("Phi", {"partial_rotary_factor": 0.5}, {"rope_dim": 8, "bias": True, "out_bias": True}),
            ("Gemma2", {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16}, {"softcap": 2.0}),
            ("Llama", {"rope": LINEAR}, {"rope_scaling": LINEAR}),
            ("Llama", {"rope": YARN}, {"rope_scaling": YARN}),
            (
                "GptOss",
                {"rope": {**YARN, "truncate": False}, "attention_bias": True},
                {"rope_scaling": {**YARN, "truncate": False}, "bias": True, "out_bias": True, "sinks": True},
            ),
        ],
        ids=[
            "Llama",
            "Llama, biases",
            "Mistral, window",
            "Qwen3, qk_norm",
            "Phi, partial rope",
            "Gemma 2, softcap",
            "Llama, linear scaling",
            "Llama, YaRN",
            "gpt-oss, sinks and YaRN",
        ],
    )
    def test_transformers(self, name, given, options):
        sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        theirs = TheirAttention({"GptOss": "gpt_oss"}.get(name, name.lower()), name, sizes | given)
        ours = Attention(64, head_dim=16, n_kv_heads=2, **options)
        weights = {
            key.replace("o_proj", "out_proj").replace("dense", "out_proj").replace("layernorm", "norm"): value
            for key, value in theirs.layer.state_dict().items()
        }
        with torch.no_grad():
            if "sinks" in weights:
                weights["sinks"].normal_()  # they come uninitialised
            for value in weights.values():
                value.add_(torch.randn_like(value), alpha=0.1)  # biases and norms that are not 0 or 1
        ours.load_state_dict(weights)

        x = torch.randn(2, 19, 64)
        seen = torch.ones(19, 19).tril().triu(1 - options.get("window", 19)).bool()
        torch.testing.assert_close(ours(x), theirs(x, seen), rtol=1e-5, atol=1e-5)


class TestWindow:
    @torch.no_grad()
    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_sees_so_many_tokens(self, bidirectional):
        mixer = make(window=4, bidirectional=bidirectional)
        x = inputs(1, 12)
        before = mixer(x)
        for t in range(12):
            changed = x.clone()
            changed[:, t] += 1
            differs = (mixer(changed) - before)[0].abs().amax(-1) > 1e-9
            last = t + 3
            first = t - 3 if bidirectional else t
            assert differs.tolist() == [first <= i <= last for i in range(12)]

    def test_bidirectional_has_no_direction(self):
        mixer = make(bidirectional=True, rope=False)
        x = inputs(1, 12)
        same(mixer(x.flip(1)).flip(1), mixer(x))


def test_far_positions_stay_exact():
    """Half precision cannot count beyond 256 or 2048; the angles must not be made in it."""
    mixer = make(n_kv_heads=1).bfloat16()
    x = inputs(1, 1).bfloat16()
    state = mixer.initial_state(1)
    state.lengths, state.longest = state.lengths + 5000, 5000
    state.keys, state.values = (t.new_zeros(1, 5000, 1, 8) for t in (state.keys, state.values))
    with torch.no_grad():
        mixer(x, state)
        key = mixer.k_proj(x).double().view(1, 1, 1, 8)
    angle = 5000 * 10000.0 ** -(torch.arange(4) / 4)
    first, second = key[0, 0, 0].chunk(2)
    expected = torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()])
    torch.testing.assert_close(state.keys[0, 5000, 0].double(), expected.double(), rtol=1e-2, atol=1e-2)


def test_autocast():
    attention_checks.autocast(make(qk_norm=True).float(), 12)


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"window": 99}, {"window": 1}, {"window": 3, "n_heads": 2}])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_flops_count_what_is_seen(options, bidirectional):
    mixer = make(**options, bidirectional=bidirectional)
    n, window = 10, options.get("window", 99)
    seen = sum(abs(i - j) < window and (bidirectional or j <= i) for i in range(n) for j in range(n))
    assert mixer.mixing_flops(n) == pytest.approx(4 * mixer.n_heads * 8 * seen / n)


def test_compiles_packed():
    attention_checks.compiles_packed(make(n_kv_heads=2))


def test_compiles_with_a_state(plain):
    attention_checks.compiles_with_a_state(plain, [5, 1, 1, 1, 1])


class TestErrors:
    @pytest.mark.parametrize(
        ("d_model", "options", "match"),
        [
            (
                100,
                {},
                "`head_dim` must divide d_model, or `n_heads` be given; got head_dim=64 and d_model=100",
            ),
            (32, {}, "got head_dim=64 and d_model=32"),
            (
                64,
                {"head_dim": 16, "n_kv_heads": 3},
                r"`n_kv_heads` must divide the number of heads, 4 .*; got 3",
            ),
            (64, {"head_dim": 0}, "`head_dim` must be at least 1; got 0"),
            (64, {"n_heads": 0}, "`n_heads` must be at least 1; got 0"),
            (64, {"window": 0}, "`window` must be at least 1; got 0"),
            (
                64,
                {"rope_dim": 66},
                "`rope_dim` must be even and at most head_dim=64, or `rope` false; got 66",
            ),
            (63, {"head_dim": 7}, "`rope_dim` must be even .* got 7"),
            (64, {"rope": False, "rope_dim": 8}, "`rope_dim` has no meaning with `rope` false; got 8"),
            (64, {"softcap": -1.0}, "`softcap` must be positive, or 0 for none; got -1.0"),
        ],
    )
    def test_sizes(self, d_model, options, match):
        with pytest.raises(ValueError, match="Attention: .*" + match):
            mixer_class("attention")(d_model, **options)

    def test_bidirectional_has_no_state(self, plain):
        mixer = make(bidirectional=True)
        with pytest.raises(ValueError, match="Attention: there is no `initial_state` with `bidirectional=True`"):
            mixer.initial_state(2)
        with pytest.raises(ValueError, match="`state` must be None, as this mixer sees the whole sequence"):
            mixer(inputs(2, 3), plain.initial_state(2))

    def test_a_state_of_another_mixer(self, plain):
        state = build_mixer("mamba", D_MODEL).double().initial_state(2)
        with pytest.raises(TypeError, match="Attention: `state` must come from .* or an earlier call; got MambaState"):
            plain(inputs(2, 3), state)

    def test_a_wrong_call_leaves_the_state_alone(self, plain):
        _, state = plain(inputs(2, 3), plain.initial_state(2))
        with pytest.raises(ValueError, match="`cu_seqlens` must rise from 0 to the length 4"):
            plain(inputs(1, 4), state, cu_seqlens=packed([3, 2]))
        assert (state.longest, state.lengths.tolist()) == (3, [3, 3])
