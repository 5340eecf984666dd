// The threads that kernels run on. The parts of a call are claimed one by one by whoever is there: the caller does all
// that nobody else has claimed, and waits for nobody who has not begun a part. So a thread that the system keeps off
// its core holds nothing up.
#pragma once

#include <stdint.h>

#define SSMZOO_HIDDEN extern "C" __attribute__((visibility("hidden")))

struct SsmzooJob;

// One thread's part in a job: the task that it holds, or -1, and how many it has been given.
struct SsmzooClaims {
    SsmzooJob* job;  // null where the caller is alone, with tasks [next, end)
    uint32_t number; // of the job
    int share;       // where to look first
    int64_t held, given, next, end;
};

// Runs tasks that it gets from ssmzoo_claim until there are none; `index` is the thread's, below that of the wanted.
typedef void (*SsmzooBody)(void* context, int index, SsmzooClaims* claims);

// A task that nobody has begun, which is then the calling thread's to do; -1 where there are none left.
SSMZOO_HIDDEN int64_t ssmzoo_claim(SsmzooClaims* claims);

// Calls body(context, index, claims) on up to `threads` threads, the caller's among them as number 0; each other one
// only once it holds a task. Returns when all tasks, numbered from 0, are done, and sees all that they wrote.
SSMZOO_HIDDEN void ssmzoo_share(int64_t threads, int64_t tasks, SsmzooBody body, void* context);

// The same for long calls, on OpenMP's threads as long as these come in time (threads_openmp.cpp).
SSMZOO_HIDDEN void ssmzoo_share_long(int64_t threads, int64_t tasks, SsmzooBody body, void* context);

// How many threads are of use at this time: no more than there are cores for them.
SSMZOO_HIDDEN int ssmzoo_useful_threads(int64_t time);
