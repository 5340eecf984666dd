// Sequences, packed or not, whose states are saved from segment to segment.
#pragma once

#include "tiles.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

// One sequence: where it lies, and which of the saved states are its own.
struct Sequence {
    int64_t index, batch, start, length, first_segment;
};

// Sequence i of a batch in which all have this length, or of the packed one with these borders; segments of `tokens`.
inline Sequence sequence(const int32_t* cu_seqlens, int64_t length, int64_t tokens, int64_t i) {
    if (!cu_seqlens) return {i, i, 0, length, i * ceil_div(length, tokens)};
    const int64_t start = cu_seqlens[i], end = cu_seqlens[i + 1];
    return {i, 0, start, end - start, start / tokens + i};  // at most length / tokens + 1 each: none overlap
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
