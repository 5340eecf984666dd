// Attention in which each query sees one run of the keys: causal, within a window, or all.
#pragma once

#include "attention/cpu_pieces.h"

namespace ssmzoo {

// Query i sees the keys firsts[i] … ends[i] - 1; neither falls along the queries.
struct RunArguments {
    const int32_t *firsts, *ends;  // (b l), or (l) for all sequences
    int64_t run_batch;             // l, or 0
};

namespace SSMZOO_ISA {

class RunKeys {
    const int32_t *firsts_, *ends_;  // of the range's sequence
    int32_t* numbers_;               // of the range's queries: 0, 1, 2 …
    int64_t first_, count_, m_;

  public:
    static constexpr int64_t bytes = kRange * int64_t(sizeof(int32_t));

    RunKeys(const AttentionArguments& a, const RunArguments& runs, const Range& range, char* scratch)
        : firsts_(runs.firsts + range.batch * runs.run_batch), ends_(runs.ends + range.batch * runs.run_batch),
          numbers_(reinterpret_cast<int32_t*>(scratch)), first_(range.first), count_(range.end - range.first), m_(a.m) {
        for (int32_t i = 0; i < kRange; ++i) numbers_[i] = i;
    }

    Span seen(int64_t query) const { return {firsts_[query], ends_[query]}; }

    template <class Visit>
    void pieces(const Visit& visit) const {
        const int32_t *firsts = firsts_ + first_, *ends = ends_ + first_;
        int64_t from = 0, to = 0;
        for (int64_t key = firsts[0] / kKeys * kKeys; key < ends[count_ - 1]; key += kKeys) {
            const int64_t count = minimum(kKeys, m_ - key);
            while (from < count_ && ends[from] <= key) ++from;
            while (to < count_ && firsts[to] < key + count) ++to;
            if (from < to) visit(key, count, numbers_ + from, numbers_ + to);
        }
    }
};

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
