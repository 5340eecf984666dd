"""What is the sparse mixers' own: equations, costs, parity; test_mixers.py has the properties that all mixers share."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ssmzoo.mixers.longformer as longformer_module
from ssmzoo import build_mixer
from ssmzoo.mixers import _pattern

pytestmark = pytest.mark.mixer("longformer", "bigbird", "strided")

LENGTHS = (1, 7, 8, 9, 40, 53)
CASES = [
    ("longformer", {"window": 6, "n_global": 2, "bias": True, "out_bias": True}),
    ("longformer", {"window": 6, "n_global": 0}),
    ("longformer", {"window": 10, "n_global": 9, "global_projections": False, "rope": False}),
    ("longformer", {"window": 100, "n_global": 60}),
    ("longformer", {"window": 5, "n_global": 3, "bidirectional": False}),
    ("longformer", {"window": 1, "n_global": 0, "bidirectional": False, "rope_base": 100.0}),
    ("longformer", {"window": 100, "n_global": 60, "bidirectional": False}),
    ("bigbird", {"random_blocks": 1}),
    ("bigbird", {"window_blocks": 1, "global_blocks": 3, "random_blocks": 2, "rope": False, "bias": True}),
    ("bigbird", {"window_blocks": 5, "global_blocks": 0, "random_blocks": 0}),
    ("bigbird", {"global_blocks": 30, "random_blocks": 9}),
    ("strided", {"local_blocks": 2, "stride": 3, "bias": True}),
    ("strided", {"local_blocks": 1, "stride": 5, "rope": False}),
    ("strided", {"local_blocks": 99, "stride": 1}),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(longformer_module, "BLOCK", 8)


def make(name, **options):
    torch.manual_seed(0)
    blocks = {} if name == "longformer" else {"block_size": 8}
    return build_mixer(name, 16, **{"head_dim": 4, **blocks, **options}).double()


def inputs(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turned(x, base):
    """Each pair of channels (i, i + d / 2) as a complex number, turned by position · base^(-2i / d)."""
    d = x.shape[-1]
    place, pair = torch.arange(x.shape[1]).double(), torch.arange(d // 2).double()
    turn = torch.exp(1j * torch.outer(place, base ** (-2 * pair / d)))[:, None]  # (l 1 d/2)
    z = torch.complex(x[..., : d // 2], x[..., d // 2 :]) * turn
    return torch.cat([z.real, z.imag], dim=-1)


def sees(name, mixer, options, length):
    """bool (h l l): the sets S(i) and N(r) of the docstrings, one query, key and head after another."""
    if name == "longformer":
        window, n_global = options["window"], options["n_global"]

        def seen(h, i, j):
            if options.get("bidirectional", True):
                return abs(i - j) <= window / 2 or i < n_global or j < n_global
            return j <= i and (i - j < window or j < n_global)

    elif name == "bigbird":
        blocks, n_global = -(-length // 8), options.get("global_blocks", 2)
        ends = [*range(n_global)[: (n_global + 1) // 2], *(blocks - 1 - c for c in range(n_global // 2))]
        drawn = random_blocks(mixer, length)

        def seen(h, i, j):
            r, c = i // 8, j // 8
            near = abs(r - c) <= options.get("window_blocks", 3) // 2
            return near or r in ends or c in ends or c in drawn[h][r]

    else:

        def seen(h, i, j):
            r, c = i // 8, j // 8
            return j <= i and (r - c < options["local_blocks"] or (c - h) % options["stride"] == 0)

    everyone = range(length)
    table = [[[seen(h, i, j) for j in everyone] for i in everyone] for h in range(mixer.n_heads)]
    return torch.tensor(table)


def random_blocks(mixer, length):
    """Of each head and row of blocks, those that are visible and neither near nor global."""
    pattern = mixer.pattern
    fixed = _pattern.mask_of(type(pattern)(**{**vars(pattern), "n_random": 0}), length, length, torch.device("cpu"))
    drawn = (pattern.mask(length, length).grid() == -1) & (fixed.grid() == -2)
    return [[row.nonzero()[:, 0].tolist() for row in head] for head in drawn]


def attend(mixer, x, seen, projections):
    """Softmax attention with all its logits, by these projections."""
    q, k, v = (p(x).unflatten(-1, (mixer.n_heads, mixer.head_dim)) for p in projections)
    if mixer.rope:
        q, k = turned(q, mixer.rope_base), turned(k, mixer.rope_base)
    logits = torch.einsum("bihd,bjhd->bhij", q, k) / mixer.head_dim**0.5
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)


def reference(mixer, x, seen):
    out = attend(mixer, x, seen, (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    if getattr(mixer, "global_projections", False):
        of_global = (mixer.q_global_proj, mixer.k_global_proj, mixer.v_global_proj)
        is_global = (torch.arange(x.shape[1]) < mixer.n_global)[:, None]
        out = torch.where(is_global, attend(mixer, x, torch.ones_like(seen), of_global), out)
    return mixer.out_proj(out)


def perturbed(mixer):
    """Global projections begin as copies of the others; this makes them differ."""
    with torch.no_grad():
        for i, parameter in enumerate(mixer.parameters()):
            parameter += 0.1 * inputs(*parameter.shape, seed=i)
    return mixer


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_is_the_papers_equation(name, options, length):
    mixer = perturbed(make(name, **options))
    x = inputs(2, length, 16).requires_grad_()
    weight = inputs(2, length, 16, seed=1)
    results = []
    for y in (mixer(x), reference(mixer, x, sees(name, mixer, options, length))):
        wanted = [x, *mixer.parameters()]
        found = torch.autograd.grad((y * weight).sum(), wanted, allow_unused=True)
        results.append([y, *(torch.zeros_like(p) if g is None else g for g, p in zip(found, wanted, strict=True))])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-11)


def test_in_blocks_of_the_published_size(monkeypatch):
    monkeypatch.setattr(longformer_module, "BLOCK", 128)
    for options in ({"window": 80, "n_global": 3}, {"window": 150, "n_global": 2, "bidirectional": False}):
        mixer = perturbed(make("longformer", **options))
        x = inputs(1, 300, 16)
        expected = reference(mixer, x, sees("longformer", mixer, options, 300))
        torch.testing.assert_close(mixer(x), expected, rtol=1e-10, atol=1e-11)


def test_global_projections_start_as_copies():
    mixer = make("longformer", bias=True)
    pairs = [(getattr(mixer, f"{n}_proj"), getattr(mixer, f"{n}_global_proj")) for n in "qkv"]
    for usual, of_global in pairs:
        assert torch.equal(usual.weight, of_global.weight)
        assert torch.equal(usual.bias, of_global.bias)
        assert usual.weight is not of_global.weight
    assert not hasattr(make("longformer", n_global=0), "q_global_proj")
    assert not hasattr(make("longformer", bidirectional=False), "q_global_proj")


@pytest.mark.parametrize(
    ("name", "options", "growth"),
    [
        ("longformer", {"window": 16, "n_global": 2}, 2.0),
        ("longformer", {"window": 16, "n_global": 2, "bidirectional": False}, 2.0),
        ("bigbird", {}, 2.0),
        ("strided", {"local_blocks": 2, "stride": 8}, 3.0),  # with the square, divided by the stride
    ],
)
def test_products_grow_with_what_is_seen(name, options, growth):
    """Operations of all matrix products of a forward and backward pass, as PyTorch's dispatcher counts them."""
    mixer = make(name, **options)

    def products(length):
        with FlopCounterMode(display=False) as counter:
            mixer(inputs(1, length, 16)).sum().backward()
        return counter.get_total_flops()

    few, many = products(512), products(1024)
    assert many < 1.02 * growth * few
    dense = 7 * 2 * 16 * 1024**2  # two products forward and five backward, of all pairs
    assert many < dense / 5


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
@pytest.mark.parametrize("length", [1, 5, 8, 64, 120])
def test_mixing_flops_count_the_mask(name, options, length):
    mixer = make(name, **options)
    if name == "bigbird" and length < 8:
        length = 8  # it counts whole blocks
    keys = float(mixer.pattern.mask(length, length).dense().double().sum()) / (mixer.pattern.heads * length)
    flops = 4 * 16 * keys
    if getattr(mixer, "global_projections", False):
        flops -= 2 * 16 * 16 * max(0, length - mixer.n_global) / length  # queries that nobody asks for
    assert mixer.mixing_flops(length) == pytest.approx(flops, rel=1e-12)


