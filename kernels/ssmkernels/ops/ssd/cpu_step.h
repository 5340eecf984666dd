// One token of the state-space dual for one head: the state (p n) is read and written as it lies, lanes over n.
#pragma once

#include "native/math.h"
#include "native/tiles.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

// `count` rows of a state (p n): h = decay h + x B. Leaves Σ_n h C of each in `sums`, one a vector.
template <class S, int count>
SSMZOO_INLINE void advance_rows(S* h, int64_t n, const S* B, const S* C, S decay, const S* x,
                                typename Lanes<S>::V* sums) {
    using V = typename Lanes<S>::V;
    constexpr int lanes = Lanes<S>::count;
    V total[count] = {};
    const V factor = splat(decay);
    int64_t j = 0;
    for (; j + lanes <= n; j += lanes) {
        const V b = load(B + j), c = load(C + j);
        for (int r = 0; r < count; ++r) {
            const V now = fma(factor, load(h + r * n + j), splat(x[r]) * b);
            store(h + r * n + j, now);
            total[r] = fma(now, c, total[r]);
        }
    }
    if (j < n) {
        const V b = load_some(B + j, n - j), c = load_some(C + j, n - j);
        for (int r = 0; r < count; ++r) {
            const V now = fma(factor, load_some(h + r * n + j, n - j), splat(x[r]) * b);
            store_some(h + r * n + j, now, n - j);
            total[r] = fma(now, c, total[r]);
        }
    }
    for (int r = 0; r < count; ++r) sums[r] = total[r];
}

// Δ of a head, and how fast its state decays.
struct SsdStepSize {
    int64_t softplus;
    double least, most;

    template <class S>
    S of(S dt, const S* bias) const {
        auto step = splat(dt);
        if (bias) step = step + splat(*bias);
        if (softplus) step = ssmzoo::SSMZOO_ISA::softplus<S>(step);
        return clamp(step, splat(S(least)), splat(S(most)))[0];
    }
};

// x (p) → h C + D x (p), through the head's state. D has a number for all channels, or with `skip` above 1 one for
// each; it may be null. put(channel, y, count) takes vectors of which `count` numbers or more are wanted.
template <class S, class X, class Put>
SSMZOO_INLINE void ssd_step_head(S* state, int64_t p, int64_t n, S step, S A, const S* B, const S* C, const S* D,
                                 int64_t skip, const X* from, const Put& put) {
    using V = typename Lanes<S>::V;
    constexpr int lanes = Lanes<S>::count, together = lanes < 4 ? lanes : 4;
    const S decay = exp<S>(splat(step * A))[0];
    for (int64_t first = 0; first < p; first += lanes) {
        const int64_t count = p - first;
        const V x = read_some(from + first, count);
        S fed[lanes];
        store(fed, splat(step) * x);
        V sums[lanes] = {};
        int64_t row = 0;
        for (; row + together <= minimum(count, lanes); row += together)
            advance_rows<S, together>(state + (first + row) * n, n, B, C, decay, fed + row, sums + row);
        for (; row < minimum(count, lanes); ++row)
            advance_rows<S, 1>(state + (first + row) * n, n, B, C, decay, fed + row, sums + row);
        V y = sum_lanes<S, lanes>(sums);
        if (D) y = fma(skip > 1 ? read_some(D + first, count) : splat(*D), x, y);
        put(first, y, count);
    }
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
