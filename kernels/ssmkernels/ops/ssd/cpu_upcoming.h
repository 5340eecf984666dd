// Rows of tokens that are asked for while others are computed with.
#pragma once

#include "ssd/cpu_rows.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

// Rows that will be read after a tile of tokens. They lie far apart, so that nothing but asking for them early, a few at a
// time, keeps a task from waiting for each.
struct Upcoming {
    const char* from[4];
    int64_t step[4], bytes[4], tokens = 0, next = 0;
    int arrays = 0;

    // So many numbers of each token, `stride` numbers apart.
    void add(const void* array, int64_t dtype, int64_t offset, int64_t stride, int64_t count) {
        const int64_t size = bytes_of(dtype);
        from[arrays] = static_cast<const char*>(array) + offset * size;
        step[arrays] = stride * size;
        bytes[arrays++] = count * size;
    }

    void fetch(int64_t token) const {
        if (token >= tokens) return;
        for (int i = 0; i < arrays; ++i) fetch_bytes(from[i] + token * step[i], bytes[i]);
    }

    // Of so many more tokens.
    void fetch_some(int64_t count) {
        for (const int64_t end = next + count; next < end; ++next) fetch(next);
    }
};

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
