// What a task of the state-space dual's backward pass has in memory.
#pragma once

#include "ssd/cpu_head_rows.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

// Where a head's number at a span's first token lies in (b l h).
inline int64_t place_of(const SsdArguments& a, const Sequence& s, Span t, int64_t head) {
    return (s.batch * a.length + s.start + t.start) * a.heads + head;
}

// A task's memory, and what is done with it whatever the gradients are.
template <class S>
struct BackwardMemory {
    using V = typename Lanes<S>::V;

    // The state before a chunk: where it lies, and from row to row.
    struct Rows {
        const S* p;
        int64_t stride;
    };

    Shared<S> shared;
    Steps<S> steps;
    Outputs<S> outputs;
    // Of all heads: the state's gradient (n, width), and states before each chunk of a segment
    S *dstates, *states;
    // Of one: x, dY and dX, (c, width); turned, (width, c); a strip of dC, (n, kStrip)
    S *x, *dY, *dX, *x_turned, *dY_turned, *strip;
    S *W, *sums;                    // (c, c), which is dY Xᵀ first and then W; (c)
    S *da, *e, *f, *gate;            // (c), (c), (c), (width)
    S *dB, *dC, *dG;                 // of all: (n, c), (n, c), (c, c)
    S *D, *dD, *dA, *dbias, *panel;  // (heads, width), likewise, (heads), likewise
    int64_t width, size, segment;    // p in whole vectors; numbers of a state; chunks of a segment

    int64_t take(S* p, const SsdArguments& a) {
        Memory<S> memory = {p, 0};
        shared.take(memory, a);
        steps.take(memory, a);
        outputs.take(memory, a);
        width = outputs.width;
        const int64_t c = a.chunk, rows = c * width;
        size = round_up(a.n * width, kLine<S>);
        segment = a.segment;
        dstates = memory.take(kBlock * size);
        states = memory.take(kBlock * a.segment * size);
        S** const of_rows[] = {&x, &dY, &dX, &x_turned, &dY_turned};
        for (S** array : of_rows) *array = memory.take(rows);
        strip = memory.take(a.n * kStrip<S>);
        W = memory.take(c * c);
        dG = memory.take(c * c);
        dB = memory.take(a.n * c);
        dC = memory.take(a.n * c);
        S** const of_tokens[] = {&sums, &da, &e, &f};
        for (S** array : of_tokens) *array = memory.take(c);
        gate = memory.take(width);
        D = memory.take(kBlock * width);
        dD = memory.take(kBlock * width);
        dA = memory.take(kBlock);
        dbias = memory.take(kBlock);
        const int64_t inner = a.n > c ? a.n : c;
        panel = memory.take(panel_size<S>(inner > width ? inner : width));
        return memory.used;
    }

    S* state(int64_t head, int64_t chunk) const { return states + (head * segment + chunk) * size; }

    // Whether states are taken from where they are kept: there is one before each chunk, in S. A gate needs whole vectors.
    static bool in_place(const SsdArguments& a) { return a.segment == 1 && !a.z && !starts_of<S>(a).compact(); }

    Rows before(const SsdArguments& a, const Sequence& s, int64_t segment, int64_t head, int64_t h, int64_t k) const {
        if (in_place(a)) return {at<S>(a.starts, start_of(a, s, segment, head) * a.p), a.p};
        return {state(h, k), width};
    }

    // The state that is taken from there next.
    static void coming_state(const SsdArguments& a, const Sequence& s, Span t, int64_t head, Next next, Coming& to) {
        if (!in_place(a) || t.start + next.chunks * a.chunk < 0) return;
        const int64_t first = start_of(a, s, t.start / a.chunk + next.chunks, head + next.heads), piece = 1024;
        to.add(at<S>(a.starts, first * a.p), piece, piece, a.n * a.p * static_cast<int64_t>(sizeof(S)) / piece);
    }

    // (c, width) → (width, c), zeros beyond the chunk's tokens.
    void turn(const SsdArguments& a, Span t, S* to, const S* from) const {
        transpose(to, a.chunk, from, width, t.tokens, a.p);
        for (int64_t c = 0; c < a.p; ++c)
            for (int64_t i = t.tokens; i < t.padded; ++i) to[c * a.chunk + i] = S(0);
    }

    // Where outputs are divided: of Y · dY what comes from within the chunk, to sums.
    void products_within(const SsdArguments& a, Span t) {
        constexpr int64_t lanes = Lanes<S>::count;
        vectors<S>(t.padded, [&](int64_t i) { store(sums + i, V{}); });
        decays(t, steps.decay, shared.G, a.chunk, outputs.row, [&](int64_t j, int64_t i, V L, V G) {
            const V scaled = splat(steps.scale[j]) * L * G, product = load(W + j * a.chunk + i);
            if (i >= j) return store(sums + i, fma(scaled, product, load(sums + i)));
            for (int64_t c = j - i; c < lanes; ++c) sums[i + c] += scaled[c] * product[c];  // 0 · NaN is left out
        });
    }

