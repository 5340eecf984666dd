from __future__ import annotations

import gc
import math
import pathlib
import re
import types
import weakref

import pytest
import torch
import torch.nn.functional as F
from attention_formula import attend_to
from implementations import each_of, implemented
from torch.utils._python_dispatch import TorchDispatchMode

from ssmkernels import OPS, attention, explain, merge_attention
from ssmkernels.masks import from_function, random_blocks, window
from ssmkernels.ops.attention import _parts, sdpa

REFERENCE, SDPA, TILED = implemented(attention, "reference", "sdpa", "tiled")
EITHER = each_of("attend", [REFERENCE, SDPA, TILED])

# A base case, and what each further one varies.
CASES = {
    "base": {},
    "more keys": {"m": 9},
    "fewer keys": {"m": 4},
    "causal": {"causal": True},
    "causal, more keys": {"causal": True, "m": 9},
    "causal, fewer keys": {"causal": True, "m": 4},
    "causal, one query": {"causal": True, "l": 1},
    "causal, one key": {"causal": True, "m": 1},
    "window": {"window": (2, 1)},
    "window, more keys": {"window": (2, 1), "m": 9},
    "window, fewer keys": {"window": (2, 1), "m": 3},
    "window of itself": {"window": (0, 0)},
    "window to the left": {"window": (2, -1)},
    "window to the right": {"window": (-1, 2), "m": 4},
    "window without bounds": {"window": (-1, -1)},
    "window wider than all": {"window": (99, 99)},
    "window, causal": {"window": (2, 3), "causal": True},
    "window open to the right, causal": {"window": (2, -1), "causal": True, "m": 4},
    "scale": {"scale": 0.1},
    "alibi": {"alibi": True},
    "alibi, causal, more keys": {"alibi": True, "causal": True, "m": 9},
    "one head of keys a head": {"h_kv": 4},
    "one head of keys": {"h_kv": 1, "causal": True},
    "one head": {"h": 1, "h_kv": 1},
    "head dims of 1": {"k": 1, "v": 1},
    "empty batch": {"b": 0},
    "no queries": {"l": 0},
    "no keys": {"m": 0},
    "no keys, causal": {"m": 0, "causal": True},
    "packed": {"packed": [0, 3, 3, 4, 7]},
    "packed, causal": {"packed": [0, 3, 3, 4, 7], "causal": True},
    "packed, nothing": {"packed": [0, 0, 0], "l": 0},
    "packed, no sequences": {"packed": [0], "l": 0},
    "packed, other keys": {"packed": [0, 3, 3, 4, 7], "packed_k": [0, 1, 3, 8, 8], "causal": True},
    "packed, window, alibi": {"packed": [0, 5, 7], "packed_k": [0, 4, 9], "window": (1, 1), "alibi": True},
}
OF_REFERENCE = {
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "sinks, fewer keys": {"sinks": True, "causal": True, "m": 4},
    "sinks, no keys": {"sinks": True, "m": 0},
    "everything": {"sinks": True, "softcap": 2.0, "alibi": True, "window": (3, 2), "m": 9, "scale": 0.7},
    "everything, packed": {
        "packed": [0, 3, 3, 7],
        "packed_k": [0, 5, 6, 8],
        "sinks": True,
        "softcap": 2.0,
        "alibi": True,
        "window": (2, 2),
        "causal": True,
    },
}


