// One token of the delta rule for one head: the walk over a tile of one token, on the state as it lies.
#pragma once

#include "delta_rule/cpu.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

constexpr int64_t kStepPart = 64;  // columns of a task

// A thread's memory for a state of so many keys.
template <class S>
struct Step {
    Tile<S> tile;
    S *state, *row;

    int64_t take(S* p, int64_t keys) {
        Memory<S> memory = {p, 0};
        tile.take(memory, keys, 1);
        tile.tokens = 1;
        state = memory.take(keys * kStepPart);
        row = memory.take(kStepPart);
        return memory.used;
    }

    // Columns [first, first + kStepPart) of a state (keys, values), by the token in the tile; `row` has their values
    // and takes their outputs. Through a copy where columns are no whole vectors.
    void advance(Decay kind, S* whole, int64_t keys, int64_t values, int64_t first, S scale) {
        const int64_t count = minimum(kStepPart, values - first), columns = round_up(count, Lanes<S>::count);
        if (columns == count) return walk<S, false>(kind, whole + first, values, keys, tile, scale, row, kStepPart, columns);
        into_blocks(state, whole + first, values, keys, count);
        walk<S, false>(kind, state, 0, keys, tile, scale, row, kStepPart, columns);
        out_of_blocks(whole + first, values, state, keys, count);
    }
};

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
