// Attention to selected blocks, backward.
#include "attention/cpu_adjoint.h"
#include "selected_attention/cpu_lists.h"

namespace ssmzoo {

struct SelectedBackwardArguments {
    AttentionBackwardArguments call;
    BlockArguments selected;
};

namespace SSMZOO_ISA {
namespace {

template <class S>
int blocks_backward(const SelectedBackwardArguments& a) {
    const AttentionArguments& call = a.call.forward;
    return backward<S>(a.call, BlockKeys::bytes(call, a.selected), [&](const Range& range, char* scratch) {
        return BlockKeys(call, a.selected, range, scratch);
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_SUMS(selected_attention_backward, SelectedBackwardArguments, call.forward.dtype, blocks_backward)
