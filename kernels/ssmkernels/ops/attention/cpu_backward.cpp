// Attention to runs of keys, backward.
#include "attention/cpu_adjoint.h"
#include "attention/cpu_runs.h"

namespace ssmzoo {

struct AttentionRunsBackwardArguments {
    AttentionBackwardArguments call;
    RunArguments runs;
};

namespace SSMZOO_ISA {
namespace {

template <class S>
int runs_backward(const AttentionRunsBackwardArguments& a) {
    return backward<S>(a.call, RunKeys::bytes, [&](const Range& range, char* scratch) {
        return RunKeys(a.call.forward, a.runs, range, scratch);
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_SUMS(attention_backward, AttentionRunsBackwardArguments, call.forward.dtype, runs_backward)
