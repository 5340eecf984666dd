// Threads of our own, on which no call waits for a thread that has not begun.
//
// A thread that comes late, even while the next job is running, finds a number in the shares that is not its job's and
// touches nothing else. So the caller waits for tasks that are done, and never for threads.
//
// Workers are started when they are first wanted, as many as there are cores for. Between jobs they look for the next
// for a while, and sleep then. One job runs at a time: a caller that finds the workers taken, by another thread's call,
// does the whole of its own job alone, and so does one that has lost by sharing (worth.h).
#include <pthread.h>
#include <signal.h>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "worth.h"

namespace {

constexpr int64_t kIdle = 100000;       // nanoseconds that a worker looks for the next job before it sleeps
constexpr int64_t kEnd = 20000;         // nanoseconds that a caller looks for the end of others' tasks before it sleeps
constexpr int64_t kAgain = 1000000000;  // nanoseconds until threads are asked for again after the system gave none
constexpr int kLooks = 32;              // between two looks at the clock
constexpr size_t kStack = 1 << 21;

struct alignas(64) Worker {
    uint32_t asleep;
};

SsmzooJob job;
Worker sleepers[kMost];  // the workers, from 1 on
pthread_once_t once = PTHREAD_ONCE_INIT;
Cores cores;
Worth worth;
int taken = 0;    // held from a job's start to its end by the thread whose job it is; what follows is that thread's
int workers = 0;  // that have been started
int64_t refused_until = 0;

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb");
#endif
}

// Looks until ready() or for so many nanoseconds; whether it is.
template <class Ready>
bool look(int64_t nanoseconds, const Ready& ready) {
    for (int64_t until = 0;;) {
        for (int i = 0; i < kLooks; ++i) {
            if (ready()) return true;
            relax();
        }
        const int64_t time = now();
        if (until == 0) until = time + nanoseconds;
        if (time > until) return false;
    }
}

#if defined(__linux__)
// Sleeps as long as the word has this value; may return early.
void sleep_on(const uint32_t& word, uint32_t value) {
    syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

void wake(const uint32_t& word) { syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0); }
#else
pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
pthread_cond_t changed = PTHREAD_COND_INITIALIZER;

void sleep_on(const uint32_t& word, uint32_t value) {
    pthread_mutex_lock(&lock);
    if (get(word, __ATOMIC_SEQ_CST) == value) pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
}

void wake(const uint32_t&) {
    pthread_mutex_lock(&lock);
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}
#endif

// The next task of a share, or -1.
int64_t claim(Share& share, uint32_t number) {
    uint64_t seen = get(share.left, __ATOMIC_ACQUIRE);
    while (uint32_t(seen >> 32) == number && uint32_t(seen) != 0)
        if (__atomic_compare_exchange_n(&share.left, &seen, seen - 1, true, __ATOMIC_ACQUIRE, __ATOMIC_ACQUIRE))
            return share.end - uint32_t(seen);
    return -1;
}

// Returns the number of the next job after `last`.
uint32_t await(Worker& self, uint32_t last) {
    const auto another = [&] { return get(job.number, __ATOMIC_SEQ_CST) != last; };
    while (!look(kIdle, another)) {
        set(self.asleep, 1u, __ATOMIC_SEQ_CST);
        while (!another() && get(self.asleep, __ATOMIC_SEQ_CST)) sleep_on(self.asleep, 1);
        set(self.asleep, 0u);
    }
    return get(job.number, __ATOMIC_ACQUIRE);
}

// Waits for the tasks that others have begun; `from` is when the caller had done its own.
void await_end(int64_t begun, int64_t from) {
    uint32_t done;
    const auto ended = [&] { return (done = get(job.done, __ATOMIC_ACQUIRE)) == job.tasks; };
    if (look(kEnd, ended)) return;
    set(job.waiting, 1, __ATOMIC_SEQ_CST);
    while ((done = get(job.done, __ATOMIC_SEQ_CST)) != job.tasks) sleep_on(job.done, done);
    set(job.waiting, 0);
    const int64_t time = now();
    worth.waited(from - begun, time - from, time);
}

