// What one token does within each of its heads: a layer norm, and a weighted sum of channels.
#include "exports.h"
#include "parallel.h"
#include "roots.h"
#include "tiles.h"

namespace ssmzoo {

struct HeadNormArguments {
    const void *x, *weight, *bias;  // (rows, heads, p); (heads, p) or null, twice; all contiguous
    void* y;                        // (rows, heads, p), contiguous
    int64_t dtype, rows, heads, p, centred, threads;  // centred: the factor is 1 + weight
    double eps;
};

struct HeadSumArguments {
    const void *x, *weight;  // (rows, heads, p), (heads, p), contiguous
    void* y;                 // (rows, heads), contiguous
    int64_t dtype, rows, heads, p;
};

namespace SSMZOO_ISA {
namespace {

// The sum of f(c, left) over a head's vectors of channels, `left` of which remain at c; beyond them f gives 0.
template <class S, class F>
SSMZOO_INLINE S sum_channels(int64_t p, const F& f) {
    typename Lanes<S>::V sum = {};
    for (int64_t c = 0; c < p; c += Lanes<S>::count) sum = sum + f(c, p - c);
    return sum_lanes<S, 1>(&sum)[0];
}

// 1 for the first `left` lanes, 0 beyond.
template <class S>
SSMZOO_INLINE typename Lanes<S>::V counted(int64_t left) {
    typename Lanes<S>::V one = {};
    for (int64_t i = 0; i < static_cast<int64_t>(Lanes<S>::count); ++i) one[i] = i < left ? S(1) : S(0);
    return one;
}

// y = (x - mean) / sqrt(variance + eps) weight + bias within each head.
template <class T>
int norm(const HeadNormArguments& a) {
    typedef typename Sum<T>::type S;
    using V = typename Lanes<S>::V;
    constexpr int64_t lanes = Lanes<S>::count;
    parallel_stage(a.rows * a.heads, a.threads, [&](int64_t i, int) {
        const int64_t head = i % a.heads * a.p;
        const T* x = at<T>(a.x, i * a.p);
        const T *weight = a.weight ? at<T>(a.weight, head) : nullptr, *bias = a.bias ? at<T>(a.bias, head) : nullptr;
        T* y = static_cast<T*>(a.y) + i * a.p;
        const V mean = splat<S>(sum_channels<S>(a.p, [&](int64_t c, int64_t left) { return read_some(x + c, left); }) /
                                S(a.p));
        const S squares = sum_channels<S>(a.p, [&](int64_t c, int64_t left) {
            const V off = (read_some(x + c, left) - mean) * counted<S>(left);
            return off * off;
        });
        const V inverse = splat<S>(S(1)) / square_root(splat<S>(squares / S(a.p) + S(a.eps)));
        for (int64_t c = 0; c < a.p; c += lanes) {
            V v = (read_some(x + c, a.p - c) - mean) * inverse;
            if (weight) {
                const V w = read_some(weight + c, a.p - c);
                v = v * (a.centred ? splat<S>(S(1)) + w : w);
            }
            if (bias) v = v + read_some(bias + c, a.p - c);
            write_some(y + c, v, a.p - c);
        }
    });
    return 0;
}

// y = sum of x weight over a head's channels.
template <class T>
int sum(const HeadSumArguments& a) {
    typedef typename Sum<T>::type S;
    for (int64_t i = 0; i < a.rows * a.heads; ++i) {
        const T *x = at<T>(a.x, i * a.p), *weight = at<T>(a.weight, i % a.heads * a.p);
        const S total = sum_channels<S>(
            a.p, [&](int64_t c, int64_t left) { return read_some(x + c, left) * read_some(weight + c, left); });
        write_some(static_cast<T*>(a.y) + i, splat<S>(total), 1);
    }
    return 0;
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_DTYPES(head_norm, HeadNormArguments, dtype, norm)
SSMZOO_EXPORT_DTYPES(head_sum, HeadSumArguments, dtype, sum)
