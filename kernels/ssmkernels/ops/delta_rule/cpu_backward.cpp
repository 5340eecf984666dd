// The delta rule's backward pass.
//
// A task takes a few heads of one group, one after another, each through its sequence's segments from the last to the
// first: forward by the walk from the saved state, then through the chunks from the last to the first.
#include "delta_rule/cpu_adjoint.h"
#include "native/exports.h"

namespace ssmzoo {
namespace SSMZOO_ISA {
namespace {

template <class S>
void head_backward(const DeltaBackwardArguments& b, const Sequence& s, int64_t head, bool first, Backward<S>& w) {
    const DeltaArguments& a = b.forward;
    const int64_t own = (s.index * a.heads + head) * a.keys * a.values;
    for (int64_t j = 0; j < a.keys; ++j)
        for (int64_t c = 0; c < w.columns; c += Lanes<S>::count)
            store(w.dstate + j * w.columns + c, b.dfinal ? read_some(at<S>(b.dfinal, own + j * a.values + c), a.values - c)
                                                         : typename Lanes<S>::V{});
    const int64_t chunks = ceil_div(s.length, kChunk);
    for (int64_t segment = ceil_div(chunks, kSegment) - 1; segment >= 0; --segment) {
        w.run_ahead(a, s, segment, head);
        for (int64_t k = minimum(kSegment, chunks - segment * kSegment) - 1; k >= 0; --k)
            w.chunk(b, s, (segment * kSegment + k) * kChunk, k, head, first);
    }
    if (!b.dinitial) return;
    for (int64_t j = 0; j < a.keys; ++j)
        memcpy(static_cast<S*>(b.dinitial) + own + j * a.values, w.dstate + j * w.columns,
               sizeof(S) * static_cast<size_t>(a.values));
}

template <class S>
int backward(const DeltaBackwardArguments& b) {
    constexpr int64_t most = Backward<S>::kHeads;
    const DeltaArguments& a = b.forward;
    const int64_t ratio = a.heads / a.groups, parts = ceil_div(ratio, most);
    Backward<S> w;
    const size_t bytes = sizeof(S) * static_cast<size_t>(w.take(nullptr, a));
    return parallel_for(a.sequences * a.groups * parts, a.threads, bytes, [&](int64_t i, char* scratch) {
        Backward<S> own;
        own.take(reinterpret_cast<S*>(scratch), a);
        const int64_t group = i / parts % a.groups, start = i % parts * most;
        for (int64_t h = start; h < minimum(start + most, ratio); ++h)
            head_backward(b, sequence(a, i / (parts * a.groups)), group * ratio + h, h == start, own);
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_SUMS(delta_rule_backward, DeltaBackwardArguments, forward.dtype, backward)
