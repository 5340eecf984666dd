// The delta rule's backward pass.
//
// A task takes a few heads of one group, one after another, each through its sequence's segments from the last to the
// first: forward from the saved state to those before the other chunks, then through the chunks from the last to the first.
#include "delta_rule/cpu_adjoint_channels.h"
#include "delta_rule/cpu_adjoint_head.h"
#include "native/exports.h"

namespace ssmzoo {
namespace SSMZOO_ISA {
namespace {

template <class S, class Work>
void head_backward(const DeltaBackwardArguments& b, const Sequence& s, int64_t head, bool first, Work& w) {
    const DeltaArguments& a = b.forward;
    const int64_t state = (s.index * a.heads + head) * a.keys * a.values, chunks = ceil_div(s.length, kChunk);
    w.own.begin(b, state);
    for (int64_t segment = ceil_div(chunks, a.segment) - 1; segment >= 0; --segment) {
        const int64_t own = segment * a.segment, last = minimum(a.segment, chunks - own) - 1;
        w.own.begin_segment(b, s, segment, head);
        for (int64_t k = 0; k < last; ++k) {
            w.own.expect(b, s, own + k + 1, head, k + 1 < last);
            w.ahead(b, s, (own + k) * kChunk, k, head);
        }
        for (int64_t k = last; k >= 0; --k) {
            w.own.expect(b, s, k > 0 ? own + k - 1 : own - a.segment, head, k == 0);
            w.chunk(b, s, (own + k) * kChunk, k, head, first);
        }
    }
    w.own.end(b, state);
}

template <class S, class Work>
int run(const DeltaBackwardArguments& b) {
    const DeltaArguments& a = b.forward;
    const int64_t ratio = a.heads / a.groups, parts = ceil_div(ratio, kHeads);
    Work w;
    const size_t bytes = sizeof(S) * static_cast<size_t>(w.take(nullptr, a));
    return parallel_for(a.sequences * a.groups * parts, a.threads, bytes, [&](int64_t i, char* scratch) {
        Work own;
        own.take(reinterpret_cast<S*>(scratch), a);
        const int64_t group = i / parts % a.groups, start = i % parts * kHeads;
        for (int64_t h = start; h < minimum(start + kHeads, ratio); ++h)
            head_backward<S>(b, sequence(a, i / (parts * a.groups)), group * ratio + h, h == start, own);
    });
}

template <class S>
int backward(const DeltaBackwardArguments& b) {
    return decay_of(b.forward) == Decay::channels ? run<S, ChannelsBackward<S>>(b) : run<S, HeadBackward<S>>(b);
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_SUMS(delta_rule_backward, DeltaBackwardArguments, forward.dtype, backward)
