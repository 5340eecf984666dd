// One step of Mamba-3's recurrence. Bound by memory: the state (p n) is read and written once, lanes over n.
#include "mamba3_scan/cpu_rotate.h"
#include "native/exports.h"

namespace ssmzoo {

// The last axis of x, z, B and C is contiguous, in x and z the last two; all else is contiguous.
struct Mamba3StepArguments {
    void *state, *angle, *key, *value;                        // S: (b h p n), (b h a), (b r h n), (b r h p)
    const void *x, *z, *B, *C;                                // (b r h p), any floating dtype, z may be null; (b r g n)
    const void *dt, *A, *trap, *angles, *B_bias, *C_bias, *D;  // S: (b h) each, (b a), (h r n) or null, (h) or null
    void* y;                                                  // (b r h p)
    int64_t dtype, batch, heads, rank, p, n, groups, angle_count, interleaved, threads;
    int64_t x_batch, x_rank, z_batch, z_rank, B_batch, B_rank, B_group, C_batch, C_rank, C_group;
};

namespace SSMZOO_ISA {
namespace {

// A task's memory. `maps` are the last keys and the new ones, (2 r width); q (r width); factors are what each of the
// maps adds to the rows of the state, (2 r lanes).
template <class S>
struct Step {
    S *turns, *sine, *cosine, *maps, *q, *factors, *row;
    int64_t width;

