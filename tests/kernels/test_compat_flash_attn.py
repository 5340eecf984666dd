"""flash_attn's functions against attention written out with a bias, over packings, caches, pages and refusals."""

import math

import pytest
import torch
import torch.nn.functional as F

from ssmkernels.compat import flash_attn
from ssmkernels.compat.flash_attn import bert_padding

OPTIONS = [
    {},
    {"causal": True},
    {"window_size": (2, 1)},
    {"causal": True, "window_size": (3, -1), "softcap": 2.0},
    {"causal": True, "alibi_slopes": (3,)},
    {"alibi_slopes": (2, 3), "softmax_scale": 0.3},
]


def expected(q, k, v, *, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, softmax_scale=None):
    """(b l h d) over (b m h_kv d): the output and the log-sum-exp."""
    (l, h), m = q.shape[1:3], k.shape[1]
    k, v = (t.repeat_interleave(h // t.shape[2], 2) for t in (k, v))
    logits = torch.einsum("blhd,bmhd->bhlm", q, k) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    ahead = torch.arange(m) - (torch.arange(l)[:, None] + m - l)
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(q.dtype).expand(q.shape[0], h)
        logits = logits - slopes[..., None, None] * ahead.abs()
    left, right = window_size[0], 0 if causal else window_size[1]
    hidden = torch.zeros(l, m, dtype=torch.bool)
    hidden |= ahead > right if right >= 0 else hidden
    hidden |= ahead < -left if left >= 0 else hidden
    logits = logits.masked_fill(hidden, -math.inf)
    weights = logits.softmax(-1).nan_to_num(0)
    return torch.einsum("bhlm,bmhd->blhd", weights, v), logits.logsumexp(-1)


def drawn(options, *shapes):
    torch.manual_seed(0)
    slopes = options.get("alibi_slopes")
    options = options | ({} if slopes is None else {"alibi_slopes": torch.rand(slopes)})
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes], options


def close(actual, wanted):
    torch.testing.assert_close(actual, wanted, atol=1e-6, rtol=1e-6)  # slopes are float32


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("lengths", [(5, 7), (7, 5)])
def test_separate_and_packed_tensors(options, lengths):
    l, m = lengths
    (q, k, v), options = drawn(options, (2, l, 3, 4), (2, m, 1, 4), (2, m, 1, 4))
    out, lse = expected(q, k, v, **options)
    found, found_lse, weights = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True, **options)
    close(found, out)
    close(found_lse, lse)
    assert weights is None
    gradient = torch.randn_like(out)
    for actual, wanted in zip(
        torch.autograd.grad(found, (q, k, v), gradient), torch.autograd.grad(out, (q, k, v), gradient), strict=True
    ):
        close(actual, wanted)
    close(flash_attn.flash_attn_kvpacked_func(q, torch.stack([k, v], 2), **options), out)
    if l < m:
        k, v = (t.expand(-1, -1, 3, -1)[:, :l] for t in (k, v))
        found = flash_attn.flash_attn_qkvpacked_func(torch.stack([q, k, v], 2), **options)
        close(found, expected(q, k, v, **options)[0])


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS)
def test_packed_sequences(options):
    (q, k, v), options = drawn(options, (9, 3, 4), (11, 3, 4), (11, 3, 4))
    cu_q, cu_k = torch.tensor([0, 4, 9]), torch.tensor([0, 8, 11])
    outs, lses = [], []
    for i in range(2):
        rows, columns = slice(*cu_q[i : i + 2]), slice(*cu_k[i : i + 2])
        slopes = options.get("alibi_slopes")
        each = options | ({"alibi_slopes": slopes[i]} if slopes is not None and slopes.ndim == 2 else {})
        out, lse = expected(q[None, rows], k[None, columns], v[None, columns], **each)
        outs.append(out[0])
        lses.append(lse[0])
    for borders in ((cu_q, cu_k), (cu_q.int(), cu_k.int())):
        found, lse, _ = flash_attn.flash_attn_varlen_func(q, k, v, *borders, 5, 8, return_attn_probs=True, **options)
        close(found, torch.cat(outs))
        close(lse, torch.cat(lses, 1))
    found = flash_attn.flash_attn_varlen_kvpacked_func(q, torch.stack([k, v], 1), cu_q, cu_k, 5, 8, **options)
    close(found, torch.cat(outs))
    # Keys and values in pages of 3 tokens, as long as the sequences of 8 and 3 need
    pages, table = torch.randperm(6)[:4], torch.full((2, 3), -7)
    table[0], table[1, 0] = pages[:3], pages[3]
    paged = []
    for t in (k, v):
        place = F.pad(t[:8], (0, 0, 0, 0, 0, 1)).view(3, 3, 3, 4), t[8:][None]
        paged.append(torch.randn(6, 3, 3, 4, dtype=t.dtype).index_copy(0, pages, torch.cat(place)))
    found = flash_attn.flash_attn_varlen_func(q, *paged, cu_q, cu_k, 5, 8, block_table=table, **options)
    close(found, torch.cat(outs))
    k, v, cu = k[:9], v[:9], cu_q
    found = flash_attn.flash_attn_varlen_qkvpacked_func(torch.stack([q, k, v], 1), cu, 5, **options)
    close(found, flash_attn.flash_attn_varlen_func(q, k, v, cu, cu, 5, 5, **options))


