"""Triton kernels in Triton's interpreter, on the CPU: the whole check, on cases small enough for it.

``TRITON_INTERPRET=1 ssmzoo verify`` runs all cases; here each op has rows that between them reach every branch of its
kernels.
"""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow

PROGRAM = """
import sys
import torch
from ssmkernels.testing import check

op, dtypes, rows = sys.argv[1], [getattr(torch, name) for name in sys.argv[2].split(",")], eval(sys.argv[3])
gradients = op != "decode_attention"  # which has none here
report = check(op, "triton", dtypes=dtypes, cases=rows, gradients=gradients, quick=True)
print(report)
assert not report.skipped, report
"""

FEW = {"b": 1, "h": 2, "h_kv": 1}
SELECTED = [
    {"l": 21, "m": 23, "b": 1, "h": 6, "g": 2, "h_kv": 1, "v": 5, "lse": True},
    {"l": 5, "block_size": 70, "h": 2, "g": 2, "k": 33, "b": 1},
    {"l": 2, "m": 0, "own": False},
    {"n": 0, "own": False, "l": 3, "lse": True},
    {"l": 3, "m": 2, "b": 1, "layout": "strided", "x": 30.0},
]
ATTENTION = [
    {"l": 37, **FEW},  # tiles that hide nothing, and others
    {"l": 0, "m": 3, **FEW},
    {"m": 0, **FEW},
    {"l": 1, "m": 20, **FEW},
    {"m": 5, "h": 2, "h_kv": 1, "sinks": True, "lse": True},
    {"l": 5, "m": 3, "lse": True, **FEW},  # queries that see nothing
    {"l": 18, "b": 1, "h": 5, "h_kv": 1},  # gradients of keys in parts
    {"l": 40, "m": 45, "window": (6, 20), "causal": False, **FEW},
    {"l": 9, "k": 33, "v": 5, "causal": False, **FEW},
    {"l": 3, "k": 130, **FEW},  # keys and values apart
    {"l": 20, "window": (7, 0), "softcap": 5.0, "alibi": True, "sinks": True, "lse": True, **FEW},
    {"l": 21, "m": 30, "packed": True, "packed_k": True, "lse": True, "alibi": True, **FEW},
    {"l": 33, "m": 50, "causal": False, "mask": "shared", **FEW},
    {"l": 37, "causal": False, "mask": "heads", "window": (9, 5), "alibi": True, "softcap": 5.0, **FEW},
    {"positions": "sorted", "l": 40, "m": 45, "window": (9, 3), "causal": False, "softcap": 5.0, "alibi": True, **FEW},
    {"positions": "far", "l": 21, "m": 30, "packed": True, "packed_k": True, "lse": True, **FEW},
    {"positions": "shuffled", "l": 20, "mask": "heads", "b": 2, "h": 2, "h_kv": 1},
    {"l": 5, "layout": "strided", **FEW},
    {"l": 3, "layout": "far", "k": 4, **FEW},
]
NORM = [
    {"shape": (70, 33), "group_size": 11},  # more rows than a program has
    {"before": False, "group_size": 3},
    {"gate": False},
    {"residual": None, "gate": False, "x": 0.0},
    {"residual": None, "before": False, "shape": (2, 700)},
    {"shape": (0, 3, 12)},
    {"shape": (3, 2, 1)},
    {"layout": "strided"},
    {"layout": "far", "shape": (1, 3, 4), "before": False},
]
GATED = [
    {"shape": (9, 130)},
    {"shape": (3, 600), "scale": -1.5, "gate": 50.0},
    {"shape": (2, 0, 12)},
    {"shape": (12,), "scale": 0.0},
    {"layout": "strided"},
    {"layout": "far", "shape": (1, 3, 4)},
]
QUANTIZED = [
    {"o": 40, "l": 9, "b": 2},
    {"zeros": False, "bias": False, "group_size": None, "layout": "strided"},
    {"bits": "8", "zeros": False, "k": 33},
    {"activations": "int8", "group_size": 96, "k": 130},
    {"bits": "same", "zeros": False, "group_size": None, "k": 5},
    {"layout": "far", "o": 2},
]
CONVOLUTION = [
    {"l": 17},
    {"l": 0},
    {"l": 2, "d": 3},
    {"w": 1, "l": 5},
    {"w": 7, "l": 9, "d": 2},
    {"bias": False, "activation": None, "state": False, "l": 5},
    {"b": 1, "packed": True, "l": 21},
    {"layout": "strided"},
    {"layout": "far", "b": 1, "l": 7, "d": 2},
]
SCAN = [
    {"l": 5},
    {"l": 0},
    {"D": False, "z": False, "bias": False, "softplus": False, "state": False, "l": 3},
    {"l": 66, "d": 1, "n": 1, "b": 1},  # beyond a chunk
    {"n": 17, "l": 3, "d": 2},
    {"n": 256, "l": 2, "d": 2, "b": 1},
    {"d": 9, "g": 3, "l": 3, "n": 2},
    {"d": 33, "l": 2, "n": 16, "b": 1},  # several blocks of channels
    {"fixed": "BC", "l": 3, "d": 2},
    {"b": 1, "packed": True, "l": 7, "d": 2, "g": 2},
    {"layout": "strided", "l": 3},
    {"layout": "far", "b": 1, "l": 3, "d": 2},
]
DECODING = [
    {"m": 9},
    {"m": 0},
    {"l": 0},
    {"m": 3, "lengths": "empty", "sinks": True, "lse": True},
    {"m": 300, "s": 2, "lse": True},  # several parts
    {"m": 40, "s": 2, "l": 2, "num_splits": 19, "window": (30, 0)},  # more parts than are joined at a time
    {"m": 9, "num_splits": 30},  # more parts than keys
    {"m": 20, "s": 2, "l": 9, "h": 8, "h_kv": 1},  # several tiles of queries
    {"m": 7, "k": 33, "v": 5},
    {"m": 9, "layout": "strided", "page_size": 4},
    {"m": 3, "layout": "far", "h": 2, "h_kv": 1, "k": 4},
    {
        "m": 35,
        "s": 2,
        "l": 2,
        "page_size": 3,
        "window": (9, 0),
        "softcap": 5.0,
        "alibi": True,
        "sinks": True,
        "weights": "float32",
        "lse": True,
    },
]
DPLR = [
    {"length": 5},
    {"length": 0},
    {"n": 17, "d": 1, "length": 3},
    {"rank": 2, "d": 2, "length": 5},
    {"rank": 4, "d": 1, "n": 2, "length": 4},  # several groups of sums
    {"complex": False, "length": 4},
    {"length": 4200, "d": 1, "n": 1, "dt": 0.002},  # frequencies of several programs, backward too
    {"layout": "strided", "length": 3},
]
FFT = [
    {"d": 1},
    {"l": 0},
    {"l_k": 0, "l_r": 0, "D": False, "d": 1},
    {"l_r": 30, "l_k": 3, "d": 1},
    {"l": 300, "l_k": 300, "b": 1, "d": 1},  # the last of three sums is of 2
    {"l": 600, "l_k": 40, "l_r": 500, "b": 1, "d": 1},  # of 4, and more than half of the circle
    {"l": 3000, "l_k": 600, "b": 1, "d": 1},  # of 8
    {"l": 2050, "l_k": 2050, "b": 1, "d": 1},  # of 16
    {"l": 400, "l_k": 400, "b": 1, "d": 1, "packed": True, "l_r": 3},
    {"l": 700, "l_k": 700, "b": 1, "d": 1, "packed": True},  # circles of two sizes
    {"layout": "strided", "l_r": 5, "d": 2, "b": 1},
    {"layout": "far", "b": 1, "l": 7, "d": 2},
    {"gate": True, "d": 1, "l_r": 3},
    {"gate": True, "l": 600, "l_k": 40, "l_r": 500, "b": 1, "d": 1},
    {"gate": True, "l": 400, "l_k": 400, "b": 1, "d": 2, "packed": True, "D": False},
    {"gate": True, "layout": "strided", "d": 2, "b": 1},
]
RECURRENCE = [
    {"l": 35, "d": 70, "b": 1},  # several chunks
    {"fixed": True, "log": True, "state": False},
    {"complex": True, "decay": "complex", "log": True, "l": 35, "b": 1},
    {"complex": True, "decay": "complex", "fixed": True, "l": 40, "b": 1, "packed": True},
    {"complex": True, "decay": "complex", "fixed": True},
    {"complex": True, "fixed": True, "layout": "strided"},
    {"b": 1, "packed": True, "l": 21, "log": True, "resets": True},
    {"weights": "float32", "fixed": True},
    {"layout": "far", "b": 1, "l": 7, "d": 2},
]
LINEAR_ATTENTION = [
    {"l": 18, "b": 1, "h": 2, "g": 1, "k": 3, "v": 2},  # two parts of a chunk
    {"l": 0},
    {"l": 18, "b": 1, "h": 1, "g": 1, "k": 3, "v": 2, "bonus": True, "layout": "strided"},
    {"l": 2, "decay": "head", "bonus": True, "b": 1, "h": 2, "g": 1},
    {"l": 2, "decay": "", "bonus": True, "state": False, "b": 1, "h": 1, "g": 1},
    {"l": 2, "decay": "token", "state": False, "off": 0.3, "b": 1},
    {"l": 2, "decay": "", "h": 2, "g": 2, "b": 1, "scale": 0.3},
    {"l": 2, "k": 33, "v": 35, "h": 1, "g": 1, "b": 1},  # several tiles
    {"l": 40, "b": 1, "h": 1, "g": 1, "packed": True, "k": 2, "v": 2, "off": 0.1},  # several chunks
    {"l": 3, "h": 2, "g": 1, "b": 1, "layout": "far"},
]
DELTA = [
    {"l": 17, "b": 1, "h": 1, "g": 1, "decay": "k"},  # two chunks
    {"l": 0},
    {"l": 2, "b": 1, "h": 2, "g": 1, "k": 17, "v": 17},  # the state in memory, two tiles of columns
    {"l": 20, "b": 1, "h": 1, "g": 1, "k": 17, "decay": "", "packed": True},  # likewise from chunk to chunk
    {"l": 5, "b": 1, "h": 1, "g": 1, "packed": True, "decay": "", "state": False},
    {"l": 2, "b": 1, "h": 1, "g": 1, "layout": "far"},
]
SSD = [
    {"l": 18, "h": 2, "g": 1, "b": 1},  # several chunks
    {"l": 0},
    {"D": "", "z": False, "bias": False, "softplus": False, "state": False, "l": 3, "h": 2, "b": 1},
    {"l": 2, "p": 17, "n": 33, "h": 2, "b": 1},  # several tiles
    {"l": 2, "h": 11, "g": 1, "D": "hp", "b": 1},  # more heads than a program takes
    {"l": 3, "limit": (0.3, 0.9), "h": 2, "b": 1},
    {"l": 34, "h": 2, "g": 1, "b": 1, "packed": True},
    {"l": 3, "h": 2, "b": 1, "layout": "strided"},
    {"l": 3, "h": 2, "b": 1, "layout": "far"},
]
MLSTM = [
    {"l": 34, "h": 2, "b": 1},  # several chunks
    {"l": 0},
    {"l": 3, "h": 1, "state": False, "scale": -0.3, "i": (30.0, 30.5), "f": (-30.5, -30.0)},
    {"l": 2, "k": 33, "v": 17, "h": 1, "b": 1},  # several tiles
    {"l": 34, "h": 1, "b": 1, "packed": True},
    {"l": 20, "h": 1, "b": 1, "far": 100.0},
    {"l": 3, "h": 2, "b": 1, "layout": "strided"},
    {"l": 3, "h": 2, "b": 1, "layout": "far"},
]
SLSTM = [
    {"l": 3, "h": 1},
    {"l": 0},
    {"b": 17, "l": 2, "h": 1, "p": 2},  # more sequences than a program takes
    {"p": 17, "l": 2, "b": 1, "h": 2, "state": False, "bias": False},  # several tiles
    {"b": 1, "packed": True, "l": 21, "h": 1},
    {"l": 3, "b": 1, "h": 2, "layout": "strided"},
    {"l": 3, "b": 1, "h": 2, "layout": "far"},
]
STEP = [{}, {"g": 3}, {"n": 17}, {"D": False, "z": False}, {"bias": False, "softplus": False}, {"layout": "strided"}]