MASKED = {
    "mask": {"mask": "shared", "l": 18, "m": 21},
    "mask, heads": {"mask": "heads", "l": 21, "m": 18},
    "mask, causal, fewer keys": {"mask": "heads", "l": 21, "m": 11, "causal": True},
    "mask, no keys": {"mask": "heads", "m": 0},
    "mask, no queries": {"mask": "shared", "l": 0},
    "mask, everything": OF_REFERENCE["everything"] | {"mask": "heads", "l": 13, "m": 21, "window": (9, 4)},
    "mask, packed": {"mask": "heads", "l": 17, "packed": [0, 3, 3, 13, 17]},
    "mask, packed, everything": OF_REFERENCE["everything, packed"]
    | {"mask": "shared", "l": 21, "packed": [0, 13, 13, 21], "packed_k": [0, 15, 17, 29], "window": (7, 2)},
}


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of so few queries and keys, and parts of so few heads, that short calls have many."""
    monkeypatch.setattr(_parts, "ROWS", 4)
    monkeypatch.setattr(_parts, "LEAST_ROWS", 3)
    monkeypatch.setattr(_parts, "COLUMNS", 5)
    monkeypatch.setattr(_parts, "ELEMENTS", 64)


@pytest.fixture
def arguments(randn):
    def make(
        dtype=torch.float64,
        *,
        b=2,
        l=7,
        m=None,
        h=4,
        h_kv=None,
        k=5,
        v=3,
        packed=None,
        packed_k=None,
        alibi=False,
        sinks=False,
        mask=None,
        **options,
    ):
        b = b if packed is None else 1
        m = (packed_k[-1] if packed_k else l) if m is None else m
        h_kv = min(h, 2) if h_kv is None else h_kv
        made = {
            "q": randn(b, l, h, k, dtype=dtype),
            "k": randn(b, m, h_kv, k, dtype=dtype),
            "v": randn(b, m, h_kv, v, dtype=dtype),
            **options,
        }
        if alibi:
            made["alibi_slopes"] = randn(h, dtype=torch.promote_types(dtype, torch.float32)).abs()
        if sinks:
            made["sinks"] = randn(h, dtype=torch.promote_types(dtype, torch.float32))
        if mask is not None:
            made["block_mask"] = random_mask(l, m, h if mask == "heads" else 1)
        for name, borders in (("cu_seqlens", packed), ("cu_seqlens_k", packed_k)):
            if borders is not None:
                made[name] = torch.tensor(borders, dtype=torch.int32)
        return made

    return make


def random_mask(l, m, heads):
    """A third of all pairs visible; of blocks of 4 by 8, a third as a whole and a third not at all."""
    generator = torch.Generator().manual_seed(2)
    kind = torch.rand(heads, l // 4 + 1, m // 8 + 1, generator=generator)
    pair = torch.rand(heads, l + 1, m + 1, generator=generator)
    return from_function(
        lambda h, i, j: pair[h, i, j] < 3 * kind[h, i // 4, j // 8] - 1, l, m, heads=heads, block_size=(4, 8)
    )


def naive(
    q,
    k,
    v,
    causal=False,
    window=(-1, -1),
    scale=None,
    softcap=0.0,
    alibi_slopes=None,
    sinks=None,
    block_mask=None,
    cu_seqlens=None,
    cu_seqlens_k=None,
):
    """One query of one head at a time, over a list of the keys that it sees."""
    options = {"causal": causal, "window": window, "scale": scale, "softcap": softcap}
    options |= {"alibi_slopes": alibi_slopes, "sinks": sinks}
    shown = (
        None if block_mask is None else getattr(block_mask, "dense", lambda: block_mask)().expand(q.shape[2], -1, -1)
    )
    if cu_seqlens is not None:
        borders = cu_seqlens.tolist()
        borders_k = borders if cu_seqlens_k is None else cu_seqlens_k.tolist()
        parts = [naive(q[:, :0], k[:, :0], v[:, :0], **options)]
        for i in range(len(borders) - 1):
            queries, keys = slice(*borders[i : i + 2]), slice(*borders_k[i : i + 2])
            mask = None if shown is None else shown[:, queries, keys]
            parts.append(naive(q[:, queries], k[:, keys], v[:, keys], block_mask=mask, **options))
        return torch.cat([out for out, _ in parts], 1), torch.cat([lse for _, lse in parts], 2)
    (b, l, h, _), m = q.shape, k.shape[1]
    connected = 0 * sum(x.sum() for x in (q, k, v, alibi_slopes, sinks) if x is not None)
    out = q.new_zeros(b, l, h, v.shape[3]) + connected
    lse = q.new_zeros(b, h, l) + connected  # 0 where there is none, to compare
    for n, i, head in torch.cartesian_prod(*(torch.arange(size) for size in (b, l, h))).tolist():
        shared, position = head // (h // k.shape[2]), i + m - l
        left, right = (math.inf if side < 0 else side for side in window)
        seen = [j for j in range(m) if position - left <= j <= position + (min(right, 0) if causal else right)]
        seen = [j for j in seen if shown is None or shown[head, i, j]]
        slope, sink = (None if x is None else x[head] for x in (alibi_slopes, sinks))
        biases = {"scale": scale, "softcap": softcap, "slope": slope, "sink": sink}
        head_of = q[n, i, head], k[n, :, shared], v[n, :, shared]
        out[n, i, head], lse[n, head, i] = attend_to(*head_of, seen, position, **biases)
    return out, lse


def with_lse(implementation="reference", **made):
    out, lse = attention(**made, return_lse=True, implementation=implementation)
    return out, lse.masked_fill(lse == -torch.inf, 0)


@pytest.mark.parametrize("case", CASES | OF_REFERENCE | MASKED)
def test_reference_is_the_formula(case, arguments, run, assert_same):
    made = arguments(**(CASES | OF_REFERENCE | MASKED)[case])
    assert_same(run(with_lse, **made), run(naive, **made))


@pytest.mark.parametrize("case", CASES | OF_REFERENCE | MASKED)
def test_tiled_is_the_reference(case, arguments, run, assert_same, small_tiles):
    made = arguments(**(CASES | OF_REFERENCE | MASKED)[case])
    assert_same(run(with_lse, implementation="tiled", **made), run(with_lse, **made))
    assert_same(run(TILED, **made), run(REFERENCE, **made))  # no gradient comes through the log-sum-exp


@pytest.mark.parametrize("case", CASES)
def test_sdpa_is_the_reference(case, arguments, run, assert_same):
    made = arguments(**CASES[case])
    assert_same(run(SDPA, **made), run(REFERENCE, **made))


@pytest.mark.parametrize("m", [130, 140, 120], ids="m={}".format)
@pytest.mark.parametrize("options", [{"window": (10, 3)}, {"window": (20, 9), "causal": True}], ids=str)
@pytest.mark.parametrize("alibi", [False, True], ids=["", "alibi"])
def test_windows_in_blocks(m, options, alibi, arguments, run, assert_same, monkeypatch):
    calls = []
    by_blocks = sdpa._by_blocks
    monkeypatch.setattr(sdpa, "_by_blocks", lambda *a: (calls.append(1), by_blocks(*a))[1])
    monkeypatch.setattr(sdpa, "BLOCK", 8)
    made = arguments(l=130, m=m, alibi=alibi, **options)
    assert_same(run(SDPA, **made), run(REFERENCE, **made))
    assert calls


@pytest.mark.parametrize("case", ["causal", "window, more keys", "alibi, causal, more keys"])
def test_sdpa_where_heads_cannot_share_keys(case, arguments, run, assert_same, monkeypatch):
    """As on a GPU, whose fused kernels take groups or a mask, but not both."""
    monkeypatch.setattr(sdpa, "_takes_groups", lambda *_: False)
    made = arguments(**CASES[case])
    assert_same(run(SDPA, **made), run(REFERENCE, **made))


def test_sdpa_keeps_a_far_bias_exact(arguments, assert_in_budget):
    """At a distance of some hundreds, 8 bits of mantissa would leave an error of 1 in the logit."""
    made = arguments(torch.bfloat16, l=400, b=1, causal=True, alibi=True)
    assert_in_budget(SDPA, REFERENCE, **made)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype, arguments):
    made = arguments(dtype, **OF_REFERENCE["everything"])
    out, lse = REFERENCE(**made, return_lse=True)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    double = {name: a.double() if isinstance(a, torch.Tensor) else a for name, a in made.items()}
    exact, exact_lse = REFERENCE(**double, return_lse=True)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    assert (out.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


@EITHER
@pytest.mark.parametrize(
    "options",
    [
        {"causal": True, "m": 4},
        {"window": (1, 1), "m": 3},
        {"window": (-1, 0), "m": 4, "alibi": True},
        {"m": 0},
        {"packed": [0, 5, 7], "packed_k": [0, 2, 2], "causal": True},
    ],
    ids=str,
)
def test_a_query_without_keys_gives_zero(attend, options, arguments, run):
    made = arguments(**options)
    results = run(attend, **made)
    assert all(value.isfinite().all() for value in results.values())
    _, lse = naive(**made)
    blind = lse[0].transpose(0, 1) == 0  # l h
    assert blind.any()
    assert (results["output 0"][:, blind] == 0).all()
    assert (results["gradient of q"][:, blind] == 0).all()
    _, lse = REFERENCE(**made, return_lse=True)
    assert (lse[0].transpose(0, 1)[blind] == -torch.inf).all()


def test_a_query_without_keys_has_its_sink(arguments):
    made = arguments(**OF_REFERENCE["sinks, fewer keys"])
    out, lse = REFERENCE(**made, return_lse=True)
    assert (out[:, :3] == 0).all()
    assert torch.equal(lse[:, :, :3], made["sinks"][:, None].expand(2, 4, 3))


def test_a_sink_of_minus_infinity_is_none(arguments, run, assert_same):
    made = arguments(causal=True, m=4)
    with torch.autograd.set_detect_anomaly(True):
        found = run(with_lse, **made, sinks=torch.full((4,), -torch.inf, dtype=torch.float64))
    assert (found.pop("gradient of sinks") == 0).all()
    assert_same(found, run(with_lse, **made))


@EITHER
@pytest.mark.parametrize("case", ["causal, more keys", "packed, window, alibi"])
def test_any_strides(attend, case, arguments, run, assert_same, spread):
    made = arguments(**CASES[case])
    assert_same(run(attend, **spread(made)), run(attend, **made))


@EITHER
def test_packed_is_one_by_one(attend, arguments, run, assert_same):
    made = arguments(packed=[0, 3, 3, 4, 7], packed_k=[0, 1, 3, 8, 11], causal=True, alibi=True)

    def one_by_one(q, k, v, cu_seqlens, cu_seqlens_k, **options):
        parts = [((0, 3), (0, 1)), ((3, 4), (3, 8)), ((4, 7), (8, 11))]
        return torch.cat([attend(q[:, slice(*x)], k[:, slice(*y)], v[:, slice(*y)], **options) for x, y in parts], 1)

    found, expected = run(attend, **made), run(one_by_one, **made)
    assert (found["gradient of k"][:, 1:3] == 0).all()  # keys of the sequence without queries
    assert_same(found, expected)


@EITHER
def test_a_neighbour_that_went_wrong_harms_nobody(attend, arguments):
    made = arguments(packed=[0, 3, 7], causal=True)
    out = attend(**made)
    made["k"][:, 0], made["v"][:, 1] = torch.nan, torch.nan
    with_wrong = attend(**made)
    assert torch.equal(with_wrong[:, 3:], out[:, 3:])
    assert with_wrong[:, :3].isnan().any()


@EITHER
def test_the_future_changes_nothing(attend, arguments):
    made = arguments(causal=True)
    out = attend(**made)
    made["k"][:, 4:], made["v"][:, 4:] = 7, -7
    torch.testing.assert_close(attend(**made)[:, :4], out[:, :4], rtol=1e-14, atol=1e-14)


@EITHER
def test_twice_the_same_bits(attend, arguments, assert_repeats):
    assert_repeats(attend, **arguments(torch.float32, l=131, window=(9, 9), alibi=True))


@pytest.mark.parametrize(
    "options",
    [
        {},
        OF_REFERENCE["everything"] | {"m": 3},
        OF_REFERENCE["everything, packed"],
        {"m": 2, "l": 4, "causal": True},
    ],
    ids=["plain", "everything", "packed", "fewer keys"],
)
def test_gradcheck(options, arguments):
    made = arguments(**{"h": 2, "h_kv": 1, "b": 1, "k": 3, "v": 2, **options})
    names = [name for name, a in made.items() if isinstance(a, torch.Tensor) and a.dtype != torch.int32]
    rest = {name: a for name, a in made.items() if name not in names}

    def call(*values):
        return with_lse(**dict(zip(names, values, strict=True)), **rest)

    torch.autograd.gradcheck(call, [made[name].requires_grad_() for name in names], fast_mode=True)


@EITHER
@pytest.mark.parametrize("case", ["causal", "causal, fewer keys", "alibi", "packed, other keys"])
def test_compiles(attend, case, arguments, assert_compiles):
    assert_compiles(attend, **arguments(torch.float32, **CASES[case]))


def test_everything_compiles(arguments, assert_compiles):
    assert_compiles(with_lse, **arguments(torch.float32, **OF_REFERENCE["everything, packed"]))


@each_of("attend", [REFERENCE, TILED])
def test_block_masks_compile(attend, arguments, assert_compiles):
    assert_compiles(attend, **arguments(torch.float32, **MASKED["mask, everything"]))


def test_windows_in_blocks_compile(arguments, assert_compiles, monkeypatch):
    monkeypatch.setattr(sdpa, "BLOCK", 16)
    assert_compiles(SDPA, **arguments(torch.float32, l=99, window=(5, 0)))


def places(made, own):
    """Positions of the tokens' own, from the last to the first; or none."""
    lengths = {"q_positions": made["q"], "k_positions": made["k"]}
    return {
        name: torch.arange(x.shape[1], dtype=torch.int32).flip(0).expand(x.shape[:2]) if own else None
        for name, x in lengths.items()
    }