    int64_t take(S* p, const Mamba3StepArguments& a) {
        Memory<S> memory = {p, 0};
        const int64_t room = round_up(a.angle_count, Lanes<S>::count);
        width = round_up(a.n, Lanes<S>::count);
        turns = memory.take(room);
        sine = memory.take(room);
        cosine = memory.take(room);
        maps = memory.take(2 * a.rank * width);
        q = memory.take(a.rank * width);
        factors = memory.take(2 * a.rank * Lanes<S>::count);
        row = memory.take(a.rank * Lanes<S>::count);
        return memory.used;
    }
};

// `count` rows of the state: h = alpha h + Σ factors maps. Leaves Σ_n h q of each in `sums`, one a vector, for one
// query.
template <class S, int count>
SSMZOO_INLINE void advance(S* h, int64_t n, S alpha, const Step<S>& w, int64_t maps, int64_t first,
                           typename Lanes<S>::V* sums) {
    using V = typename Lanes<S>::V;
    constexpr int64_t lanes = Lanes<S>::count;
    V total[count] = {};
    const V decay = splat(alpha);
    const auto part = [&](int64_t j, const auto& read, const auto& write) __attribute__((always_inline)) {
        V now[count];
        for (int r = 0; r < count; ++r) now[r] = decay * read(h + r * n + j);
        for (int64_t i = 0; i < maps; ++i) {
            const V map = load(w.maps + i * w.width + j);
            for (int r = 0; r < count; ++r) now[r] = fma(splat(w.factors[i * lanes + first + r]), map, now[r]);
        }
        const V q = load(w.q + j);
        for (int r = 0; r < count; ++r) {
            write(h + r * n + j, now[r]);
            total[r] = fma(now[r], q, total[r]);
        }
    };
    int64_t j = 0;
    for (; j + lanes <= n; j += lanes)
        part(j, [](const S* p) { return load(p); }, [](S* p, V v) { store(p, v); });
    if (j < n)
        part(j, [&](const S* p) { return load_some(p, n - j); }, [&](S* p, V v) { store_some(p, v, n - j); });
    for (int r = 0; r < count; ++r) sums[r] = total[r];
}

// Σ_n h q of one row.
template <class S>
typename Lanes<S>::V dot_row(const S* h, const S* q, int64_t n) {
    constexpr int64_t lanes = Lanes<S>::count;
    typename Lanes<S>::V total = {};
    int64_t j = 0;
    for (; j + lanes <= n; j += lanes) total = fma(load(h + j), load(q + j), total);
    if (j < n) total = fma(load_some(h + j, n - j), load(q + j), total);
    return total;
}

template <class S, class T>
void make_map(const Mamba3StepArguments& a, const Step<S>& w, const void* from, int64_t offset, const void* bias,
              int64_t head, int64_t r, S* to) {
    constexpr int64_t lanes = Lanes<S>::count;
    for (int64_t j = 0; j < w.width; j += lanes) {
        const int64_t count = a.n - j;
        auto map = read_some(at<T>(from, offset + j), count);
        if (bias) map = map + read_some(at<S>(bias, (head * a.rank + r) * a.n + j), count);
        store(to + j, map);
    }
    const int64_t step = a.interleaved ? 2 : 1, second = a.interleaved ? 1 : a.n / 2;
    for (int64_t i = 0; i < a.angle_count; ++i) {
        const S one = to[i * step], other = to[i * step + second];
        to[i * step] = one * w.cosine[i] - other * w.sine[i];
        to[i * step + second] = one * w.sine[i] + other * w.cosine[i];
    }
}

template <class S>
void turn(const Mamba3StepArguments& a, const Step<S>& w, int64_t task, int64_t batch, S delta) {
    const S whole = S(6.283185307179586);
    S* angle = static_cast<S*>(a.angle) + task * a.angle_count;
    const S* rates = at<S>(a.angles, batch * a.angle_count);
    for (int64_t i = 0; i < round_up(a.angle_count, Lanes<S>::count); ++i)
        w.turns[i] = i < a.angle_count ? (angle[i] + delta * rates[i]) / whole : S(0);
    vectors<S>(a.angle_count, [&](int64_t i) {
        store(w.turns + i, within_a_turn<S>(load(w.turns + i)));
        sine_cosine<S>(load(w.turns + i), w.sine + i, w.cosine + i);
    });
    for (int64_t i = 0; i < a.angle_count; ++i) angle[i] = w.turns[i] * whole;
}

template <class S, class T>
void step_head(const Mamba3StepArguments& a, int64_t task, char* scratch) {
    using V = typename Lanes<S>::V;
    constexpr int64_t lanes = Lanes<S>::count, together = lanes < 4 ? lanes : 4;
    Step<S> w;
    w.take(reinterpret_cast<S*>(scratch), a);
    const int64_t batch = task / a.heads, head = task % a.heads, group = head / (a.heads / a.groups), rank = a.rank;
    const S delta = *at<S>(a.dt, task), trap = *at<S>(a.trap, task);
    const S alpha = exp<S>(splat(delta * *at<S>(a.A, task)))[0], gamma = trap * delta, beta = (delta - gamma) * alpha;
    turn(a, w, task, batch, delta);
    for (int64_t r = 0; r < rank; ++r) {
        S* key = static_cast<S*>(a.key) + ((batch * rank + r) * a.heads + head) * a.n;
        S *last = w.maps + r * w.width, *now = w.maps + (rank + r) * w.width;
        for (int64_t j = 0; j < w.width; j += lanes) store(last + j, read_some(key + j, a.n - j));
        make_map<S, T>(a, w, a.B, batch * a.B_batch + r * a.B_rank + group * a.B_group, a.B_bias, head, r, now);
        make_map<S, T>(a, w, a.C, batch * a.C_batch + r * a.C_rank + group * a.C_group, a.C_bias, head, r,
                       w.q + r * w.width);
        memcpy(key, now, sizeof(S) * static_cast<size_t>(a.n));
    }
    S* state = static_cast<S*>(a.state) + task * a.p * a.n;
    for (int64_t first = 0; first < a.p; first += lanes) {
        const int64_t count = a.p - first, rows = minimum(count, lanes);
        S* h = state + first * a.n;
        for (int64_t r = 0; r < rank; ++r) {
            S* value = static_cast<S*>(a.value) + ((batch * rank + r) * a.heads + head) * a.p + first;
            const V x = read_some(at<T>(a.x, batch * a.x_batch + r * a.x_rank + head * a.p + first), count);
            store(w.factors + r * lanes, splat(beta) * read_some(value, count));
            store(w.factors + (rank + r) * lanes, splat(gamma) * x);
            write_some(value, x, count);
            store(w.row + r * lanes, x);
        }
        V sums[lanes] = {};
        int64_t row = 0;
        for (; row + together <= rows; row += together)
            advance<S, together>(h + row * a.n, a.n, alpha, w, 2 * rank, row, sums + row);
        for (; row < rows; ++row) advance<S, 1>(h + row * a.n, a.n, alpha, w, 2 * rank, row, sums + row);
        for (int64_t r = 0; r < rank; ++r) {
            if (r)
                for (int64_t i = 0; i < rows; ++i) sums[i] = dot_row(h + i * a.n, w.q + r * w.width, a.n);
            V y = sum_lanes<S, lanes>(sums);
            if (a.D) y = fma(splat(*at<S>(a.D, head)), load(w.row + r * lanes), y);
            if (a.z)
                y = y * silu<S>(read_some(at<T>(a.z, batch * a.z_batch + r * a.z_rank + head * a.p + first), count));
            write_some(static_cast<T*>(a.y) + ((batch * rank + r) * a.heads + head) * a.p + first, y, count);
        }
    }
}

template <class T>
int step_as(const Mamba3StepArguments& a) {
    typedef typename Sum<T>::type S;
    Step<S> w;
    const size_t bytes = sizeof(S) * static_cast<size_t>(w.take(nullptr, a));
    return parallel_step(a.batch * a.heads, a.threads, bytes,
                         [&](int64_t task, char* scratch) { step_head<S, T>(a, task, scratch); });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_DTYPES(mamba3_scan_step, Mamba3StepArguments, dtype, step_as)