MAMBA3 = [
    {"l": 17, "h": 1, "g": 1, "b": 1},  # several chunks
    {"l": 0, "h": 1, "g": 1},
    {"r": 2, "b": 1, "packed": True, "l": 9, "interleaved": False, "h": 2, "g": 1},
    {"D": False, "z": False, "bias": False, "state": False, "l": 2, "h": 1, "g": 1, "b": 1, "a": 0},
]
MAMBA3_STEP = [{"r": 2, "n": 7, "a": 3, "p": 7}, {"D": False, "z": False, "bias": False}, {"layout": "far"}]

SSD_STEP = [
    {"n": 130, "p": 9, "h": 2, "b": 1, "D": "hp"},  # several tiles
    {"D": "", "z": False, "bias": False, "softplus": False},
    {"limit": (0.3, 0.9)},
    {"layout": "far"},
]

COMPLEX_STEP = {"complex": True, "decay": "complex", "log": True, "d": 70}

# All rows in float32; in bfloat16 those that reach what depends on the dtype; in the others one of these.
RULE = [
    {"l": 5, "h": 1, "b": 1, "k": 2, "v": 2},
    {"l": 0},
    {"decay": None, "state": False, "l": 3, "h": 1, "b": 1},
    {"b": 1, "l": 18, "h": 1, "k": 2, "v": 2, "resets": True},  # several chunks
    {"b": 1, "packed": True, "l": 9, "h": 1, "k": 3, "v": 2},
    {"b": 1, "l": 2, "h": 1, "k": 65, "v": 17},  # several blocks of keys and values
    {"b": 1, "l": 2, "h": 1, "k": 130, "v": 17},  # token after token
    {"layout": "strided", "b": 1, "l": 3, "h": 2, "k": 3, "v": 2},
    {"layout": "far", "b": 1, "l": 3, "h": 1},
]
CASES = [
    ("attention", "float32", ATTENTION),
    ("attention", "bfloat16", [ATTENTION[i] for i in (0, 10, 11, 13)]),
    ("attention", "float16", ATTENTION[10:11]),
    ("causal_conv1d", "float32", CONVOLUTION),
    ("causal_conv1d", "bfloat16", [CONVOLUTION[0], CONVOLUTION[6]]),
    ("causal_conv1d", "float16,float64", CONVOLUTION[6:7]),
    ("causal_conv1d_step", "float32", [{}, {"w": 1}, {"layout": "far"}]),
    ("causal_conv1d_step", "bfloat16,float16,float64", [{}]),
    ("decode_attention", "float32", DECODING),
    ("decode_attention", "bfloat16", [DECODING[i] for i in (0, 7, -1)]),
    ("decode_attention", "float16", DECODING[-1:]),
    ("delta_rule", "float32", DELTA),
    ("delta_rule", "bfloat16,float16", [{"l": 2, "b": 1, "h": 1, "g": 1}]),
    (
        "delta_rule_step",
        "float32",
        [{"k": 17, "v": 300, "h": 2, "b": 1}, {"decay": "k", "layout": "far"}, {"decay": ""}],
    ),
    ("delta_rule_step", "bfloat16,float16,float64", [{}]),
    ("dplr_kernel", "float32", DPLR),
    ("dplr_kernel", "bfloat16,float16,float64", DPLR[3:4]),
    ("fft_conv", "float32", FFT),
    ("fft_conv", "bfloat16", [*FFT[3:5], {"weights": "float32", "d": 1}, FFT[-4]]),
    ("fft_conv", "float16", [{"weights": "float32", "d": 1}]),
    ("linear_attention", "float32", LINEAR_ATTENTION),
    ("linear_attention", "bfloat16,float16,float64", LINEAR_ATTENTION[2:3]),
    ("linear_attention_step", "float32", [{"bonus": True}, {"decay": "token", "layout": "far"}, {"decay": "head"}]),
    ("linear_attention_step", "bfloat16,float16,float64", [{}]),
    ("generalized_delta_rule", "float32", RULE),
    ("generalized_delta_rule", "bfloat16,float16,float64", [{"l": 2, "h": 1, "b": 1}]),
    ("generalized_delta_rule_step", "float32,bfloat16", [{}, {"decay": None, "layout": "strided"}]),
    ("linear_recurrence", "float32", RECURRENCE),
    ("linear_recurrence", "bfloat16,float16,float64", RECURRENCE[-2:-1]),
    ("linear_recurrence_step", "float32", [{"log": True}, {"fixed": True}, COMPLEX_STEP, {"layout": "far"}]),
    ("linear_recurrence_step", "bfloat16,float16,float64", [{"d": 16}]),
    ("mamba3_scan", "float32", MAMBA3),
    ("mamba3_scan", "bfloat16", [{"l": 3, "h": 1, "g": 1, "b": 1}]),
    ("mamba3_scan_step", "float32", MAMBA3_STEP),
    ("mamba3_scan_step", "bfloat16,float64", [{}]),
    (
        "rglru_gates",
        "float32",
        [{"p": 33, "b": 1, "h": 2}, {"first": False, "decay": 1e-3}, {"l": 0}, {"layout": "far"}],
    ),
    ("rglru_gates", "bfloat16,float64", [{"l": 70, "b": 1, "h": 1, "decay": 0.5}]),
    ("quantized_linear", "float32", QUANTIZED),
    ("quantized_linear", "bfloat16", [QUANTIZED[0], QUANTIZED[2] | {"weights": "float32"}, *QUANTIZED[3:5]]),
    ("mlstm", "float32", MLSTM),
    ("mlstm", "bfloat16,float16", [{"l": 18, "h": 2, "b": 1}]),
    ("mlstm_step", "float32", [{"k": 64, "v": 128, "b": 1, "h": 2}, {"layout": "far"}]),
    ("mlstm_step", "bfloat16,float16,float64", [{}]),
    ("rms_norm", "float32", NORM),
    ("rms_norm", "bfloat16,float16,float64", NORM[:1] + [{"residual": "float32", "weights": "float32"}]),
    ("selected_attention", "float32", SELECTED),
    ("selected_attention", "bfloat16,float16", SELECTED[:1]),
    ("selective_scan", "float32", SCAN),
    ("selective_scan", "bfloat16", [SCAN[0], SCAN[9]]),
    ("selective_scan", "float16,float64", SCAN[9:10]),
    ("selective_scan_step", "float32", STEP),
    ("selective_scan_step", "bfloat16,float16,float64", STEP[:1]),
    ("slstm", "float32", SLSTM),
    ("slstm", "bfloat16,float16", SLSTM[:1]),
    ("slstm_step", "float32,bfloat16", [{"p": 17, "h": 2, "b": 3}, {"layout": "far"}]),
    ("ssd", "float32", SSD),
    ("ssd", "bfloat16,float16", SSD[:1]),
    ("ssd_step", "float32", SSD_STEP),
    ("ssd_step", "bfloat16,float16,float64", [{}]),
    ("swiglu", "float32", GATED),
    ("swiglu", "bfloat16,float16,float64", GATED[:1]),
]


