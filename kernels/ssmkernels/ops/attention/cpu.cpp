// Attention to runs of keys, forward.
#include "attention/cpu_forward.h"
#include "attention/cpu_runs.h"

namespace ssmzoo {

struct AttentionForwardArguments {
    AttentionArguments call;
    RunArguments runs;
};

namespace SSMZOO_ISA {
namespace {

template <class S>
int runs_forward(const AttentionForwardArguments& a) {
    return forward<S>(a.call, RunKeys::bytes, [&](const Range& range, char* scratch) {
        return RunKeys(a.call, a.runs, range, scratch);
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_SUMS(attention, AttentionForwardArguments, call.dtype, runs_forward)
