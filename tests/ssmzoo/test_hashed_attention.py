"""What is particular to ``hash``, ``qk_sparse`` and ``hyper``; the properties that all mixers share are elsewhere."""

from __future__ import annotations

import csv
import math

import pytest
import torch

from ssmkernels import attention
from ssmzoo import build, build_mixer
from ssmzoo.bench.approximate import main
from ssmzoo.mixers._draws import UNIT
from ssmzoo.mixers._lsh import angular_ranks, rotation_buckets

pytestmark = pytest.mark.mixer("hash", "qk_sparse", "hyper")


def make(name, d_model=16, **options):
    torch.manual_seed(0)
    return build_mixer(name, d_model, **{"head_dim": 8, **options}).double()


def inputs(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def under(weights, q, k, v):
    """Softmax attention whose exponentials are multiplied by weights (b h l m); 0 where all are."""
    a = torch.exp(torch.einsum("blhd,bmhd->bhlm", q, k) / math.sqrt(q.shape[-1])) * weights
    total = a.sum(-1, keepdim=True)
    return torch.einsum("bhlm,bmhd->blhd", a / total.masked_fill(total == 0, 1), v)


def projected(mixer, x):
    places = torch.arange(x.shape[1])[None]
    return mixer.project(x, places)


def with_gradients(mixer, x, y, weight):
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), [x, *mixer.parameters()])]


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("options", [{}, {"n_rounds": 2}, {"n_rounds": 3}, {"shared_qk": True, "rope": False}], ids=str)
def test_hash_is_dense_attention_under_its_mask(options, bidirectional):
    mixer = make("hash", n_buckets=4, bidirectional=bidirectional, **options)
    x, weight = inputs(2, 33, 16).requires_grad_(), inputs(2, 33, 16, seed=1)
    q, k, v, _ = projected(mixer, x)
    q_buckets, k_buckets = (rotation_buckets(t, mixer.rotations).transpose(1, 2) for t in (q, k))  # (b h l rounds)
    seen = (q_buckets[:, :, :, None] == k_buckets[:, :, None]).any(-1)
    if not bidirectional:
        seen = seen.tril()
    assert 0.1 < seen.double().mean() < 0.8
    expected = mixer.out_proj(under(seen.double(), q, k, v).flatten(2))
    found = with_gradients(mixer, x, mixer(x), weight)
    for f, e in zip(found, with_gradients(mixer, x, expected, weight), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-10)


def test_buckets_are_directions():
    mixer = make("hash", n_buckets=8, n_rounds=2)
    x = inputs(1, 50, 2, 8)
    buckets = rotation_buckets(x, mixer.rotations)
    assert torch.equal(rotation_buckets(3 * x, mixer.rotations), buckets)
    assert buckets.min() >= 0
    assert buckets.max() == 7
    assert torch.equal(rotation_buckets(-x, mixer.rotations), (buckets + 4) % 8)
    assert not torch.equal(buckets[..., 0], buckets[..., 1])


