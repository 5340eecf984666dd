// What passes between the tokens of a chunk, with a decay for each key channel.
//
// The chunk is cut into blocks of 16 tokens, padded with tokens that are 0 and do not decay. From a token in block J to
// one in a later block I the decay is a product of three parts, each at most 1: to the end of J, through the blocks in
// between, and from the start of I. So pairs of different blocks are matrix products of keys and queries that have been
// brought to the border before I. Pairs within a block take one vector of decays each, multiplied on from token to
// token. No decay is ever a quotient of two others.
#pragma once

#include "delta_rule/cpu_segment.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

template <class S>
struct Pairs {
    using V = typename Lanes<S>::V;
    static constexpr int lanes = Lanes<S>::count;

    Tile<S> t;
    S *decay, *from, *to, *through;      // (c, width): of a token; from its block's start; to its end. (blocks, width)
    S *left, *keys, *turned, *near;      // [from q; from k] (2 c, width); k at a border (c, width); turned; (16, width)
    S *P, *M;                            // (c, c): scale q_i · k_j, and -β_i k_i · k_j, decayed
    int64_t width, tokens, count;        // tokens in whole blocks, and how many blocks

    void take(Memory<S>& memory, const DeltaArguments& a) {
        t.take(memory, a.keys, kChunk);
        width = t.width;
        S** const of_tokens[] = {&decay, &from, &to, &keys, &turned};
        for (S** array : of_tokens) *array = memory.take(kChunk * width);
        left = memory.take(2 * kChunk * width);
        through = memory.take(kChunk / kBlock * width);
        near = memory.take(kBlock * width);
        P = memory.take(kChunk * kChunk);
        M = memory.take(kChunk * kChunk);
    }

    S* from_k(int64_t i) const { return left + (tokens + i) * width; }

    // The tokens of a chunk, and their decays.
    void read(const DeltaArguments& a, const Sequence& s, int64_t start, int64_t most, int64_t head) {
        t.read(a, s, start, most, head);
        tokens = round_up(most, kBlock);
        count = tokens / kBlock;
        for (int64_t i = most; i < tokens; ++i) t.beta[i] = t.kq[i] = S(0);
        const size_t padding = sizeof(S) * static_cast<size_t>((tokens - most) * width);
        memset(t.q + most * width, 0, padding);
        memset(t.k + most * width, 0, padding);
        for (int64_t i = 0; i < tokens; ++i)
            vectors<S>(width, [&](int64_t c) {
                store(decay + i * width + c, i < most ? load(t.decay + i * width + c) : splat(S(1)));
            });
        for (int64_t I = 0; I < count; ++I)
            vectors<S>(width, [&](int64_t c) {
                V product = splat(S(1));
                for (int64_t i = I * kBlock; i < (I + 1) * kBlock; ++i) {
                    const int64_t place = i * width + c;
                    product = product * load(decay + place);
                    store(from + place, product);
                    store(left + place, product * load(t.q + place));
                    store(from_k(i) + c, product * load(t.k + place));
                }
                store(through + I * width + c, product);
                product = splat(S(1));
                for (int64_t i = (I + 1) * kBlock - 1; i >= I * kBlock; --i) {
                    store(to + i * width + c, product);
                    product = product * load(decay + i * width + c);
                }
            });
        reset_keys();
    }

    // Every key at the end of its own block.
    void reset_keys() {
        vectors<S>(tokens * width, [&](int64_t c) { store(keys + c, load(to + c) * load(t.k + c)); });
    }

    // The keys of all blocks before I - 1, which are at the border before that one, through it to its end.
    void move_keys(int64_t I) {
        for (int64_t j = 0; j < (I - 1) * kBlock; ++j) multiply_row(keys + j * width, through + (I - 1) * width);
    }

    void multiply_row(S* row, const S* factor) const {
        vectors<S>(width, [&](int64_t c) { store(row + c, load(factor + c) * load(row + c)); });
    }

    // P and M; afterwards the keys are at the chunk's end.
    void compute(int64_t size, S scale, S* panel) {
        for (int64_t I = 0; I < count; ++I) {
            const int64_t first = I * kBlock;
            if (I > 0) {
                move_keys(I);
                transpose(turned, kChunk, keys, width, first, size);
                product({left + first * width, width, 1}, turned, kChunk, P + first * kChunk, kChunk, kBlock, first,
                        size, panel);
                product({from_k(first), width, 1}, turned, kChunk, M + first * kChunk, kChunk, kBlock, first, size,
                        panel);
                for (int64_t i = first; i < first + kBlock; ++i) {
                    const V of_q = splat(scale), of_k = splat(-t.beta[i]);
                    vectors<S>(first, [&](int64_t j) {
                        S *p = P + i * kChunk + j, *m = M + i * kChunk + j;
                        store(p, of_q * load(p));
                        store(m, of_k * load(m));
                    });
                }
            }
            within(first, scale);
        }
        move_keys(count);
    }

  private:
    void within(int64_t first, S scale) {
        for (int64_t i = first; i < first + kBlock; ++i) {
            const S *q = t.q + i * width, *k = t.k + i * width, *d = decay + i * width;
            for (int64_t j = first; j < i; ++j) {
                S* x = near + (j - first) * width;
                V sums[2] = {};
                vectors<S>(width, [&](int64_t c) {
                    const V earlier = load(d + c) * load(x + c);
                    store(x + c, earlier);
                    sums[0] = fma(load(q + c), earlier, sums[0]);
                    sums[1] = fma(load(k + c), earlier, sums[1]);
                });
                const V both = sum_lanes<S, 2>(sums);
                P[i * kChunk + j] = scale * both[0];
                M[i * kChunk + j] = -t.beta[i] * both[1];
            }
            P[i * kChunk + i] = scale * t.kq[i];
            memcpy(near + (i - first) * width, k, sizeof(S) * static_cast<size_t>(width));
        }
    }
};

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
