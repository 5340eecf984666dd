// Loops over independent tasks on several threads, each with scratch memory of its own.
//
// A task's result never depends on which thread runs it, nor on how many there are: that is what makes every kernel
// give the same bits on one thread and on many.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "isa.h"

#if defined(_OPENMP)
#include <omp.h>
#endif
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

// Runs task(i, scratch) for i in [0, tasks). Returns 0, or kOutOfMemory before any task has run on that thread.
template <class Task>
int parallel_for(int64_t tasks, int64_t threads, size_t scratch_bytes, const Task& task) {
    if (tasks == 0) return 0;
    int result = 0;
    const int team = static_cast<int>(threads < tasks ? threads : tasks);
    (void)team;  // unused without OpenMP
#if defined(_OPENMP)
#pragma omp parallel num_threads(team) if (team > 1)
#endif
    {
        Scratch scratch(scratch_bytes);
        FlushSubnormals flush;
        if (!scratch.data) {
#if defined(_OPENMP)
#pragma omp atomic write
#endif
            result = kOutOfMemory;
        }
#if defined(_OPENMP)
#pragma omp for schedule(dynamic, 1) nowait
#endif
        for (int64_t i = 0; i < tasks; ++i)
            if (scratch.data) task(i, scratch.data);
    }
    return result;
}

// The threads of one call, which go through its stages side by side and wait for each other in between: for stages so
// short that waking the threads for each would take longer.
struct Team {
    int index, count;

    // task(i) for i in [0, tasks), each on one of the threads; all of them are done when any thread returns.
    template <class Task>
    void each(int64_t tasks, const Task& task) const {
        for (int64_t i = index; i < tasks; i += count) task(i);
#if defined(_OPENMP)
#pragma omp barrier
#endif
    }
};

template <class Body>
void parallel_team(int64_t threads, const Body& body) {
    const int team = static_cast<int>(threads);
    (void)team;  // unused without OpenMP
#if defined(_OPENMP)
#pragma omp parallel num_threads(team) if (team > 1)
#endif
    {
        FlushSubnormals flush;
#if defined(_OPENMP)
        body(Team{omp_get_thread_num(), omp_get_num_threads()});
#else
        body(Team{0, 1});
#endif
    }
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
