// One token of the delta rule, bound by memory.
#include "delta_rule/cpu_step.h"
#include "native/exports.h"

namespace ssmzoo {
namespace SSMZOO_ISA {
namespace {

template <class S>
int step(const DeltaArguments& a) {
    const int64_t parts = ceil_div(a.values, kStepPart);
    Step<S> w;
    const size_t bytes = sizeof(S) * static_cast<size_t>(w.take(nullptr, a.keys));
    return parallel_step(a.sequences * a.heads * parts, a.threads, bytes, [&](int64_t i, char* scratch) {
        Step<S> own;
        own.take(reinterpret_cast<S*>(scratch), a.keys);
        const int64_t task = i / parts, head = task % a.heads, first = i % parts * kStepPart;
        const Sequence s = sequence(a, task / a.heads);
        const int64_t count = minimum(kStepPart, a.values - first);
        own.tile.read(a, s, 0, 1, head);
        read_row(own.row, a.v, a.dtype, s.batch * a.v_batch + head * a.v_head + first, count);
        own.advance(decay_of(a), static_cast<S*>(a.final_state) + task * a.keys * a.values, a.keys, a.values, first,
                    S(a.scale));
        write_row(a.o, a.dtype, task * a.values + first, own.row, count);
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_SUMS(delta_rule_step, DeltaArguments, dtype, step)
