// What the general delta rule's forward and backward passes share: arguments, rows of tokens, and one token's update.
//
// A task is one head of one sequence, and goes from token to token. The state lies as (k v): lanes run over v, where
// all columns are alike. Rows and columns are padded by zeros to whole vectors. Products of matrices over chunks of
// tokens would take as many operations at a head dim of 64, and more memory.
#pragma once

#include "native/compact.h"
#include "native/math.h"
#include "native/parallel.h"
#include "ssd/cpu_rows.h"

namespace ssmzoo {

// S is float, or double where activations are. The last axis is contiguous; so are the last two of activations.
struct DeltaRuleArguments {
    const void *q, *k, *v, *a, *b;       // (b l h keys), but v (b l h values); any floating dtype
    const void* log_decay;               // S: (b l h keys) or null
    const void* initial;                 // S: (s h keys values) or null
    const int32_t* cu_seqlens;           // (s + 1) or null
    void *o, *final_state, *starts;      // (b l h values); S: (s h keys values); rows of (segments h keys), see compact.h, or null
    int64_t dtype, sequences, length, heads, keys, values, segment, threads;
    int64_t q_batch, q_time, k_batch, k_time, v_batch, v_time, a_batch, a_time, b_batch, b_time, g_batch, g_time;
    double scale;
};

namespace SSMZOO_ISA {

// One sequence of one head: where it lies, and which of the saved states are its own.
struct Task {
    int64_t sequence, head, batch, start, length, first_segment;
};

inline Task task(const DeltaRuleArguments& a, int64_t i) {
    const int64_t s = i / a.heads, head = i % a.heads;
    if (!a.cu_seqlens) return {s, head, s, 0, a.length, s * ceil_div(a.length, a.segment)};
    const int64_t start = a.cu_seqlens[s], end = a.cu_seqlens[s + 1];
    return {s, head, 0, start, end - start, start / a.segment + s};  // at most length / segment + 1 each: none overlap
}

template <class S>
KeptRows<S> starts_of(const DeltaRuleArguments& x) {
    return {x.starts, x.dtype, x.values};
}

// The first row of a task's state before a segment.
inline int64_t start_of(const DeltaRuleArguments& x, const Task& t, int64_t segment) {
    return ((t.first_segment + segment) * x.heads + t.head) * x.keys;
}

// A segment's tokens as numbers of sums, and the state, with room for both passes.
template <class S>
struct Tokens {
    S *q, *k, *a, *b, *decay, *v;  // (segment rows), but v (segment width)
    int64_t rows, width;           // keys and values in whole vectors

    void take(Memory<S>& memory, const DeltaRuleArguments& x) {
        rows = round_up(x.keys, Lanes<S>::count);
        width = round_up(x.values, Lanes<S>::count);
        S** const keyed[] = {&q, &k, &a, &b, &decay};
        for (S** p : keyed) *p = memory.take(x.segment * rows);
        v = memory.take(x.segment * width);
    }

