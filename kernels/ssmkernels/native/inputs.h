// Rows of a product's input as several of them are read beside the weights.
//
// A sum has two halves, each of every other vector of a row (product.h). Where a vector fills a line of the cache, rows
// are read as they lie. A shorter one would bring each line from the second cache twice, and rows whose length is near
// a power of two into the same few places of the first one; so the vectors of rows that are multiplied together are
// laid out in the order in which they are read.
#pragma once

#include "math.h"
#include "parallel.h"
#include "tiles.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

// Rows of the input that share each read of the weights: as many as there are registers for their sums.
#if SSMZOO_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int64_t kShared = 4;
#else
constexpr int64_t kShared = 3;
#endif
constexpr int64_t kRowsTogether = 16;  // rows whose sums are kept while the weights of kOutputs outputs are in a fast cache
constexpr bool kLined = SSMZOO_VECTOR_BYTES < 64;

// Blocks of at most kShared rows, of sizes that differ by one at most: each(first, rows).
template <class Each>
SSMZOO_INLINE void blocks_of_rows(int64_t count, const Each& each) {
    const int64_t blocks = ceil_div(count, kShared);
    for (int64_t n = 0; n < blocks; ++n) {
        const int64_t first = count * n / blocks;
        each(first, count * (n + 1) / blocks - first);
    }
}

// Made before the threads of a stage begin; one serves stage after stage, for as many rows of at most `most` inputs.
template <class S>
class Inputs {
    using V = typename Lanes<S>::V;
    static constexpr int64_t lanes = Lanes<S>::count, step = 2 * lanes;
    const Scratch lined_;
    const S* rows_ = nullptr;
    int64_t batch_, size_ = 0;

    bool lined() const { return kLined && batch_ > 1; }

  public:
    Inputs(int64_t batch, int64_t most)
        : lined_(kLined && batch > 1 ? sizeof(S) * static_cast<size_t>(batch * ceil_div(most, step) * step) : 0),
          batch_(batch) {}

    bool ready() const { return lined_.data; }  // or else there is no memory left

    // The next product's rows (batch, size), contiguous, which stay where they are.
    void take(const S* rows, int64_t size) {
        rows_ = rows;
        size_ = size;
        S* to = reinterpret_cast<S*>(lined_.data);
        for (int64_t b = 0; lined() && b < batch_; b += kRowsTogether)
            blocks_of_rows(minimum(kRowsTogether, batch_ - b), [&](int64_t first, int64_t count) {
                const S* from = rows + (b + first) * size;
                for (int64_t half = 0; half < step; half += lanes)
                    for (int64_t k = half; k < half + size; k += step)
                        for (int64_t r = 0; r < count; ++r, to += lanes)
                            store(to, k < size ? read_some(from + r * size + k, size - k) : V{});
            });
    }

    // From row `first` on, in the blocks that begin there: numbers from one row to the next are size(), and so many
    // from one block's first row to the next one's.
    const S* from(int64_t first) const { return (lined() ? reinterpret_cast<const S*>(lined_.data) : rows_) + first * size(); }
    int64_t size() const { return lined() ? ceil_div(size_, step) * step : size_; }
};

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
