// The gradients of a chunk with a decay for each key channel, by the formulas of tiled.py, with the letters used there.
//
// The gradient of the decays is a sum of five parts: of pairs within the token's block of 16, of what later tokens of
// the block read from before it, of what earlier ones leave behind it, of pairs on both sides of the block, and of what
// passes the whole chunk by.
#pragma once

#include "delta_rule/cpu_pairs.h"

namespace ssmzoo {

namespace SSMZOO_ISA {

// A task's memory.
template <class S>
struct ChannelsBackward {
    using V = typename Lanes<S>::V;

    Segment<S> own;
    Pairs<S> pairs;
    S *weights, *later, *earlier;  // [dP; N] (2 c, c); gradients of [q; k] (2 c, width), of k as the earlier one (c, width)
    S *around, *start, *dg;        // (blocks, width), (width), (c, width)
    int64_t width, columns;

    int64_t take(S* p, const DeltaArguments& a) {
        Memory<S> memory = {p, 0};
        own.take(memory, a);
        pairs.take(memory, a);
        width = own.width;
        columns = own.columns;
        weights = memory.take(2 * kChunk * kChunk);
        later = memory.take(2 * kChunk * width);
        earlier = memory.take(kChunk * width);
        around = memory.take(kChunk / kBlock * width);
        start = memory.take(width);
        dg = memory.take(kChunk * width);
        return memory.used;
    }

    // Chunk k of a segment, from token `from` on, on the way to the state after it.
    void ahead(const DeltaBackwardArguments& b, const Sequence& s, int64_t from, int64_t k, int64_t head) {
        Tile<S>& t = pairs.t;
        t.read(b.forward, s, from, kChunk, head, false);
        vectors<S>(width, [&](int64_t c) {
            V passing = splat(S(1));
            for (int64_t i = (kChunk - 1) * width + c; i >= 0; i -= width) {
                store(t.k + i, passing * load(t.k + i));
                passing = passing * load(t.decay + i);
            }
            store(start + c, passing);
        });
        S *before = own.turned + k * own.columns * width, *after = before + own.columns * width;
        for (int64_t c = 0; c < b.forward.values * width; c += width)
            vectors<S>(width, [&](int64_t j) { store(after + c + j, load(start + j) * load(before + c + j)); });
        own.run_ahead(b, s, from, head, k, t.k, t.beta, {true, S(1)});
    }

    // Chunk k of a segment, which starts at token `from` of its sequence.
    void chunk(const DeltaBackwardArguments& b, const Sequence& s, int64_t from, int64_t k, int64_t head, bool first) {
        const DeltaArguments& a = b.forward;
        pairs.read(a, s, from, minimum(kChunk, s.length - from), head);
        pairs.compute(a.keys, S(a.scale), own.panel);
        own.read(b, s, from, head, pairs.t, pairs.tokens);
        solve(a);
        products(a, own.state_turned(k));
        pass_by(a, own.state_turned(k));
        sum_earlier();
        sum_later();
        decays();
        for (int64_t I = 0; I < pairs.count; ++I) within(I * kBlock);
        step_back(a);
        S* of_k = later + pairs.tokens * width;
        own.write(b, s, s.start + from, head, first, pairs.t, pairs.tokens, later, of_k, earlier);
        for (int64_t i = 0; i < pairs.t.tokens; ++i) {
            const int64_t token = (s.batch * a.length + s.start + from + i) * a.heads + head;
            memcpy(static_cast<S*>(b.ddecay) + token * a.keys, dg + i * width, sizeof(S) * static_cast<size_t>(a.keys));
        }
    }

  private:
    // X, from dU = Pᵀ dO + (F ∘ K) dS' and (I + M)ᵀ X = dU; pairs.M has the opposite sign.
    void solve(const DeltaArguments& a) {
        const int64_t n = pairs.tokens;
        S* X = own.given + n * columns;
        own.template multiply<Shape::upper>({pairs.P, 1, kChunk}, own.given, columns, X, columns, n, columns, n);
        own.multiply({pairs.keys, width, 1}, own.dstate, columns, X, columns, n, columns, a.keys, 0,
                     {true, S(1)});
        own.solve(pairs.M, n);
    }

