// Rows of activations as the dtype of sums: where they have it, in place; half-precision ones widened in scratch
// memory.
//
// A kernel that reads and writes its rows this way is compiled once for each dtype of sums, not for each of
// activations.
#pragma once

#include "exports.h"
#include "pairs.h"
#include "tiles.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

inline int64_t bytes_of(int64_t dtype) { return dtype == 0 ? 4 : dtype == 1 ? 8 : 2; }

// Whether activations of a dtype have another one's sums: those are the half-precision ones.
inline bool is_half(int64_t dtype) { return dtype > 1; }

template <class S>
struct Rows {
    const S* p;  // null if there are none
    int64_t stride;

    SSMZOO_INLINE typename Lanes<S>::V operator()(int64_t t, int64_t c, int64_t count) const {
        return read_some(p + t * stride + c, count);
    }
};

template <class T>
__attribute__((noinline)) void widen_rows(float* to, const T* from, int64_t stride, int64_t rows, int64_t channels) {
    if (channels == kTile)
        for (int64_t t = 0; t < rows; ++t) read_row(to + t * kTile, from + t * stride, kTile);
    else
        for (int64_t t = 0; t < rows; ++t)
            for (int64_t c = 0; c < channels; c += Lanes<float>::count)
                store(to + t * kTile + c, read_some(from + t * stride + c, channels - c));
}

template <class T>
__attribute__((noinline)) void narrow_rows(T* to, const float* from, int64_t stride, int64_t rows, int64_t channels) {
    if (channels == kTile)
        for (int64_t t = 0; t < rows; ++t) write_row(to + t * stride, from + t * kTile, kTile);
    else
        for (int64_t t = 0; t < rows; ++t) write_row(to + t * stride, from + t * kTile, channels);
}

// Up to 64 channels of some rows; `scratch` (rows 64) is where half-precision ones are widened.
template <class S>
Rows<S> rows(int64_t dtype, const void* from, int64_t offset, int64_t stride, int64_t count, int64_t channels,
             S* scratch) {
    if (!from) return {nullptr, 0};
    if constexpr (sizeof(S) == sizeof(float))
        if (is_half(dtype)) {
            if (dtype == 2)
                widen_rows(scratch, at<bfloat16>(from, offset), stride, count, channels);
            else
                widen_rows(scratch, at<float16>(from, offset), stride, count, channels);
            return {scratch, kTile};
        }
    return {at<S>(from, offset), stride};
}

// The way back, of results: `keep` writes one vector, to its place or (rows 64) to scratch memory; half-precision ones
// are narrowed by `finish`.
template <class S>
struct Results {
    void* to;
    int64_t dtype, offset, stride;
    S* scratch;
    bool large;

    SSMZOO_INLINE void keep(int64_t t, int64_t c, typename Lanes<S>::V x, int64_t count) const {
        if (is_half(dtype))
            store(scratch + t * kTile + c, x);
        else
            write_some(static_cast<S*>(to) + offset + t * stride + c, x, count, large);
    }

    void finish(int64_t count, int64_t channels) const {
        if constexpr (sizeof(S) == sizeof(float)) {
            if (dtype == 2) narrow_rows(static_cast<bfloat16*>(to) + offset, scratch, stride, count, channels);
            if (dtype == 3) narrow_rows(static_cast<float16*>(to) + offset, scratch, stride, count, channels);
        }
    }
};

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
