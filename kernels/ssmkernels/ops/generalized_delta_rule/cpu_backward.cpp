// The general delta rule's backward pass.
//
// A task goes through its segments from the last to the first: forward from the saved state, keeping the state before
// each token, then through the tokens from the last to the first. With P the state before a token, N the one after it,
// u what it read, and D the gradient of N:
//
//     D += scale q doᵀ       dv = Dᵀ k          du = Dᵀ b
//     dq = scale N do        dk = D v           db = D u      da = P du      d log_decay_i = decay_i Σ_j D_ij P_ij
//     D  = diag(decay) D + a duᵀ                of P
#include "generalized_delta_rule/cpu.h"
#include "native/exports.h"

namespace ssmzoo {

struct DeltaRuleBackwardArguments {
    DeltaRuleArguments forward;
    const void *d_o, *d_final;                // as o, contiguous; S: (s h keys values) or null
    void *dq, *dk, *dv, *da, *db;             // (b l h keys), but dv (b l h values)
    void *d_log_decay, *d_initial;            // S: (b l h keys); (s h keys values) or null
};

namespace SSMZOO_ISA {
namespace {

template <class S>
struct Backward {
    Tokens<S> tokens;
    S *states, *D;                       // (segment + 1, rows, width), (rows width)
    S *reads, *d_o;                      // (segment width)
    S *dv, *du;                          // (width)
    S *dq, *dk, *da, *db, *d_log_decay;  // (rows)
    int64_t size;

    int64_t take(S* p, const DeltaRuleArguments& x) {
        Memory<S> memory = {p, 0};
        tokens.take(memory, x);
        size = tokens.rows * tokens.width;
        states = memory.take((x.segment + 1) * size);
        D = memory.take(size);
        reads = memory.take(x.segment * tokens.width);
        d_o = memory.take(x.segment * tokens.width);
        dv = memory.take(tokens.width);
        du = memory.take(tokens.width);
        S** const rows[] = {&dq, &dk, &da, &db, &d_log_decay};
        for (S** row : rows) *row = memory.take(tokens.rows);
        return memory.used;
    }

    // The states before the segment's tokens, and what each reads.
    void run_ahead(int64_t count) {
        using V = typename Lanes<S>::V;
        constexpr int64_t lanes = Lanes<S>::count;
        column_blocks<S>(tokens.width, [&](int64_t column, auto vectors) {
            constexpr int N = decltype(vectors)::value;
            for (int64_t i = 0; i < count; ++i) {
                V read[N];
                advance<S, N, false>(tokens, i, states + i * size, states + (i + 1) * size, column, read, nullptr);
                for (int j = 0; j < N; ++j) store(reads + i * tokens.width + column + j * lanes, read[j]);
            }
        });
    }

    // D takes in the output's gradient, and gives those of v and of what was read.
    void along_columns(int64_t token) {
        using V = typename Lanes<S>::V;
        constexpr int64_t lanes = Lanes<S>::count;
        const int64_t width = tokens.width, at = token * tokens.rows;
        column_blocks<S>(width, [&](int64_t column, auto vectors) {
            constexpr int N = decltype(vectors)::value;
            V v[N] = {}, u[N] = {}, out[N];
            for (int j = 0; j < N; ++j) out[j] = load(d_o + token * width + column + j * lanes);
            for (int64_t i = 0; i < tokens.rows; ++i) {
                const V q = splat(tokens.q[at + i]), k = splat(tokens.k[at + i]), b = splat(tokens.b[at + i]);
                for (int j = 0; j < N; ++j) {
                    S* place = D + i * width + column + j * lanes;
                    const V now = fma(q, out[j], load(place));
                    store(place, now);
                    v[j] = fma(k, now, v[j]);
                    u[j] = fma(b, now, u[j]);
                }
            }
            for (int j = 0; j < N; ++j) {
                store(dv + column + j * lanes, v[j]);
                store(du + column + j * lanes, u[j]);
            }
        });
    }

