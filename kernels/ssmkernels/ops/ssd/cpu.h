// What the state-space dual's forward and backward passes share: arguments, blocks of heads, and a chunk's matrices.
//
// A task takes one sequence and a block of heads of one group, and walks over time in chunks of c tokens, as tiled.py
// does for all chunks at once. C, B and their product are laid out once a chunk for the whole block. Sums over heads
// are taken within the block, whose size depends on the number of heads alone.
//
// Letters are those of tiled.py: G = C Bᵀ, L the decays from token to token, M = L ∘ G, E the decays from the chunk's
// start, F those to its end, X = Δ ∘ x, S the state. The state lies here as (n, p). Matrices over two tokens lie
// transposed, (j, i), so that lanes run over the later token.
//
// Mamba-3's scan (mamba3_scan/cpu.py) is the same with two more numbers a token. There X = scale ∘ x, and a token's own
// outputs see it not through M, which is 0 there, but through direct_j G_ji x_j, as all `rank` tokens of one step see each
// other. The scale depends on the next step; for outputs it is part of M, as 0 · NaN would bring a NaN from there into this.
#pragma once

#include "native/gemm.h"
#include "native/math.h"
#include "native/packed.h"
#include "native/parallel.h"
#include "ssd/cpu_division.h"

namespace ssmzoo {

namespace SSMZOO_ISA {

constexpr int64_t kBlock = 4;    // heads of a task, at most

inline Sequence sequence(const SsdArguments& a, int64_t i) {
    return sequence(a.cu_seqlens, a.length, a.chunk * a.segment, i);
}

// Tokens of all sequences.
inline int64_t tokens_of(const SsdArguments& a) { return (a.cu_seqlens ? 1 : a.sequences) * a.length; }

// The first row of a head's state before a segment of its sequence, where it is kept.
inline int64_t start_of(const SsdArguments& a, const Sequence& s, int64_t segment, int64_t head) {
    return ((s.first_segment + segment) * a.heads + head) * a.n;
}

template <class S>
KeptRows<S> starts_of(const SsdArguments& a) {
    return {a.starts, a.dtype, a.p};
}

// A block of heads of one group; `part` is its number within the group.
struct Block {
    int64_t first, heads, group, part;
};

inline int64_t blocks_per_group(const SsdArguments& a) { return ceil_div(a.heads / a.groups, kBlock); }

inline Block block(const SsdArguments& a, int64_t i) {
    const int64_t blocks = blocks_per_group(a), heads = a.heads / a.groups, group = i / blocks, part = i % blocks;
    const int64_t first = part * heads / blocks, end = (part + 1) * heads / blocks;  // of nearly equal size
    return {group * heads + first, end - first, group, part};
}

// The tokens of a chunk: the first one's place in its sequence, how many there are, and that in whole vectors.
struct Span {
    int64_t start, tokens, padded;
};

template <class S>
Span span(const SsdArguments& a, const Sequence& s, int64_t chunk) {
    const int64_t start = chunk * a.chunk, tokens = minimum(a.chunk, s.length - start);
    return {start, tokens, round_up(tokens, Lanes<S>::count)};
}

// Of a matrix over two tokens, (j, i), only the part with i >= j is anybody's, and pairs within a step. Such a matrix is
// worked out in strips of columns, which have rows up to their last step's last token. The narrower they are the less of the
// other half is computed: one vector, where six sums of one keep the multipliers busy, otherwise a panel of a product.
template <class S>
constexpr int64_t kStrip = (SSMZOO_VECTOR_BYTES == 64 ? 1 : kVectors) * Lanes<S>::count;

template <class S>
int64_t last_row(const SsdArguments& a, Span t, int64_t strip) {
    return minimum(t.tokens, strip + kStrip<S> + a.rank - 1);
}

// (c, c) = A (c, inner) B (inner, c)
template <class S>
void product_of_pairs(const SsdArguments& a, Left<S> A, const S* B, S* C, Span t, int64_t inner, S* panel) {
    for (int64_t i = 0; i < t.padded; i += kStrip<S>)
        product(A, B + i, a.chunk, C + i, a.chunk, last_row<S>(a, t, i), minimum(kStrip<S>, t.padded - i), inner, panel);
}

// What all heads of a group share in a chunk.
template <class S>
struct Shared {
    Left<S> B;              // (c n)
    S *own, *C_turned, *G;  // (c n), (n c), (c c): element (j, i) of G is C_i · B_j

    void take(Memory<S>& memory, const SsdArguments& a) {
        own = memory.take(a.chunk * row(a));
        C_turned = memory.take(a.n * a.chunk);
        G = memory.take(a.chunk * a.chunk);
    }

