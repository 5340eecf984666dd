// What will be read soon, asked for a piece at a time while others are computed with.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

// Bytes that will be read next. The first is read at once: a processor may forget what it is only asked to fetch where it
// does not yet know the page, and rows of a head lie in a page each.
inline void fetch_bytes(const char* from, int64_t count) {
    if (count > 0) asm volatile("" : : "r"(*from));
    for (int64_t byte = 0; byte < count; byte += 64) __builtin_prefetch(from + byte, 0, 2);
}

// Rows of a few arrays, in the order in which they will be read. Asked for all at once they would keep a task waiting as
// if it read them; a product asks for one of them with each tile (gemm.h).
class Coming {
    struct Rows {
        const char* from;
        int64_t stride, bytes, count;
    };
    static constexpr int kMostArrays = 6;
    Rows arrays_[kMostArrays];
    int count_ = 0, array_ = 0;
    int64_t row_ = 0;

  public:
    // So many rows of so many bytes each, `stride` bytes apart.
    void add(const void* from, int64_t stride, int64_t bytes, int64_t count) {
        if (count > 0 && bytes > 0) arrays_[count_++] = {static_cast<const char*>(from), stride, bytes, count};
    }

    SSMZOO_INLINE void fetch() {
        if (array_ == count_) return;
        const Rows& rows = arrays_[array_];
        fetch_bytes(rows.from + row_ * rows.stride, rows.bytes);
        if (++row_ == rows.count) row_ = 0, ++array_;
    }

    // What is left.
    void finish() {
        while (array_ < count_) fetch();
    }
};

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
