// One token of a Mamba layer: projection, convolution, projections of Δ, B and C, scan, gate, projection. Bound by
// memory: every weight and state is read once, as it lies, and what lies between is a few vectors a sequence.
#include "causal_conv1d/cpu_step.h"
#include "native/finite.h"
#include "native/exports.h"
#include "native/math.h"
#include "native/parallel.h"
#include "native/product.h"
#include "native/tiles.h"

namespace ssmzoo {

struct MambaStepArguments {
    void *conv_state, *ssm_state;                            // S: (b w-1 d), (b d n), contiguous
    const void* x;                                           // T: (b m)
    const void *in_proj, *in_bias, *conv_weight, *conv_bias; // T: (2d m); S: (2d) or null, (d w), (d) or null
    const void *x_proj, *dt_proj, *dt_bias, *A_log, *D;      // T: (r+2n d), (d r), contiguous; S: (d), (d n), (d)
    const void *out_proj, *out_bias;                         // T: (m d); S: (m) or null
    void* y;                                                 // T: (b m)
    void* scratch;                                           // S: (b, m + 4d + r + 2n), then (threads, max(w+1, n) 64)
    int64_t dtype, batch, m, d, n, width, rank, normalised, threads, x_batch;
    double eps;
};

namespace SSMZOO_ISA {
namespace {

constexpr int64_t kSequences = 4;  // of a task: what is made of a tile's weights serves all of them

// What lies between the stages, for all sequences.
template <class S>
struct Between {
    S *x, *xz, *inputs, *maps, *y, *spare;