    void read(const SsdArguments& a, const Sequence& s, Span t, int64_t group, S* panel) {
        read_rows(a, t, a.C, s.batch * a.C_batch + (s.start + t.start) * a.C_time + group * a.C_group, a.C_time);
        transpose(C_turned, a.chunk, own, row(a), t.tokens, a.n);
        read_B(a, s, t, group);
        for (int64_t j = 0; j < a.n; ++j)
            for (int64_t i = t.tokens; i < t.padded; ++i) C_turned[j * a.chunk + i] = S(0);
        product_of_pairs<S>(a, B, C_turned, G, t, a.n, panel);
    }

    void read_B(const SsdArguments& a, const Sequence& s, Span t, int64_t group) {
        read_rows(a, t, a.B, s.batch * a.B_batch + (s.start + t.start) * a.B_time + group * a.B_group, a.B_time);
        B = {own, row(a), 1};
    }

    // Rows of B or C to `own`, in S. They often lie a power of two apart, where a cache has room for few of them; there they
    // are a little more than n apart.
    void read_rows(const SsdArguments& a, Span t, const void* from, int64_t first, int64_t time) {
        for (int64_t i = 0; i < t.tokens; ++i) read_row(own + i * row(a), from, a.map_dtype, first + i * time, a.n);
    }

    // The rows of C, if they are read there, and B so many chunks further.
    static void coming(const SsdArguments& a, const Sequence& s, Span t, int64_t group, int64_t chunks, bool C,
                       Coming& to) {
        const int64_t size = bytes_of(a.map_dtype), first = t.start + chunks * a.chunk;
        if (first < 0) return;
        const auto add = [&](const void* from, int64_t batch, int64_t time, int64_t beside) {
            const int64_t place = s.batch * batch + (s.start + first) * time + group * beside;
            to.add(static_cast<const char*>(from) + place * size, time * size, a.n * size,
                   minimum(a.chunk, s.length - first));
        };
        if (C) add(a.C, a.C_batch, a.C_time, a.C_group);
        add(a.B, a.B_batch, a.B_time, a.B_group);
    }

    static int64_t row(const SsdArguments& a) { return round_up(a.n, kLine<S>) + kLine<S>; }

    Left<S> B_turned() const { return {B.p, 1, B.row}; }
};

// One head's step sizes and decays in a chunk, (c) each, 0 and 1 beyond its tokens.
template <class S>
struct Steps {
    S *raw, *delta, *decay, *E, *F;  // raw: before softplus and limits
    S *scale, *direct, *fed;         // scale is delta where the call has no other; fed is F ∘ scale
    S whole;                         // the decay over all of the chunk

    void take(Memory<S>& memory, const SsdArguments& a) {
        raw = memory.take(a.chunk);
        delta = memory.take(a.chunk);
        decay = memory.take(a.chunk);
        E = memory.take(a.chunk);
        F = memory.take(a.chunk);
        fed = memory.take(a.chunk);
        scale = a.scale ? memory.take(a.chunk) : delta;
        direct = a.direct ? memory.take(a.chunk) : nullptr;
    }

    void read(const SsdArguments& a, const Sequence& s, Span t, int64_t head) {
        const int64_t offset = s.batch * a.dt_batch + (s.start + t.start) * a.dt_time + head;
        const S bias = a.dt_bias ? *at<S>(a.dt_bias, head) : S(0);
        for (int64_t i = 0; i < t.padded; ++i) raw[i] = S(0);
        for (int64_t i = 0; i < t.tokens; ++i) raw[i] = number(a, offset + i * a.dt_time) + bias;
        const auto A = splat(*at<S>(a.A, head)), least = splat(S(a.dt_least)), most = splat(S(a.dt_most));
        vectors<S>(t.padded, [&](int64_t i) {
            auto step = load(raw + i);
            if (a.softplus) step = softplus<S>(step);
            step = clamp(step, least, most);
            store(delta + i, step);
            store(decay + i, exp<S>(step * A));
        });
        for (int64_t i = t.tokens; i < t.padded; ++i) delta[i] = S(0), decay[i] = S(1);
        S product = S(1);
        for (int64_t i = 0; i < t.padded; ++i) E[i] = product = product * decay[i];
        whole = product;
        if (a.scale) read_scales(a, s, t, head);
        product = S(1);
        for (int64_t i = t.padded - 1; i >= 0; --i) {
            F[i] = product;
            fed[i] = product * scale[i];
            product = product * decay[i];
        }
    }

  private:
    void read_scales(const SsdArguments& a, const Sequence& s, Span t, int64_t head) {
        const int64_t offset = (s.batch * a.length + s.start + t.start) * a.heads + head;
        for (int64_t i = 0; i < t.padded; ++i) {
            scale[i] = i < t.tokens ? *at<S>(a.scale, offset + i * a.heads) : S(0);
            if (a.direct) direct[i] = i < t.tokens ? *at<S>(a.direct, offset + i * a.heads) : S(0);
        }
    }

