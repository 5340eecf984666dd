// What linear attention's forward and backward passes share: arguments, and the rows of a chunk.
//
// A task takes one head of one sequence and walks over time in chunks, whose rows it first brings into its own memory,
// widened, with queries scaled and decays exponentiated. A tile of the state, a few channels of the key by a few of the
// value, then stays in registers over all tokens of a chunk: three operations a number and token, as few as products of
// matrices in chunks take at these sizes, and no decay is ever a quotient of others.
#pragma once

#include "native/compact.h"
#include "native/gemm.h"
#include "native/math.h"
#include "native/parallel.h"
#include "ssd/cpu_rows.h"

namespace ssmzoo {

// S is float, or double where activations are. The last axes of q, k, v and log_decay are contiguous.
struct LinearAttentionArguments {
    const void *q, *k, *v;                // (b l g k), likewise, (b l h v), any floating dtype
    const void *log_decay, *bonus;        // S: (h), (b l h), (b l h k) or null; (h k) or null
    const void* initial;                  // S: (s h k v) or null
    const int32_t* cu_seqlens;            // (s + 1) or null
    void *o, *final_state, *starts;       // (b l h v); S: (s h k v); rows of (chunks h k), see compact.h, or null
    int64_t dtype, sequences, length, heads, groups, keys, values, chunk, threads;
    int64_t per_token, per_key;           // whether there is a decay for each token, and for each channel of the key
    int64_t q_batch, q_time, q_head, k_batch, k_time, k_head, v_batch, v_time, v_head;
    int64_t decay_batch, decay_time, decay_head;
    double scale;
};

namespace SSMZOO_ISA {

constexpr int kKeys = 4;    // channels of the key of a tile in the forward pass
constexpr int kWidest = 2;  // vectors of a tile

// One sequence: where it lies, and which of the saved states are its own.
struct HeadSequence {
    int64_t index, batch, start, length, first_chunk;
};

inline HeadSequence head_sequence(const LinearAttentionArguments& a, int64_t i) {
    if (!a.cu_seqlens) return {i, i, 0, a.length, i * ceil_div(a.length, a.chunk)};
    const int64_t start = a.cu_seqlens[i], end = a.cu_seqlens[i + 1];
    return {i, 0, start, end - start, start / a.chunk + i};  // at most length / chunk + 1 each: none overlap
}

// The tokens of a chunk: the first one's place in the batch, and how many there are.
struct Tokens {
    int64_t start, count;
};

inline Tokens tokens(const LinearAttentionArguments& a, const HeadSequence& s, int64_t chunk) {
    return {s.start + chunk * a.chunk, minimum(a.chunk, s.length - chunk * a.chunk)};
}

// A chunk's rows for one head, 0 beyond the channels.
template <class S>
struct ChunkRows {
    S *q, *k, *w, *v;     // (c, key), likewise, likewise; (c, value)
    S* seen;              // (c): what each token sees of itself, with a bonus
    const S* bonus;       // (k) or null
    int64_t key, value;   // channels, rounded up to whole tiles

    void take(Memory<S>& memory, const LinearAttentionArguments& a) {
        key = round_up(a.keys, kKeys > Lanes<S>::count ? kKeys : Lanes<S>::count);
        value = round_up(a.values, kKeys > Lanes<S>::count ? kKeys : Lanes<S>::count);
        S** const of_keys[] = {&q, &k, &w};
        for (S** rows : of_keys) *rows = memory.take(a.chunk * key);
        v = memory.take(a.chunk * value);
        seen = memory.take(a.chunk);
    }

    void begin(const LinearAttentionArguments& a, int64_t head) {
        S* const of_keys[] = {q, k};
        for (S* rows : of_keys) memset(rows, 0, sizeof(S) * static_cast<size_t>(a.chunk * key));
        memset(v, 0, sizeof(S) * static_cast<size_t>(a.chunk * value));
        bonus = a.bonus ? at<S>(a.bonus, head * a.keys) : nullptr;
        S decay = S(1);
        if (a.log_decay && !a.per_token) decay = exp<S>(splat(*at<S>(a.log_decay, head)))[0];
        for (int64_t i = 0; i < a.chunk * key; ++i) w[i] = decay;
    }

    void read(const LinearAttentionArguments& a, const HeadSequence& s, Tokens t, int64_t head) {
        const int64_t group = head / (a.heads / a.groups);
        for (int64_t i = 0; i < t.count; ++i) {
            const int64_t time = t.start + i;
            read_row(q + i * key, a.q, a.dtype, s.batch * a.q_batch + time * a.q_time + group * a.q_head, a.keys,
                     S(a.scale));
            read_row(k + i * key, a.k, a.dtype, s.batch * a.k_batch + time * a.k_time + group * a.k_head, a.keys);
            read_row(v + i * value, a.v, a.dtype, s.batch * a.v_batch + time * a.v_time + head * a.v_head, a.values);
            if (a.per_token) {
                const S* log = at<S>(a.log_decay, s.batch * a.decay_batch + time * a.decay_time + head * a.decay_head);
                read_decay(a, w + i * key, log);
            }
            if (bonus) {
                S total = S(0);
                for (int64_t c = 0; c < a.keys; ++c) total = total + q[i * key + c] * bonus[c] * k[i * key + c];
                seen[i] = total;
            }
        }
    }

  private:
    void read_decay(const LinearAttentionArguments& a, S* to, const S* log) const {
        constexpr int lanes = Lanes<S>::count;
        if (!a.per_key) {
            const auto decay = exp<S>(splat(*log));
            for (int64_t c = 0; c < key; c += lanes) store(to + c, decay);
            return;
        }
        for (int64_t c = 0; c < a.keys; c += lanes)
            store(to + c, exp<S>(read_some(log + c, a.keys - c)));
    }
};

template <class S>
KeptRows<S> starts_of(const LinearAttentionArguments& a) {
    return {a.starts, a.dtype, a.values};
}

// The first row of a head's state before a chunk.
inline int64_t start_of(const LinearAttentionArguments& a, const HeadSequence& s, int64_t chunk, int64_t head) {
    return ((s.first_chunk + chunk) * a.heads + head) * a.keys;
}

// Rows (count, from) → (count, to), of which the first `width` numbers are copied.
template <class S>
void copy_rows(S* to, int64_t ldt, const S* from, int64_t ldf, int64_t count, int64_t width) {
    for (int64_t i = 0; i < count; ++i)
        memcpy(to + i * ldt, from + i * ldf, sizeof(S) * static_cast<size_t>(width));
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
