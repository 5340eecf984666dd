// The gradients of a chunk with one decay for the whole head, or none, by the formulas of tiled.py, with the letters there.
//
// Then the decay between two tokens is a number, E_ij, and all sums over tokens are matrix products, of which the half
// that is 0 is left out. The gradient of a token's log decay is the sum over all that fades there: pairs of a token before
// it and one from it on, what the later one reads from S, what the earlier one leaves in S', and S on its way to S'.
#pragma once

#include "delta_rule/cpu_segment.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

// A task's memory.
template <class S>
struct HeadBackward {
    using V = typename Lanes<S>::V;

    Segment<S> own;
    Tile<S> t;
    S *turned, *both;              // k turned (width, c); the tile's [q; k] (2 n, width)
    S *E, *P, *M;                  // (c, c), for i >= j: decays; scale q_i · k_j, and for i > j -β_i k_i · k_j, decayed
    S *weights, *pairs;            // [dP; N] (2 c, c); the gradient of log E (c, c), 0 for i <= j
    S *later, *earlier;            // gradients of [q; k] (2 c, width), of k as the earlier one of a pair (c, width)
    S *start, *end;                // decay from S to each token, and from it to S', (c)
    S *factors, *given, *left, *dg;  // [scale; -β] start (2 c); of log start, of log end, and of log decays (c)
    int64_t width, columns, n;     // n tokens in whole blocks

    int64_t take(S* p, const DeltaArguments& a) {
        Memory<S> memory = {p, 0};
        own.take(memory, a);
        t.take(memory, a.keys, kChunk);
        width = own.width;
        columns = own.columns;
        turned = memory.take(width * kChunk);
        both = t.q;
        S** const of_pairs[] = {&E, &P, &M, &pairs};
        for (S** array : of_pairs) *array = memory.take(kChunk * kChunk);
        weights = memory.take(2 * kChunk * kChunk);
        later = memory.take(2 * kChunk * width);
        earlier = memory.take(kChunk * width);
        S** const of_tokens[] = {&start, &end, &given, &left, &dg};
        for (S** array : of_tokens) *array = memory.take(kChunk);
        factors = memory.take(2 * kChunk);
        return memory.used;
    }

    // Chunk k of a segment, from token `from` on, on the way to the state after it.
    void ahead(const DeltaBackwardArguments& b, const Sequence& s, int64_t from, int64_t k, int64_t head) {
        t.read(b.forward, s, from, kChunk, head, false);
        S passing = S(1);
        for (int64_t i = kChunk - 1; i >= 0; --i) {
            factors[i] = t.beta[i] * passing;
            if (b.forward.decay) passing = passing * t.decay[i];
        }
        own.run_ahead(b, s, from, head, k, t.k, factors,
                      {true, passing, nullptr, -own.columns * width});
    }

    // Chunk k of a segment, which starts at token `from` of its sequence.
    void chunk(const DeltaBackwardArguments& b, const Sequence& s, int64_t from, int64_t k, int64_t head, bool first) {
        const DeltaArguments& a = b.forward;
        read(a, s, from, minimum(kChunk, s.length - from), head);
        own.read(b, s, from, head, t, n);
        solve(a);
        gradients(a, own.state_turned(k));
        const S passing = start[n - 1] * dot(own.state_turned(k), own.dturned, a.values * width);
        step_back(a);
        own.write(b, s, s.start + from, head, first, t, n, later, later + n * width, earlier);
        if (!a.decay) return;
        decays(passing);
        for (int64_t i = 0; i < t.tokens; ++i)
            static_cast<S*>(b.ddecay)[(s.batch * a.length + s.start + from + i) * a.heads + head] = dg[i];
    }

  private:
    // The tokens of a chunk, their decays, P and M.
    void read(const DeltaArguments& a, const Sequence& s, int64_t from, int64_t most, int64_t head) {
        n = round_up(most, kBlock);
        t.k = both + n * width;
        t.read(a, s, from, most, head);
        const size_t padding = sizeof(S) * static_cast<size_t>((n - most) * width);
        memset(t.q + most * width, 0, padding);
        memset(t.k + most * width, 0, padding);
        for (int64_t i = 0; i < n; ++i) {
            if (i >= most) t.beta[i] = S(0);
            if (i >= most || !a.decay) t.decay[i] = S(1);
        }
        S decay = S(1);
        for (int64_t i = 0; i < n; ++i) {
            start[i] = decay = decay * t.decay[i];
            factors[i] = S(a.scale) * decay;
            factors[n + i] = -t.beta[i] * decay;
            S* row = E + i * kChunk;
            vectors<S>(i, [&](int64_t j) { store(row + j, splat(t.decay[i]) * load(row - kChunk + j)); });
            for (int64_t j = i; j < n; ++j) row[j] = j == i ? S(1) : S(0);
        }
        for (int64_t j = 0; j < n; ++j) end[j] = E[(n - 1) * kChunk + j];
        transpose(turned, kChunk, key(0), width, n, a.keys);
        lower(both, width, turned, a.keys, P, M);
        for (int64_t i = 0; i < n; ++i) {
            const V of_q = splat(S(a.scale)), of_k = splat(-t.beta[i]);
            vectors<S>(i + 1, [&](int64_t j) {
                S *p = P + i * kChunk + j, *m = M + i * kChunk + j;
                const V e = load(E + i * kChunk + j);
                store(p, of_q * e * load(p));
                store(m, of_k * e * load(m));
            });
        }
    }

