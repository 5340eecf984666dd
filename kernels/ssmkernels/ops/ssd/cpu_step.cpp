// One token of the state-space dual. Bound by memory: the state (p n) is read and written as it lies, lanes over n.
#include "ssd/cpu.h"

namespace ssmzoo {

struct SsdStepArguments {
    void* state;                          // S: (b h p n), contiguous
    const void *x, *z, *dt;               // (b h p), any floating dtype; z may be null; (b h)
    const void *A, *B, *C, *D, *dt_bias;  // S: (h), (b g n), likewise, (h skip) or null, (h) or null
    void* y;                              // (b h p), contiguous
    int64_t dtype, batch, heads, p, n, groups, skip, softplus, threads;
    int64_t x_batch, z_batch, dt_batch, B_batch, C_batch;
    double dt_least, dt_most;
};

namespace SSMZOO_ISA {
namespace {

// `count` rows of a state (p n): h = decay h + x B. Leaves Σ_n h C of each in `sums`, one a vector.
template <class S, int count>
SSMZOO_INLINE void advance(S* h, int64_t n, const S* B, const S* C, S decay, const S* x,
                           typename Lanes<S>::V* sums) {
    using V = typename Lanes<S>::V;
    constexpr int lanes = Lanes<S>::count;
    V total[count] = {};
    const V factor = splat(decay);
    int64_t j = 0;
    for (; j + lanes <= n; j += lanes) {
        const V b = load(B + j), c = load(C + j);
        for (int r = 0; r < count; ++r) {
            const V now = fma(factor, load(h + r * n + j), splat(x[r]) * b);
            store(h + r * n + j, now);
            total[r] = fma(now, c, total[r]);
        }
    }
    if (j < n) {
        const V b = load_some(B + j, n - j), c = load_some(C + j, n - j);
        for (int r = 0; r < count; ++r) {
            const V now = fma(factor, load_some(h + r * n + j, n - j), splat(x[r]) * b);
            store_some(h + r * n + j, now, n - j);
            total[r] = fma(now, c, total[r]);
        }
    }
    for (int r = 0; r < count; ++r) sums[r] = total[r];
}

template <class S, class T>
int step_as(const SsdStepArguments& a) {
    using V = typename Lanes<S>::V;
    constexpr int lanes = Lanes<S>::count, together = lanes < 4 ? lanes : 4;
    return parallel_step(a.batch * a.heads, a.threads, 0, [&](int64_t task, char*) {
        const int64_t batch = task / a.heads, head = task % a.heads, group = head / (a.heads / a.groups);
        V step = splat(S(widen(*at<T>(a.dt, batch * a.dt_batch + head))));
        if (a.dt_bias) step = step + splat(*at<S>(a.dt_bias, head));
        if (a.softplus) step = softplus<S>(step);
        step = clamp(step, splat(S(a.dt_least)), splat(S(a.dt_most)));
        const S decay = exp<S>(step * splat(*at<S>(a.A, head)))[0];
        const S* B = at<S>(a.B, batch * a.B_batch + group * a.n);
        const S* C = at<S>(a.C, batch * a.C_batch + group * a.n);
        S* state = static_cast<S*>(a.state) + task * a.p * a.n;
        for (int64_t first = 0; first < a.p; first += lanes) {
            const int64_t count = a.p - first;
            const V x = read_some(at<T>(a.x, batch * a.x_batch + head * a.p + first), count);
            S fed[lanes];
            store(fed, step * x);
            V sums[lanes] = {};
            int64_t row = 0;
            for (; row + together <= minimum(count, lanes); row += together)
                advance<S, together>(state + (first + row) * a.n, a.n, B, C, decay, fed + row, sums + row);
            for (; row < minimum(count, lanes); ++row)
                advance<S, 1>(state + (first + row) * a.n, a.n, B, C, decay, fed + row, sums + row);
            V y = sum_lanes<S, lanes>(sums);
            if (a.D && a.skip > 1) y = fma(read_some(at<S>(a.D, head * a.p + first), count), x, y);
            if (a.D && a.skip == 1) y = fma(splat(*at<S>(a.D, head)), x, y);
            if (a.z) y = y * silu<S>(read_some(at<T>(a.z, batch * a.z_batch + head * a.p + first), count));
            write_some(static_cast<T*>(a.y) + task * a.p + first, y, count);
        }
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT(ssd_step)(const ssmzoo::SsdStepArguments* a) {
    using namespace ssmzoo::SSMZOO_ISA;
    switch (a->dtype) {
        case 0: return step_as<float, float>(*a);
        case 1: return step_as<double, double>(*a);
        case 2: return step_as<float, bfloat16>(*a);
        default: return step_as<float, float16>(*a);
    }
}
