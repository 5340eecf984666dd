// One token of a Mamba-2 layer: projection, convolution, state-space dual, gate and norm, projection. Bound by memory:
// every weight and state is read once, as it lies, and what lies between is a few vectors a sequence.
#include "causal_conv1d/cpu_step.h"
#include "native/finite.h"
#include "native/exports.h"
#include "native/parallel.h"
#include "native/product.h"
#include "rms_norm/cpu.h"
#include "ssd/cpu_step.h"

namespace ssmzoo {

// d = heads p, c = d + 2 groups n, outputs = 2 mlp + d + c + heads
struct Mamba2StepArguments {
    void *conv_state, *ssm_state;                  // S: (b w-1 c), (b heads p n), contiguous
    const void* x;                                 // T: (b m)
    const void *in_proj, *in_bias;                 // T: (outputs m); S: (outputs) or null
    const void *conv_weight, *conv_bias;           // S: (c w), (c) or null
    const void *dt_bias, *A_log, *D, *norm_weight; // S: (heads), (heads), (heads skip), (d) or null
    const void *out_proj, *out_bias;               // T: (m, mlp + d); S: (m) or null
    void* y;                                       // T: (b m)
    void* scratch;                                 // S: (b, m + outputs + c + mlp + d), then for each thread's tile
    int64_t dtype, batch, m, outputs, mlp, heads, p, n, groups, width, skip, norm_groups, gate_first, threads, x_batch;
    double eps, dt_least, dt_most;
};

namespace SSMZOO_ISA {
namespace {

// What lies between the stages, for all sequences.
template <class S>
struct Between {
    int64_t d, c, f;             // channels of the dual, of the convolution, and of what the last projection reads
    S *x, *projected, *xBC, *y, *spare;

    explicit Between(const Mamba2StepArguments& a)
        : d(a.heads * a.p), c(d + 2 * a.groups * a.n), f(a.mlp + d), x(static_cast<S*>(a.scratch)),
          projected(x + a.batch * a.m), xBC(projected + a.batch * a.outputs), y(xBC + a.batch * c),
          spare(y + a.batch * f) {}

    S* gate(const Mamba2StepArguments& a, int64_t batch) const { return projected + batch * a.outputs + 2 * a.mlp; }
};

// y silu(gate) → y
template <class S>
void gate_channels(S* y, const S* gate, int64_t count) {
    for (int64_t c = 0; c < count; c += Lanes<S>::count)
        write_some(y + c, read_some(y + c, count - c) * silu<S>(read_some(gate + c, count - c)), count - c);
}

template <class S>
void advance(const Mamba2StepArguments& a, const Between<S>& between, int64_t task) {
    const int64_t batch = task / a.heads, head = task % a.heads, group = head / (a.heads / a.groups);
    const SsdStepSize sizes = {true, a.dt_least, a.dt_most};
    const S* dt = between.projected + (batch + 1) * a.outputs - a.heads;
    const S* xBC = between.xBC + batch * between.c;
    const S* B = xBC + between.d + group * a.n;
    S* y = between.y + batch * between.f + a.mlp + head * a.p;
    const S A = -finite_exp<S>(splat(*at<S>(a.A_log, head)))[0];
    ssd_step_head(static_cast<S*>(a.ssm_state) + task * a.p * a.n, a.p, a.n,
                  sizes.of<S>(dt[head], at<S>(a.dt_bias, head)), A, B, B + a.groups * a.n,
                  at<S>(a.D, head * a.skip), a.skip, xBC + head * a.p,
                  [&](int64_t channel, typename Lanes<S>::V v, int64_t count) { write_some(y + channel, v, count); });
}

template <class T>
int mamba2_step(const Mamba2StepArguments& a) {
    typedef typename Sum<T>::type S;
    const Between<S> between(a);
    Inputs<S> inputs(a.batch, a.m > between.f ? a.m : between.f);
    if (!inputs.ready()) return kOutOfMemory;
    const int64_t c = between.c, d = between.d, f = between.f, tiles = ceil_div(c, kTile);
    for (int64_t b = 0; b < a.batch; ++b)
        for (int64_t k = 0; k < a.m; k += Lanes<S>::count)
            write_some(between.x + b * a.m + k, read_some(at<T>(a.x, b * a.x_batch + k), a.m - k), a.m - k);
    const auto stage = [&](int64_t tasks, const auto& task) { parallel_stage(tasks, a.threads, task); };
    constexpr int64_t together = 4 * kOutputs;
    inputs.take(between.x, a.m);
    stage(ceil_div(a.outputs, together), [&](int64_t i, int) {
        product_part<T>(a.in_proj, a.in_bias, inputs, a.batch, a.m, a.outputs, together, i, between.projected,
                        a.outputs);
    });
    stage(a.batch * tiles, [&](int64_t i, int thread) {
        const int64_t batch = i / tiles, first = i % tiles * kTile;
        conv_step_tile(static_cast<S*>(a.conv_state) + batch * (a.width - 1) * c + first, c,
                       between.gate(a, batch) + d + first, at<S>(a.conv_weight, first * a.width),
                       a.conv_bias ? at<S>(a.conv_bias, first) : nullptr, a.width, true,
                       between.xBC + batch * c + first, minimum(kTile, c - first),
                       between.spare + thread * conv_step_scratch(a.width));
    });
    stage(a.batch * a.heads, [&](int64_t i, int) { advance(a, between, i); });
    const int64_t groups = a.norm_weight ? a.norm_groups : 1, size = d / groups, parts = groups + (a.mlp ? 1 : 0);
    stage(a.batch * parts, [&](int64_t i, int) {
        const int64_t batch = i / parts, first = i % parts * size;
        S *y = between.y + batch * f, *outputs = y + a.mlp + first;
        const S* gate = between.gate(a, batch);
        if (first == d) {  // the MLP beside the dual: silu of the first half, times the second
            memcpy(y, gate - a.mlp, sizeof(S) * static_cast<size_t>(a.mlp));
            gate_channels(y, gate - 2 * a.mlp, a.mlp);
        } else if (a.norm_weight) {
            norm_group<S>(static_cast<const S*>(outputs), gate + first, a.gate_first, at<S>(a.norm_weight, first),
                          outputs, size, a.eps);
        } else {
            gate_channels(outputs, gate + first, size);
        }
    });
    inputs.take(between.y, f);
    stage(ceil_div(a.m, together), [&](int64_t i, int) {
        product_part<T>(a.out_proj, a.out_bias, inputs, a.batch, f, a.m, together, i, static_cast<T*>(a.y), a.m);
    });
    return 0;
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_DTYPES(mamba2_step, Mamba2StepArguments, dtype, mamba2_step)