@pytest.mark.parametrize(("op", "dtypes", "rows"), CASES, ids=[f"{op}-{dtypes}" for op, dtypes, _ in CASES])
def test_check_in_the_interpreter(op, dtypes, rows, interpret):
    interpret(PROGRAM, op, dtypes, repr(rows))


@pytest.mark.op("attention", "causal_conv1d", "decode_attention", "selective_scan")
def test_one_graph_and_opcheck(interpret):
    program = """
import torch
from ssmkernels import attention, causal_conv1d, causal_conv1d_step, decode_attention, masks
from ssmkernels import selective_scan, selective_scan_step, use

def both(x, weight, A, B, initial):
    x, last = causal_conv1d(x, weight, activation="silu", return_final_state=True)
    return (*selective_scan(x, x, A, B, B, delta_softplus=True, initial_state=initial, return_final_state=True), last)

def attend(q, k, v, slopes, sinks):
    plain = attention(q, k, v, causal=True, alibi_slopes=slopes, softcap=3.0)
    return attention(plain, k, v, sinks=sinks, block_mask=mask, cu_seqlens=borders, return_lse=True)

def steps(window, state, x, weight, A, B):
    x = causal_conv1d_step(window, x, weight)
    return selective_scan_step(state, x, x, A, B, B, delta_softplus=True)

torch.manual_seed(0)
arguments = torch.randn(1, 3, 2), torch.randn(2, 2), -torch.rand(2, 2), torch.randn(1, 3, 2), torch.randn(1, 2, 2)
heads = torch.randn(1, 3, 2, 4), torch.randn(1, 3, 1, 4), torch.randn(1, 3, 1, 4), torch.rand(2), torch.randn(2)
mask = masks.causal(3, block_size=8)
borders = torch.tensor([0, 1, 3], dtype=torch.int32)
with use("triton"):
    for function, given in ((both, arguments), (attend, heads)):
        results = []
        for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
            leaves = [a.clone().requires_grad_() for a in given]
            outputs = run(*leaves)
            results.append([*outputs, *torch.autograd.grad(sum(o.sin().sum() for o in outputs), leaves)])
        for eager, compiled in zip(*results, strict=True):
            torch.testing.assert_close(eager, compiled, rtol=0, atol=0)
    x, weight, A, B, state = arguments
    states = [[torch.zeros(1, 1, 2), state.clone()] for _ in range(2)]
    eager = steps(*states[0], x[:, 0], weight, A, B[:, 0])
    compiled = torch.compile(steps, fullgraph=True, backend="aot_eager")(*states[1], x[:, 0], weight, A, B[:, 0])
    for one, other in zip((eager, *states[0]), (compiled, *states[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)

    pages = torch.randn(3, 2, 1, 2), torch.randn(3, 2, 1, 3)
    lengths, table = torch.tensor([3, 0], dtype=torch.int32), torch.tensor([[2, 0], [1, 1]], dtype=torch.int32)
    query = torch.randn(2, 1, 2, 2)

    def decode(query, *rest):
        return decode_attention(query, *rest, block_table=table, window=(1, 0), return_lse=True)

    with torch.no_grad():
        eager = decode(query, *pages, lengths)
        compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")(query, *pages, lengths)
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)

def opcheck(operator, *arguments):
    def leaf(a):
        return a.detach().clone().requires_grad_(a.is_floating_point()) if isinstance(a, torch.Tensor) else a

    torch.library.opcheck(operator.default, [leaf(a) for a in arguments])

ops = torch.ops.ssmkernels
lists = mask.offsets, mask.columns, mask.patterns, mask.bits
opcheck(ops.attention_triton, *heads, 1, 0, 0.5, 2.0, *(None,) * 8, True, True)
packed = (*lists, borders, borders, None, None)
opcheck(ops.attention_triton, *heads[:3], None, heads[4], -1, -1, 0.5, 0.0, *packed, False, True)
two = torch.randn(2, 2, 2)
opcheck(ops.causal_conv1d_triton, x, weight, A[:, 0], "silu", two[:, :1], borders, True)
opcheck(ops.selective_scan_triton, x, x * 2, A, B, B, A[:, 0], x * 3, A[:, 1], True, state, None, True)
opcheck(ops.selective_scan_triton, x, x * 2, A, A * 2, B, None, None, None, False, two, borders, True)
x0, x1, B0, B1 = x[:, 0].clone(), x[:, 1].clone(), B[:, 0].clone(), B[:, 1].clone()
torch.library.opcheck(ops.causal_conv1d_step_triton.default, (torch.zeros(1, 1, 2), x0, weight, None, None, False))
step = state, x0, x1, A, B0, B1, None, None, None, True, False
torch.library.opcheck(ops.selective_scan_step_triton.default, step)
decoding = query, *pages, lengths, table, 1, 0.5, 2.0, torch.rand(2), torch.rand(2), None, True, False
torch.library.opcheck(ops.decode_attention_triton.default, decoding)
cache = torch.randn(2, 3, 1, 2)
decoding = query, cache, cache, lengths, None, -1, 0.5, 0.0, None, None, 2, False, False
torch.library.opcheck(ops.decode_attention_triton.default, decoding)
"""
    interpret(program)


