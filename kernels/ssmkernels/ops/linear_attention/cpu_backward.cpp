// Linear attention's backward pass.
//
// With dO the gradient of a chunk's outputs and Q the scaled queries, from the last token to the first,
//
//     D_t  = w_{t+1} ∘ D_{t+1} + q_t do_tᵀ               the gradient of the state after token t
//     dq_t = scale S_t do_t      dk_t = D_t v_t      dv_t = D_tᵀ k_t      dlog w_t = w_t Σ_v D_t ∘ S_{t-1}
//
// and with a bonus u, where the query sees S_{t-1} before its decay,
//
//     D_{t-1} = w_t ∘ D_t + q_t do_tᵀ      dq_t = scale (S_{t-1} do_t + (v_t · do_t) u ∘ k_t)
//     dk_t += (v_t · do_t) q_t ∘ u         dv_t += (Σ q_t ∘ u ∘ k_t) do_t         du += (v_t · do_t) q_t ∘ k_t
//
// A task goes through the chunks from the last to the first. Lanes run over the channels of the key here, so that sums
// over those of the value stay within a register: the states lie transposed, (value, key). For each tile a chunk's
// states are computed again from the saved one, and kept until the tile has been walked back.
#include "linear_attention/cpu.h"
#include "native/exports.h"

namespace ssmzoo {

struct LinearAttentionBackwardArguments {
    LinearAttentionArguments forward;  // whose outputs are not looked at
    const void *d_o, *d_final;         // (b l h v), contiguous; S: (s h k v) or null
    void *dq, *dk, *dv;                // (b l h k) of dtype `maps`, likewise; (b l h v)
    void *d_decay;                     // S: (s h), (b l h) or (b l h k); null where nobody wants it
    void *d_bonus, *d_initial;         // S: (s h k) where there is a bonus; (s h k v) or null
    int64_t maps;
};

namespace SSMZOO_ISA {
namespace {

constexpr int kColumns = 4;  // channels of the value of a tile

// A task's memory.
template <class S>
struct Backward {
    using V = typename Lanes<S>::V;
    static constexpr int lanes = Lanes<S>::count;

    ChunkRows<S> rows;
    S *d_o, *dq, *dk, *d_decay, *dv;     // (c, value), (c, key) three times, (c, value)
    S *before, *after;                   // (value, key): the state before the chunk, the gradient of that after it
    S *kept, *sums, *d_bonus, *line;     // a tile's states (c, columns, vectors); its sums of dv, a vector each; (key)
    S* room;                             // a vector of rows of a state
    bool decays;                         // whether anybody wants the gradient of a decay

    int64_t take(S* p, const LinearAttentionArguments& a) {
        Memory<S> memory = {p, 0};
        rows.take(memory, a);
        d_o = memory.take(a.chunk * rows.value);
        dv = memory.take(a.chunk * rows.value);
        S** const of_keys[] = {&dq, &dk, &d_decay};
        for (S** each : of_keys) *each = memory.take(a.chunk * rows.key);
        before = memory.take(rows.key * rows.value);
        after = memory.take(rows.key * rows.value);
        kept = memory.take(a.chunk * kColumns * kWidest * lanes);
        sums = memory.take(a.chunk * kColumns * lanes);
        d_bonus = memory.take(rows.key);
        line = memory.take(rows.key);
        room = memory.take(lanes * rows.value);
        return memory.used;
    }

    // Forward through a chunk: dq, and the tile's states before each token.
    template <int K, bool late>
    SSMZOO_INLINE void ahead(int64_t key, int64_t value, int64_t count) {
        V s[kColumns][K];
        for (int m = 0; m < kColumns; ++m)
            for (int n = 0; n < K; ++n) s[m][n] = load(before + (value + m) * rows.key + key + n * lanes);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t row = i * rows.key + key;
            const S *v = rows.v + i * rows.value + value, *g = d_o + i * rows.value + value;
            S* to = kept + (decays ? i * kColumns * K * lanes : 0);
            V total[K], k[K], w[K];
            for (int n = 0; n < K; ++n) {
                total[n] = load(dq + row + n * lanes);
                k[n] = load(rows.k + row + n * lanes);
                w[n] = load(rows.w + row + n * lanes);
            }
            for (int m = 0; m < kColumns; ++m) {
                const V vs = splat(v[m]), gs = splat(g[m]);
                for (int n = 0; n < K; ++n) {
                    store(to + (m * K + n) * lanes, s[m][n]);
                    if (late) total[n] = fma(s[m][n], gs, total[n]);
                    s[m][n] = fma(w[n], s[m][n], k[n] * vs);
                    if (!late) total[n] = fma(s[m][n], gs, total[n]);
                }
            }
            for (int n = 0; n < K; ++n) store(dq + row + n * lanes, total[n]);
        }
    }

