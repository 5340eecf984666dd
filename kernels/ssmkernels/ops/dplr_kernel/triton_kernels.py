"""Triton kernels for Cauchy products, X_k = Σ_n pairs_kn R_n at each frequency, and their gradients.

R_n = 1/(s - h μ_n) is made in registers for a state and a few frequencies, used for all k, and forgotten. Everything is
in double precision: an inverse FFT follows, which spreads the error of one frequency over all taps.

Complex numbers lie as (re, im), tensors are contiguous: poles (d N), pairs (d k N), sums (d k f). ``nodes`` are the
real and imaginary parts of s and h, (4 f). Offsets are 64-bit.
"""

# mypy: disable-error-code="assignment"
# (a tensor's dtype and shape change where a loop or a branch assigns to it)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def node(nodes, f, count):
    """s and h at frequencies f; beyond the last one they are 1 and 0."""
    here = f < count
    s_re = tl.load(nodes + f, mask=here, other=1.0)
    s_im = tl.load(nodes + count + f, mask=here, other=0.0)
    h_re = tl.load(nodes + 2 * count + f, mask=here, other=0.0)
    h_im = tl.load(nodes + 3 * count + f, mask=here, other=0.0)
    return s_re, s_im, h_re, h_im


@triton.jit
def resolvent(s_re, s_im, h_re, h_im, pole_re, pole_im):
    """R = 1/(s - h μ); shapes broadcast."""
    re = s_re - (h_re * pole_re - h_im * pole_im)
    im = s_im - (h_re * pole_im + h_im * pole_re)
    inverse = 1.0 / (re * re + im * im)
    return re * inverse, -im * inverse


@triton.jit(do_not_specialize=["states", "number", "count"])
def forward(poles, pairs, nodes, sums, states, number, count, K: tl.constexpr, F: tl.constexpr):
    """``K`` sums at ``F`` frequencies of one channel."""
    channel = tl.program_id(0).to(tl.int64)
    k = (tl.program_id(2) * K + tl.arange(0, K))[:, None]
    f = (tl.program_id(1) * F + tl.arange(0, F))[None, :]
    poles += channel * states * 2
    pairs += (channel * number + k) * states * 2
    total_re = tl.zeros((K, F), dtype=tl.float64)
    total_im = tl.zeros((K, F), dtype=tl.float64)
    s_re, s_im, h_re, h_im = node(nodes, f, count)
    for n in range(states):
        re, im = resolvent(s_re, s_im, h_re, h_im, tl.load(poles + 2 * n), tl.load(poles + 2 * n + 1))
        pair_re = tl.load(pairs + 2 * n, mask=k < number, other=0.0)
        pair_im = tl.load(pairs + 2 * n + 1, mask=k < number, other=0.0)
        total_re += pair_re * re - pair_im * im
        total_im += pair_re * im + pair_im * re
    at = sums + ((channel * number + k) * count + f) * 2
    mask = (k < number) & (f < count)
    tl.store(at, total_re, mask=mask)
    tl.store(at + 1, total_im, mask=mask)


@triton.jit(do_not_specialize=["states", "number", "count", "span"])
def backward(
    poles,
    nodes,
    dsums,
    dpairs,
    dpoles,
    states,
    number,
    count,
    span,
    K: tl.constexpr,
    N: tl.constexpr,
    F: tl.constexpr,
):
    """What ``span`` frequencies add to the gradients of ``K`` pairs of ``N`` states each, of one channel.

    That is Σ_f conj(R) g_k; and Σ_f conj(h R²) g_k, which times conj(pairs_kn), summed over k, is μ's. Both go to
    (spans d k N).
    """
    channel = tl.program_id(0).to(tl.int64)
    groups = tl.cdiv(number, K)
    k = ((tl.program_id(1) % groups) * K + tl.arange(0, K))[:, None, None]
    n = ((tl.program_id(1) // groups) * N + tl.arange(0, N))[None, :, None]
    dsums += (channel * number + k) * count * 2
    pole_re = tl.load(poles + (channel * states + n) * 2, mask=n < states, other=0.0)
    pole_im = tl.load(poles + (channel * states + n) * 2 + 1, mask=n < states, other=0.0)
    plain_re = tl.zeros((K, N, F), dtype=tl.float64)
    plain_im, derived_re, derived_im = plain_re, plain_re, plain_re
    start = tl.program_id(2) * span
    for first in range(start, tl.minimum(start + span, count), F):
        f = first + tl.arange(0, F)[None, None, :]
        mask = (k < number) & (f < count)
        g_re = tl.load(dsums + 2 * f, mask=mask, other=0.0)
        g_im = tl.load(dsums + 2 * f + 1, mask=mask, other=0.0)
        s_re, s_im, h_re, h_im = node(nodes, f, count)
        re, im = resolvent(s_re, s_im, h_re, h_im, pole_re, pole_im)
        plain_re += g_re * re + g_im * im
        plain_im += g_im * re - g_re * im
        square_re, square_im = re * re - im * im, 2.0 * re * im
        re, im = square_re * h_re - square_im * h_im, square_re * h_im + square_im * h_re
        derived_re += g_re * re + g_im * im
        derived_im += g_im * re - g_re * im
    k = ((tl.program_id(1) % groups) * K + tl.arange(0, K))[:, None]
    n = ((tl.program_id(1) // groups) * N + tl.arange(0, N))[None, :]
    row = (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + channel) * number + k
    at, mask = (row * states + n) * 2, (k < number) & (n < states)
    tl.store(dpairs + at, tl.sum(plain_re, axis=2), mask=mask)
    tl.store(dpairs + at + 1, tl.sum(plain_im, axis=2), mask=mask)
    tl.store(dpoles + at, tl.sum(derived_re, axis=2), mask=mask)
    tl.store(dpoles + at + 1, tl.sum(derived_im, axis=2), mask=mask)
