"""Attention's state in pages: it computes what the dense one does, and shares pages without anyone noticing.

That every option of the mixer goes with it stands in test_attention_mixer.py.
"""

from __future__ import annotations

import copy
import functools
import gc
import itertools
from collections import Counter

import pytest
import torch
import yaml
from attention_layers import D_MODEL, cache_of, check_same_calls, gradients, in_pieces, inputs, make_mixer, packed
from hypothesis import given, settings
from hypothesis import strategies as st

import ssmkernels
import ssmzoo
from ssmzoo.cache.calls import FEW
from ssmzoo.cache.hidden import PagedHiddenCache
from ssmzoo.cache.paged import PagedCache
from ssmzoo.mixers.attention import Attention, ConvolvedState
from ssmzoo.mixers.mla import PagedLatentCache

pytestmark = pytest.mark.mixer("attention", "mla")

SIZES = pytest.mark.parametrize("page_size", [1, 3, 16])
MLA = {"n_heads": 2, "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
KINDS = {
    "keys and values": ("attention", {"head_dim": 8, "n_kv_heads": 2}, PagedCache),
    "window": ("attention", {"head_dim": 8, "n_kv_heads": 2, "window": 6}, PagedCache),
    "convolution": ("attention", {"head_dim": 8, "d_conv": 3}, ConvolvedState),
    "hidden": ("attention", {"head_dim": 8, "cache": "hidden", "rope": False, "alibi": True}, PagedHiddenCache),
    "latents": ("mla", MLA, PagedLatentCache),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def make(name="attention", **options):
    return make_mixer(name, **{"page_size": 4, **({} if name == "mla" else {"head_dim": 8}), **options})


def pool_of(state):
    return cache_of(state).pages.pool


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


class TestAsDense:
    @SIZES
    @torch.no_grad()
    def test_chunks_packed_chunks_and_selections(self, kind, page_size):
        name, options, state_class = kind
        paged, dense = make(name, **options, page_size=page_size), make(name, **options, page_size=None)
        a, b = paged.initial_state(3), dense.initial_state(3, 30)
        assert type(a) is state_class
        calls = [[5, 0, 9], 1, 0, [1, 12, 40], FEW + 3, [0, 2, 1], "select", 2, [1, 1, 1], 1, FEW, FEW + 1]
        for states in check_same_calls(paged, dense, (a, b), calls):
            assert torch.equal(*(cache_of(state).lengths for state in states))

    @SIZES
    @torch.no_grad()
    def test_generation(self, page_size):
        prompts, drawn = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7]], []
        for size in (None, page_size):
            torch.manual_seed(0)
            attention = {"head_dim": 8, "n_kv_heads": 2, "page_size": size}
            model = ssmzoo.build("transformer++-tiny", d_model=D_MODEL, n_layers=2, mixers={"attention": attention})
            drawn.append(model.double().generate(prompts, 20, seed=3))
        assert drawn[0] == drawn[1]

    def test_a_model_comes_back_from_its_config(self):
        options = {"head_dim": 8, "page_size": 64}
        model = ssmzoo.build("transformer++-tiny", d_model=D_MODEL, n_layers=1, mixers={"attention": options})
        again = ssmzoo.build(ssmzoo.ModelConfig.from_dict(yaml.safe_load(model.config.to_yaml())))
        assert again.config == model.config
        assert again.blocks[0].mixer.page_size == 64

    @torch.no_grad()
    def test_autocast(self):
        mixer, x = make(qk_norm=True).float(), inputs(2, 20).float()
        with torch.autocast("cpu", torch.bfloat16):
            whole = mixer(x)
            state = mixer.initial_state(2, 20)
            room = len(pool_of(state).free)
            _, state = mixer(x[:, :12], state)
            assert len(pool_of(state).owners) == room  # what was set aside still is
            chunk, state = mixer(x[:, 12:], state)
        assert pool_of(state).keys.dtype == torch.bfloat16
        torch.testing.assert_close(chunk, whole[:, 12:], rtol=0.05, atol=0.05)

    @pytest.mark.parametrize("options", [{"window": 6}, {"cache": "hidden", "rope": False}], ids=str)
    @torch.no_grad()
    def test_compiles_in_parts(self, options):
        """Not as one graph: lists of pages are the host's."""
        mixer, x = make(**options), inputs(2, 24)
        torch._dynamo.reset()
        compiled = torch.compile(mixer, backend="eager")
        state, outputs = mixer.initial_state(2, 20), []
        for piece in x.split([5, 1, 1, FEW + 6, 1, 1, 1], dim=1):
            y, state = compiled(piece, state)
            outputs.append(y)
        same(torch.cat(outputs, dim=1), mixer(x))


