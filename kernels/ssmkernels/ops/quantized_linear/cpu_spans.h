// Inputs rounded to 8 bits, a span at a time: to whole numbers from -127 to 127 times the span's scale.
#pragma once

#include "quantized_linear/cpu.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

constexpr float kLeastScale = 0x1p-100f;

// The largest of so many magnitudes; infinity or NaN where one is not finite.
inline float largest_of(const float* x, int64_t count) {
    int32_t most = 0;
    for (int64_t k = 0; k < count; ++k) {
        int32_t bits;
        memcpy(&bits, x + k, sizeof bits);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    float largest;
    memcpy(&largest, &most, sizeof largest);
    return largest;
}

inline float span_scale(float largest) {
    const float scale = largest / 127.0f;
    return scale < kLeastScale ? kLeastScale : scale;
}

// A row of x (size) as what it is rounded to. A span that is not finite becomes NaN.
inline void round_spans(int64_t group, int64_t size, float* x) {
    constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const int64_t span = minimum(group, kChunk);
    for (int64_t first = 0; first < size; first += span) {
        const int64_t count = minimum(span, size - first);
        const float scale = span_scale(largest_of(x + first, count));
        for (int64_t k = first; k < first + count; ++k) x[k] = (x[k] / scale + magic - magic) * scale;
    }
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
