// Matrices of elements of 2, 4 or 8 bytes turned over: what lies channel by channel, put time by time.
#include "native/parallel.h"
#include "native/tiles.h"

namespace ssmzoo {

struct TransposeArguments {
    const void* from;  // (batch rows columns), `row` and `column` elements apart, columns side by side in `to`
    void* to;          // (batch rows columns), contiguous
    int64_t bytes, batch, rows, columns, from_batch, from_row, from_column, threads;
};

namespace SSMZOO_ISA {
namespace {

constexpr int64_t kSide = 32;  // of a block: a few cache lines each way

template <class E>
int transpose(const TransposeArguments& a) {
    const int64_t across = ceil_div(a.columns, kSide), down = ceil_div(a.rows, kSide);
    return parallel_for(a.batch * down, a.threads, 0, [&](int64_t i, char*) {
        const E* from = at<E>(a.from, i / down * a.from_batch);
        E* to = static_cast<E*>(a.to) + i / down * a.rows * a.columns;
        const int64_t r0 = i % down * kSide, r1 = minimum(a.rows, r0 + kSide);
        for (int64_t block = 0; block < across; ++block) {
            const int64_t c0 = block * kSide, c1 = minimum(a.columns, c0 + kSide);
            for (int64_t r = r0; r < r1; ++r)
                for (int64_t c = c0; c < c1; ++c) to[r * a.columns + c] = from[r * a.from_row + c * a.from_column];
        }
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT(transpose)(const ssmzoo::TransposeArguments* a) {
    using namespace ssmzoo::SSMZOO_ISA;
    switch (a->bytes) {
        case 2: return transpose<uint16_t>(*a);
        case 4: return transpose<uint32_t>(*a);
        default: return transpose<uint64_t>(*a);
    }
}