class TestSharing:
    @torch.no_grad()
    def test_a_clone_takes_a_page_when_it_is_written_to(self, kind):
        name, options, _ = kind
        mixer, x = make(name, **options), inputs(2, 14)
        _, state = mixer(x, mixer.initial_state(2))
        pool, before = pool_of(state), pool_of(state).in_use
        branches = [state.clone() for _ in range(3)]
        assert all(pool_of(branch) is pool for branch in branches)
        assert pool.in_use == before
        for number, branch in enumerate(branches, 1):  # both sequences have begun a page
            y, _ = mixer(inputs(2, 1, seed=number), branch)
            assert pool.in_use == before + 2 * number
            same(y, mixer(torch.cat([x, inputs(2, 1, seed=number)], dim=1))[:, 14:])
        y, state = mixer(x[:, :1], state)  # has them to itself by now
        assert pool.in_use == before + 6
        same(y, mixer(torch.cat([x, x[:, :1]], dim=1))[:, 14:])

    @torch.no_grad()
    def test_full_pages_stay_shared(self):
        mixer = make()
        _, state = mixer(inputs(1, 12), mixer.initial_state(1))
        beams = state.select([0] * 5)
        del state
        pool = pool_of(beams)
        assert pool.in_use == 3
        _, beams = mixer(inputs(5, 1), beams)
        assert pool.in_use == 3 + 5
        beams = beams.select([4, 4, 4])
        assert pool.in_use == 3 + 1
        _, beams = mixer(inputs(3, 1), beams)
        assert pool.in_use == 3 + 3

    @torch.no_grad()
    def test_states_within_states(self):
        attention = {"head_dim": 8, "page_size": 4, "d_conv": 2}
        mixers = {"both": {"kind": "parallel", "branches": ["attention", "gru"]}, "attention": attention, "gru": {}}
        model = ssmzoo.build("transformer++-tiny", d_model=D_MODEL, pattern=["both"], n_layers=1, mixers=mixers)
        ids = torch.arange(18).view(2, 9)
        _, state = model(ids, model.initial_state(2))
        pool = pool_of(state.layers[0].branches[0])
        before = pool.in_use
        kept = state.clone(), state.select([1, 0])
        assert pool.in_use == before
        assert all(pool_of(s.layers[0].branches[0]) is pool for s in kept)
        model(ids, state)
        for s, prompts in zip(kept, (ids, ids.flip(0)), strict=True):
            y, _ = model(ids, s)
            torch.testing.assert_close(y, model(torch.cat([prompts, ids], dim=1))[:, 9:], rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def test_pages_are_given_back(self, kind):
        name, options, _ = kind
        mixer = make(name, **options)
        _, state = mixer(inputs(3, 11), mixer.initial_state(3))
        pool, branch, chosen = pool_of(state), state.clone(), state.select([1, 1])
        _, branch = mixer(inputs(3, 9), branch)
        del state, branch
        assert pool.in_use == len(cache_of(chosen).pages.distinct)
        del chosen
        gc.collect()
        assert pool.in_use == 0
        assert sorted(pool.free) == list(range(len(pool.owners)))

    @torch.no_grad()
    def test_dropped_pages_are_used_again(self):
        mixer = make()
        _, state = mixer(inputs(1, 9), mixer.initial_state(1))
        pool = pool_of(state)
        for seed in range(50):
            branch = state.select([0, 0])
            _, branch = mixer(inputs(2, 6, seed=seed), branch)
        assert len(pool.owners) <= 4 * pool.in_use

    @torch.no_grad()
    def test_a_deep_copy_has_a_pool_of_its_own(self):
        mixer, x = make(), inputs(2, 9)
        _, state = mixer(x, mixer.initial_state(2))
        twin = copy.deepcopy(state)
        assert pool_of(twin) is not pool_of(state)
        mixer(-x, state)
        same(mixer(x, twin)[0], mixer(torch.cat([x, x], dim=1))[:, 9:])

    @torch.no_grad()
    def test_beams(self):
        """A beam search through select finds the beams that one without a state finds."""
        torch.manual_seed(0)
        attention = {"head_dim": 8, "page_size": 3}
        model = ssmzoo.build("transformer++-tiny", d_model=D_MODEL, n_layers=2, mixers={"attention": attention})
        model, width, prompt = model.double(), 4, torch.tensor([[3, 1, 4, 1, 5]])
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        logits, state = model(prompt, model.initial_state(1))
        ids, scores = prompt, torch.zeros(1, 1, dtype=torch.float64)
        for _ in range(12):
            expected = model(ids)[:, -1].log_softmax(-1)
            step = logits[:, -1].log_softmax(-1)
            same(step, expected)
            total = (scores + step).flatten()
            scores, best = total.topk(width)
            beam, token = best // step.shape[1], best % step.shape[1]
            ids, scores = torch.cat([ids[beam], token[:, None]], dim=1), scores[:, None]
            logits, state = model(token[:, None], state.select(beam))
        assert len({tuple(row) for row in ids.tolist()}) == width
        pool = pool_of(state.layers[0])
        assert pool.in_use == len(cache_of(state.layers[0]).pages.distinct) < width * 6


operations = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["append", "differentiable"]), st.integers(0, 9), st.integers(0, 7)),
        st.tuples(st.just("packed"), st.integers(0, 9), st.lists(st.integers(0, 6), min_size=1, max_size=4)),
        st.tuples(st.sampled_from(["clone", "drop", "trim"]), st.integers(0, 9), st.none()),
        st.tuples(st.just("select"), st.integers(0, 9), st.lists(st.integers(0, 3), max_size=4)),
        st.tuples(st.just("to"), st.integers(0, 9), st.sampled_from([torch.float32, torch.float64])),
    ),
    max_size=25,
)