void* work(void* place) {
    Worker& self = *static_cast<Worker*>(place);
    const int index = static_cast<int>(&self - sleepers);
    for (uint32_t number = get(job.number) - 1;;) {
        number = await(self, number);
        if (index >= get(job.team)) continue;
        SsmzooClaims claims = {&job, number, index, -1, 0, 0, 0};
        claims.held = ssmzoo_claim(&claims);
        if (claims.held < 0) continue;
        claims.given = 0;
        job.body(job.context, index, &claims);
        const uint32_t given = static_cast<uint32_t>(claims.given), tasks = job.tasks;
        if (__atomic_add_fetch(&job.done, given, __ATOMIC_SEQ_CST) == tasks && get(job.waiting, __ATOMIC_SEQ_CST))
            wake(job.done);
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
    const bool started = pthread_create(&thread, &attributes, work, &sleepers[workers + 1]) == 0;
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_attr_destroy(&attributes);
    workers += started;
    return started;
}

// A forked process has none of its parent's workers, and may find them taken.
void begin_anew() {
#if !defined(__linux__)
    pthread_mutex_init(&lock, nullptr);
    pthread_cond_init(&changed, nullptr);
#endif
    for (Worker& worker : sleepers) worker.asleep = 0;
    workers = job.waiting = taken = 0;
    refused_until = 0;
    worth.forget();
}

void at_fork() { pthread_atfork(nullptr, nullptr, begin_anew); }

}  // namespace

// For a process that has the time of so many cores alone.
extern "C" __attribute__((visibility("default"))) void ssmzoo_limit_threads(int count) { cores.limit(count); }

int ssmzoo_useful_threads(int64_t time) { return cores.useful(time); }

int64_t ssmzoo_claim(SsmzooClaims* claims) {
    int64_t task = claims->held;
    claims->held = -1;
    if (!claims->job) return claims->next < claims->end ? claims->next++ : -1;
    const int team = get(claims->job->team);
    for (int looked = 0; task < 0 && looked < team; ++looked) {
        if (claims->share >= team) claims->share = 0;
        task = claim(claims->job->shares[claims->share], claims->number);
        if (task < 0) ++claims->share;  // its own first, then others'
    }
    claims->given += task >= 0;
    return task;
}

void ssmzoo_share(int64_t threads, int64_t tasks, SsmzooBody body, void* context) {
    if (threads > tasks) threads = tasks;
    if (threads > kMost) threads = kMost;
    if (threads <= 1 || tasks > kTasks) return alone(tasks, body, context);
    const int64_t begun = now();
    const int limit = cores.useful(begun);
    if (threads > limit) threads = limit;
    if (threads <= 1 || !worth.shared(begun) || __atomic_exchange_n(&taken, 1, __ATOMIC_ACQUIRE))
        return alone(tasks, body, context);
    pthread_once(&once, at_fork);
    while (workers < threads - 1 && begun >= refused_until)
        if (!start()) refused_until = begun + kAgain;
    const int team = static_cast<int>(threads - 1 < workers ? threads : workers + 1);
    const uint32_t number = job.number + 1;
    prepare(job, number, team, tasks, body, context);
    set(job.number, number, __ATOMIC_SEQ_CST);
    for (int k = 1; k < team; ++k)
        if (get(sleepers[k].asleep, __ATOMIC_SEQ_CST)) {
            set(sleepers[k].asleep, 0u, __ATOMIC_SEQ_CST);
            wake(sleepers[k].asleep);
        }
    SsmzooClaims claims = {&job, number, 0, -1, 0, 0, 0};
    body(context, 0, &claims);
    const int64_t worked = now();
    worth.helped(claims.given < tasks, begun);
    worth.saved(worked - begun, claims.given, tasks);
    const uint32_t done = __atomic_add_fetch(&job.done, static_cast<uint32_t>(claims.given), __ATOMIC_ACQ_REL);
    if (done != job.tasks) await_end(begun, worked);
    __atomic_store_n(&taken, 0, __ATOMIC_RELEASE);
}
