// The general delta rule's forward pass.
#include "generalized_delta_rule/cpu.h"
#include "native/exports.h"

namespace ssmzoo {
namespace SSMZOO_ISA {
namespace {

template <class S>
struct Forward {
    Tokens<S> tokens;
    S *state, *o;

    int64_t take(S* p, const DeltaRuleArguments& x) {
        Memory<S> memory = {p, 0};
        tokens.take(memory, x);
        state = memory.take(tokens.rows * tokens.width);
        o = memory.take(x.segment * tokens.width);
        return memory.used;
    }
};

template <class S>
void head_forward(const DeltaRuleArguments& x, const Task& t, char* scratch) {
    using V = typename Lanes<S>::V;
    constexpr int64_t lanes = Lanes<S>::count;
    Forward<S> w;
    w.take(reinterpret_cast<S*>(scratch), x);
    const int64_t width = w.tokens.width, size = x.keys * x.values, own = (t.sequence * x.heads + t.head) * size;
    memset(w.state, 0, sizeof(S) * static_cast<size_t>(w.tokens.rows * width));
    if (x.initial) read_state(w.state, x.initial, own, x, width);
    for (int64_t first = 0; first < t.length; first += x.segment) {
        const int64_t count = minimum(x.segment, t.length - first);
        if (x.starts) {
            const int64_t row = start_of(x, t, first / x.segment);
            for (int64_t j = 0; j < x.keys; ++j) starts_of<S>(x).write(row + j, 0, w.state + j * width, x.values);
        }
        w.tokens.read(x, t, first, count);
        const V scale = splat(S(x.scale));
        column_blocks<S>(width, [&](int64_t column, auto vectors) {
            constexpr int N = decltype(vectors)::value;
            for (int64_t i = 0; i < count; ++i) {
                V read[N], o[N];
                advance<S, N, true>(w.tokens, i, w.state, w.state, column, read, o);
                for (int j = 0; j < N; ++j) store(w.o + i * width + column + j * lanes, scale * o[j]);
            }
        });
        for (int64_t i = 0; i < count; ++i) {
            const int64_t time = t.batch * x.length + t.start + first + i;
            write_row(x.o, x.dtype, (time * x.heads + t.head) * x.values, w.o + i * width, x.values);
        }
    }
    write_state(x.final_state, own, w.state, x, width);
}

template <class S>
int forward(const DeltaRuleArguments& x) {
    Forward<S> w;
    const size_t bytes = sizeof(S) * static_cast<size_t>(w.take(nullptr, x));
    return for_heads(x, bytes, [&](const Task& t, char* scratch) { head_forward<S>(x, t, scratch); });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_SUMS(generalized_delta_rule, DeltaRuleArguments, dtype, forward)
