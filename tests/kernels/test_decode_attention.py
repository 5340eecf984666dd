from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attention_formula import attend_to
from implementations import each_of, implemented

from ssmkernels import OPS, attention, decode_attention, explain, native

REFERENCE, SDPA, CPU = implemented(decode_attention, "reference", "sdpa", "cpu")
needs_native = pytest.mark.skipif(bool(native.missing()), reason=f"needs the native CPU library: {native.missing()}")
EITHER = each_of("decode", [REFERENCE, SDPA])

# A base case, and what each further one varies.
CASES = {
    "base": {},
    "several queries": {"l": 3},
    "more queries than tokens": {"l": 5, "lengths": [2, 9, 0]},
    "full": {"lengths": [11, 11, 11]},
    "empty": {"lengths": [0, 4, 0]},
    "window": {"window": (2, 0), "l": 2},
    "window of itself": {"window": (0, -1), "l": 2},
    "window with a right bound": {"window": (3, 5), "l": 2},
    "scale": {"scale": 0.1},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi": True, "l": 2},
    "sinks": {"sinks": True, "lengths": [0, 3, 11]},
    "one head of keys a head": {"h_kv": 4},
    "one head of keys": {"h_kv": 1, "l": 2},
    "head dims of 1": {"k": 1, "v": 1},
    "no queries": {"l": 0},
    "no sequences": {"lengths": []},
    "no cache": {"m": 0, "lengths": [0, 0]},
    "everything": {"l": 3, "window": (4, 0), "scale": 0.7, "softcap": 2.0, "alibi": True, "sinks": True},
}
CASES_OF_SDPA = [case for case, options in CASES.items() if not {"softcap", "sinks"} & options.keys()]


SIZES = {"l": 1, "m": 11, "h": 4, "h_kv": 2, "k": 5, "v": 3}


@pytest.fixture
def arguments(randn):
    def make(dtype=torch.float64, *, lengths=(7, 1, 11), alibi=False, sinks=False, **options):
        l, m, h, h_kv, k, v = (options.pop(name, size) for name, size in SIZES.items())
        s, wide = len(lengths), torch.promote_types(dtype, torch.float32)
        made = {
            "q": randn(s, l, h, k, dtype=dtype),
            "k_cache": randn(s, m, h_kv, k, dtype=dtype),
            "v_cache": randn(s, m, h_kv, v, dtype=dtype),
            "lengths": torch.tensor(lengths, dtype=torch.int32),
            **options,
        }
        if alibi:
            made["alibi_slopes"] = randn(h, dtype=wide).abs()
        if sinks:
            made["sinks"] = randn(h, dtype=wide)
        return made

    return make


