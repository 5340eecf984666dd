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

// f(c, left) for every vector of a block, where `left` numbers lie from c on: as many as a vector has, known when the
// kernel is compiled, but for the last.
template <class S, class F>
SSMZOO_INLINE void by_vectors(int64_t count, const F& f) {
    constexpr int64_t lanes = Lanes<S>::count;
    int64_t c = 0;
    for (; c + lanes <= count; c += lanes) f(c, lanes);
    if (c < count) f(c, count - c);
}

// The arithmetic of a vector of real numbers, or of complex ones that lie as PyTorch has them, real and imaginary parts
// by turns: a x + c, and conj(a) x.
template <class S>
struct RealNumbers {
    using V = typename Lanes<S>::V;
    static constexpr int parts = 1;

    static SSMZOO_INLINE V decay(V a, bool log_a) { return log_a ? exp<S>(a) : a; }
    static SSMZOO_INLINE V multiply_add(V a, V x, V c) { return fma(a, x, c); }
    static SSMZOO_INLINE V conjugate_product(V a, V x) { return a * x; }
};

template <class S>
struct ComplexNumbers {
    using V = typename Lanes<S>::V;
    typedef typename Count<Lanes<S>::count>::type All;
    static constexpr int parts = 2;

    static SSMZOO_INLINE V decay(V a, bool) { return a; }  // its exponential has been taken

    static SSMZOO_INLINE V multiply_add(V a, V x, V c) {
        return fma(real_parts(a, All()), x, fma(imaginary_parts(a, All()) * signs(All()), swapped(x, All()), c));
    }

    static SSMZOO_INLINE V conjugate_product(V a, V x) {
        return fma(real_parts(a, All()), x, -(imaginary_parts(a, All()) * signs(All()) * swapped(x, All())));
    }

  private:
    template <int... i>
    static SSMZOO_INLINE V real_parts(V x, Indices<i...>) {
        return shuffle<(i & ~1)...>(x, x);
    }

    template <int... i>
    static SSMZOO_INLINE V imaginary_parts(V x, Indices<i...>) {
        return shuffle<(i | 1)...>(x, x);
    }

    template <int... i>
    static SSMZOO_INLINE V swapped(V x, Indices<i...>) {
        return shuffle<(i ^ 1)...>(x, x);
    }

    template <int... i>
    static SSMZOO_INLINE V signs(Indices<i...>) {
        return V{(i & 1 ? S(1) : S(-1))...};
    }
};

// Whether what is written is too large for the caches.
template <class T>
bool is_large(const RecurrenceArguments& a) {
    const int64_t numbers = a.is_complex ? 2 * a.d : a.d;
    return a.sequences * a.length * numbers * static_cast<int64_t>(sizeof(T)) >= kLarge;
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
