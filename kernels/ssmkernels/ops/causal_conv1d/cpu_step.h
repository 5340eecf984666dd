// One token of the causal convolution, for one tile of one sequence's channels.
#pragma once

#include "native/math.h"
#include "native/tiles.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

// Numbers of the scratch memory that a tile's step takes: its weights, turned, and its biases.
inline int64_t conv_step_scratch(int64_t width) { return (width + 1) * kTile; }

// A tile's weights (channels w), turned, and its biases, which may be null, into the scratch memory: for any number of
// sequences.
template <class S>
void read_conv_weights(const S* weight, const S* bias, int64_t width, int64_t channels, S* scratch) {
    read_transposed(scratch, weight, width, channels, S(1));
    read_parameters(scratch + width * kTile, bias, 0, channels);
}

// x (channels) through the convolution, and silu if so told → y. The state (w-1 d), from the tile's first channel on,
// loses its oldest row to x.
template <class X, class Y, class S>
void conv_step_with(const S* weights, S* state, int64_t d, const X* x, int64_t width, bool through_silu, Y* y,
                    int64_t channels) {
    const S* biases = weights + width * kTile;
    for (int64_t c = 0; c < channels; c += Lanes<S>::count) {
        auto now = read_some(x + c, channels - c);
        auto sum = fma(load(weights + (width - 1) * kTile + c), now, load(biases + c));
        for (int64_t j = width - 2; j >= 0; --j) {  // the newest first: each input moves one place towards the oldest
            const auto older = read_some(state + j * d + c, channels - c);
            sum = fma(load(weights + j * kTile + c), older, sum);
            write_some(state + j * d + c, now, channels - c);
            now = older;
        }
        write_some(y + c, through_silu ? silu<S>(sum) : sum, channels - c);
    }
}

// Both of them, for one sequence.
template <class X, class Y, class S>
void conv_step_tile(S* state, int64_t d, const X* x, const S* weight, const S* bias, int64_t width, bool through_silu,
                    Y* y, int64_t channels, S* scratch) {
    read_conv_weights(weight, bias, width, channels, scratch);
    conv_step_with(scratch, state, d, x, width, through_silu, y, channels);
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