def paged(made, page_size=4, seed=0):
    """The same caches in shuffled pages among others; NaN where no token lies, -1 for no page."""
    generator = torch.Generator().manual_seed(seed)
    s, m = made["k_cache"].shape[:2]
    blocks = -(-m // page_size)
    order = torch.randperm(2 * s * blocks, generator=generator)[: s * blocks].view(s, blocks)
    used = torch.arange(blocks) * page_size < made["lengths"][:, None]
    made = dict(made, block_table=torch.where(used, order, -1).int())
    for name in ("k_cache", "v_cache"):
        cache = made[name]
        hidden = (torch.arange(m) >= made["lengths"][:, None])[..., None, None]
        last = blocks * page_size - m
        cache = F.pad(cache.masked_fill(hidden, torch.nan), (0, 0, 0, 0, 0, last), value=torch.nan)
        pages = cache.new_full((2 * s * blocks, page_size, *cache.shape[2:]), torch.nan)
        pages[order] = cache.unflatten(1, (blocks, page_size))
        made[name] = pages
    return made


def naive(
    q,
    k_cache,
    v_cache,
    lengths,
    window=(-1, -1),
    scale=None,
    softcap=0.0,
    alibi_slopes=None,
    sinks=None,
):
    """One query of one head at a time, over the keys that it sees."""
    s, l, h, _ = q.shape
    connected = 0 * sum(x.sum() for x in (q, k_cache, v_cache, alibi_slopes, sinks) if x is not None)
    out = q.new_zeros(s, l, h, v_cache.shape[3]) + connected
    lse = q.new_zeros(s, h, l) + connected  # 0 where there is none, to compare
    for n, i, head in torch.cartesian_prod(*(torch.arange(size) for size in (s, l, h))).tolist():
        shared, position = head // (h // k_cache.shape[2]), int(lengths[n]) - l + i
        first = 0 if window[0] < 0 else max(0, position - window[0])
        seen = range(first, position + 1)
        slope, sink = (None if x is None else x[head] for x in (alibi_slopes, sinks))
        query, keys, values = q[n, i, head], k_cache[n, :, shared], v_cache[n, :, shared]
        biases = {"softcap": softcap, "slope": slope, "sink": sink}
        out[n, i, head], lse[n, head, i] = attend_to(query, keys, values, seen, position, scale=scale, **biases)
    return out, lse


def with_lse(**made):
    out, lse = REFERENCE(**made, return_lse=True)
    return out, lse.masked_fill(lse == -torch.inf, 0)


@pytest.mark.parametrize("case", CASES)
def test_reference_is_the_formula(case, arguments, run, assert_same):
    made = arguments(**CASES[case])
    assert_same(run(with_lse, **made), run(naive, **made))


@pytest.mark.parametrize("case", CASES_OF_SDPA)
def test_sdpa_is_the_reference(case, arguments, run, assert_same):
    made = arguments(**CASES[case])
    assert_same(run(SDPA, **made), run(REFERENCE, **made))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("page_size", [1, 4])
def test_paged_is_dense(case, page_size, arguments):
    made = arguments(**CASES[case])
    torch.testing.assert_close(with_lse(**paged(made, page_size)), with_lse(**made), rtol=1e-12, atol=1e-12)


def test_gradients_through_pages(arguments, run, assert_same):
    made = arguments(l=2, h_kv=1)
    pages = paged(made)
    found = run(REFERENCE, **pages)
    expected = run(REFERENCE, **made)
    for name in ("k_cache", "v_cache"):
        gradient = found.pop(f"gradient of {name}")
        assert gradient.isfinite().all()
        dense = gradient[pages["block_table"].clamp(min=0)].flatten(1, 2)[:, :11]
        used = (torch.arange(11) < made["lengths"][:, None])[..., None, None]
        assert_same({name: dense * used}, {name: expected.pop(f"gradient of {name}")})
    assert_same(found, expected)


@pytest.mark.parametrize("case", ["several queries", "window", "alibi", "everything"])
def test_is_the_last_rows_of_attention(case, arguments, run, assert_same):
    made = arguments(**CASES[case] | {"lengths": [7, 3, 11]})

    def one_by_one(q, k_cache, v_cache, lengths, **options):
        rows = []
        for i, n in enumerate(lengths.tolist()):
            whole = torch.cat([q[i : i + 1, :1].expand(1, n - q.shape[1], -1, -1), q[i : i + 1]], 1)
            out = attention(whole, k_cache[i : i + 1, :n], v_cache[i : i + 1, :n], causal=True, **options)
            rows.append(out[:, n - q.shape[1] :])
        return torch.cat(rows)

    assert_same(run(REFERENCE, **made), run(one_by_one, **made))


@pytest.mark.parametrize(
    ("decode", "case"),
    [(with_lse, "base"), (with_lse, "everything"), (with_lse, "empty"), (SDPA, "base"), (SDPA, "empty")],
)
def test_what_lies_past_the_lengths_is_not_read(decode, case, arguments, run):
    made = arguments(**CASES[case])
    clean = run(decode, **made)
    hidden = torch.arange(11) >= made["lengths"][:, None]
    for value in (torch.nan, torch.inf):
        made["k_cache"][hidden], made["v_cache"][hidden] = value, value
        dirty = run(decode, **made)
        assert all(torch.equal(dirty[name], clean[name]) for name in clean)


@EITHER
def test_a_query_without_keys_gives_zero(decode, arguments, run):
    made = arguments(l=2, lengths=[0, 1, 5])
    blind = torch.tensor([[True, True], [True, False], [False, False]])
    results = run(decode, **made)
    assert (results["output 0"][blind] == 0).all()
    assert all(value.isfinite().all() for value in results.values())
    assert (results["gradient of q"][blind] == 0).all()
    _, lse = REFERENCE(**made, return_lse=True)
    assert torch.equal(lse[:, 0] == -torch.inf, blind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pages", [False, True], ids=["dense", "paged"])
def test_half_precision_is_rounded_once(dtype, pages, arguments):
    made = arguments(dtype, **CASES["everything"])
    double = {n: a.double() if isinstance(a, torch.Tensor) and n != "lengths" else a for n, a in made.items()}
    exact, exact_lse = REFERENCE(**double, return_lse=True)
    out, lse = REFERENCE(**(paged(made) if pages else made), return_lse=True)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    assert (out.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize(("decode", "case"), [(REFERENCE, "everything"), (SDPA, "window"), (SDPA, "full")])
def test_any_strides(decode, case, arguments, run, assert_same, spread):
    made = arguments(**CASES[case])
    spread_out = spread(made) | {"lengths": made["lengths"].repeat_interleave(2)[::2]}
    assert_same(run(decode, **spread_out), run(decode, **made))


@EITHER
def test_a_sequence_alone_is_itself_in_a_batch(decode, arguments):
    made = arguments(l=2)
    out = decode(**made)
    for i in range(3):
        alone = {name: a[i : i + 1] for name, a in made.items()}
        torch.testing.assert_close(decode(**alone)[0], out[i], rtol=1e-12, atol=1e-12)


def test_splits_change_nothing(arguments):
    made = arguments()
    torch.testing.assert_close(decode_attention(**made, num_splits=3), decode_attention(**made))


@needs_native
class TestNative:
    """The native kernel: its numbers are checked by its spec; here what is its own."""

    def long(self, arguments, **options):
        return arguments(torch.float32, **{"m": 1400, "k": 20, "v": 24, "l": 2, "lengths": (1400, 0, 777)} | options)

    @pytest.mark.parametrize("options", [{}, {"window": (900, 0), "alibi": True}, {"num_splits": 5}], ids=str)
    def test_the_same_bits_on_any_number_of_threads_in_any_company_and_in_pages(self, options, arguments, on_threads):
        made = self.long(arguments, **options)
        one, three = (on_threads(n, CPU, **made, return_lse=True) for n in (1, 3))
        in_pages = CPU(**paged(made, 7), return_lse=True)
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(one, three, in_pages, strict=True))
        own = {"q", "k_cache", "v_cache", "lengths"}
        for i in range(3):
            alone = CPU(**{name: a[i : i + 1] if name in own else a for name, a in made.items()})
            assert torch.equal(alone[0], one[0][i])

    @pytest.mark.parametrize("page_size", [1, 3, 16, 1000])
    def test_reads_no_page_but_its_own(self, page_size, arguments):
        """NaN lies in all other pages and past the lengths; past a sequence's pages the table holds anything."""
        made = self.long(arguments)
        pages = paged(made, page_size)
        used = torch.arange(pages["block_table"].shape[1]) * page_size < made["lengths"][:, None]
        for garbage in (2**31 - 1, -(2**31)):
            pages["block_table"] = torch.where(used, pages["block_table"], garbage)
            assert torch.equal(CPU(**pages), CPU(**made))

    def test_any_strides_give_the_same_bits(self, arguments, spread):
        made = self.long(arguments, sinks=True)
        spread_out = spread(made) | {"lengths": made["lengths"].repeat_interleave(2)[::2]}
        assert torch.equal(CPU(**spread_out), CPU(**made))
        by_head = {name: made[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("k_cache", "v_cache")}
        assert torch.equal(CPU(**made | by_head), CPU(**made))
        pages = paged(made, 5)
        table = {"block_table": pages["block_table"].t().contiguous().t()}
        assert torch.equal(CPU(**pages | table), CPU(**pages))

    def test_softcap_of_small_and_large_logits(self, arguments):
        """Below it a softcap changes nothing, to the last digits; far beyond it all logits are equal."""
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
            made = arguments(dtype, m=300, lengths=(300, 2, 40))
            torch.testing.assert_close(CPU(**made, softcap=1e9), CPU(**made), rtol=tolerance, atol=tolerance)
            made["q"], made["k_cache"] = made["q"].abs() * 1e4, made["k_cache"].abs() + 1
            mean = made["v_cache"][1, :2].mean(0).repeat_interleave(2, 0)[None]
            torch.testing.assert_close(CPU(**made, softcap=3.0)[1], mean, rtol=10 * tolerance, atol=10 * tolerance)

    def test_runs_where_no_gradient_is_wanted(self, arguments):
        made = arguments(torch.float32)
        assert explain(decode_attention, **made).chosen == "cpu"
        found = explain(decode_attention, **made | {"q": made["q"].requires_grad_()})
        assert found.chosen == "sdpa"
        assert "no gradient" in found.reasons["cpu"]

    @pytest.mark.parametrize("case", ["base", "everything", "no queries", "no sequences", "no cache"])
    def test_opcheck_and_compile(self, case, arguments):
        made = arguments(torch.float32, **CASES[case])
        for given in (made, paged(made) if made["k_cache"].numel() else made):
            names = ("q", "k_cache", "v_cache", "lengths", "block_table")
            biases = (given.get("alibi_slopes"), given.get("sinks"))
            values = (*(given.get(name) for name in names), 4, 0.3, 0.0, *biases, None, True, False)
            operator = OPS["decode_attention"].implementation("cpu").function.operator
            torch.library.opcheck(operator, values)
            torch._dynamo.reset()
            compiled = torch.compile(CPU, fullgraph=True, backend="aot_eager")
            assert torch.equal(compiled(**given), CPU(**given))

    def test_compiled_code_checks_lengths_and_pages_too(self, arguments):
        made = paged(arguments(torch.float32))
        torch._dynamo.reset()
        compiled = torch.compile(CPU, fullgraph=True, backend="aot_eager")
        compiled(**made)
        for name, value in (("lengths", 13), ("block_table", 10**6)):
            with pytest.raises(ValueError, match=f"`{name}` must"):
                compiled(**made | {name: torch.full_like(made[name], value)})


def test_gradcheck(arguments):
    made = arguments(**CASES["everything"] | {"lengths": [2, 4], "m": 5, "k": 2, "v": 2})
    names = [name for name, a in made.items() if isinstance(a, torch.Tensor) and name != "lengths"]
    rest = {name: a for name, a in made.items() if name not in names}

    def call(*values):
        return with_lse(**dict(zip(names, values, strict=True)), **rest)

    torch.autograd.gradcheck(call, [made[name].requires_grad_() for name in names], fast_mode=True)


@pytest.mark.parametrize(("decode", "case"), [(with_lse, "everything"), (SDPA, "alibi"), (SDPA, "full")])
def test_compiles(decode, case, arguments, assert_compiles):
    assert_compiles(decode, **arguments(torch.float32, **CASES[case]))


def test_compiles_with_pages(arguments):
    made = paged(arguments(torch.float32))
    torch._dynamo.reset()
    compiled = torch.compile(decode_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**made), decode_attention(**made))


@pytest.mark.parametrize(
    ("implementation", "case", "pages"),
    [("reference", case, pages) for case in ("base", "everything", "empty", "no queries") for pages in (False, True)]
    + [("sdpa", case, False) for case in ("base", "full", "alibi", "no queries", "no sequences")],
)
def test_opcheck(implementation, case, pages, arguments, opcheck):
    made = arguments(**CASES[case])
    made = paged(made) if pages else made
    operator_arguments = {
        "left": made.get("window", (-1, -1))[0],
        "scale": 0.4,
        "softcap": made.get("softcap", 0.0),
        "num_splits": None,
        "return_lse": implementation == "reference",
        **{name: made.get(name) for name in ("q", "k_cache", "v_cache", "lengths", "block_table")},
        **{name: made.get(name) for name in ("alibi_slopes", "sinks")},
    }
    opcheck(OPS["decode_attention"].implementation(implementation).function.operator, operator_arguments)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"block_table": torch.zeros(3, 1, dtype=torch.int32)}, "has no pages"),
        ({"softcap": 1.0}, "has no softcap"),
        ({"sinks": torch.zeros(4)}, "has no sinks"),
        ({"return_lse": True}, "does not return the log-sum-exp"),
    ],
    ids=str,
)
def test_what_sdpa_cannot_do(options, reason, arguments):
    made = arguments(torch.float32) | options
    assert reason in explain(decode_attention, **made).reasons["sdpa"]
    with pytest.raises(ValueError, match="implementation 'sdpa' .* cannot run this call: .*" + reason):
        SDPA(**made)


