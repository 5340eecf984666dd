// Whether it is worth it to share a call with other threads.
//
// On a busy machine workers come late or not at all, yet waking them costs; and a worker that has begun a task may lose
// its core to another program. When that has cost more than sharing has saved of late, calls are done alone for a
// while, and for twice as long after each further loss: what sharing then costs is a small part of the time.
#pragma once

#include <stdint.h>
#include <time.h>

#if defined(__linux__)
#include <sched.h>
#endif

#include "job.h"

namespace {

constexpr int64_t kHeldUp = 200000;         // nanoseconds of waiting for the end of others' tasks that may be a loss
constexpr int kHelpful = 16;                // so many more jobs without help than with it are a loss
constexpr int64_t kSavings = 10000000;      // nanoseconds that count of what sharing has saved since the last loss
constexpr int64_t kShortest = 10000000;     // nanoseconds alone after the first loss
constexpr int64_t kLongest = 1000000000;    // after many
constexpr int64_t kForgotten = 4000000000;  // nanoseconds after which a loss no longer counts
constexpr int64_t kRecount = 100000000;     // nanoseconds until the cores are counted again

inline int64_t now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return int64_t(time.tv_sec) * 1000000000 + time.tv_nsec;
}

class Worth {
    int64_t alone_until_ = 0, alone_for_ = kShortest;
    int64_t savings_ = 0;
    int helpful_ = 0;  // jobs in which a worker did something, less those in which none came

    void lose(int64_t time) {
        if (time - alone_until_ > kForgotten) alone_for_ = kShortest;
        set(alone_until_, time + alone_for_);
        if (2 * alone_for_ <= kLongest) alone_for_ *= 2;
        savings_ = 0;
        helpful_ = 0;
    }

  public:
    // Any thread may ask; all else is for the one whose job it is.
    bool shared(int64_t time) const { return time >= get(alone_until_); }

    // Whether anybody else did a task of the job that has just ended.
    void helped(bool was, int64_t time) {
        if (was)
            helpful_ += helpful_ < kHelpful;
        else if (--helpful_ < -kHelpful)
            lose(time);
    }

    // The caller did `own` of so many tasks, for so long: alone it would have worked longer.
    void saved(int64_t worked, int64_t own, int64_t tasks) {
        if (own <= 0 || own >= tasks) return;
        savings_ += worked / own * (tasks - own);
        if (savings_ < kSavings) return;
        savings_ = kSavings;
        alone_for_ = kShortest;
    }

    // The caller worked for so long, and waited then.
    void waited(int64_t worked, int64_t waiting, int64_t time) {
        if (waiting <= kHeldUp || waiting <= worked) return;
        savings_ -= waiting;
        if (savings_ < 0) lose(time);
    }

    void forget() { *this = Worth(); }
};

// How many threads are of use: more than there are cores for would only wait for each other.
class Cores {
    int limit_ = kMost;  // of the process's time, in cores
    int able_ = kMost;   // that the calling threads may run on, when they were last counted
#if defined(__linux__)
    int64_t counted_until_ = 0;
#endif

  public:
    void limit(int count) { set(limit_, count < 1 ? 1 : count < kMost ? count : kMost); }

    // A thread may be moved to other cores at any time.
    int useful(int64_t time) {
#if defined(__linux__)
        if (time >= get(counted_until_)) {
            set(counted_until_, time + kRecount);
            cpu_set_t able;  // too small on a machine of more than 1024 cores: no limit then
            set(able_, sched_getaffinity(0, sizeof able, &able) == 0 ? CPU_COUNT(&able) : kMost);
        }
#endif
        (void)time;
        const int able = get(able_), limit = get(limit_);
        return able < limit ? able : limit;
    }
};

}  // namespace