    // Two rows of all: sums over columns for dq, dk, db, da and d_log_decay in `sums`, (5, 2), and D of the token
    // before.
    void two_rows(int64_t token, int64_t row, typename Lanes<S>::V (&sums)[5][Lanes<S>::count], int64_t place) {
        using V = typename Lanes<S>::V;
        constexpr int64_t lanes = Lanes<S>::count;
        const int64_t width = tokens.width, at = token * tokens.rows + row;
        const S *before = states + token * size + row * width, *after = before + size;
        const S *out = d_o + token * width, *v = tokens.v + token * width, *u = reads + token * width;
        S* gradient = D + row * width;
        V q[2] = {}, k[2] = {}, b[2] = {}, a[2] = {}, g[2] = {};
        const V decay[2] = {splat(tokens.decay[at]), splat(tokens.decay[at + 1])};
        const V along[2] = {splat(tokens.a[at]), splat(tokens.a[at + 1])};
        for (int64_t c = 0; c < width; c += lanes) {
            const V o = load(out + c), value = load(v + c), was = load(u + c), dread = load(du + c);
            for (int r = 0; r < 2; ++r) {
                const V now = load(gradient + r * width + c), P = load(before + r * width + c);
                q[r] = fma(load(after + r * width + c), o, q[r]);
                k[r] = fma(now, value, k[r]);
                b[r] = fma(now, was, b[r]);
                a[r] = fma(P, dread, a[r]);
                g[r] = fma(now, P, g[r]);
                store(gradient + r * width + c, fma(along[r], dread, decay[r] * now));
            }
        }
        for (int r = 0; r < 2; ++r) {
            const V found[5] = {q[r], k[r], b[r], a[r], g[r]};
            for (int i = 0; i < 5; ++i) sums[i][place + r] = found[i];
        }
    }

    void along_rows(int64_t token) {
        using V = typename Lanes<S>::V;
        constexpr int64_t lanes = Lanes<S>::count;
        for (int64_t first = 0; first < tokens.rows; first += lanes) {
            V sums[5][lanes];
            for (int64_t r = 0; r < lanes; r += 2) two_rows(token, first + r, sums, r);
            S* const to[5] = {dq, dk, db, da, d_log_decay};
            for (int i = 0; i < 5; ++i) store(to[i] + first, sum_lanes<S, static_cast<int>(lanes)>(sums[i]));
            store(d_log_decay + first, load(d_log_decay + first) * load(tokens.decay + token * tokens.rows + first));
        }
    }
};

template <class S>
void head_backward(const DeltaRuleBackwardArguments& y, const Task& t, char* scratch) {
    const DeltaRuleArguments& x = y.forward;
    Backward<S> w;
    const int64_t used = w.take(reinterpret_cast<S*>(scratch), x);
    memset(scratch, 0, sizeof(S) * static_cast<size_t>(used));
    const int64_t width = w.tokens.width, size = x.keys * x.values, own = (t.sequence * x.heads + t.head) * size;
    if (y.d_final) read_state(w.D, y.d_final, own, x, width);
    for (int64_t segment = ceil_div(t.length, x.segment) - 1; segment >= 0; --segment) {
        const int64_t first = segment * x.segment, count = minimum(x.segment, t.length - first);
        w.tokens.read(x, t, first, count);
        const int64_t row = start_of(x, t, segment);
        for (int64_t j = 0; j < x.keys; ++j) starts_of<S>(x).read(w.states + j * width, row + j);
        w.run_ahead(count);
        const int64_t time = t.batch * x.length + t.start + first;
        for (int64_t i = 0; i < count; ++i)
            read_row(w.d_o + i * width, y.d_o, x.dtype, ((time + i) * x.heads + t.head) * x.values, x.values, S(x.scale));
        for (int64_t i = count - 1; i >= 0; --i) {
            w.along_columns(i);
            w.along_rows(i);
            const int64_t place = (time + i) * x.heads + t.head;
            write_row(y.dq, x.dtype, place * x.keys, w.dq, x.keys);
            write_row(y.dk, x.dtype, place * x.keys, w.dk, x.keys);
            write_row(y.da, x.dtype, place * x.keys, w.da, x.keys);
            write_row(y.db, x.dtype, place * x.keys, w.db, x.keys);
            write_row(y.dv, x.dtype, place * x.values, w.dv, x.values);
            memcpy(static_cast<S*>(y.d_log_decay) + place * x.keys, w.d_log_decay,
                   sizeof(S) * static_cast<size_t>(x.keys));
        }
    }
    if (y.d_initial) write_state(y.d_initial, own, w.D, x, width);
}

template <class S>
int backward(const DeltaRuleBackwardArguments& y) {
    Backward<S> w;
    const size_t bytes = sizeof(S) * static_cast<size_t>(w.take(nullptr, y.forward));
    return for_heads(y.forward, bytes, [&](const Task& t, char* scratch) { head_backward<S>(y, t, scratch); });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_SUMS(generalized_delta_rule_backward, DeltaRuleBackwardArguments, forward.dtype, backward)
