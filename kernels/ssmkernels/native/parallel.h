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

// body(index, count) on `threads` threads at once, or fewer.
template <class Body>
void on_threads(int64_t threads, const Body& body) {
    const SsmzooBody call = [](void* context, int index, int count) {
        const FlushSubnormals flush;
        (*static_cast<const Body*>(context))(index, count);
    };
    ssmzoo_on_threads(static_cast<int>(threads), call, const_cast<Body*>(&body));
}

// Tasks [next, end) that nobody has begun, on a cache line of its own.
struct alignas(64) Share {
    int64_t next, end;
};

// Runs task(i, scratch) for i in [0, tasks). Returns 0, or kOutOfMemory before any task has run on that thread.
//
// Each thread begins with a share of its own, tasks that follow one another, and helps with the others' when it is done:
// from call to call a thread works on the same part of memory, which is still in its cache, and nobody waits for a thread
// that the system has put aside.
template <class Task>
int parallel_for(int64_t tasks, int64_t threads, size_t scratch_bytes, const Task& task) {
    if (tasks == 0) return 0;
    int result = 0;
    const int team = static_cast<int>(threads < tasks ? threads : tasks);
    const Scratch memory(sizeof(Share) * static_cast<size_t>(team));
    if (!memory.data) return kOutOfMemory;
    Share* const shares = reinterpret_cast<Share*>(memory.data);
    for (int k = 0; k < team; ++k) shares[k] = {tasks * k / team, tasks * (k + 1) / team};
    on_threads(team, [&](int own, int) {
        const Scratch scratch(scratch_bytes);
        if (!scratch.data) __atomic_store_n(&result, kOutOfMemory, __ATOMIC_RELAXED);
        for (int k = 0; k < team && scratch.data; ++k) {
            Share& share = shares[(own + k) % team];
            for (int64_t i; (i = __atomic_fetch_add(&share.next, 1, __ATOMIC_RELAXED)) < share.end;)
                task(i, scratch.data);
        }
        finish_streams();
    });
    return result;
}

// The threads of one call, which go through its stages side by side and wait for each other in between: for stages so
// short that waking the threads for each would take longer.
struct Team {
    int index, count;

    // task(i) for i in [0, tasks), each on one of the threads; all of them are done when any thread returns.
    template <class Task>
    void each(int64_t tasks, const Task& task) const {
        const int64_t end = tasks * (index + 1) / count;
        for (int64_t i = tasks * index / count; i < end; ++i) task(i);
        ssmzoo_meet(count);
    }
};

template <class Body>
void parallel_team(int64_t threads, const Body& body) {
    on_threads(threads, [&](int index, int count) { body(Team{index, count}); });
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
