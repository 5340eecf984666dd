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
#include <immintrin.h>
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

// One thread's way to the tasks of a job: the next that nobody has begun, or -1.
struct Claims {
    SsmzooClaims* claims;
    int64_t next() const { return ssmzoo_claim(claims); }
};

// body(index, claims) on up to `threads` threads, the caller's as number 0; all `tasks` are done when it returns.
template <class Body>
void on_threads(int64_t threads, int64_t tasks, const Body& body) {
    const SsmzooBody call = [](void* context, int index, SsmzooClaims* claims) {
        const FlushSubnormals flush;
        (*static_cast<const Body*>(context))(index, Claims{claims});
        finish_streams();
    };
    ssmzoo_share(threads, tasks, call, const_cast<Body*>(&body));
}

// Runs task(i, index) for i in [0, tasks), where `index` is that of the thread: a stage of a call, which begins when
// the one before is done. Threads that wait for the next stage are awake, as long as stages are short.
//
// Each thread begins with a share of its own, tasks that follow one another, and helps with the others' when it is
// done: from call to call a thread works on the same part of memory, which is still in its cache.
template <class Task>
void parallel_stage(int64_t tasks, int64_t threads, const Task& task) {
    const auto body = [&](int index, const Claims& claims) {
        for (int64_t i; (i = claims.next()) >= 0;) task(i, index);
    };
    on_threads(threads, tasks, body);
}

// task(i, scratch) for i in [0, tasks), with scratch memory for each thread. Returns 0, or kOutOfMemory before any task
// has run.
template <class Task>
int parallel_for(int64_t tasks, int64_t threads, size_t scratch_bytes, const Task& task) {
    const size_t each = (scratch_bytes + 63) / 64 * 64;
    const Scratch scratch(each * static_cast<size_t>(threads < tasks ? threads : tasks));
    if (!scratch.data) return kOutOfMemory;
    parallel_stage(tasks, threads, [&](int64_t i, int index) { task(i, scratch.data + static_cast<size_t>(index) * each); });
    return 0;
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
