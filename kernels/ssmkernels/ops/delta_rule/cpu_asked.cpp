// The gradient of the delta rule's first state, for that of its output: the walk from the last token to the first.
//
// With G the gradient of the state after a token, before it is diag(decay) (I - β k kᵀ) (G + scale q doᵀ). As in the walk
// forward each token takes one pass, in which what the token after it has to write, and its decay, come first.
#include "delta_rule/cpu.h"
#include "native/exports.h"

namespace ssmzoo {
namespace SSMZOO_ISA {
namespace {

// Back through the tokens of a tile with N vectors of columns; `rows` (c, stride) has the gradient of the output.
template <class S, int N, Decay kind>
__attribute__((noinline)) void back_block(S* state, int64_t ld, int64_t keys, const Tile<S>& t, const S* ones, S scale,
                                          const S* rows, int64_t stride) {
    using V = typename Lanes<S>::V;
    constexpr int lanes = Lanes<S>::count;
    V written[N] = {}, whole = splat(S(1));
    const S *after = t.zeros, *decay = ones;
    for (int64_t i = t.tokens - 1; i >= 0; --i) {
        const S *key = t.k + i * t.width, *query = t.q + i * t.width;
        V held[N] = {}, given[N];
        for (int n = 0; n < N; ++n) given[n] = splat(scale) * load(rows + i * stride + n * lanes);
        for (int64_t j = 0; j < keys; ++j) {
            S* row = state + j * ld;
            const V factor = kind == Decay::channels ? splat(decay[j]) : whole;
            const V later = splat(after[j]), now = splat(key[j]), asked = splat(query[j]);
            for (int n = 0; n < N; ++n) {
                V x = fma(later, written[n], load(row + n * lanes));
                if (kind != Decay::none) x = factor * x;
                x = fma(asked, given[n], x);
                store(row + n * lanes, x);
                held[n] = fma(now, x, held[n]);
            }
        }
        for (int n = 0; n < N; ++n) written[n] = splat(-t.beta[i]) * held[n];
        after = key;
        decay = t.decay + i * t.width;
        if (kind == Decay::head) whole = splat(t.decay[i]);
    }
    for (int64_t j = 0; j < keys; ++j) {
        const V factor = kind == Decay::channels ? splat(decay[j]) : whole;
        for (int n = 0; n < N; ++n) {
            S* place = state + j * ld + n * lanes;
            const V x = fma(splat(after[j]), written[n], load(place));
            store(place, kind == Decay::none ? x : factor * x);
        }
    }
}

template <class S, int N>
void back(Decay kind, S* state, int64_t ld, int64_t keys, const Tile<S>& t, const S* ones, S scale, const S* rows,
          int64_t stride) {
    if (kind == Decay::none) back_block<S, N, Decay::none>(state, ld, keys, t, ones, scale, rows, stride);
    if (kind == Decay::head) back_block<S, N, Decay::head>(state, ld, keys, t, ones, scale, rows, stride);
    if (kind == Decay::channels) back_block<S, N, Decay::channels>(state, ld, keys, t, ones, scale, rows, stride);
}

// A task: one sequence, one head and some columns. In `v` is the gradient of the output, and F comes in `final_state`.
template <class S>
struct Asked {
    Tile<S> tile;
    S *state, *rows, *ones;
    int64_t width;

    int64_t take(S* p, const DeltaArguments& a) {
        Memory<S> memory = {p, 0};
        tile.take(memory, a.keys, minimum(kChunk, a.length));
        width = round_up(minimum(kPart, a.values), Lanes<S>::count);
        state = memory.take(a.keys * width);
        rows = memory.take(minimum(kChunk, a.length) * width);
        ones = memory.take(tile.width);
        return memory.used;
    }

    void run(const DeltaArguments& a, const Sequence& s, int64_t head, int64_t first) {
        const int64_t values = minimum(kPart, a.values - first), columns = round_up(values, Lanes<S>::count);
        const int64_t own = (s.index * a.heads + head) * a.keys * a.values + first;
        for (int64_t j = 0; j < tile.width; ++j) ones[j] = S(1);
        into_blocks<S>(state, nullptr, a.values, a.keys, values);
        for (int64_t start = (ceil_div(s.length, kChunk) - 1) * kChunk; start >= 0; start -= kChunk) {
            tile.read(a, s, start, minimum(kChunk, s.length - start), head);
            for (int64_t i = 0; i < tile.tokens; ++i)
                read_row(rows + i * width, a.v, a.dtype,
                         s.batch * a.v_batch + (s.start + start + i) * a.v_time + head * a.v_head + first, values);
            blocks<S>(columns, [&](int64_t at, int64_t wide) {
                S* block = state + at * a.keys;
                if (wide > Lanes<S>::count)
                    back<S, kColumns>(decay_of(a), block, wide, a.keys, tile, ones, S(a.scale), rows + at, width);
                else
                    back<S, 1>(decay_of(a), block, wide, a.keys, tile, ones, S(a.scale), rows + at, width);
            });
        }
        out_of_blocks(static_cast<S*>(a.final_state) + own, a.values, state, a.keys, values);
    }
};

template <class S>
int asked(const DeltaArguments& a) {
    return by_columns<Asked<S>, S>(a);
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_SUMS(delta_rule_asked, DeltaArguments, dtype, asked)
