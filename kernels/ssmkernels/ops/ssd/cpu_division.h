// A head's inputs and outputs as they lie in memory, and the matrix memory's division (mlstm/cpu.py).
//
// With a stabiliser m, the last of a head's p channels is 1 at every token, and stored nowhere. Its outputs are sums that
// those of all others are divided by:
//
//     y = σ Y / d      d = max(|s|, exp(-m)) + ε      s = σ Y_last      σ the scale of queries
//
// Backward, with dd = -(dy · y) / d: dY = σ dy / d. Where |s| is the larger, dY_last = σ sign(s) dd; where exp(-m) is,
// m's gradient is -exp(-m) dd. dy · y is that of dY and Y without the last channel, which the backward pass has from
// other sums: y need not be kept, and what cancels in the gradients cancels to the last bit of what they are made of.
#pragma once

#include "native/choose.h"
#include "native/compact.h"
#include "native/math.h"
#include "ssd/cpu_arguments.h"
#include "ssd/cpu_rows.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

constexpr double kEpsilon = 1e-6;

// max(|sum|, exp(-m)) + ε of a scaled sum. exp(-m) stays finite: outputs are 0 there either way.
template <class S>
SSMZOO_INLINE typename Lanes<S>::V denominator(typename Lanes<S>::V sum, typename Lanes<S>::V m) {
    const S least = sizeof(S) == 8 ? S(-709) : S(-88);
    return larger<S>(absolute<S>(sum), exp<S>(-larger<S>(m, splat(least)))) + splat(S(kEpsilon));
}

// Channels of a head in memory.
inline int64_t stored(const SsdArguments& a) { return a.p - (a.m ? 1 : 0); }

// One head's channels at a token in whole vectors of `width` numbers; the channel that is not stored becomes `last`.
template <class S>
void read_channels(const SsdArguments& a, S* to, const void* from, int64_t dtype, int64_t offset, int64_t width, S last) {
    const int64_t count = stored(a);
    read_row(to, from, dtype, offset, count);
    if (!a.m) return;
    for (int64_t c = count; c < width; ++c) to[c] = S(0);
    to[count] = last;
}

// y over Y of one token and head, whose number among all is `place`.
template <class S>
S divide(const SsdArguments& a, int64_t place, const S* Y) {
    const S scale = S(a.query_scale), sum = scale * Y[stored(a)];
    if (a.sums) static_cast<S*>(a.sums)[place] = sum;
    return scale / denominator<S>(splat(sum), splat(*at<S>(a.m, place)))[0];
}

// dy becomes dY, but for the last channel's.
template <class S>
void divide_gradient(const SsdArguments& a, int64_t place, S* dy, int64_t width) {
    const S sum = *at<S>(a.sums, place), m = *at<S>(a.m, place);
    const auto factor = splat(S(a.query_scale)) / denominator<S>(splat(sum), splat(m));
    vectors<S>(width, [&](int64_t c) { store(dy + c, factor * load(dy + c)); });
}

// From dy · y the gradient of the last channel, which is returned, and of m.
template <class S>
S last_gradient(const SsdArguments& a, int64_t place, S product, S* dm) {
    const S sum = *at<S>(a.sums, place), m = *at<S>(a.m, place);
    const S floor = exp<S>(splat(-m))[0], below = denominator<S>(splat(sum), splat(m))[0];
    const S of_floor = S(1) / (S(1) + S(kEpsilon) * exp<S>(splat(m))[0]);  // exp(-m) / d
    const S size = sum < S(0) ? -sum : sum, counted = size > floor ? S(1) : (size < floor ? S(0) : S(0.5));
    const S sign = sum > S(0) ? S(1) : (sum < S(0) ? S(-1) : S(0));
    *dm = (S(1) - counted) * product * of_floor;
    return -product / below * counted * sign * S(a.query_scale);
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