    // And back: all other gradients.
    template <int K, bool late>
    SSMZOO_INLINE void back(int64_t key, int64_t value, int64_t count) {
        V d[kColumns][K];
        for (int m = 0; m < kColumns; ++m)
            for (int n = 0; n < K; ++n) d[m][n] = load(after + (value + m) * rows.key + key + n * lanes);
        for (int64_t i = count - 1; i >= 0; --i) {
            const int64_t row = i * rows.key + key;
            const S *v = rows.v + i * rows.value + value, *g = d_o + i * rows.value + value;
            const S* from = kept + (decays ? i * kColumns * K * lanes : 0);
            S* sum = sums + i * kColumns * lanes;
            V of_key[K], of_decay[K];
            for (int n = 0; n < K; ++n) {
                of_key[n] = load(dk + row + n * lanes);
                of_decay[n] = load(d_decay + row + n * lanes);
            }
            for (int m = 0; m < kColumns; ++m) {
                const V vs = splat(v[m]), gs = splat(g[m]);
                V of_value = load(sum + m * lanes);
                for (int n = 0; n < K; ++n) {
                    const V q = load(rows.q + row + n * lanes), w = load(rows.w + row + n * lanes);
                    V now = d[m][n];
                    if (!late) now = fma(q, gs, now);
                    of_key[n] = fma(now, vs, of_key[n]);
                    of_value = fma(now, load(rows.k + row + n * lanes), of_value);
                    of_decay[n] = fma(now, load(from + (m * K + n) * lanes), of_decay[n]);
                    now = w * now;
                    if (late) now = fma(q, gs, now);
                    d[m][n] = now;
                }
                store(sum + m * lanes, of_value);
            }
            for (int n = 0; n < K; ++n) {
                store(dk + row + n * lanes, of_key[n]);
                store(d_decay + row + n * lanes, of_decay[n]);
            }
        }
        for (int m = 0; m < kColumns; ++m)
            for (int n = 0; n < K; ++n) store(after + (value + m) * rows.key + key + n * lanes, d[m][n]);
    }

    template <bool late>
    void walk(int64_t count) {
        constexpr int together = lanes < kColumns ? lanes : kColumns;
        for (int64_t c = 0; c < rows.value; c += kColumns) {
            memset(sums, 0, sizeof(S) * static_cast<size_t>(count * kColumns * lanes));
            int64_t r = 0;
            for (; r + kWidest * lanes <= rows.key; r += kWidest * lanes) {
                ahead<kWidest, late>(r, c, count);
                back<kWidest, late>(r, c, count);
            }
            for (; r < rows.key; r += lanes) {
                ahead<1, late>(r, c, count);
                back<1, late>(r, c, count);
            }
            for (int64_t i = 0; i < count; ++i)
                for (int m = 0; m < kColumns; m += together) {
                    V each[together];
                    for (int n = 0; n < together; ++n) each[n] = load(sums + (i * kColumns + m + n) * lanes);
                    store_some(dv + i * rows.value + c + m, sum_lanes<S, together>(each), together);
                }
        }
    }

    // What a token sees of itself.
    void add_own(int64_t i) {
        const S *v = rows.v + i * rows.value, *g = d_o + i * rows.value;
        const S *q = rows.q + i * rows.key, *k = rows.k + i * rows.key;
        V total = V{};
        const auto seen = splat(rows.seen[i]);
        S* to = dv + i * rows.value;
        vectors<S>(rows.value, [&](int64_t c) {
            total = fma(load(v + c), load(g + c), total);
            store(to + c, fma(seen, load(g + c), load(to + c)));
        });
        const V dot = splat(sum_lanes<S, 1>(&total)[0]);
        vectors<S>(rows.key, [&](int64_t c) {
            const V u = load(line + c), by_query = dot * load(q + c), by_key = dot * load(k + c);
            store(dq + i * rows.key + c, fma(by_key, u, load(dq + i * rows.key + c)));
            store(dk + i * rows.key + c, fma(by_query, u, load(dk + i * rows.key + c)));
            store(d_bonus + c, fma(by_query, load(k + c), load(d_bonus + c)));
        });
    }

