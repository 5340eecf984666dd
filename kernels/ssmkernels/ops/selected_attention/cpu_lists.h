// Attention in which each query sees the blocks of keys that are named for it, up to its own place.
#pragma once

#include "attention/cpu_pieces.h"

namespace ssmzoo {

struct BlockArguments {
    const int32_t* blocks;  // (b l g n), contiguous
    int64_t n, block_size;
};

namespace SSMZOO_ISA {

// Which queries of a range see some of each block: numbers within the range, rising.
class BlockKeys {
    const AttentionArguments& a_;
    const BlockArguments& b_;
    const Range& range_;
    const int64_t blocks_;
    int32_t *latest_, *starts_, *queries_;  // (blocks), (blocks + 1), (range n)

    static int64_t count(const AttentionArguments& a, const BlockArguments& b) { return ceil_div(a.m, b.block_size); }

    // Calls call(block, number) for each query and each of its blocks that it sees some of, once.
    template <class Call>
    void each(const Call& call) const {
        for (int64_t block = 0; block < blocks_; ++block) latest_[block] = -1;
        for (int64_t i = range_.first; i < range_.end; ++i) {
            const int32_t* named = b_.blocks + ((range_.batch * a_.l + i) * a_.g + range_.group) * b_.n;
            const int32_t number = static_cast<int32_t>(i - range_.first);
            for (int64_t j = 0; j < b_.n; ++j) {
                const int64_t block = named[j];
                if (block < 0 || block >= blocks_ || block * b_.block_size >= seen(i).end) continue;
                if (latest_[block] == number) continue;
                latest_[block] = number;
                call(block, number);
            }
        }
    }

  public:
    static int64_t bytes(const AttentionArguments& a, const BlockArguments& b) {
        return int64_t(sizeof(int32_t)) * (2 * count(a, b) + 1 + minimum(a.l, kRange) * b.n);
    }

    BlockKeys(const AttentionArguments& a, const BlockArguments& b, const Range& range, char* scratch)
        : a_(a), b_(b), range_(range), blocks_(count(a, b)), latest_(reinterpret_cast<int32_t*>(scratch)),
          starts_(latest_ + blocks_), queries_(starts_ + blocks_ + 1) {
        for (int64_t block = 0; block <= blocks_; ++block) starts_[block] = 0;
        each([&](int64_t block, int32_t) { ++starts_[block + 1]; });
        for (int64_t block = 0; block < blocks_; ++block) starts_[block + 1] += starts_[block];
        each([&](int64_t block, int32_t number) { queries_[starts_[block]++] = number; });
        for (int64_t block = blocks_; block > 0; --block) starts_[block] = starts_[block - 1];
        starts_[0] = 0;
    }

    // What of a block that it selected a query sees.
    Span seen(int64_t query) const { return {0, query + a_.m - a_.l + 1}; }

    template <class Visit>
    void pieces(const Visit& visit) const {
        for (int64_t block = 0; block < blocks_; ++block) {
            const int32_t *next = queries_ + starts_[block], *end = queries_ + starts_[block + 1];
            const int64_t last = minimum(a_.m, (block + 1) * b_.block_size);
            for (int64_t key = block * b_.block_size; key < last; key += kKeys) {
                while (next < end && seen(range_.first + *next).end <= key) ++next;  // nor do they see a later piece
                if (next == end) break;
                visit(key, minimum(kKeys, last - key), next, end);
            }
        }
    }
};

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