    // dP and N; what later tokens read from S, at the start of their blocks; what earlier ones leave in S', at its end.
    void products(const DeltaArguments& a, const S* S_turned) {
        const int64_t n = pairs.tokens;
        own.multiply({own.given, columns, 1}, own.U_turned, kChunk, weights, kChunk, 2 * n, n, a.values);
        own.multiply({own.given, columns, 1}, S_turned, width, later, width, 2 * n, width, a.values);
        own.multiply({own.U, columns, 1}, own.dturned, width, earlier, width, n, width, a.values);
        vectors<S>(width, [&](int64_t c) { store(start + c, splat(S(1))); });
        for (int64_t i = 0; i < n; ++i) {
            if (i > 0 && i % kBlock == 0) pairs.multiply_row(start, pairs.through + (i / kBlock - 1) * width);
            scale_row(weights + i * kChunk, n, S(a.scale));
            scale_row(weights + (n + i) * kChunk, n, -pairs.t.beta[i]);
            scale_row(later + i * width, width, S(a.scale));
            scale_row(later + (n + i) * width, width, -pairs.t.beta[i]);
            pairs.multiply_row(later + i * width, start);
            pairs.multiply_row(later + (n + i) * width, start);
        }
        pairs.multiply_row(start, pairs.through + (pairs.count - 1) * width);  // now through all of the chunk
    }

    // For each block what passes it by on its way from S, or from a block before it, to S'.
    void pass_by(const DeltaArguments& a, const S* S_turned) {
        vectors<S>(width, [&](int64_t c) {
            V sum = {};
            for (int64_t v = 0; v < a.values; ++v)
                sum = fma(load(S_turned + v * width + c), load(own.dturned + v * width + c), sum);
            sum = sum * load(start + c);
            for (int64_t i = 0; i < pairs.tokens; ++i) {
                if (i % kBlock == 0) store(around + i / kBlock * width + c, sum);
                sum = fma(load(pairs.keys + i * width + c), load(earlier + i * width + c), sum);
            }
        });
    }

    // The gradients of q and k as the later one of pairs from earlier blocks.
    void sum_earlier() {
        const int64_t n = pairs.tokens;
        pairs.reset_keys();
        for (int64_t I = 0; I < pairs.count; ++I) {
            const int64_t first = I * kBlock;
            pairs.move_keys(I);
            for (int64_t J = 0; J < I; ++J) {
                vectors<S>(width, [&](int64_t c) {
                    V sum = load(around + J * width + c);
                    for (int64_t i = first; i < first + kBlock; ++i) {
                        sum = fma(load(pairs.left + i * width + c), load(later + i * width + c), sum);
                        sum = fma(load(pairs.from_k(i) + c), load(later + (n + i) * width + c), sum);
                    }
                    store(around + J * width + c, sum);
                });
                for (int64_t row = first; row <= n + first; row += n)
                    own.multiply({weights + row * kChunk + J * kBlock, kChunk, 1}, pairs.keys + J * kBlock * width, width,
                                 later + row * width, width, kBlock, width, kBlock, 0, {true, S(1)});
            }
            for (int64_t i = first; i < first + kBlock; ++i) {
                pairs.multiply_row(later + i * width, pairs.from + i * width);
                pairs.multiply_row(later + (n + i) * width, pairs.from + i * width);
            }
        }
    }