def test_mixing_flops_of_a_million_tokens_need_no_mask():
    for name in ("longformer", "bigbird", "strided"):
        mixer = build_mixer(name, 64, head_dim=16)
        assert mixer.mixing_flops(2**20) < 0.15 * 4 * 64 * 2**20


class TestPublished:
    """Against transformers' layers with the same weights; position embeddings are no part of these."""

    def same(self, mixer, layer, run, length, tolerance):
        for ours, theirs in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
            getattr(mixer, ours).load_state_dict(getattr(layer, theirs).state_dict())
        with torch.no_grad():
            mixer.out_proj.weight.copy_(torch.eye(16))  # theirs is in the layer above
        x = inputs(2, length, 16).requires_grad_()
        results = []
        for y in (mixer(x), run(x)):
            results.append([y, *torch.autograd.grad((y * inputs(*y.shape, seed=1)).sum(), [x])])
        torch.testing.assert_close(*results, rtol=10 * tolerance, atol=tolerance)

    @pytest.mark.parametrize("n_global", [0, 1, 5])
    def test_longformer(self, n_global):
        published = pytest.importorskip("transformers.models.longformer.modeling_longformer")
        config = published.LongformerConfig(
            hidden_size=16, num_attention_heads=4, attention_window=[8], attention_probs_dropout_prob=0.0
        )
        torch.manual_seed(0)
        layer = published.LongformerSelfAttention(config, layer_id=0).double().eval()
        mixer = make("longformer", window=8, n_global=n_global, rope=False, bias=True)
        if n_global:
            for ours, theirs in (("q", "query"), ("k", "key"), ("v", "value")):
                weights = getattr(layer, f"{theirs}_global").state_dict()
                getattr(mixer, f"{ours}_global_proj").load_state_dict(weights)
        is_global = torch.arange(48).expand(2, -1) < n_global

        def run(x):
            return layer(
                x,
                attention_mask=is_global.double() * 10000,
                is_index_masked=torch.zeros_like(is_global),
                is_index_global_attn=is_global,
                is_global_attn=n_global > 0,
            )[0]

        self.same(mixer, layer, run, 48, tolerance=1e-6)  # its softmax is always float32

    @pytest.mark.parametrize("random", [1, 3])
    def test_bigbird(self, random, monkeypatch):
        """With the blocks that our mixer draws."""
        published = pytest.importorskip("transformers.models.big_bird.modeling_big_bird")
        length = 96
        config = published.BigBirdConfig(
            hidden_size=16, num_attention_heads=4, block_size=8, num_random_blocks=random, use_bias=True
        )
        torch.manual_seed(0)
        layer = published.BigBirdBlockSparseAttention(config).double()
        mixer = make("bigbird", random_blocks=random, rope=False, bias=True)
        drawn = [rows[1:-1] for rows in random_blocks(mixer, length)]
        assert {len(row) for head in drawn for row in head} == {random}
        monkeypatch.setattr(layer, "_bigbird_block_rand_mask_with_head", lambda **_: [torch.tensor(h) for h in drawn])
        every = torch.ones(2, length, dtype=torch.float64)
        blocked, band, rows, columns = published.BigBirdModel.create_masks_for_block_sparse_attn(every, 8)

        def run(x):
            return layer(x, band, rows, columns, blocked, blocked)[0]

        self.same(mixer, layer, run, length, tolerance=1e-10)


