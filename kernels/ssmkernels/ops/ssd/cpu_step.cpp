// One token of the state-space dual, bound by memory.
#include "native/exports.h"
#include "native/parallel.h"
#include "ssd/cpu_step.h"

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

template <class T>
int step_as(const SsdStepArguments& a) {
    typedef typename Sum<T>::type S;
    const SsdStepSize sizes = {a.softplus, a.dt_least, a.dt_most};
    return parallel_step(a.batch * a.heads, a.threads, 0, [&](int64_t task, char*) {
        const int64_t batch = task / a.heads, head = task % a.heads, group = head / (a.heads / a.groups);
        const S step = sizes.of<S>(widen(*at<T>(a.dt, batch * a.dt_batch + head)),
                                   a.dt_bias ? at<S>(a.dt_bias, head) : nullptr);
        const T* z = a.z ? at<T>(a.z, batch * a.z_batch + head * a.p) : nullptr;
        ssd_step_head(static_cast<S*>(a.state) + task * a.p * a.n, a.p, a.n, step, *at<S>(a.A, head),
                      at<S>(a.B, batch * a.B_batch + group * a.n), at<S>(a.C, batch * a.C_batch + group * a.n),
                      a.D ? at<S>(a.D, head * a.skip) : nullptr, a.skip,
                      at<T>(a.x, batch * a.x_batch + head * a.p),
                      [&](int64_t channel, typename Lanes<S>::V y, int64_t count) {
                          if (z) y = y * silu<S>(read_some(z + channel, count));
                          write_some(static_cast<T*>(a.y) + task * a.p + channel, y, count);
                      });
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_DTYPES(ssd_step, SsdStepArguments, dtype, step_as)
