// Where a head's inputs and outputs lie in a chunk, and those that are read after them.
#pragma once

#include "ssd/cpu.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

// Which head of which chunk comes next in a block: so many heads and chunks further.
struct Next {
    int64_t heads, chunks;

    static Next of(const Block& block, int64_t head, int64_t chunks) {
        if (head + 1 < block.heads) return {1, 0};
        return {1 - block.heads, chunks};
    }
};

// One head's rows of x, z or y in a chunk: where the first token's lies, and from token to token.
struct HeadRows {
    const void* from;
    int64_t offset, stride, ahead, first, length;

    // `next` is whose rows are read after these.
    HeadRows(const SsdArguments& a, const Sequence& s, Span t, int64_t head, const void* of, int64_t batch, int64_t time,
         Next next = {0, 0})
        : from(of), offset(s.batch * batch + (s.start + t.start) * time + head * stored(a)), stride(time),
          ahead(next.heads * stored(a) + next.chunks * a.chunk * time), first(t.start + next.chunks * a.chunk),
          length(s.length) {}

    int64_t operator()(int64_t token) const { return offset + token * stride; }

    // The rows that are read after these.
    void coming(const SsdArguments& a, Coming& to) const {
        const int64_t size = bytes_of(a.dtype);
        if (from && first >= 0)
            to.add(static_cast<const char*>(from) + (offset + ahead) * size, stride * size, stored(a) * size,
                   minimum(a.chunk, length - first));
    }
};

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
