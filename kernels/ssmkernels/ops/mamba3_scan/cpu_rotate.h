// Mamba-3's maps: bias, and rotation by angles that add up over time.
//
// Angles are held as turns, between -1/2 and 1/2, so that taking away whole turns rounds nothing.
#pragma once

#include "native/angles.h"
#include "ssd/cpu.h"

namespace ssmzoo {

// S is float, or double where activations are. B and C may have any floating dtype and strides but for the last axis;
// all else is contiguous. k and q lie head by head.
struct RotateArguments {
    const void *B, *C;                        // (b l r g n)
    const void *dt, *angles;                  // S: (b l h), (b l a)
    const void *B_bias, *C_bias, *initial;    // S: (h r n) or null, likewise, (s h a) or null
    const int32_t* cu_seqlens;                // (s + 1) or null
    void *k, *q, *turns, *final_angle;        // S: (b h l r n), likewise, (b h l a), (s h a)
    int64_t dtype, sequences, length, heads, groups, rank, n, angle_count, interleaved, threads;
    int64_t B_batch, B_time, B_rank, B_group, C_batch, C_time, C_rank, C_group;
};

struct RotateBackwardArguments {
    RotateArguments forward;        // with the k, q and turns that it wrote; the turns are overwritten
    void *dk, *dq;                  // S: (b h l r n), overwritten
    const void* dfinal;             // S: (s h a) or null
    void *dB, *dC, *ddt, *dangles;  // S: (b l r g n), likewise, (b l h), (b l a)
    void *dB_bias, *dC_bias;        // S: (s h r n), of which the first takes the sum of all
    void* dinitial;                 // S: (s h a)
};

namespace SSMZOO_ISA {

// One head of one sequence.
struct HeadOf {
    int64_t sequence, batch, start, length, head;

    HeadOf(const RotateArguments& a, int64_t task) : sequence(task / a.heads), head(task % a.heads) {
        batch = a.cu_seqlens ? 0 : sequence;
        start = a.cu_seqlens ? a.cu_seqlens[sequence] : 0;
        length = a.cu_seqlens ? a.cu_seqlens[sequence + 1] - start : a.length;
    }

    // Where its step t lies among all of (b h l).
    int64_t row(const RotateArguments& a, int64_t t) const { return (batch * a.heads + head) * a.length + start + t; }
    // Where a number of its own lies in (b l h).
    int64_t number(const RotateArguments& a, int64_t t) const { return (batch * a.length + start + t) * a.heads + head; }
};

// Where the pairs of dimensions that turn lie.
struct Pairs {
    int64_t count, step, second;

    explicit Pairs(const RotateArguments& a)
        : count(a.angle_count), step(a.interleaved ? 2 : 1), second(a.interleaved ? 1 : a.n / 2) {}
};

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
