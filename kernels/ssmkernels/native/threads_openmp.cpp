// Threads for long calls: OpenMP's where the build has it, as its runtime is then the one that PyTorch uses.
#include "job.h"

#if defined(_OPENMP)
#include <omp.h>

// The version of OpenMP, as year and month.
extern "C" __attribute__((visibility("default"))) int ssmzoo_openmp() { return _OPENMP; }

void ssmzoo_share_long(int64_t threads, int64_t tasks, SsmzooBody body, void* context) {
    if (threads > tasks) threads = tasks;
    if (threads > kMost) threads = kMost;
    if (threads <= 1 || tasks > kTasks) return alone(tasks, body, context);
    SsmzooJob job;
    const int team = static_cast<int>(threads);
    prepare(job, 1, team, tasks, body, context);
#pragma omp parallel num_threads(team)
    {
        SsmzooClaims claims = {&job, 1, omp_get_thread_num(), -1, 0, 0, 0};
        body(context, claims.share, &claims);
    }
}
#else
extern "C" __attribute__((visibility("default"))) int ssmzoo_openmp() { return 0; }

void ssmzoo_share_long(int64_t threads, int64_t tasks, SsmzooBody body, void* context) {
    ssmzoo_share(threads, tasks, body, context);
}
#endif