    // E ∘ (S dYᵀ) in columns from i on: to dC, and times C to e.
    void add_strip(int64_t i, int64_t columns, int64_t stride, int64_t n) const {
        constexpr int64_t lanes = Lanes<S>::count;
        int64_t c = 0;
        for (; c + 2 * lanes <= columns; c += 2 * lanes) add_columns<2>(i + c, strip + c, stride, n);
        for (; c < columns; c += lanes) add_columns<1>(i + c, strip + c, stride, n);
    }

    template <int N>
    void add_columns(int64_t i, const S* from, int64_t stride, int64_t n) const {
        constexpr int64_t lanes = Lanes<S>::count;
        V E[N], sum[N] = {};
        for (int v = 0; v < N; ++v) E[v] = load(steps.E + i + v * lanes);
        for (int64_t j = 0; j < n; ++j)
            for (int v = 0; v < N; ++v) {
                const int64_t place = j * stride + i + v * lanes;
                const V gradient = E[v] * load(from + j * kStrip<S> + v * lanes);
                store(dC + place, load(dC + place) + gradient);
                sum[v] = fma(load(shared.C_turned + place), gradient, sum[v]);
            }
        for (int v = 0; v < N; ++v) store(e + i + v * lanes, sum[v]);
    }

    // And with what comes from the state, in a strip of S dYᵀ, the gradients of the last channel and of m.
    void add_last(const SsdArguments& a, int64_t place, Span t, int64_t i, int64_t columns, Rows before, S* dm) {
        const int64_t last = stored(a);
        for (int64_t c = 0; c < columns; c += Lanes<S>::count) {
            V sum = {};
            for (int64_t j = 0; j < a.n; ++j)
                sum = fma(load(shared.C_turned + j * a.chunk + i + c), load(strip + j * kStrip<S> + c), sum);
            store(sums + i + c, fma(load(steps.E + i + c), sum, load(sums + i + c)));
        }
        for (int64_t k = i; k < minimum(i + columns, t.tokens); ++k) {
            const int64_t own = place + k * a.heads;
            dY[k * width + last] = dY_turned[last * a.chunk + k] = last_gradient(a, own, sums[k], dm + own);
        }
        for (int64_t j = 0; j < a.n; ++j)
            vectors<S>(columns, [&](int64_t c) {
                S* to = strip + j * kStrip<S> + c;
                store(to, fma(splat(before.p[j * before.stride + last]), load(dY_turned + last * a.chunk + i + c), load(to)));
            });
    }

    static S sum(const S* from, int64_t count) {
        V total = V{};
        vectors<S>(count, [&](int64_t i) { total = total + load(from + i); });
        return sum_lanes<S, 1>(&total)[0];
    }

    // Four sums take turns, since each multiply-add waits for the one before it.
    struct Dot {
        static constexpr int64_t lanes = Lanes<S>::count, turns = 4;
        V totals[turns] = {};

        SSMZOO_INLINE void add(const S* left, const S* right, int64_t count) {  // whole vectors
            int64_t i = 0;
            for (; i + turns * lanes <= count; i += turns * lanes)
                for (int64_t k = 0; k < turns; ++k)
                    totals[k] = fma(load(left + i + k * lanes), load(right + i + k * lanes), totals[k]);
            for (; i < count; i += lanes) totals[0] = fma(load(left + i), load(right + i), totals[0]);
        }

        S sum() const {
            V total = (totals[0] + totals[1]) + (totals[2] + totals[3]);
            return sum_lanes<S, 1>(&total)[0];
        }
    };

    static S dot(const S* left, const S* right, int64_t count) {
        Dot sums;
        sums.add(left, right, count);
        return sums.sum();
    }

    // Of the state before a chunk, whose rows may end within a vector, and the gradient of that after it.
    S dot_states(const SsdArguments& a, Rows before, const S* gradient) const {
        const int64_t whole = a.p / Lanes<S>::count * Lanes<S>::count;
        Dot sums;
        S rest = S(0);
        for (int64_t j = 0; j < a.n; ++j) {
            const S *left = before.p + j * before.stride, *right = gradient + j * width;
            sums.add(left, right, whole);
            for (int64_t c = whole; c < a.p; ++c) rest = rest + left[c] * right[c];
        }
        return sums.sum() + rest;
    }
};

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
