// A job whose tasks are claimed one by one, by the pool's threads or by OpenMP's.
//
// The tasks lie in shares, one a thread. A share is one word, the job's number and how many tasks are left, which a
// thread lowers to claim one.
#pragma once

#include "threads.h"

constexpr int kMost = 256;                    // threads of a job
constexpr int64_t kTasks = int64_t(1) << 31;  // of a job, at most

template <class X>
X get(const X& x, int order = __ATOMIC_RELAXED) {
    return __atomic_load_n(&x, order);
}

template <class X>
void set(X& x, X value, int order = __ATOMIC_RELAXED) {
    __atomic_store_n(&x, value, order);
}

struct alignas(64) Share {
    uint64_t left;  // the job's number in the upper half, how many tasks nobody has begun in the lower
    int64_t end;    // the last of them plus one; read by those alone who have claimed a task, as is all of the job
};

struct SsmzooJob {
    SsmzooBody body;
    void* context;
    int team;
    uint32_t tasks;
    alignas(64) uint32_t number;  // of the latest job
    alignas(64) uint32_t done;    // tasks
    int waiting;                  // whether the caller sleeps
    alignas(64) Share shares[kMost];
};

inline void prepare(SsmzooJob& job, uint32_t number, int team, int64_t tasks, SsmzooBody body, void* context) {
    job.body = body;
    job.context = context;
    job.tasks = static_cast<uint32_t>(tasks);
    set(job.team, team);
    set(job.done, 0u);
    for (int k = 0; k < team; ++k) {
        const int64_t first = tasks * k / team, end = tasks * (k + 1) / team;
        job.shares[k].end = end;
        set(job.shares[k].left, uint64_t(number) << 32 | uint64_t(end - first), __ATOMIC_RELEASE);
    }
}

// The whole job on the calling thread.
inline void alone(int64_t tasks, SsmzooBody body, void* context) {
    SsmzooClaims claims = {nullptr, 0, 0, -1, 0, 0, tasks};
    body(context, 0, &claims);
}
