// The threads that kernels run on: OpenMP's (threads_openmp.cpp) or our own (threads_pool.cpp), as the build chooses.
#pragma once

#define SSMZOO_HIDDEN extern "C" __attribute__((visibility("hidden")))

typedef void (*SsmzooBody)(void* context, int index, int count);

// body(context, index, count) for each index in [0, count), every one on a thread of its own, the caller's among them;
// returns when all have. There are as many as wanted, or fewer; the index of the caller is 0.
SSMZOO_HIDDEN void ssmzoo_on_threads(int wanted, SsmzooBody body, void* context);

// Called by each thread of a body of `count`: returns when all have called it, and sees all that they wrote before.
SSMZOO_HIDDEN void ssmzoo_meet(int count);
