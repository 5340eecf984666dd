// Tiles of 64 channels: the shape of everything that a kernel keeps in scratch memory.
#pragma once

#include "half.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

constexpr int64_t kTile = 64;  // channels

inline int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// (channels, n) times factor → (n, 64)
template <class S>
void read_transposed(S* to, const S* from, int64_t n, int64_t channels, S factor) {
    for (int64_t j = 0; j < n; ++j)
        for (int64_t c = 0; c < kTile; ++c) to[j * kTile + c] = c < channels ? from[c * n + j] * factor : S(0);
}

template <class S>
void write_transposed(S* to, const S* from, int64_t n, int64_t channels) {
    for (int64_t c = 0; c < channels; ++c)
        for (int64_t j = 0; j < n; ++j) to[c * n + j] = from[j * kTile + c];
}

// A vector of 64 parameters, 0 beyond the channels or where there are none.
template <class S>
void read_parameters(S* to, const void* from, int64_t first, int64_t channels) {
    const S* p = static_cast<const S*>(from);
    for (int64_t c = 0; c < kTile; ++c) to[c] = p && c < channels ? p[first + c] : S(0);
}

// Element `from` + offset of a tensor of dtype T.
template <class T>
SSMZOO_INLINE const T* at(const void* from, int64_t offset) {
    return static_cast<const T*>(from) + offset;
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
