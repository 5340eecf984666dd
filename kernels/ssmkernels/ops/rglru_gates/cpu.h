// What the forward and backward passes of the real-gated linear recurrent unit's gates share.
#pragma once

#include "native/roots.h"
#include "native/parallel.h"
#include "native/tiles.h"

namespace ssmzoo {

// Strides count elements; the last axis is contiguous. T is x's dtype, S its precision.
struct GateArguments {
    const void *x, *gates, *log_decay;  // T: (b l h p); T: (b l h 2p); S: (h p)
    const int32_t* first;               // (b l) or null
    void *a, *b;                        // S and T: (b l h p), contiguous
    int64_t dtype, batch, length, heads, p, threads;
    int64_t x_batch, x_time, x_head, gates_batch, gates_time, gates_head;
};

namespace SSMZOO_ISA {

template <class S>
struct Gates {
    using V = typename Lanes<S>::V;
    V recurrence, input, a, rest, root;  // both gates open or shut, the decay, 1 - a^2 and its root

    SSMZOO_INLINE Gates(V r, V i, V log_decay) : recurrence(sigmoid<S>(r)), input(sigmoid<S>(i)) {
        const V log_a = log_decay * recurrence;
        a = exp<S>(log_a);
        rest = -expm1<S>(log_a + log_a);
        root = square_root(rest);
    }
};

// f(row of the batch and its time, offset of the head's parameters, and pointers to its x and logits) for every head.
template <class T, class F>
SSMZOO_INLINE void for_heads(const GateArguments& args, int64_t row, const F& f) {
    const int64_t batch = row / args.length, time = row % args.length;
    const T* x = at<T>(args.x, batch * args.x_batch + time * args.x_time);
    const T* gates = at<T>(args.gates, batch * args.gates_batch + time * args.gates_time);
    for (int64_t h = 0; h < args.heads; ++h) f(h * args.p, x + h * args.x_head, gates + h * args.gates_head);
}

// f(c, left) for every vector of a head's channels, `left` of which remain.
template <class S, class F>
SSMZOO_INLINE void for_channels(int64_t p, const F& f) {
    int64_t c = 0;
    for (; c + Lanes<S>::count <= p; c += Lanes<S>::count) f(c, static_cast<int64_t>(Lanes<S>::count));
    if (c < p) f(c, p - c);
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
