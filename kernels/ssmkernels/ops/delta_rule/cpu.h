// What the delta rule's forward and backward passes and its step share: arguments, tokens of a tile, and the walk.
//
// The walk is the recurrence itself. A block of columns of the state stays in the first cache while it goes through the
// tokens of a tile, and each token takes one pass over it: what the token before has to write, the decay, and what the
// state holds for the key and the query. With S' the decayed state, the output is S'ᵀ q + (k · q) u, so that nothing
// waits for u. That is as many operations as chunks of matrix products would take, and safe for any decay. One decay for
// the whole head is not multiplied into the state at each token: a number beside it takes it, as long as that is neither
// small nor large.
#pragma once

#include "delta_rule/cpu_remaining.h"
#include "native/compact.h"
#include "native/packed.h"
#include "native/parallel.h"
#include "ssd/cpu_upcoming.h"

namespace ssmzoo {

// S is float, or double where activations are.
struct DeltaArguments {
    const void *q, *k, *v;                // (b l g keys), likewise, (b l h values): any floating dtype
    const void *beta, *decay;             // S: (b l h), (b l h) or (b l h keys) or null; contiguous, as all of S
    const void* initial;                  // S: (s h keys values) or null
    const int32_t* cu_seqlens;            // (s + 1) or null
    void *o, *final_state;                // (b l h values), contiguous; S: (s h keys values)
    void *starts, *errors;                // S, or null: (segments h keys values); (b h l row), v - S'ᵀ k in whole cache lines
    int64_t dtype, sequences, length, heads, groups, keys, values, channels, segment, threads;  // channels: of a head's
                                           // decay; segment: chunks between saved states
    int64_t q_batch, q_time, q_head, k_batch, k_time, k_head, v_batch, v_time, v_head;  // strides; the last axis has 1
    double scale;
};

namespace SSMZOO_ISA {

constexpr int64_t kChunk = 64;              // tokens of a tile
constexpr int64_t kPart = 128;              // columns of a task in the forward pass
constexpr int kColumns = SSMZOO_VECTOR_BYTES == 64 ? 2 : 4;  // vectors of a block: 128 keys of it take half of a first cache

inline Sequence sequence(const DeltaArguments& a, int64_t i) {
    return sequence(a.cu_seqlens, a.length, kChunk * a.segment, i);
}

// The first row of a head's state before a segment of its sequence, where it is kept.
inline int64_t start_of(const DeltaArguments& a, const Sequence& s, int64_t segment, int64_t head) {
    return ((s.first_segment + segment) * a.heads + head) * a.keys;
}

// The row of a head's errors at token `from` of a sequence.
inline int64_t errors_of(const DeltaArguments& a, const Sequence& s, int64_t head, int64_t from) {
    return (s.batch * a.heads + head) * a.length + s.start + from;
}

template <class S>
KeptRows<S> starts_of(const DeltaArguments& a) {
    return {a.starts, a.dtype, a.values};
}

// Of whole cache lines, if they are not compact: the walk writes whole vectors.
template <class S>
KeptRows<S> kept_errors(const DeltaArguments& a) {
    return {a.errors, a.dtype, is_half(a.dtype) ? a.values : round_up(a.values, kLine<S>)};
}

enum class Decay { none, head, channels };

inline Decay decay_of(const DeltaArguments& a) {
    return !a.decay ? Decay::none : a.channels > 1 ? Decay::channels : Decay::head;
}

template <class S>
S dot(const S* x, const S* y, int64_t count) {
    typename Lanes<S>::V total = {};
    vectors<S>(count, [&](int64_t i) { total = fma(load(x + i), load(y + i), total); });
    return sum_lanes<S, 1>(&total)[0];
}

// Tokens of one head of one sequence, zeros beyond the numbers of a row.
template <class S>
struct Tile {
    S *q, *k, *decay;        // (c, width), the decay not as a logarithm; of a head (c)
    S *kq, *beta, *zeros;    // (c), (c), (width)
    int64_t width, tokens;   // keys in whole vectors

    void take(Memory<S>& memory, int64_t keys, int64_t most) {
        width = round_up(keys, Lanes<S>::count);
        q = memory.take(most * width);
        k = memory.take(most * width);
        decay = memory.take(most * width);
        kq = memory.take(most);
        beta = memory.take(most);
        zeros = memory.take(width);
    }

