// What the convolution's forward and backward passes share: arguments, blocks of time, and the inputs of a block.
//
// A sequence is cut into blocks of 64 steps; a task computes one block of one tile of 64 channels. All inputs that a
// block sees, the w-1 before it included, are laid out (time, 64) in scratch memory first, wherever they come from.
#pragma once

#include "native/math.h"
#include "native/parallel.h"
#include "native/tiles.h"

namespace ssmzoo {

// Strides count elements; the last axis is contiguous. S is float, or double where x is.
struct ConvArguments {
    const void* x;                         // (b l d), any floating dtype
    const void *weight, *bias, *initial;   // S: (d w), (d), (s w-1 d); the last two may be null
    const int32_t* cu_seqlens;             // (s + 1) or null
    void *y, *final_state;                 // (b l d); S: (s w-1 d)
    int64_t dtype, sequences, length, d, width, silu, threads, x_batch, x_time;
};

namespace SSMZOO_ISA {

constexpr int64_t kBlock = 64;  // steps

// Steps [t0, t0 + steps) of a sequence; `last` tells whether it ends there.
struct Block {
    int64_t sequence, batch, start, length, t0, steps;
    bool last;
};

// Blocks are numbered so that the sequence of each is found without walking through all: packed, the first block of
// sequence i is number start_i / 64 + i, and some numbers are nobody's. Even an empty sequence has a block.
inline int64_t count_blocks(const ConvArguments& a) {
    if (a.cu_seqlens) return a.length / kBlock + a.sequences;
    return a.sequences * (a.length ? ceil_div(a.length, kBlock) : 1);
}

// False where there is no such block.
inline bool find_block(const ConvArguments& a, int64_t number, Block* found) {
    int64_t i, index, start = 0, length = a.length;
    if (a.cu_seqlens) {
        int64_t low = 0, high = a.sequences;  // the last sequence whose first block is not beyond `number`
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            (a.cu_seqlens[middle] / kBlock + middle <= number ? low : high) = middle;
        }
        i = low;
        start = a.cu_seqlens[i];
        length = a.cu_seqlens[i + 1] - start;
        index = number - (start / kBlock + i);
    } else {
        const int64_t blocks = length ? ceil_div(length, kBlock) : 1;
        i = number / blocks;
        index = number % blocks;
    }
    const int64_t t0 = index * kBlock;
    if (index > 0 && t0 >= length) return false;
    *found = {i, a.cu_seqlens ? 0 : i, start, length, t0, minimum(kBlock, length - t0), t0 + kBlock >= length};
    return true;
}

// The inputs of steps [from, to) of the block's sequence, from - (w-1) at the earliest, → (time, 64). Before the
// sequence stands the initial state, behind it 0.
template <class T, class S>
void read_inputs(const ConvArguments& a, const Block& b, int64_t first, int64_t channels, int64_t from, int64_t to,
                 S* rows) {
    const T* x = at<T>(a.x, b.batch * a.x_batch + b.start * a.x_time + first);
    for (int64_t t = from; t < to; ++t, rows += kTile) {
        const int64_t row = b.sequence * (a.width - 1) + a.width - 1 + t;
        const S* state = a.initial && t < 0 ? at<S>(a.initial, row * a.d + first) : nullptr;
        for (int64_t c = 0; c < channels; c += Lanes<S>::count) {
            typename Lanes<S>::V v = {};
            if (t >= 0 && t < b.length)
                v = read_some(x + t * a.x_time + c, channels - c);
            else if (state)
                v = read_some(state + c, channels - c);
            store(rows + c, v);
        }
    }
}

// bias + sum_j weight_j rows_{t + j}, for one vector of channels; `rows` begins w-1 steps before t = 0. A width of 0 at
// compile time stands for any.
template <class S, int fixed_width>
struct Taps {
    typename Lanes<S>::V weights[fixed_width ? fixed_width : 1], bias;
    const S* weight;  // (w, 64), from this vector's channels on
    int64_t width;

    Taps(const S* weight_, const S* bias_, int64_t width_) : bias(load(bias_)), weight(weight_), width(width_) {
        for (int j = 0; j < fixed_width; ++j) weights[j] = load(weight + j * kTile);
    }

    SSMZOO_INLINE typename Lanes<S>::V operator()(const S* rows, int64_t t) const {
        auto sum = bias;
        if (fixed_width)
            for (int j = 0; j < fixed_width; ++j) sum = fma(weights[j], load(rows + (t + j) * kTile), sum);
        else
            for (int64_t j = 0; j < width; ++j) sum = fma(load(weight + j * kTile), load(rows + (t + j) * kTile), sum);
        return sum;
    }
};

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