OPCHECKED = [
    (implementation, case, return_lse)
    for implementation in ("reference", "tiled")
    for case in ("base", "no keys", "packed", "sinks, fewer keys", "everything, packed", "mask", "base, positions")
    for return_lse in (False, True)
]
OPCHECKED += [("sdpa", c, False) for c in ("packed, other keys", "packed, window, alibi", "packed, nothing")]


@pytest.mark.parametrize(("implementation", "case", "return_lse"), OPCHECKED)
def test_opcheck(implementation, case, return_lse, arguments, opcheck):
    made = arguments(**(CASES | OF_REFERENCE | MASKED)[case.removesuffix(", positions")])
    mask = made.get("block_mask")
    left, right = made.get("window", (-1, -1))
    operator_arguments = {
        "left": left,
        "right": 0 if made.get("causal") else right,
        "scale": 0.4,
        "softcap": made.get("softcap", 0.0),
        "return_lse": return_lse,
        **{name: made.get(name) for name in ("q", "k", "v", "alibi_slopes", "sinks", "cu_seqlens")},
        **{f"block_{name}": getattr(mask, name, None) for name in ("offsets", "columns", "patterns", "bits")},
        "cu_seqlens_k": made.get("cu_seqlens_k", made.get("cu_seqlens")),
        **places(made, "positions" in case),
    }
    opcheck(OPS["attention"].implementation(implementation).function.operator, operator_arguments)


