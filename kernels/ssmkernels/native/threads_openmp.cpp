// Threads by OpenMP: where its runtime is the one that PyTorch uses, both share one pool of threads, which are awake.
#include <omp.h>

#include "threads.h"

// The version of OpenMP, as year and month.
extern "C" __attribute__((visibility("default"))) int ssmzoo_openmp() { return _OPENMP; }

void ssmzoo_on_threads(int wanted, SsmzooBody body, void* context) {
#pragma omp parallel num_threads(wanted) if (wanted > 1)
    body(context, omp_get_thread_num(), omp_get_num_threads());
}

void ssmzoo_meet(int) {
#pragma omp barrier
}
