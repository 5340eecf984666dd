// One token of the matrix memory, bound by memory: the state (k v) is read and written once, lanes over v.
#include "mlstm/cpu.h"
#include "native/exports.h"

namespace ssmzoo {

struct MlstmStepArguments {
    void *C, *n, *m;           // S: (b h k v), (b h k), (b h), contiguous
    const void *q, *k, *v;     // (b h k), likewise, (b h v), any floating dtype, contiguous
    const void *i, *f;         // S: (b h), contiguous
    void* y;                   // (b h v), contiguous
    int64_t dtype, heads, keys, values, threads;  // heads of all sequences; sizes of k and v
    double scale;
};

namespace SSMZOO_ISA {
namespace {

constexpr int kAtOnce = 4;  // rows of the state, which share each read of v and y

template <class S, int rows>
SSMZOO_INLINE void advance(S* C, int64_t values, S decay, const S* k, const S* q, const S* v, S* y) {
    constexpr int64_t lanes = Lanes<S>::count;
    for (int64_t j = 0; j < values; j += lanes) {
        const auto value = load(v + j);
        auto sum = load(y + j);
        for (int r = 0; r < rows; ++r) {
            S* p = C + r * values + j;
            const auto now = fma(splat(decay), read_some(p, values - j), splat(k[r]) * value);
            write_some(p, now, values - j);
            sum = fma(splat(q[r]), now, sum);
        }
        store(y + j, sum);
    }
}

template <class S, class T>
void step_head(const MlstmStepArguments& a, int64_t head, S* scratch) {
    using V = typename Lanes<S>::V;
    constexpr int64_t lanes = Lanes<S>::count;
    const int64_t keys = a.keys, values = a.values;
    S *k = scratch, *q = k + ceil_div(keys, lanes) * lanes, *v = q + ceil_div(keys, lanes) * lanes;
    S* y = v + ceil_div(values, lanes) * lanes;
    S *C = static_cast<S*>(a.C) + head * keys * values, *n = static_cast<S*>(a.n) + head * keys;
    S* state_m = static_cast<S*>(a.m) + head;
    const V i = splat(*at<S>(a.i, head)), kept = log_sigmoid<S>(splat(*at<S>(a.f, head))) + splat(*state_m);
    const V m = larger<S>(kept, i), decay = exp<S>(kept - m), weight = exp<S>(i - m);
    V sum = V{};
    for (int64_t j = 0; j < keys; j += lanes) {
        const V key = weight * read_some(at<T>(a.k, head * keys) + j, keys - j);
        const V query = splat(S(a.scale)) * read_some(at<T>(a.q, head * keys) + j, keys - j);
        const V now = fma(decay, read_some(n + j, keys - j), key);
        write_some(n + j, now, keys - j);
        sum = fma(now, query, sum);
        store(k + j, key);
        store(q + j, query);
    }
    for (int64_t j = 0; j < values; j += lanes) {
        store(v + j, read_some(at<T>(a.v, head * values) + j, values - j));
        store(y + j, V{});
    }
    int64_t row = 0;
    for (; row + kAtOnce <= keys; row += kAtOnce)
        advance<S, kAtOnce>(C + row * values, values, decay[0], k + row, q + row, v, y);
    for (; row < keys; ++row) advance<S, 1>(C + row * values, values, decay[0], k + row, q + row, v, y);
    *state_m = m[0];
    const V below = denominator<S>(splat(sum_lanes<S, 1>(&sum)[0]), m);
    for (int64_t j = 0; j < values; j += lanes)
        write_some(static_cast<T*>(a.y) + head * values + j, load(y + j) / below, values - j);
}

template <class T>
int step_as(const MlstmStepArguments& a) {
    typedef typename Sum<T>::type S;
    constexpr int64_t lanes = Lanes<S>::count;
    const int64_t numbers = 2 * (ceil_div(a.keys, lanes) + ceil_div(a.values, lanes)) * lanes;
    return parallel_step(a.heads, a.threads, sizeof(S) * static_cast<size_t>(numbers), [&](int64_t head, char* scratch) {
        step_head<S, T>(a, head, reinterpret_cast<S*>(scratch));
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_DTYPES(mlstm_step, MlstmStepArguments, dtype, step_as)
