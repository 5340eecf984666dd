// The pool of threads, in a program of its own that decides whether the system gives threads and when they begin.
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <time.h>

namespace {

int given = 1, begin = 1, wanted = 0;  // whether there are threads, whether they begin, how many were asked for

struct Start {
    void* (*body)(void*);
    void* argument;
} starts[64];

void pause_a_while() {
    const timespec moment = {0, 1000000};
    nanosleep(&moment, nullptr);
}

void* begin_later(void* place) {
    const Start* start = static_cast<Start*>(place);
    while (!__atomic_load_n(&begin, __ATOMIC_SEQ_CST)) pause_a_while();
    return start->body(start->argument);
}

int create(pthread_t* thread, const pthread_attr_t* attributes, void* (*body)(void*), void* argument) {
    Start* start = &starts[wanted++ % 64];
    *start = {body, argument};
    return given ? pthread_create(thread, attributes, begin_later, start) : EAGAIN;
}

}  // namespace

#define pthread_create create
#define sched_getaffinity(...) (-1)  // so many cores that nobody can count them
#include "native/threads_pool.cpp"
#undef pthread_create

namespace {

constexpr int kCount = 1000;
int done[kCount], others, slow;

void body(void*, int index, SsmzooClaims* claims) {
    for (int64_t i; (i = ssmzoo_claim(claims)) >= 0;) {
        __atomic_add_fetch(&done[i], 1, __ATOMIC_RELAXED);
        if (index != 0) __atomic_add_fetch(&others, 1, __ATOMIC_RELAXED);
        if (slow) pause_a_while();
    }
}

// How many of the tasks others did; -1 where one was not done exactly once.
int run(int threads, int tasks) {
    for (int& count : done) count = 0;
    others = 0;
    ssmzoo_share(threads, tasks, body, nullptr);
    for (int i = 0; i < kCount; ++i)
        if (done[i] != (i < tasks)) return -1;
    return others;
}

}  // namespace

int main() {
    given = 0;
    for (int i = 0; i < 5; ++i) printf("no threads: %d by others\n", run(4, kCount));
    printf("asked for %d\n", wanted);
    given = 1;
    refused_until = 0;
    begin = 0;
    for (int i = 0; i < 5; ++i) printf("none begin: %d by others\n", run(4, kCount));
    printf("asked for %d more\n", wanted - 1);
    __atomic_store_n(&begin, 1, __ATOMIC_SEQ_CST);
    slow = 1;
    int helped = 0;
    for (int i = 0; i < 1000 && helped == 0; ++i) helped = run(4, 40);
    printf("they begin: %s\n", helped > 0 ? "some by others" : "none");
    slow = 0;
    ssmzoo_limit_threads(1);
    printf("one core's time: %d by others\n", run(4, kCount));
    ssmzoo_limit_threads(3);
    for (int i = 0; i < 2000; ++i)
        if (run(1 + i % 6, i % 100) < 0) printf("call %d: a task was not done exactly once\n", i);
    worth.forget();
    for (int i = 0; i < 40; ++i) {  // nobody helps: the calls after the 17th are done alone, for a while
        worth.helped(false, now());
        if (i == 15 || i == 39) printf("shared: %d\n", worth.shared(now()));
    }
    worth.forget();
    worth.waited(1000000, 900000, now());
    printf("waited for less than it worked: shared %d\n", worth.shared(now()));
    worth.waited(1000000, 1100000, now());
    printf("waited for longer: shared %d\n", worth.shared(now()));
    worth.forget();
    for (int i = 0; i < 4; ++i) worth.saved(1000000, 4, 8);  // four milliseconds
    for (int i = 0; i < 2; ++i) worth.waited(1000000, 3000000, now());
    printf("waited for longer than others saved: shared %d\n", worth.shared(now()));
    worth.forget();
    for (int i = 0; i < 100; ++i) worth.saved(1000000, 4, 8);  // of which ten count
    for (int i = 0; i < 3; ++i) worth.waited(1000000, 3000000, now());
    printf("waited for less than others saved: shared %d\n", worth.shared(now()));
    worth.waited(1000000, 3000000, now());
    printf("and for longer: shared %d\n", worth.shared(now()));
    return 0;
}