    void read(const DeltaRuleArguments& x, const Task& t, int64_t first, int64_t count) {
        const auto row = [&](S* to, const void* from, int64_t size, int64_t time, int64_t batch_step, int64_t step) {
            read_row(to, from, x.dtype, t.batch * batch_step + time * step + t.head * size, size);
        };
        for (int64_t i = 0; i < count; ++i) {
            const int64_t time = t.start + first + i, at = i * rows;
            row(q + at, x.q, x.keys, time, x.q_batch, x.q_time);
            row(k + at, x.k, x.keys, time, x.k_batch, x.k_time);
            row(a + at, x.a, x.keys, time, x.a_batch, x.a_time);
            row(b + at, x.b, x.keys, time, x.b_batch, x.b_time);
            row(v + i * width, x.v, x.values, time, x.v_batch, x.v_time);
            if (x.log_decay) {
                const S* g = static_cast<const S*>(x.log_decay) + t.batch * x.g_batch + time * x.g_time + t.head * x.keys;
                vectors<S>(x.keys, [&](int64_t j) { store(decay + at + j, exp<S>(read_some(g + j, x.keys - j))); });
            } else {
                for (int64_t j = 0; j < rows; ++j) decay[at + j] = S(1);
            }
        }
    }
};

// (keys values), contiguous → (rows width), and back.
template <class S>
void read_state(S* to, const void* from, int64_t offset, const DeltaRuleArguments& x, int64_t width) {
    for (int64_t i = 0; i < x.keys; ++i)
        memcpy(to + i * width, at<S>(from, offset + i * x.values), sizeof(S) * static_cast<size_t>(x.values));
}

template <class S>
void write_state(void* to, int64_t offset, const S* from, const DeltaRuleArguments& x, int64_t width) {
    for (int64_t i = 0; i < x.keys; ++i)
        memcpy(static_cast<S*>(to) + offset + i * x.values, from + i * width, sizeof(S) * static_cast<size_t>(x.values));
}

template <int N>
struct Constant {
    static constexpr int value = N;
};

// f(first, N) for columns of a state in blocks of N vectors, a constant: four as long as there are as many.
template <class S, class F>
SSMZOO_INLINE void column_blocks(int64_t width, const F& f) {
    constexpr int64_t lanes = Lanes<S>::count;
    int64_t first = 0;
    for (; first + 4 * lanes <= width; first += 4 * lanes) f(first, Constant<4>());
    for (; first < width; first += lanes) f(first, Constant<1>());
}

// Σ_i x_i S_i over rows, for N vectors of columns. Two chains of additions, even rows and odd ones.
template <class S, int N>
SSMZOO_INLINE void read_along(const S* x, const S* state, int64_t rows, int64_t width, typename Lanes<S>::V* sum) {
    using V = typename Lanes<S>::V;
    constexpr int64_t lanes = Lanes<S>::count;
    V even[N] = {}, odd[N] = {};
    for (int64_t i = 0; i < rows; i += 2) {
        const V one = splat(x[i]), other = splat(x[i + 1]);
        for (int j = 0; j < N; ++j) {
            even[j] = fma(one, load(state + i * width + j * lanes), even[j]);
            odd[j] = fma(other, load(state + (i + 1) * width + j * lanes), odd[j]);
        }
    }
    for (int j = 0; j < N; ++j) sum[j] = even[j] + odd[j];
}

// One token's update of N vectors of columns: `from` → `to`, which may be one. Returns what was read along a in `read`,
// and the products with q in `o` where it is wanted.
template <class S, int N, bool output>
SSMZOO_INLINE void advance(const Tokens<S>& w, int64_t token, const S* from, S* to, int64_t first,
                           typename Lanes<S>::V* read, typename Lanes<S>::V* o) {
    using V = typename Lanes<S>::V;
    constexpr int64_t lanes = Lanes<S>::count;
    const int64_t at = token * w.rows;
    read_along<S, N>(w.a + at, from + first, w.rows, w.width, read);
    V v[N];
    for (int j = 0; j < N; ++j) {
        v[j] = load(w.v + token * w.width + first + j * lanes);
        if (output) o[j] = V{};
    }
    for (int64_t i = 0; i < w.rows; ++i) {
        const V decay = splat(w.decay[at + i]), b = splat(w.b[at + i]), k = splat(w.k[at + i]), q = splat(w.q[at + i]);
        const int64_t row = i * w.width + first;
        for (int j = 0; j < N; ++j) {
            const V now = fma(k, v[j], fma(b, read[j], decay * load(from + row + j * lanes)));
            store(to + row + j * lanes, now);
            if (output) o[j] = fma(q, now, o[j]);
        }
    }
}

template <class Run>
int for_heads(const DeltaRuleArguments& a, size_t bytes, const Run& run) {
    const auto one = [&](int64_t i, char* scratch) { run(task(a, i), scratch); };
    return a.length == 1 ? parallel_step(a.sequences * a.heads, a.threads, bytes, one)
                         : parallel_for(a.sequences * a.heads, a.threads, bytes, one);
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
