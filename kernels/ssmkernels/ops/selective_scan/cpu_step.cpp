// One step of the selective scan. Bound by memory: the state (d n) is read and written as it lies, lanes over n.
#include "native/exports.h"
#include "native/math.h"
#include "native/parallel.h"
#include "selective_scan/cpu_numbers.h"

namespace ssmzoo {

// As in cpu.h, n and strides count reals.
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
template <class K>
typename K::V advance(const ScanStepArguments& a, int64_t batch, int64_t first, int64_t channels,
                      const typename K::S* dt, const typename K::S* dtu) {
    typedef typename K::S S;
    using V = typename K::V;
    constexpr int lanes = Lanes<S>::count;
    const int64_t states = a.n / K::parts, per_B = a.d / a.groups_B, per_C = a.d / a.groups_C;
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
        for (int64_t j = 0; j < states; j += lanes) {
            const int64_t i = j * K::parts, count = states - j;
            const auto decay = K::template decay<true>(step, K::rate(K::read_some(A + i, count)));
            const auto now = fma(decay, K::read_some(h + i, count), input * K::read_some(B + i, count));
            K::write_some(h + i, now, count);
            sums[c] = fma_real(now, K::read_some(C + i, count), sums[c]);
        }
    }
    return sum_lanes<S, lanes>(sums);
}

template <class K, class T>
int scan_step_as(const ScanStepArguments& a) {
    typedef typename K::S S;
    constexpr int lanes = Lanes<S>::count;
    using V = typename K::V;
    const int64_t tiles = ceil_div(a.d, kTile);
    return parallel_step(a.batch * tiles, a.threads, 0, [&](int64_t i, char*) {
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
            V y = advance<K>(a, batch, first, minimum(count, lanes), steps, inputs);
            if (a.D) y = fma(read_some(at<S>(a.D, first), count), u, y);
            if (a.z) y = y * silu<S>(read_some(at<T>(a.z, batch * a.z_batch + first), count));
            write_some(static_cast<T*>(a.y) + batch * a.d + first, y, count);
        }
    });
}

template <template <class> class Numbers>
int scan_step(const ScanStepArguments& a) {
    return by_dtype(a.dtype, [&](auto zero) {
        typedef decltype(zero) T;
        return scan_step_as<Numbers<typename Sum<T>::type>, T>(a);
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT(selective_scan_step)(const ssmzoo::ScanStepArguments* a) {
    using namespace ssmzoo::SSMZOO_ISA;
    return scan_step<Real>(*a);
}

SSMZOO_EXPORT(selective_scan_complex_step)(const ssmzoo::ScanStepArguments* a) {
    using namespace ssmzoo::SSMZOO_ISA;
    return scan_step<Complex>(*a);
}