    S sum(const S* from) const {
        V total = V{};
        vectors<S>(rows.key, [&](int64_t c) { total = total + load(from + c); });
        return sum_lanes<S, 1>(&total)[0];
    }
};

template <class S>
void head_backward(const LinearAttentionBackwardArguments& b, const HeadSequence& s, int64_t head, char* scratch) {
    const LinearAttentionArguments& a = b.forward;
    Backward<S> w;
    w.take(reinterpret_cast<S*>(scratch), a);
    w.decays = b.d_decay != nullptr;
    const int64_t key = w.rows.key, value = w.rows.value, size = a.keys * a.values, own = s.index * a.heads + head;
    const auto clear = [](S* p, int64_t count) { memset(p, 0, sizeof(S) * static_cast<size_t>(count)); };
    w.rows.begin(a, head);
    clear(w.d_o, a.chunk * value);
    clear(w.before, key * value);
    clear(w.after, key * value);
    clear(w.d_bonus, key);
    clear(w.line, key);
    if (w.rows.bonus) memcpy(w.line, w.rows.bonus, sizeof(S) * static_cast<size_t>(a.keys));
    if (b.d_final) transpose(w.after, key, at<S>(b.d_final, own * size), a.values, a.keys, a.values);
    S of_head = S(0);
    for (int64_t chunk = ceil_div(s.length, a.chunk) - 1; chunk >= 0; --chunk) {
        const Tokens t = tokens(a, s, chunk);
        transpose_kept(w.before, key, starts_of<S>(a), start_of(a, s, chunk, head), a.keys, w.room);
        w.rows.read(a, s, t, head);
        const int64_t first = (s.batch * a.length + t.start) * a.heads + head;
        for (int64_t i = 0; i < t.count; ++i)
            read_row(w.d_o + i * value, b.d_o, a.dtype, (first + i * a.heads) * a.values, a.values);
        S* const sums[] = {w.dq, w.dk, w.d_decay};
        for (S* rows : sums) clear(rows, t.count * key);
        if (w.rows.bonus)
            w.template walk<true>(t.count);
        else
            w.template walk<false>(t.count);
        for (int64_t i = 0; i < t.count; ++i) {
            if (w.rows.bonus) w.add_own(i);
            S *dq = w.dq + i * key, *decay = w.d_decay + i * key;
            const auto scale = splat(S(a.scale));
            vectors<S>(key, [&](int64_t c) {
                store(dq + c, scale * load(dq + c));
                store(decay + c, load(w.rows.w + i * key + c) * load(decay + c));
            });
            const int64_t place = first + i * a.heads;
            write_row(b.dq, b.maps, place * a.keys, dq, a.keys);
            write_row(b.dk, b.maps, place * a.keys, w.dk + i * key, a.keys);
            write_row(b.dv, a.dtype, place * a.values, w.dv + i * value, a.values);
            if (!w.decays) continue;
            S* to = static_cast<S*>(b.d_decay);
            if (a.per_key)
                memcpy(to + place * a.keys, decay, sizeof(S) * static_cast<size_t>(a.keys));
            else if (a.per_token)
                to[place] = w.sum(decay);
            else
                of_head = of_head + w.sum(decay);
        }
    }
    if (w.decays && !a.per_token) static_cast<S*>(b.d_decay)[own] = of_head;
    if (a.bonus)
        memcpy(static_cast<S*>(b.d_bonus) + own * a.keys, w.d_bonus, sizeof(S) * static_cast<size_t>(a.keys));
    if (b.d_initial) transpose(static_cast<S*>(b.d_initial) + own * size, a.values, w.after, key, a.values, a.keys);
}

template <class S>
int backward(const LinearAttentionBackwardArguments& b) {
    const LinearAttentionArguments& a = b.forward;
    Backward<S> w;
    const size_t bytes = sizeof(S) * static_cast<size_t>(w.take(nullptr, a));
    return parallel_for(a.sequences * a.heads, a.threads, bytes, [&](int64_t i, char* scratch) {
        head_backward<S>(b, head_sequence(a, i / a.heads), i % a.heads, scratch);
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_SUMS(linear_attention_backward, LinearAttentionBackwardArguments, forward.dtype, backward)
