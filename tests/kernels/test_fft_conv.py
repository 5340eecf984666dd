from __future__ import annotations

import pytest
import torch
from implementations import each_of, implemented

from ssmkernels import OPS, fft_conv
from ssmkernels.ops.fft_conv.circle import Circles, fft_size, lay_out
from ssmkernels.ops.fft_conv.cpu_circles import has_layout
from ssmkernels.ops.fft_conv.cpu_circles import lay_out as native_layout

REFERENCE, FFT, CPU = implemented(fft_conv, "reference", "fft", "cpu")
EITHER = each_of("convolve", [REFERENCE, FFT, CPU])

# A base case, and what each further one varies.
CASES = {
    "base": {},
    "plain": {"D": False, "kernel_reverse": False},
    "causal": {"kernel_reverse": False},
    "no skip": {"D": False},
    "short kernels": {"l_k": 3, "l_r": 5},
    "one tap": {"l_k": 1, "l_r": 1},
    "kernels longer than the input": {"l_k": 30, "l_r": 40},
    "a length that is no good for FFTs": {"l": 61},
    "one channel": {"d": 1},
    "length 1": {"l": 1},
    "length 0": {"l": 0},
    "length 0, plain": {"l": 0, "D": False, "kernel_reverse": False},
    "empty batch": {"b": 0},
    "gated": {"gate": True},
    "gated, causal, no skip": {"gate": True, "kernel_reverse": False, "D": False},
    "gated, length 1": {"gate": True, "l": 1},
    "gated, length 0": {"gate": True, "l": 0},
    "gated, packed": {"gate": True, "cu_seqlens": [0, 5, 5, 6, 17, 17]},
    "packed": {"cu_seqlens": [0, 5, 5, 6, 17, 17]},
    "packed, causal": {"cu_seqlens": [0, 0, 2, 17], "kernel_reverse": False},
    "packed, nothing": {"cu_seqlens": [0, 0, 0], "l": 0},
}


@pytest.fixture
def arguments(randn):
    def make(dtype=torch.float64, *, b=2, l=17, d=3, l_k=17, l_r=16, cu_seqlens=None, gate=False, **given):
        made = {
            "u": randn(b if cu_seqlens is None else 1, l, d, dtype=dtype),
            "kernel": randn(d, l_k, dtype=torch.promote_types(dtype, torch.float32)),
            "D": randn(d, dtype=dtype),
            "kernel_reverse": randn(d, l_r, dtype=dtype),
        }
        made = {name: value for name, value in made.items() if given.get(name, True)}
        if gate:
            made["gate"] = randn(*made["u"].shape, dtype=dtype)
        if cu_seqlens is not None:
            made["cu_seqlens"] = torch.tensor(cu_seqlens, dtype=torch.int32)
        return made

    return make


def toeplitz(u, kernel, D=None, *, kernel_reverse=None, gate=None, cu_seqlens=None):
    """y = T u, gated, with a dense matrix T of each channel: T[t, s] is the weight of lag t - s."""
    l = u.shape[1]
    position = torch.arange(l)
    lag = position[:, None] - position  # (t s)
    T = torch.zeros(u.shape[2], l, l, dtype=u.dtype)
    for j in range(kernel.shape[1]):
        T = T + kernel[:, j, None, None] * (lag == j)
    if D is not None:
        T = T + D[:, None, None] * torch.eye(l, dtype=u.dtype)
    if kernel_reverse is not None:
        for j in range(kernel_reverse.shape[1]):
            T = T + kernel_reverse[:, j, None, None] * (lag == -(1 + j))
    if cu_seqlens is not None:
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)
        T = T * (sequence[:, None] == sequence)
    y = torch.einsum("dts,bsd->btd", T, u)
    return y if gate is None else gate * y


@EITHER
@pytest.mark.parametrize("case", CASES)
def test_it_is_a_toeplitz_matrix(convolve, case, arguments, run, assert_same):
    made = arguments(**CASES[case])
    assert_same(run(convolve, **made), run(toeplitz, **made))


@EITHER
def test_what_the_kernels_mean(convolve):
    u = torch.zeros(1, 5, 1)
    u[0, 2] = 1
    kernel, reverse = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[10.0, 20.0]])
    y = convolve(u, kernel, torch.tensor([100.0]), kernel_reverse=reverse)
    torch.testing.assert_close(y.flatten(), torch.tensor([20.0, 10.0, 101.0, 2.0, 3.0]))


@EITHER
def test_kernels_without_a_tap(convolve, arguments):
    made = arguments(l_k=0, l_r=0)
    torch.testing.assert_close(convolve(**made), made["D"] * made["u"])


