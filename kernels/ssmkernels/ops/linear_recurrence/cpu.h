// What the forward and backward passes of the linear recurrence share. Each task walks through the whole time of one
// sequence, for a block of channels whose states stay in the first-level cache.
#pragma once

#include "native/math.h"
#include "native/parallel.h"
#include "native/tiles.h"

namespace ssmzoo {

// Strides count numbers, of which a complex one is two; channels lie side by side. T is b's dtype, S its precision.
struct RecurrenceArguments {
    const void *a, *b, *initial;  // T or S: (b l d), or (d) where it is fixed, with strides of 0; T: (b l d); S: (s d) or null
    const int32_t* cu_seqlens;    // (s + 1) or null
    void *h, *states, *final_state;  // T: (b l d); S: (b l d) where the backward pass needs it, or null; S: (s d)
    // log_a: a holds logarithms, of complex numbers their exponentials, and the gradient is that of logarithms
    int64_t dtype, a_wide, is_complex, log_a, fixed, sequences, length, d, threads;
    int64_t a_batch, a_time, b_batch, b_time;
};

namespace SSMZOO_ISA {

constexpr int64_t kChannels = 256;  // numbers of a block
constexpr int64_t kAhead = 4;       // steps: rows are far apart, which the processor's own prefetching does not follow

struct Stretch {
    int64_t batch, first, steps;
};

inline Stretch stretch(const RecurrenceArguments& a, int64_t sequence) {
    if (!a.cu_seqlens) return {sequence, 0, a.length};
    const int64_t first = a.cu_seqlens[sequence];
    return {0, first, a.cu_seqlens[sequence + 1] - first};
}

template <class T>
SSMZOO_INLINE void fetch(const T* row, int64_t count) {
    for (int64_t i = 0; i < count; i += static_cast<int64_t>(64 / sizeof(T))) __builtin_prefetch(row + i, 0, 2);
}

template <class S>
SSMZOO_INLINE typename Lanes<S>::V decay(typename Lanes<S>::V a, bool log_a) {
    return log_a ? exp<S>(a) : a;
}

// task(sequence, first number, how many) for every block.
template <class Task>
int for_blocks(const RecurrenceArguments& a, const Task& task) {
    const int64_t numbers = a.is_complex ? 2 * a.d : a.d, blocks = ceil_div(numbers, kChannels);
    return parallel_for(a.sequences * blocks, a.threads, 0, [&](int64_t i, char*) {
        const int64_t first = i % blocks * kChannels;
        task(i / blocks, first, minimum(kChannels, numbers - first));
    });
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