    const S* key(int64_t i) const { return t.k + i * width; }

    // Both halves of a left factor (2 n, inner) times a right one (inner, c), for i >= j and the rest of their blocks.
    void lower(const S* from, int64_t ld, const S* to, int64_t inner, S* upper_half, S* lower_half) {
        for (int64_t j = 0; j < n; j += kBlock) {
            own.multiply({from + j * ld, ld, 1}, to + j, kChunk, upper_half + j * kChunk + j, kChunk, n - j, kBlock, inner);
            own.multiply({from + (n + j) * ld, ld, 1}, to + j, kChunk, lower_half + j * kChunk + j, kChunk, n - j, kBlock,
                         inner);
        }
    }

    // X, from dU = Pᵀ dO + F K dS' and (I + M)ᵀ X = dU; M has the opposite sign.
    void solve(const DeltaArguments& a) {
        S* X = own.given + n * columns;
        own.multiply({key(0), width, 1}, own.dstate, columns, X, columns, n, columns, a.keys);
        own.template multiply<Shape::upper>({P, 1, kChunk}, own.given, columns, X, columns, n, columns, n, 0,
                                            {true, S(1), end});
        own.solve(M, n);
    }

    // Those of q and k, of log E, and of the logarithms of the decays from S and to S'.
    void gradients(const DeltaArguments& a, const S* S_turned) {
        S *dP = weights, *N = weights + n * kChunk;
        lower(own.given, columns, own.U_turned, a.values, dP, N);
        for (int64_t i = 0; i < n; ++i) {
            const V of_q = splat(S(a.scale)), of_k = splat(-t.beta[i]);
            vectors<S>(i + 1, [&](int64_t j) {
                const int64_t place = i * kChunk + j;
                const V p = load(dP + place), m = load(N + place), e = load(E + place);
                store(pairs + place, fma(p, load(P + place), m * load(M + place)));
                store(dP + place, of_q * e * p);
                store(N + place, of_k * e * m);
            });
            for (int64_t j = i; j < n; ++j) pairs[i * kChunk + j] = S(0);
        }
        own.multiply({own.given, columns, 1}, S_turned, width, later, width, 2 * n, width, a.values);
        own.multiply({own.U, columns, 1}, own.dturned, width, earlier, width, n, width, a.values);
        for (int64_t i = 0; i < n; ++i) {
            const S *q = both + i * width, *k = key(i);
            given[i] = factors[i] * dot(q, later + i * width, width);
            given[i] += factors[n + i] * dot(k, later + (n + i) * width, width);
            left[i] = end[i] * dot(k, earlier + i * width, width);
        }
        own.template multiply<Shape::lower>({dP, kChunk, 1}, key(0), width, later, width, n, width, n, 1,
                                            {true, S(1), factors});
        own.template multiply<Shape::lower>({N, kChunk, 1}, key(0), width, later + n * width, width, n, width, n, 0,
                                            {true, S(1), factors + n});
        own.template multiply<Shape::upper>({dP, 1, kChunk}, both, width, earlier, width, n, width, n, 0,
                                            {true, S(1), end});
        own.template multiply<Shape::upper>({N, 1, kChunk}, key(0), width, earlier, width, n, width, n, 1, {true, S(1)});
    }

    // dS, from dS'.
    void step_back(const DeltaArguments& a) {
        own.multiply({both, 1, width}, own.given, columns, own.dstate, columns, a.keys, columns, 2 * n, 0,
                     {true, start[n - 1]}, factors);
    }

    // The gradients of log decays. At token i, `sums` has for each token before it what the pairs with token i and later
    // ones give.
    void decays(S passing) {
        S sums[kChunk] = {};
        S reading = passing;
        for (int64_t i = n - 1; i >= 0; --i) {
            reading += given[i];
            sums[i] = S(0);  // as all after it: these pairs begin at token i or later
            V across = {};
            vectors<S>(i, [&](int64_t j) {
                const V sum = load(sums + j) + load(pairs + i * kChunk + j);
                store(sums + j, sum);
                across = across + sum;
            });
            dg[i] = reading + sum_lanes<S, 1>(&across)[0];
        }
        S leaving = S(0);
        for (int64_t i = 0; i < n; ++i) {
            dg[i] += leaving;
            leaving += left[i];
        }
    }
};

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