@pytest.mark.parametrize("convolve", [FFT, CPU], ids=["fft", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["base", "plain", "gated", "packed"])
def test_fft_is_nearly_as_exact_as_the_sum(convolve, case, dtype, arguments):
    """A Fourier transform spreads its roundings over all outputs: a few of float32's in Σ |kernel| |u|."""
    made = arguments(dtype, **CASES[case])
    double = {k: v.double() if v.is_floating_point() else v for k, v in made.items()}
    y, exact = convolve(**made), toeplitz(**double)
    magnitude = toeplitz(**{k: v.abs() if v.is_floating_point() else v for k, v in double.items()}).max()
    roundings = 4 * torch.finfo(torch.float32).eps * magnitude + torch.finfo(dtype).eps * exact.abs().max()
    assert y.dtype == dtype
    assert (y.double() - exact).abs().max() <= roundings


@EITHER
@pytest.mark.parametrize("case", ["base", "gated", "packed"])
def test_any_strides(convolve, case, arguments, run, assert_same, spread):
    made = arguments(**CASES[case])
    assert_same(run(convolve, **spread(made)), run(convolve, **made))


@EITHER
def test_the_future_changes_nothing_without_a_reverse_kernel(convolve, arguments):
    made = arguments(torch.float32, kernel_reverse=False)
    made["u"][:, 9:] = 0
    y = convolve(**made)
    made["u"][:, 9:] = 1e3
    later = convolve(**made)
    error = (later[:, :9] - y[:, :9]).abs().max()
    assert error <= 4 * torch.finfo(torch.float32).eps * later.abs().max()


@EITHER
def test_packed_is_one_by_one(convolve, arguments, run, assert_same):
    def one_by_one(u, cu_seqlens, **rest):
        return torch.cat([convolve(part, **rest) for part in u.split(cu_seqlens.diff().tolist(), dim=1)], dim=1)

    made = arguments(cu_seqlens=[0, 5, 5, 6, 17])
    assert_same(run(convolve, **made), run(one_by_one, **made))


@EITHER
def test_a_neighbour_that_went_wrong_harms_nobody(convolve, arguments):
    made = arguments(cu_seqlens=[0, 5, 8, 17])
    y = convolve(**made)
    made["u"][:, 0] = torch.nan
    assert torch.equal(convolve(**made)[:, 5:], y[:, 5:])


@EITHER
def test_twice_the_same_bits(convolve, arguments, assert_repeats):
    assert_repeats(convolve, **arguments(torch.float32, l=61))


@pytest.mark.parametrize("least", [*range(1, 70), 1000, 1025, 32767, 131073])
def test_fft_size(least):
    def good(n):
        for prime in (2, 3, 5):
            while n % prime == 0:
                n //= prime
        return n == 1

    expected = next(n for n in range(least, 2 * least + 2) if n % 2 == 0 and good(n))
    assert fft_size(least) == expected


@EITHER
@pytest.mark.parametrize("case", ["base", "gated", "packed"])
def test_gradcheck(convolve, case, arguments):
    made = arguments(l=6, l_k=4, l_r=3, gate=case == "gated", cu_seqlens=[0, 4, 4, 6] if case == "packed" else None)
    cu_seqlens = made.pop("cu_seqlens", None)

    def call(*values):
        return convolve(**dict(zip(made, values, strict=True)), cu_seqlens=cu_seqlens)

    torch.autograd.gradcheck(call, [v.requires_grad_() for v in made.values()])


@EITHER
@pytest.mark.parametrize("case", ["base", "plain", "gated", "packed"])
def test_compiles(convolve, case, arguments, assert_compiles):
    assert_compiles(convolve, **arguments(torch.float32, **CASES[case]))


@pytest.mark.parametrize("implementation", ["fft", "reference"])
@pytest.mark.parametrize("case", ["base", "plain", "gated, packed", "length 0", "packed"])
def test_opcheck(implementation, case, arguments, opcheck):
    made = arguments(**CASES[case])
    operator = OPS["fft_conv"].implementation(implementation).function.operator
    opcheck(operator, {name: made.get(name) for name in ("u", "kernel", "D", "kernel_reverse", "gate", "cu_seqlens")})


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"u": torch.zeros(2, 17)}, ValueError, r"`u` must have shape \(b l d\); got \(2, 17\)"),
        ({"u": torch.zeros(2, 17, 3, dtype=torch.complex64)}, TypeError, "`u` must be float32 or .*; got complex64"),
        ({"kernel": torch.zeros(4, 17)}, ValueError, r"`kernel` must have shape \(d l_k\) with d=3; got \(4, 17\)"),
        ({"kernel": torch.zeros(3, 17).half()}, TypeError, "`kernel` must be float32; got float16"),
        ({"kernel_reverse": torch.zeros(3)}, ValueError, r"`kernel_reverse` must have shape \(d l_r\)"),
        ({"gate": torch.zeros(2, 16, 3)}, ValueError, r"`gate` must have shape \(b l d\) with b=2, l=17, d=3; got"),
        ({"gate": torch.zeros(2, 17, 3).half()}, TypeError, "`gate` must .*float32"),
        ({"D": 1.0}, TypeError, r"`D` must be a tensor of shape \(d\); got float"),
        ({"cu_seqlens": torch.tensor([0, 17], dtype=torch.int32)}, ValueError, "a batch of 2"),
        ({"implementation": "ftt"}, ValueError, "unknown implementation of fft_conv: 'ftt'. Did you mean 'fft'?"),
    ],
)
def test_errors(changes, error, match, arguments):
    with pytest.raises(error, match=match):
        fft_conv(**arguments(torch.float32) | changes)