@pytest.mark.op("ssd")
def test_the_dual_in_one_graph_and_opcheck(interpret):
    program = """
import math
import torch
from ssmkernels import ssd, ssd_step, use

def dual(x, dt, A, B, C, D, z, initial):
    y, state = ssd(x, dt, A, B, C, D, z, dt_softplus=True, initial_state=initial, return_final_state=True)
    row, step, B, C = (a.detach()[:, 0] for a in (x, dt, B, C))
    return y, state, ssd_step(state.detach().clone(), row, step, A.detach(), B, C)

torch.manual_seed(0)
x, dt, A, B, C, D = (torch.randn(shape) for shape in ((1, 3, 2, 2), (1, 3, 2), 2, (1, 3, 1, 2), (1, 3, 1, 2), (2, 2)))
given = x, dt, -A.abs(), B, C, D, torch.randn(1, 3, 2, 2), torch.randn(1, 2, 2, 2)
with use("triton"):
    results = []
    for run in (dual, torch.compile(dual, fullgraph=True, backend="aot_eager")):
        leaves = [a.clone().requires_grad_() for a in given]
        outputs = run(*leaves)
        results.append([*outputs, *torch.autograd.grad(sum(o.sin().sum() for o in outputs[:2]), leaves)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=0, atol=0)

leaves = [a.clone().requires_grad_() for a in given]
limits, borders = (0.0, math.inf), torch.tensor([0, 1, 3], dtype=torch.int32)
operator = torch.ops.ssmkernels.ssd_triton.default
torch.library.opcheck(operator, (*leaves[:7], leaves[0][0, 0, :, 0], True, limits, None, leaves[7], None, True))
torch.library.opcheck(operator, (*leaves[:5], None, None, None, False, (0.1, 0.5), 16, None, borders, True))
row = [a[:, 0].clone() for a in (x, dt, B, C)]
step = given[7], *row[:2], A, *row[2:], D, None, None, True, limits, False
torch.library.opcheck(torch.ops.ssmkernels.ssd_step_triton.default, step)
"""
    interpret(program)