class Watch(TorchDispatchMode):
    """Notes the largest tensor that any operator gives, and how many weights of tiles are computed."""

    def __init__(self):
        super().__init__()
        self.largest = self.weights = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            self.largest = max(self.largest, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
        if func.overloadpacket.__name__ == "exp2_":
            self.weights += result.numel()
        return result


def watched(made):
    leaves = {name: made[name].requires_grad_() for name in "qkv"}
    with Watch() as watch:
        TILED(**made | leaves).sum().backward()
    return watch


@pytest.mark.parametrize("options", [{"causal": True}, {"window": (9, 3)}, {"softcap": 3.0, "alibi": True}], ids=str)
def test_nothing_in_tiled_grows_faster_than_the_length(options, arguments, small_tiles):
    short, long = (watched(arguments(torch.float32, l=l, **options)).largest for l in (48, 96))
    assert long <= 2 * short


@pytest.mark.parametrize("heads", [1, 4])
def test_tiled_visits_visible_blocks_alone(heads, arguments, monkeypatch):
    """In either pass each visible pair once, and no other."""
    mask = random_blocks(64, count=3, heads=heads, block_size=8)
    for columns in (8, 16, 512):
        monkeypatch.setattr(_parts, "COLUMNS", columns)
        made = arguments(torch.float32, l=64, b=1) | {"block_mask": mask}
        assert watched(made).weights == 2 * 4 * 8 * 3 * 64


def test_tiled_visits_the_window_alone(arguments, small_tiles):
    made = arguments(torch.float32, l=120, b=1, window=(10, 0))
    assert watched(made).weights <= 2 * 4 * 120 * (11 + _parts.ROWS)


def test_a_mask_is_not_kept_alive(arguments):
    """What is remembered of calls that passed the checks are shapes and numbers."""
    mask = window(7, left=1, right=0)
    attention(**arguments(), block_mask=mask)
    kept = weakref.ref(mask)
    del mask
    gc.collect()
    assert kept() is None


def test_the_page_quotes_the_code():
    root = pathlib.Path(__file__).parents[2]
    quotes = re.findall(r"^```py\n(.*?)^```", (root / "docs" / "attention.md").read_text(), re.DOTALL | re.MULTILINE)
    code = (root / "kernels" / "ssmkernels" / "ops" / "attention" / "tiled.py").read_text()
    assert len(quotes) > 1
    assert all(quote in code for quote in quotes)


class TestMerge:
    def test_parts_are_the_whole(self, arguments, run, assert_same):
        made = arguments(m=9, sinks=True)

        def merged(q, k, v, sinks):
            parts = [(0, 4, sinks), (4, 5, None), (5, 9, None)]
            found = [attention(q, k[:, a:b], v[:, a:b], sinks=own, return_lse=True) for a, b, own in parts]
            return merge_attention(*zip(*found, strict=True))

        assert_same(run(merged, **made), run(with_lse, **made))

    def test_parts_that_show_nothing(self, arguments, run, assert_same):
        """Some queries see keys of one part alone, some of none."""
        made = arguments(mask="heads", l=13, m=18)
        even, odd = (from_function(lambda h, i, j, p=p: j % 2 == p, 13, 18, block_size=(4, 8)) for p in (0, 1))
        half = made["block_mask"] & window(13, 18, left=3, right=0, block_size=(4, 8))

        def merged(block_mask, **rest):
            parts = [attention(block_mask=half & part, **rest, return_lse=True) for part in (even, odd)]
            assert any((lse == -torch.inf).any() for _, lse in parts)
            out, lse = merge_attention(*zip(*parts, strict=True))
            assert (lse == -torch.inf).any()
            return out, lse.masked_fill(lse == -torch.inf, 0)

        assert_same(run(merged, **made), run(with_lse, **made | {"block_mask": half}))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype, arguments):
        made = arguments(dtype, m=9)
        parts = [
            attention(made["q"], made["k"][:, s], made["v"][:, s], return_lse=True) for s in (slice(5), slice(5, 9))
        ]
        out, lse = merge_attention(*zip(*parts, strict=True))
        assert (out.dtype, lse.dtype) == (dtype, torch.float32)
        whole, its_lse = REFERENCE(**made, return_lse=True)
        rounding = torch.finfo(dtype).eps / 2 * made["v"].abs().max()
        assert (out - whole).abs().max() <= 3 * rounding  # of the parts, of the sum, and of the whole
        torch.testing.assert_close(lse, its_lse, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        ("outs", "lses", "error", "match"),
        [
            ([], [], ValueError, ".* must be as many, at least 1; got 0 and 0"),
            ([torch.zeros(1, 2, 3, 4)], [], ValueError, ".* must be as many, at least 1; got 1 and 0"),
            ([torch.zeros(1, 2, 3, 4)], [torch.zeros(1, 2, 3)], ValueError, r"`lses\[0\]` must have shape \(b h l\)"),
            ([torch.zeros(1, 2, 3, 4)], [torch.zeros(1, 3, 2).half()], TypeError, r"`lses\[0\]` must be float32"),
            ([torch.zeros(1, 2, 3, 4).int()], [torch.zeros(1, 3, 2)], TypeError, r"`outs\[0\]` must be"),
        ],
    )
    def test_refuses(self, outs, lses, error, match):
        with pytest.raises(error, match="merge_attention: " + match):
            merge_attention(outs, lses)


