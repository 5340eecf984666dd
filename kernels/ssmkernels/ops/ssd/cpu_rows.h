// A task's own memory, and rows of activations in it.
#pragma once

#include "native/coming.h"
#include "native/half.h"
#include "native/rows.h"
#include "native/tiles.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

inline int64_t round_up(int64_t size, int64_t to) { return ceil_div(size, to) * to; }

template <class S>
constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(S));  // numbers of a cache line, or of the widest vector

// A piece of memory that arrays are taken from, each on a cache line's border; counts only where there is none.
template <class S>
struct Memory {
    S* p;
    int64_t used;

    S* take(int64_t count) {
        S* taken = p ? p + used : nullptr;
        used += round_up(count, kLine<S>);
        return taken;
    }
};

// A row of activations as numbers of sums, with zeros up to a whole vector.
template <class S, class T>
SSMZOO_INLINE void widen_row(S* to, const void* from, int64_t offset, int64_t count, S factor) {
    constexpr int lanes = Lanes<S>::count;
    const T* p = at<T>(from, offset);
    const auto scale = splat(factor);
    for (int64_t c = 0; c < count; c += lanes) store(to + c, scale * read_some(p + c, count - c));
}

template <class S>
void read_row(S* to, const void* from, int64_t dtype, int64_t offset, int64_t count, S factor = S(1)) {
    if constexpr (sizeof(S) == 8) {
        widen_row<S, double>(to, from, offset, count, factor);
    } else {
        if (dtype == 0) widen_row<S, float>(to, from, offset, count, factor);
        if (dtype == 2) widen_row<S, bfloat16>(to, from, offset, count, factor);
        if (dtype == 3) widen_row<S, float16>(to, from, offset, count, factor);
    }
}

// Bytes of a gradient from which its rows are written past the caches. Bringing their old lines there takes time, and they
// would drive out what a task computes with, which fills its core's own cache.
constexpr int64_t kPast = 4 << 20;

// Whether that goes for an array of so many numbers, in rows of `row`, each in lines of its own.
template <class S>
bool written_past(const void* array, int64_t numbers, int64_t row) {
    return numbers * static_cast<int64_t>(sizeof(S)) >= kPast && row % kLine<S> == 0 &&
           reinterpret_cast<uintptr_t>(array) % 64 == 0;
}

template <class S, class T>
SSMZOO_INLINE void narrow_row(void* to, int64_t offset, const S* from, int64_t count, bool past = false,
                              S factor = S(1)) {
    constexpr int lanes = Lanes<S>::count;
    T* p = static_cast<T*>(to) + offset;
    const auto scale = splat(factor);
    for (int64_t c = 0; c < count; c += lanes) write_some(p + c, scale * load(from + c), count - c, past);
}

// A row of sums, times a factor, as activations of this dtype.
template <class S>
void write_row(void* to, int64_t dtype, int64_t offset, const S* from, int64_t count, bool past = false, S factor = S(1)) {
    if constexpr (sizeof(S) == 8) {
        narrow_row<S, double>(to, offset, from, count, past, factor);
    } else {
        if (dtype == 0) narrow_row<S, float>(to, offset, from, count, past, factor);
        if (dtype == 2) narrow_row<S, bfloat16>(to, offset, from, count, past, factor);
        if (dtype == 3) narrow_row<S, float16>(to, offset, from, count, past, factor);
    }
}

// f(i) for vectors from the first element on.
template <class S, class F>
SSMZOO_INLINE void vectors(int64_t count, const F& f) {
    for (int64_t i = 0; i < count; i += Lanes<S>::count) f(i);
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