def test_attention_under_masks_of_any_block_size_over_packed_sequences(interpret):
    program = """
import torch
from ssmkernels import attention, masks

torch.manual_seed(0)
l, m, h = 37, 41, 2
q, k, v = torch.randn(1, l, h, 8), torch.randn(1, m, 1, 8), torch.randn(1, m, 1, 5)
slopes, window = torch.rand(h), (20, 9)
packed = {"cu_seqlens": torch.tensor([0, 5, 5, 23, l]).int(), "cu_seqlens_k": torch.tensor([0, 9, 12, 12, m]).int()}
dout, dlse = torch.randn(1, l, h, 5), torch.randn(1, h, l)

def run(implementation, dtype, tensors, mask, **options):
    leaves = [x.to(dtype).requires_grad_() for x in tensors]
    out, lse = attention(
        *leaves[:3], alibi_slopes=leaves[3], block_mask=mask, implementation=implementation, return_lse=True, **options
    )
    seen = lse > -torch.inf
    loss = (out * dout).sum() + (lse.masked_fill(~seen, 0) * dlse).sum()
    return [out, lse, *torch.autograd.grad(loss, leaves)]

alone, both, bounded = (h, packed), (1, {**packed, "window": window}), (h, {"window": window})
blocks = {(8, 16): [alone, bounded], (24, 40): [both], (16, 32): [bounded], (5, 8): [alone, both]}
for (block_q, block_k), ways in blocks.items():
    for heads, options in ways:
        kind, pair = torch.rand(heads, -(-l // block_q), -(-m // block_k)), torch.rand(heads, l, m)

        def seen(h, i, j):
            return pair[h, i, j] < 3 * kind[h, i // block_q, j // block_k] - 1  # some blocks whole, some hidden

        mask = masks.from_function(seen, l, m, heads=heads, block_size=(block_q, block_k))
        found = run("triton", torch.float32, (q, k, v, slopes), mask, **options)
        expected = run("reference", torch.float64, (q, k, v, slopes), mask, **options)
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f, e.float(), rtol=1e-5, atol=1e-5)
        if "cu_seqlens" in options:
            broken = [x.clone() for x in (q, k, v)]
            broken[0][:, 5:23], broken[1][:, 9:12], broken[2][:, :9] = torch.nan, torch.nan, torch.nan
            others = run("triton", torch.float32, (*broken, slopes), mask, **options)
            last = (slice(23, l), slice(23, l), slice(23, l), slice(12, m), slice(12, m))  # its out, lse, dq, dk, dv
            for f, o, rows in zip(found, others, last):
                axis = 2 if f is found[1] else 1
                assert torch.equal(f.movedim(axis, 0)[rows], o.movedim(axis, 0)[rows])
"""
    interpret(program)