@pytest.mark.parametrize(
    ("length", "taps", "reverse"), [(3000, 5, 0), (3111, 40, 0), (2500, 30, 17), (4000, 1, 9), (2600, 8, 8)]
)
def test_many_blocks_are_one(length, taps, reverse, randn):
    circles = lay_out(length, taps, reverse)
    assert circles.blocks > 1
    made = {"u": randn(2, length, 3), "kernel": randn(3, taps), "D": randn(3)}
    if reverse:
        made["kernel_reverse"] = randn(3, reverse)
    for value in made.values():
        value.requires_grad_()
    weight = randn(2, length, 3)
    results = []
    for name in ("reference", "fft", "cpu"):
        y = fft_conv(**made, implementation=name)
        results.append([y, *torch.autograd.grad((y * weight).sum(), list(made.values()))])
    for found in results[1:]:
        for values, expected in zip(found, results[0], strict=True):
            torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", ["spread", "overlap"])
@pytest.mark.parametrize(
    ("length", "after", "before", "block", "size"), [(10, 9, 0, 10, 20), (23, 3, 2, 7, 12), (21, 0, 4, 7, 12)]
)
def test_layouts_beside_their_adjoints(method, length, after, before, block, size, randn):
    circles = Circles(length, after, before, block, size)
    u, g = randn(2, length, 3), randn(2, 3, circles.blocks, size)
    if method == "spread":
        there, back = (circles.spread(u, u.dtype) * g).sum(), (circles.collect(g) * u.mT).sum()
    else:
        there, back = (circles.underlap(u, u.dtype) * g).sum(), (circles.overlap(g.clone()) * u.mT).sum()
    torch.testing.assert_close(there, back)


def test_a_long_kernel_takes_one_block_and_a_short_one_many():
    assert lay_out(16384, 16384, 0).blocks == 1
    assert lay_out(16384, 16384, 0).size == 32768
    short = lay_out(2**20, 64, 0)
    assert short.blocks * short.size < 1.6 * 2**20
    assert short.size <= 2048


def test_memory_beside_a_long_input_stays_small(randn):
    """A few channels at a time: what lies between does not grow with the number of channels."""
    peaks = []
    for d in (16, 128):
        u, kernel = randn(1, 2**15, d, dtype=torch.float32).requires_grad_(), randn(d, 2**15, dtype=torch.float32)
        with torch.profiler.profile(profile_memory=True) as profile:
            FFT(u, kernel).sum().backward()
        at, peak = 0, 0
        for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
            if event.name() == "[memory]":
                at += event.nbytes()
                peak = max(peak, at)
        peaks.append(peak - 3 * u.nbytes)  # the output, its gradient and that of u
    assert peaks[1] < 1.5 * peaks[0]


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"kernel_reverse": False},
        {"kernel_reverse": False, "D": False},
        {"l": 3000, "l_k": 5, "l_r": 3},
        {"gate": True},
        {"cu_seqlens": [0, 5, 5, 6, 17, 17]},
        {"l_k": 1, "l_r": 1},
        {"l": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("argument", ["u", "kernel", "kernel_reverse"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("convolve", [FFT, CPU], ids=["fft", "cpu"])
def test_non_finite_values_reach_no_further_than_in_the_direct_sum(convolve, arguments, case, argument, value):
    made = arguments(**case)
    if argument not in made or ("cu_seqlens" in made and argument == "kernel_reverse"):
        return  # packed sequences are padded, and a tap that is NaN meets the zeros behind a sequence too
    x = made[argument]
    x[0, min(2, x.shape[1] - 1)] = value
    found, expected = convolve(**made), REFERENCE(**made)
    assert torch.equal(found.isfinite(), expected.isfinite())
    finite = expected.isfinite()
    torch.testing.assert_close(found[finite], expected[finite])


@pytest.mark.parametrize(("taps", "ahead"), [(2**19, 0), (2**19 + 2, 0), (2**18, 2**18), (2**20, 2**20), (9, 3)])
@pytest.mark.parametrize("length", [1, 2**19, 2**19 + 1, 2**20, 2**21])
def test_the_native_kernel_knows_which_circles_it_has(length, taps, ahead):
    assert has_layout(length, taps, ahead) == (native_layout(length, taps, ahead) is not None)