class TestParity:
    """Against code that we did not write."""

    def test_pytorch(self, arguments):
        made = arguments(causal=True, v=5)
        q, k, v = (made[name].transpose(1, 2) for name in "qkv")
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(REFERENCE(**made), expected.transpose(1, 2))

    def test_softcap_of_gemma_2(self, arguments):
        gemma2 = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
        made = arguments(torch.float32, softcap=3.0, causal=True, window=(2, 0))
        seen = torch.ones(7, 7).tril().triu(-2).bool()
        module = types.SimpleNamespace(num_key_value_groups=2, training=False)
        expected, _ = gemma2.eager_attention_forward(
            module,
            *(made[name].transpose(1, 2) for name in "qkv"),
            attention_mask=torch.zeros(7, 7).masked_fill(~seen, -torch.inf),
            scaling=5**-0.5,
            softcap=3.0,
        )
        torch.testing.assert_close(REFERENCE(**made), expected, rtol=1e-5, atol=1e-5)

    def test_sinks_of_gpt_oss(self, arguments):
        gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
        made = arguments(torch.float32, sinks=True, causal=True)
        module = types.SimpleNamespace(num_key_value_groups=2, training=False, sinks=made["sinks"])
        expected, _ = gpt_oss.eager_attention_forward(
            module,
            *(made[name].transpose(1, 2) for name in "qkv"),
            attention_mask=torch.full((7, 7), -torch.inf).triu(1),
            scaling=5**-0.5,
        )
        torch.testing.assert_close(REFERENCE(**made), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"softcap": 1.0}, "has no softcap"),
        ({"sinks": torch.zeros(4, dtype=torch.float64)}, "has no sinks"),
        ({"block_mask": window(7, left=1, right=0)}, "has no block masks"),
        ({"return_lse": True}, "does not return the log-sum-exp"),
    ],
    ids=str,
)
def test_what_sdpa_cannot_do(options, reason, arguments):
    made = arguments() | options
    found = explain(attention, **made)
    assert found.chosen in ("cpu", "tiled")
    assert reason in found.reasons["sdpa"]
    with pytest.raises(ValueError, match="attention: implementation 'sdpa' .* cannot run this call: .*" + reason):
        SDPA(**made)


