// Linear attention's forward pass.
#include "linear_attention/cpu.h"
#include "native/exports.h"

namespace ssmzoo {
namespace SSMZOO_ISA {
namespace {

// A tile of kKeys channels of the key by N vectors of the value, through a chunk. `late`: outputs see the state before
// their own token.
template <class S, int N, bool late>
SSMZOO_INLINE void advance(const ChunkRows<S>& rows, int64_t first_key, int64_t first_value, int64_t count, S* state,
                           S* o) {
    using V = typename Lanes<S>::V;
    constexpr int lanes = Lanes<S>::count;
    V s[kKeys][N];
    for (int r = 0; r < kKeys; ++r)
        for (int n = 0; n < N; ++n) s[r][n] = load(state + (first_key + r) * rows.value + first_value + n * lanes);
    for (int64_t i = 0; i < count; ++i) {
        const S *q = rows.q + i * rows.key + first_key, *k = rows.k + i * rows.key + first_key;
        const S* w = rows.w + i * rows.key + first_key;
        V v[N], y[N];
        for (int n = 0; n < N; ++n) {
            v[n] = load(rows.v + i * rows.value + first_value + n * lanes);
            y[n] = load(o + i * rows.value + first_value + n * lanes);
        }
        for (int r = 0; r < kKeys; ++r) {
            const V qs = splat(q[r]), ks = splat(k[r]), ws = splat(w[r]);
            for (int n = 0; n < N; ++n) {
                if (late) y[n] = fma(qs, s[r][n], y[n]);
                s[r][n] = fma(ws, s[r][n], ks * v[n]);
                if (!late) y[n] = fma(qs, s[r][n], y[n]);
            }
        }
        for (int n = 0; n < N; ++n) store(o + i * rows.value + first_value + n * lanes, y[n]);
    }
    for (int r = 0; r < kKeys; ++r)
        for (int n = 0; n < N; ++n) store(state + (first_key + r) * rows.value + first_value + n * lanes, s[r][n]);
}

template <class S, bool late>
void advance_all(const ChunkRows<S>& rows, int64_t count, S* state, S* o) {
    constexpr int lanes = Lanes<S>::count;
    int64_t c = 0;
    for (; c + kWidest * lanes <= rows.value; c += kWidest * lanes)
        for (int64_t r = 0; r < rows.key; r += kKeys) advance<S, kWidest, late>(rows, r, c, count, state, o);
    for (; c < rows.value; c += lanes)
        for (int64_t r = 0; r < rows.key; r += kKeys) advance<S, 1, late>(rows, r, c, count, state, o);
}

template <class S>
void head_forward(const LinearAttentionArguments& a, const HeadSequence& s, int64_t head, char* scratch,
                  int64_t* used) {
    Memory<S> memory = {reinterpret_cast<S*>(scratch), 0};
    ChunkRows<S> rows;
    rows.take(memory, a);
    S* state = memory.take(rows.key * rows.value);
    S* o = memory.take(a.chunk * rows.value);
    *used = memory.used;
    if (!scratch) return;
    rows.begin(a, head);
    const int64_t size = a.keys * a.values, own = (s.index * a.heads + head) * size;
    memset(state, 0, sizeof(S) * static_cast<size_t>(rows.key * rows.value));
    if (a.initial) copy_rows(state, rows.value, at<S>(a.initial, own), a.values, a.keys, a.values);
    for (int64_t chunk = 0; chunk * a.chunk < s.length; ++chunk) {
        const Tokens t = tokens(a, s, chunk);
        if (a.starts) {
            const int64_t row = start_of(a, s, chunk, head);
            for (int64_t j = 0; j < a.keys; ++j) starts_of<S>(a).write(row + j, 0, state + j * rows.value, a.values);
        }
        rows.read(a, s, t, head);
        memset(o, 0, sizeof(S) * static_cast<size_t>(t.count * rows.value));
        if (rows.bonus)
            advance_all<S, true>(rows, t.count, state, o);
        else
            advance_all<S, false>(rows, t.count, state, o);
        for (int64_t i = 0; i < t.count; ++i) {
            S* row = o + i * rows.value;
            if (rows.bonus) {
                const auto seen = splat(rows.seen[i]);
                const S* v = rows.v + i * rows.value;
                vectors<S>(rows.value, [&](int64_t c) { store(row + c, fma(seen, load(v + c), load(row + c))); });
            }
            const int64_t place = (s.batch * a.length + t.start + i) * a.heads + head;
            write_row(a.o, a.dtype, place * a.values, row, a.values);
        }
    }
    copy_rows(static_cast<S*>(a.final_state) + own, a.values, state, rows.value, a.keys, a.values);
}

template <class S>
int forward(const LinearAttentionArguments& a) {
    int64_t numbers = 0;
    head_forward<S>(a, {}, 0, nullptr, &numbers);
    return parallel_for(a.sequences * a.heads, a.threads, sizeof(S) * static_cast<size_t>(numbers),
                        [&](int64_t i, char* scratch) {
                            int64_t used;
                            head_forward<S>(a, head_sequence(a, i / a.heads), i % a.heads, scratch, &used);
                        });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_SUMS(linear_attention, LinearAttentionArguments, dtype, forward)