def turned(x, place, cos, sin, interleaved):
    """x (n h d) at places (n), pair by pair."""
    x, half = x.clone(), cos.shape[1]
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        c, s = cos[place, i][:, None], sin[place, i][:, None]
        x[..., a], x[..., b] = x[..., a] * c - x[..., b] * s, x[..., a] * s + x[..., b] * c
    return x


CACHED = [
    {"causal": True},
    {"causal": True, "window_size": (3, 0), "softcap": 2.0},
    {},
    {"window_size": (3, 2)},
    {"causal": True, "alibi_slopes": (2, 3)},
    {"alibi_slopes": (3,)},
]


@torch.no_grad()
@pytest.mark.parametrize("options", CACHED)
@pytest.mark.parametrize(
    ("place", "l", "rotary"), [("rows", 1, None), ("rows", 3, True), ("pages", 3, False), ("leftpad", 2, None)]
)
def test_a_cache(options, place, l, rotary):
    shapes = [(2, l, 3, 6), (4, 12, 1, 6), (4, 12, 1, 6), (2, l, 1, 6), (2, l, 1, 6)]
    (q, keys, values, k, v), options = drawn(options, *shapes)
    q, keys, values, k, v = (t.detach().clone() for t in (q, keys, values, k, v))
    before, rows = torch.tensor([4, 7]), torch.tensor([3, 1])
    angles = torch.rand(12, 2, dtype=torch.float64)
    cos, sin = (angles.cos(), angles.sin()) if rotary is not None else (None, None)
    leftpad = torch.tensor([1, 0]) if place == "leftpad" else None
    outs, lses, written = [], [], (keys.clone(), values.clone())
    for i in range(2):
        at = before[i] + torch.arange(l)
        new_q, new_k = q[i], k[i]
        if rotary is not None:
            still = not options.get("causal") and "window_size" not in options
            new_q = turned(new_q, before[i] + 0 * at if still else at, cos, sin, rotary)
            new_k = turned(new_k, at, cos, sin, rotary)
        written[0][rows[i], at], written[1][rows[i], at] = new_k, v[i]
        start, end = 0 if leftpad is None else leftpad[i], before[i] + l
        slopes = options.get("alibi_slopes")
        each = options | ({"alibi_slopes": slopes[i]} if slopes is not None and slopes.ndim == 2 else {})
        out, lse = expected(new_q[None], *(t[rows[i], start:end][None] for t in written), **each)
        outs.append(out)
        lses.append(lse)
    caches, where = (keys, values), {"cache_batch_idx": rows, "cache_leftpad": leftpad}
    if place == "pages":
        caches = tuple(t.reshape(16, 3, 1, 6) for t in caches)
        where = {"block_table": 4 * rows[:, None] + torch.arange(4)}
    more = {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": rotary is not False}
    found, lse = flash_attn.flash_attn_with_kvcache(
        q, *caches, k, v, cache_seqlens=before, return_softmax_lse=True, **more, **where, **options
    )
    close(found, torch.cat(outs))
    close(lse, torch.cat(lses))
    for cache, wanted in zip(caches, written, strict=True):
        close(cache.reshape(wanted.shape), wanted)


@torch.no_grad()
def test_a_cache_without_new_tokens():
    (q, keys, values), _ = drawn({}, (2, 1, 2, 4), (2, 5, 2, 4), (2, 5, 2, 4))
    close(flash_attn.flash_attn_with_kvcache(q, keys, values), expected(q, keys, values)[0])
    found = flash_attn.flash_attn_with_kvcache(q, keys, values, cache_seqlens=3)
    close(found, expected(q, keys[:, :3], values[:, :3])[0])


def test_padding():
    x = torch.randn(3, 5, 2, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    packed, indices, borders, longest, used = bert_padding.unpad_input(x, mask)
    assert torch.equal(packed, x[mask.bool()])
    assert (borders.tolist(), longest, used.tolist()) == ([0, 2, 6, 6], 4, [2, 4, 0])
    assert borders.dtype == torch.int32
    again = bert_padding.pad_input(packed, indices, 3, 5)
    assert torch.equal(again, x * mask[..., None])
    again.sum().backward()
    assert torch.equal(x.grad, mask[..., None].expand_as(x).float())
    unused = torch.tensor([[0, 0, 1, 0, 0], [0] * 5, [0] * 5])
    packed, indices, borders, longest, used = bert_padding.unpad_input(x, mask, unused)
    assert (borders.tolist(), longest, used.tolist()) == ([0, 3, 7, 7], 4, [2, 4, 0])
    assert indices.tolist() == [0, 1, 2, 6, 7, 8, 9]
    in_length = torch.tensor([[2, 1, 0, 0, 0], [5, 0, 0, 0, 0], [0] * 5])
    packed, _, borders, longest, _ = bert_padding.unpad_input_for_concatenated_sequences(x, in_length)
    assert torch.equal(packed, torch.cat([x[0, :3], x[1]]))
    assert (borders.tolist(), longest) == ([0, 2, 3, 8], 5)
    rows = torch.tensor([2, 0])
    kept, residual = bert_padding.index_first_axis_residual(x, rows)
    assert torch.equal(kept, bert_padding.index_first_axis(x, rows))
    assert not residual.requires_grad
    assert torch.equal(bert_padding.index_put_first_axis(kept, rows, 3)[[2, 0]], kept)


def test_refusals():
    q, cache = torch.randn(2, 3, 2, 4), torch.randn(2, 5, 2, 4)
    with pytest.raises(ValueError, match=r"flash_attn_func: `dropout_p` must be in \[0, 1\); got 1.0"):
        flash_attn.flash_attn_func(q, q, q, 1.0)
    with pytest.raises(ValueError, match="attention: the 3 heads of keys and values must divide the 2 heads of `q`"):
        flash_attn.flash_attn_func(q, q.new_zeros(2, 3, 3, 4), q.new_zeros(2, 3, 3, 4), 0.1)
    with pytest.raises(ValueError, match=r"flash_attn_func: `k` must have shape \(b m h_kv d\)"):
        flash_attn.flash_attn_func(q, q[0], q)
    with pytest.raises(ValueError, match="flash_attn_qkvpacked_func: `qkv` must have shape"):
        flash_attn.flash_attn_qkvpacked_func(torch.randn(2, 3, 2, 2, 4))
    with pytest.raises(TypeError, match="flash_attn_varlen_func: `cu_seqlens_q` must be int32 or int64; got float32"):
        flash_attn.flash_attn_varlen_func(q[0], q[0], q[0], torch.tensor([0.0, 3.0]), torch.tensor([0, 3]), 3, 3)
    with_cache = flash_attn.flash_attn_with_kvcache
    with pytest.raises(ValueError, match="the cache has room for 5 tokens of a sequence; .* make 7"):
        with_cache(q, cache, cache, q, q, cache_seqlens=4)
    with pytest.raises(ValueError, match="give `k` and `v`, or neither of them"):
        with_cache(q, cache, cache, q)
    with pytest.raises(ValueError, match="`rotary_cos` needs `k` and `v`"):
        with_cache(q, cache, cache, rotary_cos=torch.ones(9, 2), rotary_sin=torch.ones(9, 2))
    with pytest.raises(ValueError, match="`rotary_cos` must be .*at least 3 by at most 2"):
        with_cache(q, cache, cache, q, q, cache_seqlens=0, rotary_cos=torch.ones(2, 2), rotary_sin=torch.ones(2, 2))
    table, zero = torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="`cache_leftpad` goes with whole caches; got `block_table`"):
        with_cache(q, cache, cache, cache_leftpad=zero, block_table=table)
    with pytest.raises(ValueError, match="`k_cache` must have 2 rows, as `q`; got 1"):
        with_cache(q, cache[:1], cache[:1])


@pytest.mark.parametrize(
    ("borders", "message"),
    [
        ([0, 4, 2, 6], r"must rise from 0 to the length 6 without falling; got \[0, 4, 2, 6\]"),
        ([0, 2, 2, 5], "must rise from 0 to the length 6"),
        ([0, 2, 2, 2**32 + 6], "must rise from 0 to the length 6"),
        ([0, 6], r"must have shape \(b\+1\)"),
        ([], r"must have shape \(s \+ 1\)"),
        (None, "must be a tensor"),
        (0, "must have shape"),
    ],
)
@pytest.mark.parametrize("slopes", [None, torch.rand(3, 4)], ids=["plain", "slopes"])
def test_borders_are_checked(borders, message, slopes):
    q, cu = torch.randn(6, 4, 8), torch.tensor([0, 2, 2, 6])
    bad = None if borders is None else torch.tensor(borders, dtype=torch.int64)
    for name, given in (("q", (bad, cu)), ("k", (cu, bad))):
        wrong = name if borders != [0, 6] else "k"  # the second of two lengths
        with pytest.raises((TypeError, ValueError), match=f"flash_attn_varlen_func: `cu_seqlens_{wrong}` .*{message}"):
            flash_attn.flash_attn_varlen_func(q, q, q, *given, 4, 4, alibi_slopes=slopes)


def test_a_cache_is_written_only_where_it_is():
    """What names no row or page is refused before anything is written."""
    q, new = torch.randn(2, 1, 2, 4), torch.randn(2, 1, 2, 4)
    caches = torch.randn(2, 3, 5, 2, 4)
    kept = caches.clone()

    def refused(message, **where):
        with pytest.raises(ValueError, match=f"flash_attn_with_kvcache: {message}"):
            flash_attn.flash_attn_with_kvcache(q, *caches, new, new, cache_seqlens=2, **where)
        assert torch.equal(caches, kept)

    for row in (-1, 3, 2**32):
        refused(f"`cache_batch_idx` must be between 0 and 2; got .*{row}", cache_batch_idx=torch.tensor([row, 1]))
        refused(f"`block_table` must be between 0 and 2; got .*{row}", block_table=torch.tensor([[row], [1]]))
    for start in (-1, 4):
        refused(rf"`cache_leftpad` .* the lengths \[3, 3\]; got \[0, {start}\]", cache_leftpad=torch.tensor([0, start]))
    with pytest.raises(TypeError, match="`k` must be float32, as `q` is; got float64"):
        flash_attn.flash_attn_with_kvcache(q, *caches, new.double(), new, cache_seqlens=2)
    unused = torch.tensor([[0, -1], [1, 7]])  # second pages, of which no token is in use
    assert (
        flash_attn.flash_attn_with_kvcache(q, *caches, new, new, cache_seqlens=2, block_table=unused).isfinite().all()
    )


def test_no_sequences():
    q, cache = torch.randn(0, 2, 2, 4), torch.randn(3, 5, 2, 4)
    for causal in (True, False):
        out, lse = flash_attn.flash_attn_with_kvcache(q, cache, cache, causal=causal, return_softmax_lse=True)
        assert (out.shape, lse.shape) == (q.shape, (0, 2, 2))


def test_windows_and_masks_of_another_kind():
    q = torch.randn(2, 3, 2, 4)
    for window in (None, 3, (1, 2, 3)):
        with pytest.raises(TypeError, match=r"flash_attn_func: `window_size` must be two ints \(left, right\)"):
            flash_attn.flash_attn_func(q, q, q, window_size=window)
        with pytest.raises(TypeError, match="flash_attn_with_kvcache: `window_size` must be two ints"):
            flash_attn.flash_attn_with_kvcache(q, q, q, window_size=window)
    with pytest.raises(ValueError, match=r"unpad_input: `attention_mask` must have shape \(b l\) with b=2, l=3"):
        bert_padding.unpad_input(q, torch.ones(2, 2))


@pytest.mark.parametrize("options", [{}, {"causal": True, "alibi": True}, {"window_size": torch.tensor([2, 1])}])
def test_dropout(options):
    """The output is the mean with the weights that were kept, gradients included, and half of them were dropped."""
    torch.manual_seed(0)
    alibi, options = options.get("alibi"), {name: value for name, value in options.items() if name != "alibi"}
    q = torch.randn(3, 7, 4, 8, dtype=torch.float64, requires_grad=True)
    kv = torch.randn(3, 9, 2, 2, 8, dtype=torch.float64, requires_grad=True)
    slopes = torch.rand(3, 4) if alibi else None

    def run():
        torch.manual_seed(1)
        return flash_attn.flash_attn_kvpacked_func(
            q, kv, 0.5, 0.3, alibi_slopes=slopes, return_attn_probs=True, **options
        )

    out, lse, weights = run()
    assert torch.equal(out, run()[0])
    without, expected_lse, none = flash_attn.flash_attn_kvpacked_func(
        q, kv, 0.0, 0.3, alibi_slopes=slopes, return_attn_probs=True, **options
    )
    assert none is None
    torch.testing.assert_close(lse, expected_lse)
    assert not torch.allclose(out, without)
    k, v = kv.repeat_interleave(2, dim=3).unbind(2)
    distance = torch.arange(9) - torch.arange(2, 9)[:, None]
    seen = distance <= 0 if options.get("causal") else torch.ones_like(distance) > 0
    seen = seen & (distance >= -2) & (distance <= 1) if "window_size" in options else seen
    s = 0.3 * torch.einsum("blhd,bmhd->bhlm", q, k)
    s = (s if slopes is None else s - slopes[:, :, None, None] * distance.abs()).masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(weights.abs(), torch.exp(s - s.amax(-1, keepdim=True)))
    dropped = (weights < 0)[seen.expand_as(weights)].double().mean()
    assert 0.4 < dropped < 0.6
    mean = torch.einsum("bhlm,bmhd->blhd", 2 * s.softmax(-1) * (weights >= 0), v)
    torch.testing.assert_close(out, mean)
    w = torch.randn_like(out)
    for a, b in zip(*(torch.autograd.grad(t, (q, kv), w) for t in (out, mean)), strict=True):
        torch.testing.assert_close(a, b)


def test_dropout_of_packed_sequences():
    q, borders, longer = torch.randn(7, 2, 4), torch.tensor([0, 2, 7]), torch.tensor([0, 3, 7])
    torch.manual_seed(1)
    out, lse, weights = flash_attn.flash_attn_varlen_func(
        q, q, q, borders, longer, 5, 4, 0.3, causal=True, return_attn_probs=True
    )
    torch.manual_seed(1)
    parts = [
        flash_attn.flash_attn_func(q[None, a:b], q[None, c:d], q[None, c:d], 0.3, causal=True, return_attn_probs=True)
        for a, b, c, d in ((0, 2, 0, 3), (2, 7, 3, 7))
    ]
    assert torch.equal(out, torch.cat([part[0][0] for part in parts]))
    assert torch.equal(lse, torch.cat([part[1][0] for part in parts], 1))
    assert weights.shape == (2, 2, 5, 4)
    assert torch.equal(weights[:1, :, :2, :3], parts[0][2])
    assert torch.equal(weights[1:], parts[1][2])
    assert not weights[0, :, 2:].any()
    assert out[2].eq(0).all()  # a query that sees no key


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_keys_without_room_raise_what_the_package_raises_too(error):
    q, pages, table = torch.randn(1, 1, 2, 4), torch.randn(3, 5, 2, 4), torch.zeros(1, 1, dtype=torch.int32)
    with_cache = flash_attn.flash_attn_with_kvcache
    with pytest.raises(error, match="with_kvcache: `block_table` has room for 5 tokens of a sequence; .* make 6"):
        with_cache(q, pages, pages, q, q, cache_seqlens=5, block_table=table)
    with pytest.raises(error, match="with_kvcache: the cache has room for 5 tokens of a sequence; .* make 6"):
        with_cache(q, pages[:1], pages[:1], cache_seqlens=6)
    borders = torch.tensor([0, 6], dtype=torch.int32)
    with pytest.raises(error, match="varlen_func: `block_table` has room for 5 tokens a sequence; got 6"):
        flash_attn.flash_attn_varlen_func(q[0], pages, pages, borders // 6, borders, 1, 6, block_table=table)