def test_sdpa_is_taken_where_it_can_run(arguments):
    assert explain(attention, **arguments(**CASES["packed, window, alibi"])).chosen == "sdpa"


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"window": (2, 1), "l": 15}, 15 * 15),
        ({"causal": True, "m": 9}, 7 * 9),
        ({"alibi": True}, 4 * 7 * 7),
        ({"causal": True, "packed": [0, 3, 7], "packed_k": [0, 5, 11]}, 3 * 5 + 4 * 6),
        ({"window": (1, 1), "l": 40}, 2 * 40 * 4),
        ({"causal": True}, 0),
        ({"window": (99, 99)}, 0),
    ],
    ids=str,
)
def test_sdpa_is_passed_over_where_its_mask_is_large(options, size, arguments, monkeypatch):
    monkeypatch.setattr(sdpa, "BLOCK", 4)
    made = arguments(**options)
    for most in (size, size - 1):
        monkeypatch.setattr(sdpa, "LARGE", most)
        found = explain(attention, **made)
        assert (found.chosen == "sdpa") == (most == size)
        assert "sdpa" in found.able
    assert f"would need a mask of {size} numbers" in found.reasons["sdpa"]


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"q": None}, TypeError, r"`q` must be a tensor of shape \(b l h k\); got NoneType"),
        ({"k": torch.zeros(2, 7, 2, 4)}, ValueError, r"`k` must have shape .* k=5.*; got \(2, 7, 2, 4\)"),
        ({"v": torch.zeros(2, 6, 2, 3)}, ValueError, r"`v` must have shape .* m=7.*; got \(2, 6, 2, 3\)"),
        ({"v": torch.zeros(2, 7, 2, 3).half()}, TypeError, "`v` must be float32, as `q` is; got float16"),
        (
            {"q": torch.zeros(2, 7, 3, 5)},
            ValueError,
            "the 2 heads of keys and values must divide the 3 heads",
        ),
        ({"window": 3}, TypeError, r"`window` must be None or two ints \(left, right\).*; got 3"),
        ({"window": (1, 2.0)}, TypeError, r"`window` must be None or two ints"),
        ({"window": (-2, 0)}, ValueError, r"`window` must be at least 0, or -1 for none; got \(-2, 0\)"),
        ({"softcap": -1.0}, ValueError, "`softcap` must be positive, or 0 for none; got -1.0"),
        (
            {"alibi_slopes": torch.zeros(3)},
            ValueError,
            r"`alibi_slopes` must have shape \(h\) with h=4; got \(3,\)",
        ),
        ({"sinks": torch.zeros(4).half()}, TypeError, "`sinks` must be float32; got float16"),
        (
            {"cu_seqlens": torch.tensor([0, 7])},
            TypeError,
            "`cu_seqlens` must be an int32 tensor; got torch.int64",
        ),
        ({"block_mask": torch.ones(7, 7).bool()}, TypeError, "`block_mask` must be a BlockMask.*; got Tensor"),
        ({"block_mask": window(7, 8, left=1, right=0)}, ValueError, "7 queries and 7 keys; got one for 7 and 8"),
        ({"block_mask": random_mask(7, 7, 2)}, ValueError, "must have 1 head, or 4 as `q`; got 2"),
        ({"cu_seqlens": torch.tensor([0, 7], dtype=torch.int32)}, ValueError, "a batch of 2"),
        (
            {"cu_seqlens_k": torch.tensor([0, 7], dtype=torch.int32)},
            ValueError,
            "`cu_seqlens_k` needs `cu_seqlens`",
        ),
        ({"implementation": "flash"}, ValueError, "unknown implementation of attention: 'flash'"),
    ],
)
def test_errors(changes, error, match, arguments):
    prefix = "" if "implementation" in changes else "attention: .*"
    with pytest.raises(error, match=prefix + match):
        attention(**arguments(torch.float32) | changes)


@pytest.mark.parametrize(
    ("packed", "packed_k", "match"),
    [
        ([0, 3, 7], None, "without `cu_seqlens_k` the packed `k` must be as long as `q`, 7; got 9"),
        ([0, 3, 7], [0, 9], "`cu_seqlens_k` must pack 2 sequences, as `cu_seqlens` does; got 1"),
        ([0, 3, 7], [0, 3, 7], "`cu_seqlens_k` must rise from 0 to the length 9"),
        ([0, 3, 9], [0, 3, 9], "`cu_seqlens` must rise from 0 to the length 7"),
    ],
)
def test_errors_of_packing(packed, packed_k, match, arguments):
    with pytest.raises(ValueError, match="attention: " + match):
        attention(**arguments(packed=packed, packed_k=packed_k, m=9))