class TestAnyOrder:
    """Against plain lists of tokens, after any operations on any of several states."""

    @settings(max_examples=200, deadline=None, database=None, derandomize=True)
    @given(
        page_size=st.sampled_from([1, 2, 3, 16]),
        keep=st.sampled_from([None, 0, 1, 4]),
        capacity=st.sampled_from([0, 20]),
        operations=operations,
    )
    def test_states_hold_what_they_were_given(self, page_size, keep, capacity, operations):
        first = PagedCache.empty(torch.empty(0, dtype=torch.float64), (2, 1, 1, 1), capacity, keep, page_size)
        caches, given = [first], [[[], []]]  # of each cache, of each sequence, its tokens
        del first
        number = itertools.count(1)
        for operation, which, argument in operations:
            if not caches:
                break
            which %= len(caches)
            cache, tokens = caches[which], given[which]
            if operation in ("append", "differentiable", "packed"):
                s = len(tokens)
                lengths = [argument] * s if operation != "packed" else (argument * 4)[:s]
                new = [[next(number) for _ in range(l)] for l in lengths]
                k = torch.tensor([*itertools.chain(*new)], dtype=pool_of(cache).keys.dtype)
                if operation == "packed":
                    k = k.view(1, -1, 1, 1)
                    cache.append_packed(k, -k, packed(lengths), differentiable=False)
                else:
                    k = k.view(s, argument, 1, 1)
                    cache.append(k, -k, operation == "differentiable")
                given[which] = [old + added for old, added in zip(tokens, new, strict=True)]
            elif operation == "clone":
                caches.append(cache.clone())
                given.append(tokens)
            elif operation == "select":
                chosen = [i for i in argument if i < len(tokens)]
                caches.append(cache.select(chosen))
                given.append([tokens[i] for i in chosen])
            elif operation == "to":
                caches.append(cache.to(argument))
                given.append(tokens)
            elif operation == "trim":
                cache.trim()
            else:
                del caches[which], given[which]
            del cache
            self.check(caches, given, keep)

    def check(self, caches, given, keep):
        held = {}
        for cache, tokens in zip(caches, given, strict=True):
            here = [row[len(row) - count :] for row, count in zip(tokens, cache.counts, strict=True)]
            assert all(count >= min(len(row), keep or 0) for count, row in zip(cache.counts, tokens, strict=True))
            assert cache.lengths.tolist() == [len(row) for row in tokens]
            assert cache.held.tolist() == cache.counts == [len(row) for row in here]
            assert (cache.longest, cache.even) == (max(cache.counts, default=0), len(set(cache.counts)) <= 1)
            k, v, borders = cache.packed(torch.ones(len(tokens), dtype=torch.bool))
            assert k.flatten().tolist() == (-v).flatten().tolist() == [*itertools.chain(*here)]
            assert borders.tolist() == packed([len(row) for row in here]).tolist()
            k, _, lengths = cache.recent(1, 2)
            for row, found, length in zip(here, k[..., 0, 0].tolist(), lengths.tolist(), strict=True):
                assert found[:length] == row[len(row) - length :]
            assert [len(row) for row in cache.pages.rows] == [-(-n // pool_of(cache).page_size) for n in cache.counts]
            held.setdefault(id(pool_of(cache)), (pool_of(cache), Counter()))[1].update(
                itertools.chain(*cache.pages.rows)
            )
        for pool, owners in held.values():
            assert pool.owners == [owners[page] for page in range(len(pool.keys))]
            assert sorted(pool.free) == [page for page, count in enumerate(pool.owners) if not count]


class TestMemory:
    def bytes_for(self, window, page_size, sequences):
        """Twice what a sequence needs, and the table, lengths and starts."""
        blocks = (window - 1) // page_size + 2
        return 2 * sequences * blocks * page_size * 2 * 8 * 8 + 4 * sequences * (blocks + 2)

    @pytest.mark.parametrize("window", [1, 2, 30])
    @SIZES
    @torch.no_grad()
    def test_bounded_for_ever_with_a_window(self, window, page_size):
        mixer = make(window=window, n_kv_heads=1, page_size=page_size)
        x = inputs(2, 500)
        state, outputs = mixer.initial_state(2), []
        for piece in x.split([1, 3] + [1] * 496, dim=1):
            y, state = mixer(piece, state)
            outputs.append(y)
            assert state.nbytes <= self.bytes_for(window, page_size, 2)
        same(torch.cat(outputs, dim=1), mixer(x))
        assert state.lengths.tolist() == [500, 500]

    @SIZES
    @torch.no_grad()
    def test_long_chunks_leave_nothing_behind(self, page_size):
        mixer = make(window=30, n_kv_heads=1, page_size=page_size)
        lengths = [500, 1, FEW + 1, 1, 200, 3, 300, *[FEW] * 20, 1]
        x = inputs(2, sum(lengths))
        state, outputs = mixer.initial_state(2, 10**6), []
        for piece in x.split(lengths, dim=1):
            y, state = mixer(piece, state)
            outputs.append(y)
            assert state.nbytes <= self.bytes_for(30, page_size, 2)
        same(torch.cat(outputs, dim=1), mixer(x))

    @torch.no_grad()
    def test_sequences_of_several_lengths_with_a_window(self):
        mixer = make(window=6, n_kv_heads=1, page_size=2)
        lengths = [3, 190, 0]
        x, more = inputs(1, sum(lengths)), inputs(3, 60, seed=1)
        _, state = mixer(x, mixer.initial_state(3), cu_seqlens=packed(lengths))
        outputs = []
        for piece in more.split([1] * 60, dim=1):
            y, state = mixer(piece, state)
            outputs.append(y)
            assert state.nbytes <= self.bytes_for(6, 2, 3)
        for row, before in enumerate(x[0].split(lengths)):
            whole = mixer(torch.cat([before, more[row]])[None])
            same(torch.cat(outputs, dim=1)[row], whole[0, len(before) :])

    @torch.no_grad()
    def test_a_branch_keeps_what_the_state_has_dropped(self):
        mixer, x = make(window=5, page_size=2), inputs(1, 60)
        _, state = mixer(x[:, :11], mixer.initial_state(1))
        branch = state.clone()
        for t in range(11, 40):
            _, state = mixer(x[:, t : t + 1], state)
        y, _ = mixer(x[:, 11:12], branch)
        same(y, mixer(x[:, :12])[:, 11:])

    @torch.no_grad()
    def test_pages_stay_shared_where_a_pool_is_too_large(self):
        mixer = make(window=9, n_kv_heads=1, page_size=2)
        _, state = mixer(inputs(1, 8), mixer.initial_state(1))
        branch, long, pool = state.clone(), state.clone(), pool_of(state)
        _, long = mixer(inputs(1, 100), long)
        assert pool_of(long) is not pool  # which it has made large, and left
        assert len(pool.owners) > 50
        for t in range(30):
            _, state = mixer(inputs(1, 1), state)
            _, branch = mixer(inputs(1, 1, seed=1), branch)
            assert t > 5 or pool_of(state) is pool_of(branch) is pool
        for s in (state, branch, long):
            assert s.nbytes <= self.bytes_for(9, 2, 1)

    @torch.no_grad()
    def test_set_aside_it_stays_in_place(self):
        mixer, x = make(n_kv_heads=2), inputs(2, 54)
        state = mixer.initial_state(2, max_length=50)
        assert state.nbytes == 2 * 13 * 4 * 2 * 2 * 8 * 8 + 2 * 4
        place = pool_of(state).keys.data_ptr(), pool_of(state).values.data_ptr()
        for piece in x[:, :52].split([38, 1, 3, 10], dim=1):
            _, state = mixer(piece, state)
            assert (pool_of(state).keys.data_ptr(), pool_of(state).values.data_ptr()) == place
        y, state = mixer(x[:, 52:], state)  # beyond: it grows
        assert len(pool_of(state).owners) == 2 * 26
        same(y, mixer(x)[:, 52:])

    @torch.no_grad()
    def test_of_several_lengths_it_takes_what_each_needs(self):
        """Where the dense cache has the longest one's room for all."""
        sizes = []
        for page_size in (4, None):
            mixer = make(page_size=page_size)
            _, state = mixer(inputs(1, 105), mixer.initial_state(6), cu_seqlens=packed([1, 1, 1, 1, 1, 100]))
            sizes.append(state.nbytes)
        assert sizes[0] < sizes[1] / 4

    @torch.no_grad()
    def test_bytes_are_those_of_the_pool(self):
        mixer = make(n_kv_heads=2)
        _, state = mixer(inputs(2, 10), mixer.initial_state(2))
        pool = 6 * 4 * 2 * 2 * 8 * 8
        assert state.nbytes == pool + 4 * (2 + 2 * 3)
        assert state.clone().nbytes == state.nbytes
        assert state.select([1]).nbytes == pool + 4 * (1 + 3)
        assert state.select([1]).to("cpu").nbytes == pool / 2 + 4 * (1 + 3)  # in a pool of its own

    @torch.no_grad()
    def test_what_lies_past_the_lengths_does_not_matter(self, kind):
        name, options, _ = kind
        mixer, x, results = make(name, **options), inputs(1, 20), []
        for filling in (0.0, torch.nan):
            state = mixer.initial_state(3, max_length=64)
            pool_of(state).keys.fill_(filling)
            pool_of(state).values.fill_(filling)
            first, state = mixer(x, state, cu_seqlens=packed([4, 0, 16]))
            steps = [mixer(inputs(3, n, seed=n), state)[0] for n in (1, 2, FEW + 1)]
            results.append(torch.cat([first.flatten(), *(y.flatten() for y in steps)]))
        assert torch.equal(*results)

    @pytest.mark.parametrize("lengths", [[12, 12], [12, 7]], ids=["even", "uneven"])
    @torch.no_grad()
    def test_single_tokens_wait_for_no_device(self, kind, lengths):
        """On the meta device nothing can be read on the host."""
        name, options, _ = kind
        mixer = make(name, **options)
        _, state = mixer(inputs(1, sum(lengths)), mixer.initial_state(2), cu_seqlens=packed(lengths))
        mixer, state = mixer.to("meta"), state.to("meta")
        x = torch.empty(2, 12, D_MODEL, device="meta", dtype=torch.float64)
        for length in (1, 1, 3, 1, 1):
            y, state = mixer(x[:, :length], state.select([1, 0]).clone())
            assert y.shape == (2, length, D_MODEL)

    @torch.no_grad()
    def test_to_another_dtype(self, kind):
        name, options, _ = kind
        mixer, x = make(name, **options), inputs(2, 20)
        _, state = mixer(x[:, :19], mixer.initial_state(2, 50))
        moved = state.to(torch.float32)
        assert pool_of(moved) is not pool_of(state)
        assert pool_of(moved).keys.dtype == pool_of(moved).values.dtype == torch.float32
        assert cache_of(moved).lengths.dtype == cache_of(moved).block_table.dtype == torch.int32
        expected, _ = mixer(x[:, 19:], state)
        same(expected, mixer(x)[:, 19:])
        y, moved = mixer.float()(x[:, 19:].float(), moved)
        assert y.dtype == pool_of(moved).keys.dtype == torch.float32
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


class TestGradients:
    """Chunks have the gradients of the whole: nothing that a backward pass needs is overwritten."""

    @pytest.mark.parametrize("max_length", [None, 64])
    def test_chunks(self, kind, max_length):
        name, options, _ = kind
        mixer = make(name, **options)
        lengths = [4, 1, 1, 0, FEW + 1, 2]
        x, chunks = inputs(2, 17), functools.partial(in_pieces, mixer, lengths=lengths, max_length=max_length)
        same(gradients(mixer, chunks, x), gradients(mixer, mixer, x))

    def test_tokens_do_without_the_reference(self, kind):
        """Nothing fast that has gradients reads pages, so none are handed to it."""
        name, options, _ = kind
        mixer = make(name, **options)
        _, state = mixer(inputs(2, 9), mixer.initial_state(2))
        with ssmkernels.use(decode_attention="sdpa"):
            y, _ = mixer(inputs(2, 1), state)
        assert y.requires_grad

    def test_branches(self, kind):
        """Two ways on from one state, of which each sequence's gradient is the sum."""
        name, options, _ = kind
        mixer = make(name, **options)

        def branched(x):
            first, state = mixer(x[:, :6], mixer.initial_state(2))
            chosen = state.select([1, 0, 0])
            a, state = mixer(x[:, 6:8], state)
            b, chosen = mixer(x[[1, 0, 0], 8:11], chosen)
            c, chosen = mixer(x[[1, 0, 0], 11:12], chosen)
            d, state = mixer(x[:, 12:13], state)
            return torch.cat([t.flatten() for t in (first, a, b, c, d)])

        def whole(x):
            ways = x[[1, 0, 0]]
            b = mixer(torch.cat([ways[:, :6], ways[:, 8:12]], dim=1))
            a = mixer(torch.cat([x[:, :8], x[:, 12:13]], dim=1))
            parts = a[:, :6], a[:, 6:8], b[:, 6:9], b[:, 9:], a[:, 8:]
            return torch.cat([t.flatten() for t in parts])

        x = inputs(2, 13)
        same(gradients(mixer, branched, x), gradients(mixer, whole, x))

    def test_packed_chunks(self):
        mixer, x = make(window=6), inputs(1, 16)

        def chunks(x):
            first, state = mixer(x[:, :8], mixer.initial_state(2), cu_seqlens=packed([3, 5]))
            second, _ = mixer(x[:, 8:], state, cu_seqlens=packed([6, 2]))
            return torch.cat([first, second], dim=1)

        def whole(x):
            a = mixer(torch.cat([x[:, :3], x[:, 8:14]], dim=1))
            b = mixer(torch.cat([x[:, 3:8], x[:, 14:]], dim=1))
            return torch.cat([a[:, :3], b[:, :5], a[:, 3:], b[:, 5:]], dim=1)

        same(gradients(mixer, chunks, x), gradients(mixer, whole, x))

    def test_frozen_keys_and_values(self):
        """What the queries' gradients need is not written to either, with gradients or without."""
        mixer, x = make(), inputs(2, 13)
        for projection in (mixer.k_proj, mixer.v_proj):
            projection.requires_grad_(False)
        state, outputs = mixer.initial_state(2, 13), []
        for piece in x.split([5, 1, 6, 1], dim=1):
            y, state = mixer(piece, state)
            outputs.append(y)
        with torch.no_grad():
            mixer(x[:, :1], state)
        trained = [mixer.q_proj.weight, mixer.out_proj.weight]
        found = torch.autograd.grad(torch.cat(outputs, dim=1).square().sum(), trained)
        same(found, torch.autograd.grad(mixer(x).square().sum(), trained))

    def test_generating_from_a_state_leaves_its_graph_alone(self):
        mixer, x = make(), inputs(2, 6)
        expected = torch.autograd.grad(mixer(x).square().sum(), mixer.k_proj.weight)
        first, state = mixer(x[:, :3], mixer.initial_state(2, 64))
        branch = state.clone()
        with torch.no_grad():
            for _ in range(3):
                _, branch = mixer(x[:, :1], branch)
            assert pool_of(branch) is not pool_of(state)
        second, state = mixer(x[:, 3:], state)
        loss = first.square().sum() + second.square().sum()
        with torch.no_grad():
            place = None
            for step in range(4):
                _, state = mixer(x[:, :1], state)
                assert step < 1 or pool_of(state) is place  # from the second on it writes in place again
                place = pool_of(state)
        assert not pool_of(state).keys.requires_grad
        same(torch.autograd.grad(loss, mixer.k_proj.weight), expected)


class TestErrors:
    @pytest.mark.parametrize("name", ["attention", "mla"])
    @pytest.mark.parametrize("page_size", [0, -4])
    def test_page_size(self, name, page_size):
        with pytest.raises(ValueError, match=f"`page_size` must be at least 1; got {page_size}"):
            ssmzoo.build_mixer(name, 64, page_size=page_size)

    @pytest.mark.parametrize("page_size", [True, 2.0, "16"])
    def test_page_size_of_the_wrong_type(self, page_size):
        with pytest.raises(TypeError, match="`page_size` of mixer 'attention' must be int or None; got"):
            ssmzoo.build_mixer("attention", 64, page_size=page_size)

    def test_without_a_state(self):
        with pytest.raises(ValueError, match="Attention: `page_size` has no meaning with `bidirectional`"):
            Attention(64, page_size=16, bidirectional=True)

    def test_a_dense_state_is_refused(self):
        with pytest.raises(TypeError, match="`state` must come from .* or an earlier call; got KVCache"):
            make()(inputs(1, 2), make(page_size=None).initial_state(1))

    @torch.no_grad()
    def test_a_wrong_call_leaves_the_state_alone(self):
        mixer = make()
        _, state = mixer(inputs(2, 3), mixer.initial_state(2))
        with pytest.raises(ValueError, match="`cu_seqlens` must rise from 0 to the length 4"):
            mixer(inputs(1, 4), state, cu_seqlens=packed([3, 2]))
        assert (state.counts, state.lengths.tolist(), pool_of(state).in_use) == ([3, 3], [3, 3], 2)

    def test_a_sequence_that_is_not_there(self):
        state = make().initial_state(2)
        for index in (2, -1):
            with pytest.raises(IndexError):
                state.select([index])