    static S number(const SsdArguments& a, int64_t i) {
        if constexpr (sizeof(S) == 8) {
            return *at<double>(a.dt, i);
        } else {
            if (a.dtype == 2 && !a.scale) return widen(*at<bfloat16>(a.dt, i));
            if (a.dtype == 3 && !a.scale) return widen(*at<float16>(a.dt, i));
            return *at<float>(a.dt, i);
        }
    }
};

// put(j, i, L, G) for vectors of the elements (j, i) with i >= j, those left of them 0; the last row first. L comes row
// by row from the one below: no decay is ever a quotient of two others. `row` is (c).
template <class S, class Put>
void decays(Span t, const S* decay, const S* G, int64_t stride, S* row, const Put& put) {
    for (int64_t i = 0; i < t.padded; ++i) row[i] = S(0);
    for (int64_t j = t.tokens - 1; j >= 0; --j) {
        const int64_t first = j / Lanes<S>::count * Lanes<S>::count;
        if (j + 1 < t.tokens) {
            const auto factor = splat(decay[j + 1]);
            for (int64_t i = first; i < t.padded; i += Lanes<S>::count) store(row + i, factor * load(row + i));
        }
        row[j] = S(1);
        for (int64_t i = first; i < t.padded; i += Lanes<S>::count) put(j, i, load(row + i), load(G + j * stride + i));
    }
}

// f(j) for each token j of the step that token i belongs to.
template <class F>
void of_step(const SsdArguments& a, int64_t i, const F& f) {
    const int64_t first = i - i % a.rank;
    for (int64_t j = first; j < first + a.rank; ++j) f(j);
}

// A matrix over two tokens becomes 0 at those of one step; elements (j, i) with i < j are nobody's.
template <class S>
void clear_steps(const SsdArguments& a, Span t, S* matrix) {
    for (int64_t j = 0; j < t.tokens; ++j) of_step(a, j, [&](int64_t i) { matrix[j * a.chunk + i] = S(0); });
}

// A head's outputs, Y = E ∘ (C S) + M X.
template <class S>
struct Outputs {
    S *M, *row;     // (c, c), (c)
    int64_t width;  // p in whole vectors

    void take(Memory<S>& memory, const SsdArguments& a) {
        width = round_up(a.p, Lanes<S>::count);
        M = memory.take(a.chunk * a.chunk);
        row = memory.take(a.chunk);
    }

    // Y, (c, width), from the state before the chunk, (n, width), and x, (c, width).
    void compute(const SsdArguments& a, Span t, const Shared<S>& shared, const Steps<S>& steps, const S* state,
                 const S* x, S* Y, S* panel, Coming* coming = nullptr) const {
        using V = typename Lanes<S>::V;
        decays(t, steps.decay, shared.G, a.chunk, row,
               [&](int64_t j, int64_t i, V L, V G) { store(M + j * a.chunk + i, L * G); });
        if (a.direct) {
            for (int64_t j = 0; j < t.tokens; ++j) {
                const V scale = splat(steps.scale[j]);
                for (int64_t i = j / Lanes<S>::count * Lanes<S>::count; i < t.padded; i += Lanes<S>::count)
                    store(M + j * a.chunk + i, scale * load(M + j * a.chunk + i));
            }
            clear_steps(a, t, M);
        }
        product(Left<S>{shared.C_turned, 1, a.chunk}, state, width, Y, width, t.tokens, width, a.n, panel);
        product<S, Shape::lower>(Left<S>{M, 1, a.chunk}, x, width, Y, width, t.tokens, width, t.tokens, panel, 1,
                              {true, S(1), steps.E}, a.direct ? nullptr : steps.scale, coming);
    }

    // Adds what the tokens of each token's own step give, from x (c, width).
    void add_direct(const SsdArguments& a, Span t, const Shared<S>& shared, const Steps<S>& steps, const S* x,
                    S* Y) const {
        for (int64_t i = 0; i < t.tokens; ++i)
            of_step(a, i, [&](int64_t j) {
                const auto factor = splat(steps.direct[j] * shared.G[j * a.chunk + i]);
                S* row = Y + i * width;
                vectors<S>(width, [&](int64_t c) { store(row + c, fma(factor, load(x + j * width + c), load(row + c))); });
            });
    }
};

// The factor of x in y: a number for all of the head's channels, or one for each.
template <class S>
S skip(const SsdArguments& a, int64_t head, int64_t channel) {
    return a.D ? *at<S>(a.D, head * a.skip + (a.skip > 1 ? channel : 0)) : S(0);
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
