// One step of the selective scan. Bound by memory: the state (d n) is read and written as it lies, lanes over n.
#include "native/math.h"
#include "native/parallel.h"
#include "native/tiles.h"

namespace ssmzoo {

struct ScanStepArguments {
    void* state;                            // S: (b d n), contiguous
    const void *u, *delta, *z;              // (b d); z may be null
    const void *A, *B, *C, *D, *delta_bias; // S: (d n), (b g n), likewise, (d), (d); the last two may be null
    void* y;                                // (b d)
    int64_t dtype, batch, d, n, groups_B, groups_C, softplus, threads;
    int64_t u_batch, delta_batch, z_batch, B_batch, C_batch;
};

namespace SSMZOO_ISA {
namespace {

// Up to as many channels as a vector has lanes, from the first on: their sums over n of C h, one in each lane.
template <class S>
typename Lanes<S>::V advance(const ScanStepArguments& a, int64_t batch, int64_t first, int64_t channels, const S* dt,
                             const S* dtu) {
    using V = typename Lanes<S>::V;
    constexpr int lanes = Lanes<S>::count;
    const int64_t per_B = a.d / a.groups_B, per_C = a.d / a.groups_C;
    V sums[lanes];
    for (int c = 0; c < lanes; ++c) {
        sums[c] = V{};
        if (c >= channels) continue;
        const int64_t channel = first + c;
        const S* A = at<S>(a.A, channel * a.n);
        const S* B = at<S>(a.B, batch * a.B_batch + channel / per_B * a.n);
        const S* C = at<S>(a.C, batch * a.C_batch + channel / per_C * a.n);
        S* h = static_cast<S*>(a.state) + (batch * a.d + channel) * a.n;
        const V step = splat(dt[c]), input = splat(dtu[c]);
        for (int64_t j = 0; j < a.n; j += lanes) {
            const int64_t count = a.n - j;
            const V decay = exp2_product<S, true>(step, read_some(A + j, count) * splat(Constants<S>::log2e));
            const V now = fma(decay, read_some(h + j, count), input * read_some(B + j, count));
            write_some(h + j, now, count);
            sums[c] = fma(now, read_some(C + j, count), sums[c]);
        }
    }
    return sum_lanes<S, lanes>(sums);
}

template <class T>
int scan_step(const ScanStepArguments& a) {
    typedef typename Sum<T>::type S;
    constexpr int lanes = Lanes<S>::count;
    using V = typename Lanes<S>::V;
    const int64_t tiles = ceil_div(a.d, kTile);
    return parallel_for(a.batch * tiles, a.threads, 0, [&](int64_t i, char*) {
        const int64_t batch = i / tiles, tile = i % tiles * kTile;
        for (int64_t first = tile; first < minimum(a.d, tile + kTile); first += lanes) {
            const int64_t count = a.d - first;
            const V u = read_some(at<T>(a.u, batch * a.u_batch + first), count);
            V dt = read_some(at<T>(a.delta, batch * a.delta_batch + first), count);
            if (a.delta_bias) dt = dt + read_some(at<S>(a.delta_bias, first), count);
            if (a.softplus) dt = softplus<S>(dt);
            S steps[lanes], inputs[lanes];
            store(steps, dt);
            store(inputs, dt * u);
            V y = advance(a, batch, first, minimum(count, lanes), steps, inputs);
            if (a.D) y = fma(read_some(at<S>(a.D, first), count), u, y);
            if (a.z) y = y * silu<S>(read_some(at<T>(a.z, batch * a.z_batch + first), count));
            write_some(static_cast<T*>(a.y) + batch * a.d + first, y, count);
        }
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT(selective_scan_step)(const ssmzoo::ScanStepArguments* a) {
    using namespace ssmzoo::SSMZOO_ISA;
    switch (a->dtype) {
        case 0: return scan_step<float>(*a);
        case 1: return scan_step<double>(*a);
        case 2: return scan_step<bfloat16>(*a);
        default: return scan_step<float16>(*a);
    }
}