    // Without queries where only errors are asked for.
    void read(const DeltaArguments& a, const Sequence& s, int64_t start, int64_t count, int64_t head,
              bool queries = true) {
        tokens = count;
        const int64_t group = head / (a.heads / a.groups), time = s.start + start;
        const Decay kind = decay_of(a);
        for (int64_t c = 0; c < width; ++c) zeros[c] = S(0);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t own = (s.batch * a.length + time + i) * a.heads + head;
            read_row(k + i * width, a.k, a.dtype, s.batch * a.k_batch + (time + i) * a.k_time + group * a.k_head, a.keys);
            if (queries) {
                const int64_t place = s.batch * a.q_batch + (time + i) * a.q_time + group * a.q_head;
                read_row(q + i * width, a.q, a.dtype, place, a.keys);
                kq[i] = dot(q + i * width, k + i * width, width);
            }
            beta[i] = *at<S>(a.beta, own);
            if (kind == Decay::channels) {
                const S* logarithms = at<S>(a.decay, own * a.keys);
                vectors<S>(a.keys, [&](int64_t c) {
                    store(decay + i * width + c, exp<S>(read_some(logarithms + c, a.keys - c)));
                });
            } else if (kind == Decay::head) {
                decay[i] = exp<S>(splat(*at<S>(a.decay, own)))[0];
            }
        }
    }
};

// Keys of the tile from token `start` on, if there is one, and queries if they are asked for.
inline Upcoming upcoming(const DeltaArguments& a, const Sequence& s, int64_t start, int64_t head, bool queries) {
    Upcoming rows;
    const int64_t group = head / (a.heads / a.groups), time = s.start + start;
    rows.tokens = start < 0 ? 0 : minimum(kChunk, s.length - start);
    rows.add(a.k, a.dtype, s.batch * a.k_batch + time * a.k_time + group * a.k_head, a.k_time, a.keys);
    if (queries) rows.add(a.q, a.dtype, s.batch * a.q_batch + time * a.q_time + group * a.q_head, a.q_time, a.keys);
    return rows;
}

// A bool as a type: the standard library's header is not there for every compiler that builds this.
template <bool truth>
struct Whether {
    static constexpr bool value = truth;
};

// Through the tokens of a tile with N vectors of the state's columns; `rows` (c, stride) has v and takes the outputs,
// and `errors` (c, row), if they are kept, v - S'ᵀ k.
template <class S, int N, Decay kind, bool kept>
__attribute__((noinline)) void walk_block(S* state, int64_t ld, int64_t keys, const Tile<S>& t, S scale, S* rows,
                                          int64_t stride, S* errors, int64_t row_of_errors, const Upcoming& next) {
    using V = typename Lanes<S>::V;
    constexpr int lanes = Lanes<S>::count;
    V written[N] = {};
    const S* before = t.zeros;
    Remaining<S> remaining;
    for (int64_t i = 0; i < t.tokens; ++i) {
        const S *key = t.k + i * t.width, *query = t.q + i * t.width, *decay = t.decay + i * t.width;
        const S now = kind == Decay::head ? remaining.take(t.decay[i]) : S(1);
        V held[N] = {}, out[N] = {};
        next.fetch(i);
        const auto pass = [&](auto decays) __attribute__((always_inline)) {
            for (int64_t j = 0; j < keys; ++j) {
                S* row = state + j * ld;
                const V factor = kind == Decay::channels ? splat(decay[j]) : splat(now);
                const V earlier = splat(before[j]), own = splat(key[j]), asked = splat(query[j]);
                for (int n = 0; n < N; ++n) {
                    V x = fma(earlier, written[n], load(row + n * lanes));
                    if (decays.value) x = factor * x;
                    store(row + n * lanes, x);
                    held[n] = fma(own, x, held[n]);
                    out[n] = fma(asked, x, out[n]);
                }
            }
        };
        if (kind == Decay::channels || (kind == Decay::head && now != S(1))) pass(Whether<true>());
        else pass(Whether<false>());
        const V beta = splat(t.beta[i]), through = splat(t.kq[i]), factor = splat(scale);
        const V left = splat(remaining.factor);
        for (int n = 0; n < N; ++n) {
            S* place = rows + i * stride + n * lanes;
            const V error = kind == Decay::head ? load(place) - left * held[n] : load(place) - held[n];
            written[n] = beta * error;
            if (kind == Decay::head) out[n] = left * out[n];
            store(place, factor * fma(through, written[n], out[n]));
            if (kept) store(errors + i * row_of_errors + n * lanes, error);
        }
        if (kind == Decay::head) {
            if (beyond<S, N>(written, remaining.large)) {
                for (int64_t j = 0; j < keys; ++j)
                    for (int n = 0; n < N; ++n) store(state + j * ld + n * lanes, left * load(state + j * ld + n * lanes));
                remaining.factor = S(1);
            }
            const V over = splat(S(1) / remaining.factor);
            for (int n = 0; n < N; ++n) written[n] = over * written[n];
        }
        before = key;
    }
    const V left = splat(remaining.factor);
    for (int64_t j = 0; j < keys; ++j)
        for (int n = 0; n < N; ++n) {
            S* place = state + j * ld + n * lanes;
            const V x = fma(splat(before[j]), written[n], load(place));
            store(place, kind == Decay::head ? left * x : x);
        }
}

template <class S, int N, bool kept>
void walk_some(Decay kind, S* state, int64_t ld, int64_t keys, const Tile<S>& t, S scale, S* rows, int64_t stride,
               S* errors, int64_t row, const Upcoming& next) {
    const auto run = [&](auto walk) { walk(state, ld, keys, t, scale, rows, stride, errors, row, next); };
    if (kind == Decay::none) run(walk_block<S, N, Decay::none, kept>);
    if (kind == Decay::head) run(walk_block<S, N, Decay::head, kept>);
    if (kind == Decay::channels) run(walk_block<S, N, Decay::channels, kept>);
}

// f(first column, columns) for the blocks of so many columns, whole vectors.
template <class S, class F>
void blocks(int64_t columns, const F& f) {
    constexpr int64_t wide = kColumns * Lanes<S>::count;
    int64_t first = 0;
    for (; first + wide <= columns; first += wide) f(first, wide);
    for (; first < columns; first += Lanes<S>::count) f(first, int64_t(Lanes<S>::count));
}

// The walk over all columns. The state lies block by block, each (keys, its columns); or as it is, (keys, ld).
template <class S, bool kept>
void walk(Decay kind, S* state, int64_t ld, int64_t keys, const Tile<S>& t, S scale, S* rows, int64_t stride,
          int64_t columns, const Upcoming& next = Upcoming(), S* errors = nullptr, int64_t row = 0) {
    const Upcoming nothing = Upcoming();
    blocks<S>(columns, [&](int64_t first, int64_t wide) {
        S* block = ld ? state + first : state + first * keys;
        const int64_t own = ld ? ld : wide;
        const Upcoming& rest = first == 0 ? next : nothing;
        const auto run = [&](auto some) {
            some(kind, block, own, keys, t, scale, rows + first, stride, kept ? errors + first : errors, row, rest);
        };
        if (wide > Lanes<S>::count) run(walk_some<S, kColumns, kept>);
        else run(walk_some<S, 1, kept>);
    });
}

// f(in the blocks, key, first column, numbers there are of the vector): for each vector of a state of `values` columns.
template <class S, class F>
void each_vector(int64_t keys, int64_t values, const F& f) {
    blocks<S>(round_up(values, Lanes<S>::count), [&](int64_t first, int64_t wide) {
        for (int64_t j = 0; j < keys; ++j)
            for (int64_t c = 0; c < wide; c += Lanes<S>::count)
                f(first * keys + j * wide + c, j, first + c, values - first - c);
    });
}

// A state (keys, ld), `values` columns of it, into blocks, and back.
template <class S>
void into_blocks(S* to, const S* from, int64_t ld, int64_t keys, int64_t values) {
    each_vector<S>(keys, values, [&](int64_t place, int64_t j, int64_t c, int64_t count) {
        store(to + place, from ? read_some(from + j * ld + c, count) : typename Lanes<S>::V{});
    });
}

template <class S>
void out_of_blocks(S* to, int64_t ld, const S* from, int64_t keys, int64_t values) {
    each_vector<S>(keys, values, [&](int64_t place, int64_t j, int64_t c, int64_t count) {
        write_some(to + j * ld + c, load(from + place), count);
    });
}

// Runs a Task, with memory of its own, for each sequence, head and part of at most kPart of the values' columns.
template <class Task, class S>
int by_columns(const DeltaArguments& a) {
    const int64_t parts = ceil_div(a.values, kPart);
    Task w;
    const size_t bytes = sizeof(S) * static_cast<size_t>(w.take(nullptr, a));
    return parallel_for(a.sequences * a.heads * parts, a.threads, bytes, [&](int64_t i, char* scratch) {
        Task own;
        own.take(reinterpret_cast<S*>(scratch), a);
        own.run(a, sequence(a, i / (a.heads * parts)), i / parts % a.heads, i % parts * kPart);
    });
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
