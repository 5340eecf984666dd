// Loops over independent tasks on several threads, each with scratch memory of its own.
//
// A task's result never depends on which thread runs it, nor on how many there are: that is what makes every kernel
// give the same bits on one thread and on many.
#pragma once

#include <stdint.h>
#include <stdlib.h>

#include "isa.h"
#include "threads.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace ssmzoo {
namespace SSMZOO_ISA {

// Subnormal numbers count as 0 while one of these lives: a state that has decayed so far would cost many times more.
class FlushSubnormals {
#if defined(__x86_64__)
    unsigned before_ = _mm_getcsr();

  public:
    FlushSubnormals() { _mm_setcsr(before_ | 0x8040); }  // flush to zero, denormals are zero
    ~FlushSubnormals() { _mm_setcsr(before_); }
#elif defined(__aarch64__)
    uint64_t before_;

  public:
    FlushSubnormals() {
        asm volatile("mrs %0, fpcr" : "=r"(before_));
        asm volatile("msr fpcr, %0" : : "r"(before_ | (uint64_t(1) << 24)));
    }
    ~FlushSubnormals() { asm volatile("msr fpcr, %0" : : "r"(before_)); }
#else
  public:
    FlushSubnormals() {}
#endif
    FlushSubnormals(const FlushSubnormals&) = delete;
    FlushSubnormals& operator=(const FlushSubnormals&) = delete;
};

// What a thread has written past its caches is there for all others, once this returns.
inline void finish_streams() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

// Memory on a cache line's border; `data` is null where there is none left.
class Scratch {
    void* block_;

  public:
    char* data;

    explicit Scratch(size_t bytes) : block_(malloc(bytes + 64)) {
        data = block_ ? reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(block_) + 63) / 64 * 64) : nullptr;
    }
    ~Scratch() { free(block_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
};

constexpr int kOutOfMemory = 1;

// task(i, index) for i in [0, tasks) on up to `threads` threads, where `index` is that of the thread, the caller's 0.
//
// Each thread begins with a share of its own, tasks that follow one another, and helps with the others' when it is
// done: from call to call a thread works on the same part of memory, which is still in its cache.
template <class Task>
void on_threads(int64_t tasks, int64_t threads, const Task& task, decltype(ssmzoo_share)* share) {
    const SsmzooBody body = [](void* context, int index, SsmzooClaims* claims) {
        const FlushSubnormals flush;
        for (int64_t i; (i = ssmzoo_claim(claims)) >= 0;) (*static_cast<const Task*>(context))(i, index);
        finish_streams();
    };
    share(threads, tasks, body, const_cast<Task*>(&task));
}

// A stage of a short call, which begins when the one before is done: threads that wait for the next one are awake.
template <class Task>
void parallel_stage(int64_t tasks, int64_t threads, const Task& task) {
    on_threads(tasks, threads, task, ssmzoo_share);
}

// task(i, scratch), with scratch memory for each thread. Returns 0, or kOutOfMemory before any task has run.
template <class Task>
int with_scratch(int64_t tasks, int64_t threads, size_t bytes, const Task& task, decltype(ssmzoo_share)* share) {
    const size_t each = (bytes + 63) / 64 * 64;
    const Scratch scratch(each * static_cast<size_t>(threads < tasks ? threads : tasks));
    if (!scratch.data) return kOutOfMemory;
    const auto call = [&](int64_t i, int index) { task(i, scratch.data + static_cast<size_t>(index) * each); };
    on_threads(tasks, threads, call, share);
    return 0;
}

// For long calls.
template <class Task>
int parallel_for(int64_t tasks, int64_t threads, size_t scratch_bytes, const Task& task) {
    return with_scratch(tasks, threads, scratch_bytes, task, ssmzoo_share_long);
}

// For the short calls of decoding.
template <class Task>
int parallel_step(int64_t tasks, int64_t threads, size_t scratch_bytes, const Task& task) {
    return with_scratch(tasks, threads, scratch_bytes, task, ssmzoo_share);
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
