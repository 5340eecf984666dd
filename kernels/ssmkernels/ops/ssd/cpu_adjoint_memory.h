// What a task of the state-space dual's backward pass has in memory.
#pragma once

#include "ssd/cpu.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

// A task's memory, and what is done with it whatever the gradients are.
template <class S>
struct BackwardMemory {
    using V = typename Lanes<S>::V;

    Shared<S> shared;
    Steps<S> steps;
    Outputs<S> outputs;
    // Of all heads: the state's gradient (n, width), and states before each chunk of a segment, each with room for X
    S *dstates, *states;
    // Of one: states ahead (n, width); X, x, dY, and two of them to scale, (c, width); turned, (width, c)
    S *factor, *x, *dY, *scaled, *dX, *X_turned, *dY_turned;
    S *L, *dM, *map, *sums;         // (c, c), (c, c), (n, c), (c)
    S *da, *e, *f, *gate;            // (c), (c), (c), (width)
    S *dB, *dC, *dG, *dG_turned;     // of all: (n, c), (n, c), (c, c): element (j, i), and turned
    S *D, *dD, *dA, *dbias, *panel;  // (heads, width), likewise, (heads), likewise
    int64_t width, size, room;       // p in whole vectors; numbers of a state, and of one with its room

    int64_t take(S* p, const SsdArguments& a) {
        Memory<S> memory = {p, 0};
        shared.take(memory, a);
        steps.take(memory, a);
        outputs.take(memory, a);
        width = outputs.width;
        const int64_t c = a.chunk, rows = c * width;
        size = round_up(a.n * width, kLine<S>);
        room = round_up((a.n + c) * width, kLine<S>);
        dstates = memory.take(kBlock * size);
        states = memory.take(kBlock * kSegment * size);
        factor = memory.take(room);
        S** const of_rows[] = {&x, &dY, &scaled, &dX, &X_turned, &dY_turned};
        for (S** array : of_rows) *array = memory.take(rows);
        S** const of_pairs[] = {&L, &dM, &dG, &dG_turned};
        for (S** array : of_pairs) *array = memory.take(c * c);
        S** const of_maps[] = {&map, &dB, &dC};
        for (S** array : of_maps) *array = memory.take(a.n * c);
        S** const of_tokens[] = {&sums, &da, &e, &f};
        for (S** array : of_tokens) *array = memory.take(c);
        gate = memory.take(width);
        D = memory.take(kBlock * width);
        dD = memory.take(kBlock * width);
        dA = memory.take(kBlock);
        dbias = memory.take(kBlock);
        panel = memory.take(panel_size<S>(a.n + c > width ? a.n + c : width));
        return memory.used;
    }

    S* state(int64_t head, int64_t chunk) const { return states + (head * kSegment + chunk) * size; }

    static void swap_rows(S* a, S* b, int64_t count) {
        vectors<S>(count, [&](int64_t i) {
            const V kept = load(a + i);
            store(a + i, load(b + i));
            store(b + i, kept);
        });
    }

    // (c, width) → (width, c), zeros beyond the chunk's tokens.
    void turn(const SsdArguments& a, Span t, S* to, const S* from) const {
        transpose(to, a.chunk, from, width, t.tokens, a.p);
        for (int64_t c = 0; c < a.p; ++c)
            for (int64_t i = t.tokens; i < t.padded; ++i) to[c * a.chunk + i] = S(0);
    }

    static S sum(const S* from, int64_t count) {
        V total = V{};
        vectors<S>(count, [&](int64_t i) { total = total + load(from + i); });
        return sum_lanes<S, 1>(&total)[0];
    }

    static S dot(const S* left, const S* right, int64_t count) {
        V total = V{};
        vectors<S>(count, [&](int64_t i) { total = fma(load(left + i), load(right + i), total); });
        return sum_lanes<S, 1>(&total)[0];
    }
};

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