@pytest.mark.op("decode_attention")
def test_decoding_gives_the_same_bits_in_any_company_room_and_pages(interpret):
    program = """
import functools
import torch
from ssmkernels import decode_attention

decode = functools.partial(decode_attention, implementation="triton", window=(450, 0), return_lse=True)
torch.manual_seed(0)
q, lengths = torch.randn(3, 2, 4, 8), torch.tensor([600, 0, 297], dtype=torch.int32)
cache = torch.randn(3, 600, 2, 8)
for splits in (None, 5):
    whole = decode(q, cache, cache, lengths, num_splits=splits)
    for i in range(3):
        one = slice(i, i + 1)
        alone = decode(q[one], cache[one], cache[one], lengths[one], num_splits=splits)
        short = cache[one, : lengths[i]]
        fitting = decode(q[one], short, short, lengths[one], num_splits=splits)
        for a, b, c in zip(alone, fitting, whole, strict=True):
            assert torch.equal(a, c[one]) and torch.equal(b, c[one])
    for size in (7, 64):
        blocks = -(-600 // size)
        table = torch.randperm(3 * blocks).view(3, blocks).int()
        pages = torch.full((3 * blocks, size, 2, 8), torch.nan)
        padded = torch.nn.functional.pad(cache, (0, 0, 0, 0, 0, blocks * size - 600), value=torch.nan)
        pages[table.long()] = padded.unflatten(1, (blocks, size))
        paged = decode(q, pages, pages, lengths, block_table=table, num_splits=splits)
        for a, b in zip(paged, whole, strict=True):
            assert torch.equal(a, b)
"""
    interpret(program)
