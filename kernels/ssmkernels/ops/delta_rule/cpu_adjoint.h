// The gradients of a chunk of the delta rule, by the formulas of tiled.py, with the letters used there.
//
// The walk gives the errors, and with them U; what is left are matrix products. The gradient of the decays is a sum of
// five parts: of pairs within the token's block of 16, of what later tokens of the block read from before it, of what
// earlier ones leave behind it, of pairs on both sides of the block, and of what passes the whole chunk by.
#pragma once

#include "delta_rule/cpu_pairs.h"

namespace ssmzoo {

struct DeltaBackwardArguments {
    DeltaArguments forward;     // whose outputs are not looked at
    const void *d_o, *dfinal;   // (b l h values), contiguous; S: (s h keys values) or null
    void *dq, *dk;              // S: (parts b l g keys)
    void* dv;                   // (b l h values)
    void *dbeta, *ddecay;       // S: (b l h); as the log decay, or null
    void* dinitial;             // S: (s h keys values) or null
};

namespace SSMZOO_ISA {

// A task's memory.
template <class S>
struct Backward {
    using V = typename Lanes<S>::V;

    Pairs<S> pairs;
    S *state, *turned, *errors;    // the walk's; of each chunk of a segment: S turned (values, width), errors (c, columns)
    S *dstate, *dturned;           // dS' (keys, columns), and turned (values, width)
    S *given, *U, *U_turned;       // [dO; X] (2 c, columns), (c, columns), (values, c)
    S *weights, *later, *earlier;  // [dP; N] (2 c, c); gradients of [q; k] (2 c, width), of k as the earlier one (c, width)
    S *around, *start, *dg, *panel;  // (blocks, width), (width), (c, width)
    int64_t width, columns;

    int64_t take(S* p, const DeltaArguments& a) {
        Memory<S> memory = {p, 0};
        pairs.take(memory, a);
        width = pairs.width;
        columns = round_up(a.values, Lanes<S>::count);
        state = memory.take(a.keys * columns);
        turned = memory.take(kSegment * columns * width);
        errors = memory.take(kSegment * kChunk * columns);
        dstate = memory.take(a.keys * columns);
        dturned = memory.take(columns * width);
        given = memory.take(2 * kChunk * columns);
        U = memory.take(kChunk * columns);
        U_turned = memory.take(columns * kChunk);
        weights = memory.take(2 * kChunk * kChunk);
        later = memory.take(2 * kChunk * width);
        earlier = memory.take(kChunk * width);
        around = memory.take(kChunk / kBlock * width);
        start = memory.take(width);
        dg = memory.take(kChunk * width);
        panel = memory.take(panel_size<S>(columns > width ? columns : width) + panel_size<S>(2 * kChunk));
        return memory.used;
    }

    // The states before each chunk of a segment, and the errors of its tokens.
    void run_ahead(const DeltaArguments& a, const Sequence& s, int64_t segment, int64_t head) {
        const S* kept = at<S>(a.starts, start_of(a, s, segment, head));
        into_blocks(state, kept, a.values, a.keys, a.values);
        const int64_t first = segment * kSegment * kChunk;
        for (int64_t k = 0; k < kSegment && first + k * kChunk < s.length; ++k) {
            const int64_t from = first + k * kChunk, time = s.start + from;
            S *to = turned + k * columns * width, *rows = errors + k * kChunk * columns;
            each_vector<S>(a.keys, columns, [&](int64_t place, int64_t j, int64_t c, int64_t) {
                for (int64_t i = 0; i < Lanes<S>::count; ++i) to[(c + i) * width + j] = state[place + i];
            });
            for (int64_t c = 0; c < columns; ++c)
                for (int64_t j = a.keys; j < width; ++j) to[c * width + j] = S(0);
            pairs.t.read(a, s, from, minimum(kChunk, s.length - from), head);
            for (int64_t i = 0; i < pairs.t.tokens; ++i)
                read_row(rows + i * columns, a.v, a.dtype,
                         s.batch * a.v_batch + (time + i) * a.v_time + head * a.v_head, a.values);
            walk<S, false>(decay_of(a), state, 0, a.keys, pairs.t, S(1), rows, columns, columns);
        }
    }

    // Chunk k of a segment, which starts at token `from` of its sequence.
    void chunk(const DeltaBackwardArguments& b, const Sequence& s, int64_t from, int64_t k, int64_t head, bool first) {
        const DeltaArguments& a = b.forward;
        pairs.read(a, s, from, minimum(kChunk, s.length - from), head);
        pairs.compute(a.keys, S(a.scale), panel);
        const S *S_turned = turned + k * columns * width, *error = errors + k * kChunk * columns;
        read_gradients(b, s, from, head, error);
        solve(a);
        products(a, S_turned);
        pass_by(a, S_turned);
        sum_earlier();
        sum_later();
        decays();
        for (int64_t I = 0; I < pairs.count; ++I) within(I * kBlock);
        step_back(a);
        write(b, s, s.start + from, head, first, error);
    }

  private:
    void read_gradients(const DeltaBackwardArguments& b, const Sequence& s, int64_t from, int64_t head,
                        const S* error) {
        const DeltaArguments& a = b.forward;
        const int64_t there = pairs.t.tokens, padding = (pairs.tokens - there) * columns;
        for (int64_t i = 0; i < there; ++i) {
            read_row(given + i * columns, b.d_o, a.dtype,
                     ((s.batch * a.length + s.start + from + i) * a.heads + head) * a.values, a.values);
            const V beta = splat(pairs.t.beta[i]);
            vectors<S>(columns, [&](int64_t c) { store(U + i * columns + c, beta * load(error + i * columns + c)); });
        }
        memset(given + there * columns, 0, sizeof(S) * static_cast<size_t>(padding));
        memset(U + there * columns, 0, sizeof(S) * static_cast<size_t>(padding));
        transpose(U_turned, kChunk, U, columns, pairs.tokens, a.values);
        for (int64_t j = 0; j < a.keys; ++j)
            for (int64_t c = 0; c < columns; ++c) dturned[c * width + j] = dstate[j * columns + c];
        for (int64_t c = 0; c < columns; ++c)
            for (int64_t j = a.keys; j < width; ++j) dturned[c * width + j] = S(0);
    }