def test_a_pair_that_shares_every_bucket_counts_once():
    """With the same rotations in all rounds, three of them are one."""
    one, three = make("hash", n_buckets=4), make("hash", n_buckets=4, n_rounds=3)
    three.load_state_dict({**one.state_dict(), "rotations": one.rotations.expand(3, -1, -1, -1)})
    x = inputs(1, 30, 16)
    torch.testing.assert_close(three(x), one(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("drop", ["learned", "random"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_qk_sparse_is_dense_attention_under_its_mask(drop, bidirectional):
    mixer = make("qk_sparse", drop=drop, bidirectional=bidirectional)
    x, weight = inputs(2, 33, 16).requires_grad_(), inputs(2, 33, 16, seed=1)
    q, k, v, scores = projected(mixer, x)
    if drop == "learned":
        kept_q, kept_k = (scores > 0).unbind(2)
        gate = scores[:, :, 0].sigmoid()[..., None]
    else:
        at = (mixer.offsets / UNIT + (math.sqrt(5) - 1) / 2 * torch.arange(33)[:, None, None]) % 1
        kept_q, kept_k = (at < 0.5).unbind(1)
        gate = torch.ones(1, dtype=torch.float64)
        assert (kept_q.sum(0) - 33 / 2).abs().max() <= 2, "the share to keep, in any stretch"
    seen = kept_q.mT[..., :, None] & kept_k.mT[..., None, :]
    seen = (seen if bidirectional else seen.tril()).expand(2, 2, 33, 33)
    expected = mixer.out_proj((under(seen.double(), q, k, v) * gate).flatten(2))
    found = with_gradients(mixer, x, mixer(x), weight)
    for f, e in zip(found, with_gradients(mixer, x, expected, weight), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-10)


def test_hashes_come_in_the_order_of_a_gray_code():
    projections = torch.eye(3, dtype=torch.float64)[None]
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3)
    ranks = angular_ranks(signs[None, :, None], projections).flatten()
    assert sorted(ranks.tolist()) == list(range(8))
    in_order = signs[ranks.argsort()]
    assert ((in_order[1:] != in_order[:-1]).sum(1) == 1).all()


def hyper_weights(mixer, q, k):
    """How often each pair counts, (b h l m): equation by equation, with the mixer's own draws."""
    (b, l, h, _), m, size = q.shape, k.shape[1], mixer.block_size
    place_q, place_k = (
        angular_ranks(x, mixer.projections).transpose(1, 2).argsort(stable=True).argsort() for x in (q, k)
    )
    last = min(l, m) // size
    block_q, block_k = ((place // size).clamp(max=last) for place in (place_q, place_k))
    weights = q.new_zeros(b, h, l, m)
    for head in range(h):
        for j in (mixer.samples[head] * m // UNIT).tolist():
            weights[:, head, :, j] += m / mixer.sample_size
    return torch.where(block_q[..., :, None] == block_k[..., None, :], 1.0, weights)


def causal_hyper_weights(mixer, q, k):
    l = q.shape[1]
    if l <= mixer.min_seq_len:
        return q.new_ones(q.shape[0], q.shape[2], l, l).tril()
    half = l // 2
    weights = q.new_zeros(q.shape[0], q.shape[2], l, l)
    weights[..., :half, :half] = causal_hyper_weights(mixer, q[:, :half], k[:, :half])
    weights[..., half:, half:] = causal_hyper_weights(mixer, q[:, half:], k[:, half:])
    weights[..., half:, :half] = hyper_weights(mixer, q[:, half:], k[:, :half]) if l - half > mixer.min_seq_len else 1
    return weights


@pytest.mark.parametrize("length", [1, 9, 32, 37])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_hyper_is_the_papers_equation(bidirectional, length):
    sizes = {"min_seq_len": 0 if bidirectional else 8, "block_size": 4, "sample_size": 3, "lsh_num_projs": 3}
    mixer = make("hyper", bidirectional=bidirectional, **sizes)
    x, weight = inputs(2, length, 16).requires_grad_(), inputs(2, length, 16, seed=1)
    q, k, v, _ = projected(mixer, x)
    weights = hyper_weights if bidirectional and length > 1 else causal_hyper_weights
    mixer.min_seq_len = max(1, mixer.min_seq_len)
    expected = mixer.out_proj(under(weights(mixer, q, k), q, k, v).flatten(2))
    found = with_gradients(mixer, x, mixer(x), weight)
    for f, e in zip(found, with_gradients(mixer, x, expected, weight), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-10)


def test_hyper_with_one_block_is_exact():
    mixer = make("hyper", min_seq_len=0, block_size=64, sample_size=5, bidirectional=True)
    x = inputs(1, 40, 16)
    q, k, v, _ = projected(mixer, x)
    expected = mixer.out_proj(attention(q, k, v).flatten(2))
    torch.testing.assert_close(mixer(x), expected, rtol=1e-10, atol=1e-10)


def test_hyper_goes_on_exactly_from_a_state():
    mixer = make("hyper", min_seq_len=8, block_size=4, sample_size=3)
    x = inputs(1, 60, 16)
    exact = make("attention")
    exact.load_state_dict({n: p for n, p in mixer.state_dict().items() if n.endswith("weight")})
    for count in (1, 20):
        _, state = mixer(x[:, :40], mixer.initial_state(1))
        y, _ = mixer(x[:, 40 : 40 + count], state)
        torch.testing.assert_close(y, exact(x)[:, 40 : 40 + count], rtol=1e-10, atol=1e-10)
    assert (mixer(x) - exact(x)).abs().max() > 1e-3, "a whole sequence is approximated"


def assumed(length, clusters, d=16, spread=0.02, seed=0):
    """Queries and keys of tight clusters, a few large weights a query in them, and small weights outside of them."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, d, generator=generator, dtype=torch.float64)
    centres = centres / centres.norm(dim=1, keepdim=True) * 3.2
    cluster = torch.randperm(length, generator=generator) % clusters
    noise = torch.randn(3, length, d, generator=generator, dtype=torch.float64)
    q, k = (centres[cluster] + spread * n for n in noise[:2])
    return tuple(t[None, :, None] for t in (q, k, noise[2]))


def test_hyper_keeps_the_papers_bound():
    """Theorem 1 in the operator norm: the error is at most ε ‖softmax‖ ‖V‖.

    With weights outside of the blocks that differ by a factor κ at most, the sample of n gives their sums within
    κ / √n in the mean square (lemma 1), and the numerator likewise: ε is twice that, and four of five draws keep it.
    """
    q, k, v = assumed(512, 16)
    exact = attention(q, k, v)[0, :, 0]
    weights = torch.exp(torch.einsum("blhd,bmhd->blm", q, k)[0] / 4)
    softmax = weights / weights.sum(-1, keepdim=True)
    errors = {}
    for n in (16, 256):
        kept = []
        for seed in range(10):
            sizes = {"block_size": 64, "sample_size": n, "min_seq_len": 0, "lsh_num_projs": 12, "seed": seed}
            mixer = make("hyper", head_dim=16, n_heads=1, bidirectional=True, **sizes)
            near = hyper_weights(mixer, q, k)[0, 0] == 1
            outside = weights.masked_fill(near, torch.nan)
            kappa = float(outside.nan_to_num(0).max() / outside.nan_to_num(torch.inf).min())
            found = mixer.whole(q, torch.zeros(1, 1), q, k, v)[0, :, 0]
            error = torch.linalg.matrix_norm(found - exact, 2)
            bound = (
                2
                * kappa
                / math.sqrt(n)
                * torch.linalg.matrix_norm(softmax, 2)
                * torch.linalg.matrix_norm(v[0, :, 0], 2)
            )
            kept.append(bool(error <= bound))
            errors.setdefault(n, []).append(float((found - exact).norm() / exact.norm()))
        assert sum(kept) >= 8
    few, many = (sorted(errors[n])[5] for n in (16, 256))
    assert many < few / 2, "four times less for sixteen times the samples; half of that must show"


def test_samples_estimate_sums_without_bias():
    """The mean over many draws of numerator and normaliser comes to the exact ones."""
    q, k = (inputs(1, 24, 1, 8, seed=s) for s in range(2))
    mixer = make("hyper", 8, n_heads=1, block_size=4, sample_size=6, min_seq_len=0, bidirectional=True)
    projections = mixer.projections.clone()
    exact = torch.exp(torch.einsum("blhd,bmhd->bhlm", q, k) / math.sqrt(8))
    sums = []
    for mixer.seed in range(1000):
        mixer.redraw()
        mixer.projections.copy_(projections)
        sums.append((exact * hyper_weights(mixer, q, k)).sum(-1))
    sums = torch.stack(sums)
    standard_error = sums.std(0) / math.sqrt(len(sums))
    assert ((sums.mean(0) - exact.sum(-1)).abs() < 4.5 * standard_error).all()


@pytest.mark.parametrize("name", ["hash", "hyper", "qk_sparse"])
def test_draws_are_saved_and_follow_seed_and_layer(name):
    options = {"drop": "random"} if name == "qk_sparse" else {}
    buffers = {"hash": ("rotations",), "hyper": ("projections", "samples"), "qk_sparse": ("offsets",)}[name]
    first, again, other = make(name, **options), make(name, **options), make(name, seed=1, **options)
    for buffer in buffers:
        assert buffer in first.state_dict()
        assert torch.equal(getattr(first, buffer), getattr(again, buffer))
        assert not torch.equal(getattr(first, buffer), getattr(other, buffer))
    options = {"head_dim": 8, **options}
    model = build({"d_model": 16, "n_layers": 2, "pattern": [name], "mixers": {name: options}, "vocab_size": 16})
    layers = [dict(block.mixer.named_buffers()) for block in model.layers]
    for buffer in buffers:
        assert not torch.equal(layers[0][buffer], layers[1][buffer])
        half = make(name, **options).bfloat16()
        assert getattr(half, buffer).dtype in (torch.bfloat16, torch.int64)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("hash", {"n_buckets": 5}, "Hash: `n_buckets` must be even; got 5"),
        ("hash", {"n_buckets": 0}, "Hash: `n_buckets` must be at least 2; got 0"),
        ("hash", {"n_rounds": 5}, "Hash: `n_rounds` must be at most 4; got 5"),
        ("hash", {"n_buckets": 8192}, "Hash: `n_buckets` must be at most 4096; got 8192"),
        ("qk_sparse", {"keep_keys": 0.0}, "QKSparse: `keep_keys` must be above 0 and at most 1; got 0.0"),
        ("qk_sparse", {"drop": "some"}, "`drop`"),
        ("hyper", {"sample_size": 0}, "Hyper: `sample_size` must be at least 1; got 0"),
        ("hyper", {"lsh_num_projs": 33}, "Hyper: `lsh_num_projs` must be at most 32; got 33"),
        ("hyper", {"head_dim": 7}, "Hyper: `head_dim` must be even, or `rope` false; got 7"),
    ],
)
def test_errors(name, options, match):
    with pytest.raises((ValueError, TypeError), match=match):
        make(name, **{"n_heads": 2, **options})


def test_the_figure_of_errors(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    path, table = tmp_path / "errors.svg", tmp_path / "errors.csv"
    rows = main(
        [
            "--length",
            "2100",
            "--bidirectional",
            "--samples",
            "1",
            "--only",
            "hash-16",
            "hyper-64",
            "--figure",
            str(path),
            "--csv",
            str(table),
        ]
    )
    assert path.stat().st_size > 1000
    assert [row.way for row in rows] == ["hash-16", "hyper-64"]
    for row in rows:
        assert 0 < row.share < 0.2
        assert 0 < row.error < 0.1
    lines = list(csv.DictReader(table.open()))
    assert [(line["way"], float(line["error"]), line["length"]) for line in lines] == [
        (row.way, row.error, "2100") for row in rows
    ]
    assert all(line["cpu"] for line in lines)
    assert "% off" in capsys.readouterr().out.splitlines()[-1]