    explicit Between(const MambaStepArguments& a)
        : x(static_cast<S*>(a.scratch)), xz(x + a.batch * a.m), inputs(xz + a.batch * 2 * a.d),
          maps(inputs + a.batch * a.d), y(maps + a.batch * (a.rank + 2 * a.n)), spare(y + a.batch * a.d) {}
};

// Each of Δ's part, B and C over its root mean square.
template <class S>
void normalise(const MambaStepArguments& a, S* maps) {
    const int64_t sizes[3] = {a.rank, a.n, a.n};
    for (int64_t size : sizes) {
        S squares = S(0);
        for (int64_t i = 0; i < size; ++i) squares += maps[i] * maps[i];
        const S scale = S(1) / S(__builtin_sqrt(double(squares / S(size) + S(a.eps))));
        for (int64_t i = 0; i < size; ++i) maps[i] *= scale;
        maps += size;
    }
}

// -A log2(e) of a tile's channels → rates (channels n)
template <class S>
void read_rates(const MambaStepArguments& a, int64_t first, int64_t channels, S* rates) {
    const int64_t count = channels * a.n;
    const S* A_log = at<S>(a.A_log, first * a.n);
    for (int64_t k = 0; k < count; k += Lanes<S>::count) {
        const auto rate = finite_exp<S>(read_some(A_log + k, count - k)) * splat(Constants<S>::log2e);
        write_some(rates + k, rate, count - k);
    }
}

// As many channels as a vector has lanes, or fewer, from the first on: Δ, the recurrence, skip and gate → y. `rates` are
// theirs. The state that lies `next` numbers further will be needed soon.
template <class T, class S>
void advance(const MambaStepArguments& a, const Between<S>& between, int64_t batch, int64_t first, int64_t channels,
             const S* rates, int64_t next) {
    using V = typename Lanes<S>::V;
    constexpr int lanes = Lanes<S>::count;
    const int64_t n = a.n, r = a.rank;
    const S* delta = between.maps + batch * (r + 2 * n);
    const S *B = delta + r, *C = B + n;
    V sums[lanes];
    for (int c = 0; c < lanes; ++c) {
        sums[c] = V{};
        if (c >= channels) continue;
        const T* row = at<T>(a.dt_proj, (first + c) * r);
        for (int64_t k = 0; k < r; k += lanes)
            sums[c] = fma(read_some(row + k, r - k), read_some(delta + k, r - k), sums[c]);
    }
    const V dt = softplus<S>(sum_lanes<S, lanes>(sums) + read_some(at<S>(a.dt_bias, first), channels));
    const V u = read_some(between.inputs + batch * a.d + first, channels);
    S steps[lanes], inputs[lanes];
    store(steps, dt);
    store(inputs, dt * u);
    for (int c = 0; c < lanes; ++c) {
        sums[c] = V{};
        if (c >= channels) continue;
        S* h = static_cast<S*>(a.ssm_state) + (batch * a.d + first + c) * n;
        const V step = splat(-steps[c]), input = splat(inputs[c]);
        for (int64_t j = 0; j < n; j += lanes) {
            const int64_t count = n - j;
            __builtin_prefetch(h + j + next, 1);
            const V decay = exp2_product<S, true>(step, read_some(rates + c * n + j, count));
            const V now = fma(decay, read_some(h + j, count), input * read_some(B + j, count));
            write_some(h + j, now, count);
            sums[c] = fma(now, read_some(C + j, count), sums[c]);
        }
    }
    const V y = fma(read_some(at<S>(a.D, first), channels), u, sum_lanes<S, lanes>(sums));
    const V z = read_some(between.xz + batch * 2 * a.d + a.d + first, channels);
    write_some(between.y + batch * a.d + first, y * silu<S>(z), channels);
}

template <class T>
int mamba_step(const MambaStepArguments& a) {
    typedef typename Sum<T>::type S;
    constexpr int64_t lanes = Lanes<S>::count;
    const Between<S> between(a);
    Inputs<S> inputs(a.batch, a.m > a.d ? a.m : a.d);
    if (!inputs.ready()) return kOutOfMemory;
    const int64_t tiles = ceil_div(a.d, kTile), rows = a.rank + 2 * a.n;
    const int64_t spare = (a.width + 1 > a.n ? a.width + 1 : a.n) * kTile;  // of each thread
    for (int64_t b = 0; b < a.batch; ++b)
        for (int64_t k = 0; k < a.m; k += lanes)
            write_some(between.x + b * a.m + k, read_some(at<T>(a.x, b * a.x_batch + k), a.m - k), a.m - k);
    const auto stage = [&](int64_t tasks, const auto& task) { parallel_stage(tasks, a.threads, task); };
    inputs.take(between.x, a.m);
    stage(ceil_div(2 * a.d, kTile), [&](int64_t i, int) {
        product_part<T>(a.in_proj, a.in_bias, inputs, a.batch, a.m, 2 * a.d, kTile, i, between.xz, 2 * a.d);
    });
    stage(tiles * ceil_div(a.batch, kSequences), [&](int64_t i, int thread) {
        const int64_t first = i % tiles * kTile, channels = minimum(kTile, a.d - first), b0 = i / tiles * kSequences;
        S* weights = between.spare + thread * spare;
        read_conv_weights(at<S>(a.conv_weight, first * a.width), a.conv_bias ? at<S>(a.conv_bias, first) : nullptr,
                          a.width, channels, weights);
        for (int64_t b = b0; b < minimum(a.batch, b0 + kSequences); ++b)
            conv_step_with(weights, static_cast<S*>(a.conv_state) + b * (a.width - 1) * a.d + first, a.d,
                           between.xz + b * 2 * a.d + first, a.width, true, between.inputs + b * a.d + first, channels);
    });
    inputs.take(between.inputs, a.d);
    stage(ceil_div(rows, 2 * kOutputs), [&](int64_t i, int) {
        product_part<T>(a.x_proj, nullptr, inputs, a.batch, a.d, rows, 2 * kOutputs, i, between.maps, rows);
    });
    if (a.normalised) stage(a.batch, [&](int64_t b, int) { normalise(a, between.maps + b * rows); });
    stage(tiles * ceil_div(a.batch, kSequences), [&](int64_t i, int thread) {
        const int64_t tile = i % tiles * kTile, end = minimum(a.d, tile + kTile), b0 = i / tiles * kSequences;
        const int64_t b1 = minimum(a.batch, b0 + kSequences);
        S* rates = between.spare + thread * spare;
        read_rates(a, tile, end - tile, rates);
        for (int64_t b = b0; b < b1; ++b)
            for (int64_t first = tile; first < end; first += lanes)
                advance<T>(a, between, b, first, minimum(end - first, lanes), rates + (first - tile) * a.n,
                           b + 1 < b1 ? a.d * a.n : 0);
    });
    inputs.take(between.y, a.d);
    stage(ceil_div(a.m, 4 * kOutputs), [&](int64_t i, int) {
        product_part<T>(a.out_proj, a.out_bias, inputs, a.batch, a.d, a.m, 4 * kOutputs, i, static_cast<T*>(a.y),
                        a.m);
    });
    return 0;
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_DTYPES(mamba_step, MambaStepArguments, dtype, mamba_step)