class TestDraws:
    """BigBird's random blocks."""

    def test_as_many_as_asked_for_where_there_are_so_many(self):
        drawn = random_blocks(make("bigbird", random_blocks=2), 80)
        for head in drawn:
            assert [len(row) for row in head] == [0, *[2] * 8, 0]
        most = random_blocks(make("bigbird", random_blocks=99), 80)
        assert [len(row) for row in most[0]] == [0, 6, *[5] * 6, 6, 0]  # a row has 10 blocks, 3 near ones and 2 ends

    def test_depend_on_seed_head_and_row_and_on_nothing_else(self):
        first = random_blocks(make("bigbird", random_blocks=2), 160)
        torch.rand(3)
        assert random_blocks(make("bigbird", random_blocks=2), 160) == first
        assert random_blocks(make("bigbird", random_blocks=2, seed=1), 160) != first
        assert first[0] != first[1]
        assert first[0][5] != first[0][6]

    def test_leave_the_global_generator_alone(self):
        mixer, x = make("bigbird"), inputs(1, 96, 16)
        _pattern._made.cache_clear()
        before = torch.get_rng_state()
        mixer(x)
        assert torch.equal(torch.get_rng_state(), before)

    def test_reach_everywhere(self):
        counts = torch.zeros(20)
        for seed in range(200):
            for c in random_blocks(make("bigbird", n_heads=1, random_blocks=1, seed=seed), 160)[0][9]:
                counts[c] += 1
        hidden = [c for c in range(1, 19) if abs(c - 9) > 1]
        assert counts.sum() == 200
        assert (counts[hidden] > 2).all()  # 13.3 expected of each, deviation 3.5
        assert counts[hidden].sum() == 200