    // The gradient of k as the earlier one of pairs with later blocks.
    void sum_later() {
        const int64_t n = pairs.tokens;
        for (int64_t J = 0; J < pairs.count; ++J) {
            S* rows = earlier + J * kBlock * width;
            for (int64_t I = pairs.count - 1; I > J; --I) {
                for (int64_t j = 0; j < kBlock; ++j) pairs.multiply_row(rows + j * width, pairs.through + I * width);
                for (int64_t row = I * kBlock; row <= n + I * kBlock; row += n)
                    own.multiply({weights + row * kChunk + J * kBlock, 1, kChunk}, pairs.left + row * width, width, rows,
                                 width, kBlock, width, kBlock, 0, {true, S(1)});
            }
            for (int64_t j = 0; j < kBlock; ++j)
                pairs.multiply_row(rows + j * width, pairs.to + (J * kBlock + j) * width);
        }
    }

    // The gradient of each token's log decay but for pairs within its block.
    void decays() {
        const int64_t n = pairs.tokens;
        for (int64_t I = 0; I < pairs.count; ++I)
            vectors<S>(width, [&](int64_t c) {
                V sum = load(around + I * width + c);
                for (int64_t i = I * kBlock; i < (I + 1) * kBlock; ++i) {
                    const int64_t place = i * width + c;
                    store(dg + place, sum);
                    sum = fma(load(pairs.t.k + place), load(earlier + place), sum);
                }
                sum = V{};
                for (int64_t i = (I + 1) * kBlock - 1; i >= I * kBlock; --i) {
                    const int64_t place = i * width + c;
                    sum = fma(load(pairs.t.q + place), load(later + place), sum);
                    sum = fma(load(pairs.t.k + place), load(later + n * width + place), sum);
                    store(dg + place, load(dg + place) + sum);
                }
            });
    }

    // Adds what pairs within the block that begins with token `first` give.
    void within(int64_t first) {
        const int64_t n = pairs.tokens;
        const S *dP = weights + first * kChunk + first, *N = weights + (n + first) * kChunk + first;
        vectors<S>(width, [&](int64_t c) {
            V between[kBlock];
            for (int64_t i = 0; i < kBlock; ++i) {
                const int64_t own = (first + i) * width + c;
                const V q = load(pairs.t.q + own), k = load(pairs.t.k + own), d = load(pairs.decay + own);
                V of_q = load(later + own), of_k = load(later + n * width + own), crossing = {};
                for (int64_t j = 0; j < i; ++j) {
                    const int64_t place = (first + j) * width + c;
                    const V p = splat(dP[i * kChunk + j]), m = splat(N[i * kChunk + j]), key = load(pairs.t.k + place);
                    const V decay = between[j] = between[j] * d;
                    const V decayed = decay * key, back = decay * fma(p, q, m * k);
                    of_q = fma(p, decayed, of_q);
                    of_k = fma(m, decayed, of_k);
                    store(earlier + place, load(earlier + place) + back);
                    crossing = fma(back, key, crossing);
                    store(dg + place + width, load(dg + place + width) + crossing);
                }
                const V p = splat(dP[i * kChunk + i]);
                store(later + own, fma(p, k, of_q));
                store(later + n * width + own, of_k);
                store(earlier + own, fma(p, q, load(earlier + own)));
                between[i] = splat(S(1));
            }
        });
    }

    // dS, from dS'.
    void step_back(const DeltaArguments& a) {
        const int64_t n = pairs.tokens;
        for (int64_t j = 0; j < a.keys; ++j) scale_row(own.dstate + j * columns, columns, start[j]);
        vectors<S>(width, [&](int64_t c) { store(start + c, splat(S(1))); });
        for (int64_t i = 0; i < n; ++i) {
            if (i > 0 && i % kBlock == 0) pairs.multiply_row(start, pairs.through + (i / kBlock - 1) * width);
            const V scale = splat(S(a.scale)), beta = splat(-pairs.t.beta[i]);
            vectors<S>(width, [&](int64_t c) {
                S *q = pairs.left + i * width + c, *k = pairs.from_k(i) + c;
                store(q, scale * load(start + c) * load(q));
                store(k, beta * load(start + c) * load(k));
            });
        }
        own.multiply({pairs.left, 1, width}, own.given, columns, own.dstate, columns, a.keys, columns, 2 * n, 0,
                     {true, S(1)});
    }
};

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