    // X, from dU = Pᵀ dO + (F ∘ K) dS' and (I + M)ᵀ X = dU; pairs.M has the opposite sign.
    void solve(const DeltaArguments& a) {
        const int64_t n = pairs.tokens;
        S* X = given + n * columns;
        product<S, Shape::upper>({pairs.P, 1, kChunk}, given, columns, X, columns, n, columns, n, panel);
        product({pairs.keys, width, 1}, dstate, columns, X, columns, n, columns, a.keys, panel, 0, {true, S(1)});
        for (int64_t I = pairs.count - 1; I >= 0; --I) {
            const int64_t first = I * kBlock, end = first + kBlock;
            if (end < n)
                product({pairs.M + end * kChunk + first, 1, kChunk}, X + end * columns, columns, X + first * columns,
                        columns, kBlock, columns, n - end, panel, 0, {true, S(1)});
            for (int64_t i = end - 2; i >= first; --i)
                vectors<S>(columns, [&](int64_t c) {
                    V sum = load(X + i * columns + c);
                    for (int64_t j = i + 1; j < end; ++j)
                        sum = fma(splat(pairs.M[j * kChunk + i]), load(X + j * columns + c), sum);
                    store(X + i * columns + c, sum);
                });
        }
    }

    // dP and N; what later tokens read from S, at the start of their blocks; what earlier ones leave in S', at its end.
    void products(const DeltaArguments& a, const S* S_turned) {
        const int64_t n = pairs.tokens;
        product({given, columns, 1}, U_turned, kChunk, weights, kChunk, 2 * n, n, a.values, panel);
        product({given, columns, 1}, S_turned, width, later, width, 2 * n, width, a.values, panel);
        product({U, columns, 1}, dturned, width, earlier, width, n, width, a.values, panel);
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

    static void scale_row(S* row, int64_t size, S factor) {
        const V by = splat(factor);
        vectors<S>(size, [&](int64_t c) { store(row + c, by * load(row + c)); });
    }

    // For each block what passes it by on its way from S, or from a block before it, to S'.
    void pass_by(const DeltaArguments& a, const S* S_turned) {
        vectors<S>(width, [&](int64_t c) {
            V sum = {};
            for (int64_t v = 0; v < a.values; ++v)
                sum = fma(load(S_turned + v * width + c), load(dturned + v * width + c), sum);
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
                    product({weights + row * kChunk + J * kBlock, kChunk, 1}, pairs.keys + J * kBlock * width, width,
                            later + row * width, width, kBlock, width, kBlock, panel, 0, {true, S(1)});
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
                    product({weights + row * kChunk + J * kBlock, 1, kChunk}, pairs.left + row * width, width, rows,
                            width, kBlock, width, kBlock, panel, 0, {true, S(1)});
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
        for (int64_t j = 0; j < a.keys; ++j) scale_row(dstate + j * columns, columns, start[j]);
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
        product({pairs.left, 1, width}, given, columns, dstate, columns, a.keys, columns, 2 * n, panel, 0,
                {true, S(1)});
    }

    void write(const DeltaBackwardArguments& b, const Sequence& s, int64_t time, int64_t head, bool first,
               const S* error) {
        const DeltaArguments& a = b.forward;
        const int64_t n = pairs.tokens, ratio = a.heads / a.groups, batches = a.cu_seqlens ? 1 : a.sequences;
        const int64_t part = head % ratio / kHeads * batches + s.batch;
        S* X = given + n * columns;
        for (int64_t i = 0; i < pairs.t.tokens; ++i) {
            const int64_t token = (s.batch * a.length + time + i) * a.heads + head;
            static_cast<S*>(b.dbeta)[token] = dot(X + i * columns, error + i * columns, columns);
            scale_row(X + i * columns, columns, pairs.t.beta[i]);
            write_row(b.dv, a.dtype, token * a.values, X + i * columns, a.values);
            const int64_t shared = ((part * a.length + time + i) * a.groups + head / ratio) * a.keys;
            S *dq = static_cast<S*>(b.dq) + shared, *dk = static_cast<S*>(b.dk) + shared;
            V total = {};
            for (int64_t c = 0; c < a.keys; c += Lanes<S>::count) {
                const int64_t place = i * width + c, there = a.keys - c;
                V of_q = load(later + place), of_k = load(later + n * width + place) + load(earlier + place);
                if (!first) of_q = of_q + read_some(dq + c, there), of_k = of_k + read_some(dk + c, there);
                write_some(dq + c, of_q, there);
                write_some(dk + c, of_k, there);
                if (!a.decay) continue;
                if (a.channels > 1)
                    write_some(static_cast<S*>(b.ddecay) + token * a.keys + c, load(dg + place), there);
                total = total + load(dg + place);
            }
            if (a.decay && a.channels == 1) static_cast<S*>(b.ddecay)[token] = sum_lanes<S, 1>(&total)[0];
        }
    }

  public:
    static constexpr int64_t kHeads = 4;  // of a group, whose gradients of q and k are added in one part
};

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
