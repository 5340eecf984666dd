// Threads for long calls: OpenMP's where the build has it, as its runtime is then the one that PyTorch uses.
//
// PyTorch's threads spin for milliseconds after each of its own operations, on the cores that ours would need. So they
// are taken for long calls, too, as long as they come: a call in which they did not, so that the end of OpenMP's region
// was waited for in vain, is the last for a while. Those after it go to threads of our own (worth.h).
//
// Not so where it is known that PyTorch's threads have just worked, as in a step of training, whose products and
// operations go back and forth between PyTorch and this library: ours would share each core with one that spins.
#include "worth.h"

#if defined(_OPENMP)
#include <omp.h>

namespace {

constexpr int64_t kSpinning = 3000000;   // nanoseconds, about, for which GNU's threads look for their next region
constexpr int64_t kFollowing = 20000000;  // nanoseconds for which calls that follow one another keep them awake

Worth worth;
int64_t noticed = 0;      // when it was last known that they spin
int64_t awake_until = 0;  // and until when they do
int recording = 0;  // held by the thread that changes it

void record(bool helped, int64_t worked, int64_t waiting, int64_t time) {
    if (__atomic_exchange_n(&recording, 1, __ATOMIC_ACQUIRE)) return;
    worth.waited(helped ? worked : 0, waiting, time);
    __atomic_store_n(&recording, 0, __ATOMIC_RELEASE);
}

}  // namespace

// The version of OpenMP, as year and month.
extern "C" __attribute__((visibility("default"))) int ssmzoo_openmp() { return _OPENMP; }

// How many threads OpenMP, and so PyTorch, uses for what the calling thread does; returns how many these were.
extern "C" __attribute__((visibility("default"))) int ssmzoo_set_threads(int threads) {
    const int before = omp_get_max_threads();
    omp_set_num_threads(threads);
    return before;
}

// PyTorch's threads have just worked.
extern "C" __attribute__((visibility("default"))) void ssmzoo_openmp_spins() {
    const int64_t time = now();
    set(noticed, time);
    set(awake_until, time + kSpinning);
}

void ssmzoo_share_long(int64_t threads, int64_t tasks, SsmzooBody body, void* context) {
    if (threads > tasks) threads = tasks;
    if (threads > kMost) threads = kMost;
    if (threads <= 1 || tasks > kTasks) return alone(tasks, body, context);
    const int64_t begun = now();
    const int limit = ssmzoo_useful_threads(begun);
    if (threads > limit) threads = limit;
    const bool awake = begun < get(awake_until);
    if (threads <= 1 || !(awake || worth.shared(begun))) return ssmzoo_share(threads, tasks, body, context);
    SsmzooJob job;
    const int team = static_cast<int>(threads);
    prepare(job, 1, team, tasks, body, context);
    int64_t given = 0, worked = begun;
#pragma omp parallel num_threads(team)
    {
        SsmzooClaims claims = {&job, 1, omp_get_thread_num(), -1, 0, 0, 0};
        body(context, claims.share, &claims);
        if (omp_get_thread_num() == 0) {
            given = claims.given;
            worked = now();
        }
    }
    const int64_t ended = now();
    if (!awake)
        record(given < tasks, worked - begun, ended - worked, ended);
    else if (ended - get(noticed) < kFollowing)
        set(awake_until, ended + kSpinning);
}
#else
extern "C" __attribute__((visibility("default"))) int ssmzoo_openmp() { return 0; }

extern "C" __attribute__((visibility("default"))) void ssmzoo_openmp_spins() {}

void ssmzoo_share_long(int64_t threads, int64_t tasks, SsmzooBody body, void* context) {
    ssmzoo_share(threads, tasks, body, context);
}
#endif