@pytest.mark.parametrize("name", ["longformer", "bigbird", "strided"])
def test_compiled_code_serves_any_length(name):
    torch._dynamo.reset()
    mixer = make(name)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for length in (17, 33, 40, 64, 9):
        x = inputs(2, length, 16)
        results = []
        for function in (mixer, compiled):
            y = function(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), list(mixer.parameters()))])
        torch.testing.assert_close(*results)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before <= 2


def test_the_masks_operator():
    pattern = make("bigbird").pattern
    arguments = ("BigBirdPattern", [8, 4, 3, 2, 3, 0], 40, 40, torch.device("cpu"))
    torch.library.opcheck(_pattern._members, arguments)
    mask = pattern.mask(40, 40)
    for found, name in zip(_pattern._members(*arguments), ("offsets", "columns", "patterns", "bits"), strict=True):
        assert torch.equal(found, getattr(mask, name))


@pytest.mark.parametrize("name", ["longformer", "bigbird", "strided"])
def test_masks_are_made_once_and_serve_training_after_inference(name):
    _pattern._made.cache_clear()
    mixer, x = make(name), inputs(1, 20, 16)
    with torch.inference_mode():
        expected = mixer(x)
    y = mixer(x)
    y.sum().backward()
    assert torch.equal(y, expected)
    assert _pattern._made.cache_info().misses == 1
    make(name)(x)
    assert _pattern._made.cache_info().misses == 1


@pytest.mark.parametrize("name", ["longformer", "bigbird", "strided"])
def test_another_default_device_changes_nothing(name):
    mixer, x = make(name), inputs(1, 20, 16)
    expected = mixer(x)
    _pattern._made.cache_clear()
    with torch.device("meta"):
        assert torch.equal(mixer(x), expected)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("longformer", {"window": 0}, "Longformer: `window` must be at least 1; got 0"),
        ("longformer", {"window": 7}, "`window` must be even, half of it for each side; got 7"),
        ("longformer", {"n_global": -1}, "`n_global` must be at least 0; got -1"),
        ("longformer", {"n_global": 0, "global_projections": True}, "needs `bidirectional` and `n_global` of at least"),
        ("longformer", {"bidirectional": False, "global_projections": True}, "got bidirectional=False and n_global=1"),
        ("bigbird", {"block_size": 12}, "BigBird: `block_size` must be a multiple of 8; got 12"),
        ("bigbird", {"window_blocks": 2}, "`window_blocks` must be odd, as many on each side; got 2"),
        ("bigbird", {"global_blocks": -1}, "`global_blocks` must be at least 0; got -1"),
        ("bigbird", {"random_blocks": -1}, "`random_blocks` must be at least 0; got -1"),
        ("strided", {"block_size": 0}, "Strided: `block_size` must be a multiple of 8; got 0"),
        ("strided", {"local_blocks": 0}, "`local_blocks` must be at least 1; got 0"),
        ("strided", {"stride": 0}, "`stride` must be at least 1; got 0"),
        ("strided", {"head_dim": 5}, "Strided: `head_dim` must divide d_model, or `n_heads` be given"),
        ("strided", {"head_dim": 5, "n_heads": 3}, "`head_dim` must be even, or `rope` false; got 5"),
        ("bigbird", {"head_dim": 0}, "`head_dim` must be at least 1; got 0"),
        ("bigbird", {"rope_base": 1.0}, "`rope_base` must be above 1; got 1.0"),
    ],
)
def test_values(name, options, message):
    with pytest.raises(ValueError, match=message):
        make(name, **options)


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(TypeError, match="'random_block'. Did you mean 'random_blocks'"):
        make("bigbird", random_block=2)