def test_a_gpu_is_not_held_up(arguments):
    made = {name: a.to("meta") for name, a in arguments().items()}
    assert "would hold up a GPU" in explain(decode_attention, **made).reasons["sdpa"]


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"lengths": None}, TypeError, r"`lengths` must be a tensor of shape \(s\); got NoneType"),
        ({"lengths": torch.tensor([1, 2, 3])}, TypeError, "`lengths` must be int32; got int64"),
        (
            {"lengths": torch.tensor([1, 2, 12], dtype=torch.int32)},
            ValueError,
            "`lengths` must lie between 0 and the cache's 11; got 12 at 2",
        ),
        (
            {"k_cache": torch.zeros(2, 11, 2, 5)},
            ValueError,
            r"`k_cache` must have shape \(s m h_kv k\) with s=3",
        ),
        (
            {"v_cache": torch.zeros(3, 10, 2, 3)},
            ValueError,
            r"`v_cache` must have shape .* m=11.*; got \(3, 10, 2, 3\)",
        ),
        (
            {"v_cache": torch.zeros(3, 4, 2, 3), "block_table": torch.zeros(3, 1, dtype=torch.int32)},
            ValueError,
            r"`v_cache` must have shape \(pages page_size h_kv v\) with pages=3, page_size=11.*; got \(3, 4, 2, 3\)",
        ),
        (
            {"v_cache": torch.zeros(3, 11, 2, 3).half()},
            TypeError,
            "`v_cache` must be float32, as `q` is; got float16",
        ),
        (
            {"q": torch.zeros(3, 1, 3, 5)},
            ValueError,
            "the 2 heads of keys and values must divide the 3 heads",
        ),
        ({"num_splits": 0}, ValueError, "`num_splits` must be at least 1, or None; got 0"),
        ({"window": (0, -3)}, ValueError, r"`window` must be at least 0, or -1 for none; got \(0, -3\)"),
        ({"softcap": -1.0}, ValueError, "`softcap` must be positive"),
        (
            {
                "block_table": torch.zeros(3, 1, dtype=torch.int32),
                "lengths": torch.full((3,), 12, dtype=torch.int32),
            },
            ValueError,
            "`lengths` must lie between 0 and the cache's 11; got 12 at 0",
        ),
        (
            {"block_table": torch.tensor([[0], [7], [2]], dtype=torch.int32)},
            ValueError,
            "`block_table` must name pages 0 to 2; got 7 in row 1",
        ),
        ({"block_table": torch.zeros(3, 1)}, TypeError, "`block_table` must be int32; got float32"),
    ],
)
def test_errors(changes, error, match, arguments):
    with pytest.raises(error, match="decode_attention: .*" + match):
        decode_attention(**arguments(torch.float32) | changes)
