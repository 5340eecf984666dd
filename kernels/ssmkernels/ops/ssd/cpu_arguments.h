// What the state-space dual's kernels take.
#pragma once

#include <stdint.h>

namespace ssmzoo {

// S is float, or double where activations are. The last axis is contiguous; so are the last two of x and z. `starts` are
// the states before every `segment` chunks of `chunk` tokens, rows of compact.h.
struct SsdArguments {
    const void *x, *z, *dt;                     // (b l h p), any floating dtype; z may be null; (b l h)
    const void *B, *C;                          // (b l g n), likewise, of map_dtype
    const void *A, *D, *dt_bias;                // S: (h), (h skip) or null, (h) or null
    const void* initial;                        // S: (s h p n) or null
    const void *scale, *direct;                 // S: (b l h), contiguous, or null; with a scale dt is S too
    const int32_t* cu_seqlens;                  // (s + 1) or null
    void *y, *final_state, *starts;             // (b l h p); S: (s h p n); rows of p, (segments h n), or null
    const void* m;                              // S: (b l h) or null; with it p counts one channel that is not stored
    void* sums;                                 // S: (b l h) or null: what outputs are divided by, before its bounds
    int64_t dtype, map_dtype, sequences, length, heads, p, n, groups, skip, softplus, chunk, segment, rank, threads;
    int64_t x_batch, x_time, z_batch, z_time, dt_batch, dt_time, B_batch, B_time, B_group, C_batch, C_time, C_group;
    double dt_least, dt_most, query_scale;
};

}  // namespace ssmzoo
