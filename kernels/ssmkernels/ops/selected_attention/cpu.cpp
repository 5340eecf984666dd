// Attention to selected blocks, forward.
#include "attention/cpu_forward.h"
#include "selected_attention/cpu_lists.h"

namespace ssmzoo {

struct SelectedArguments {
    AttentionArguments call;
    BlockArguments selected;
};

namespace SSMZOO_ISA {
namespace {

template <class S>
int blocks_forward(const SelectedArguments& a) {
    return forward<S>(a.call, BlockKeys::bytes(a.call, a.selected), [&](const Range& range, char* scratch) {
        return BlockKeys(a.call, a.selected, range, scratch);
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_SUMS(selected_attention, SelectedArguments, call.dtype, blocks_forward)
