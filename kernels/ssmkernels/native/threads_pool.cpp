// Threads of our own, for where OpenMP is missing, or would be another than PyTorch's: two of its runtimes in a process
// abort on macOS, and elsewhere their idle threads take the cores from each other.
//
// Workers are started when they are first wanted, and sleep in between. One job runs at a time: who finds the workers
// taken, by another thread's call, does the whole of its own job alone.
#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include "threads.h"

// No OpenMP.
extern "C" __attribute__((visibility("default"))) int ssmzoo_openmp() { return 0; }

namespace {

constexpr int kMost = 256;   // workers
constexpr int kSpins = 500;  // looks at a flag, ten or twenty microseconds, before a thread goes to sleep
constexpr size_t kStack = 1 << 21;

struct Job {
    SsmzooBody body;
    void* context;
    int count;
};

pthread_once_t once = PTHREAD_ONCE_INIT;
pthread_mutex_t taken = PTHREAD_MUTEX_INITIALIZER;  // held from a job's start to its end, by the one whose job it is
pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;   // of all that follows
pthread_cond_t begun = PTHREAD_COND_INITIALIZER;
pthread_cond_t ended = PTHREAD_COND_INITIALIZER;
Job job;
int workers = 0, running = 0;
unsigned long long number = 0;       // of the job
unsigned long long seen[kMost + 1];  // the latest job that each worker, from 1 on, knows of
int arrived = 0;                     // of the threads that meet
unsigned phase = 0;                  // how often they have met; it may wrap around

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb");
#endif
}

void* work(void* place) {
    unsigned long long* const last = static_cast<unsigned long long*>(place);
    const int index = static_cast<int>(last - seen);
    for (;;) {
        for (int i = 0; i < kSpins && __atomic_load_n(&number, __ATOMIC_RELAXED) == *last; ++i) relax();
        pthread_mutex_lock(&lock);
        while (number == *last) pthread_cond_wait(&begun, &lock);
        *last = number;
        const Job mine = job;
        pthread_mutex_unlock(&lock);
        if (index >= mine.count) continue;
        mine.body(mine.context, index, mine.count);
        pthread_mutex_lock(&lock);
        if (__atomic_sub_fetch(&running, 1, __ATOMIC_RELAXED) == 0) pthread_cond_signal(&ended);
        pthread_mutex_unlock(&lock);
    }
    return nullptr;
}

// One more worker; false where the system gives none. Signals are for the threads that the program started.
bool start() {
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes)) return false;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, kStack);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t thread;
    seen[workers + 1] = number;
    const bool started = pthread_create(&thread, &attributes, work, &seen[workers + 1]) == 0;
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_attr_destroy(&attributes);
    workers += started;
    return started;
}

// A forked process has none of its parent's workers, and may find any lock closed.
void begin_anew() {
    pthread_mutex_init(&taken, nullptr);
    pthread_mutex_init(&lock, nullptr);
    pthread_cond_init(&begun, nullptr);
    pthread_cond_init(&ended, nullptr);
    workers = running = arrived = 0;
}

void at_fork() { pthread_atfork(nullptr, nullptr, begin_anew); }

}  // namespace

void ssmzoo_on_threads(int wanted, SsmzooBody body, void* context) {
    if (wanted <= 1 || pthread_mutex_trylock(&taken)) return body(context, 0, 1);
    pthread_once(&once, at_fork);
    pthread_mutex_lock(&lock);
    while (workers < wanted - 1 && workers < kMost && start()) {
    }
    const int count = wanted - 1 < workers ? wanted : workers + 1;
    job = {body, context, count};
    __atomic_store_n(&running, count - 1, __ATOMIC_RELAXED);
    __atomic_store_n(&number, number + 1, __ATOMIC_RELAXED);
    pthread_cond_broadcast(&begun);
    pthread_mutex_unlock(&lock);
    body(context, 0, count);
    for (int i = 0; i < kSpins && __atomic_load_n(&running, __ATOMIC_RELAXED); ++i) relax();
    pthread_mutex_lock(&lock);
    while (running) pthread_cond_wait(&ended, &lock);
    pthread_mutex_unlock(&lock);
    pthread_mutex_unlock(&taken);
}

void ssmzoo_meet(int count) {
    if (count == 1) return;
    const unsigned now = __atomic_load_n(&phase, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == count) {
        __atomic_store_n(&arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&phase, now + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int i = 0; __atomic_load_n(&phase, __ATOMIC_ACQUIRE) == now; ++i) {
        if (i < kSpins)
            relax();
        else
            sched_yield();
    }
}
