// y = scale max(f(slope (x + bias)), least) factor + addend for each number of a few rows, as between the products of
// one token. The rows of bias and factor serve those of x in turn, over and over.
#include "exports.h"
#include "finite.h"
#include "parallel.h"
#include "tanh.h"
#include "tiles.h"

namespace ssmzoo {

struct ActivateArguments {
    const void *x, *addend;       // (rows, count), the addend or null; all rows are contiguous
    const void *bias, *factor;    // (bias_rows, count) or null; (factor_rows, count), (factor_rows, 1) or null
    void* y;                      // (rows, count), contiguous
    int64_t dtype, function, rows, count, x_row, addend_row, bias_rows, bias_row, factor_rows, factor_row;
    int64_t factor_step, threads;  // 0 where a row of the factor is one number, 1 otherwise
    double slope, least, scale;
};

struct WidenArguments {
    const void* x;  // (count), of a half-precision dtype
    void* y;        // float: (count)
    int64_t dtype, count;
};

namespace SSMZOO_ISA {
namespace {

// f by its number in FUNCTIONS of calls.py. What is no number stays so.
template <class S>
SSMZOO_INLINE typename Lanes<S>::V apply(int64_t function, typename Lanes<S>::V x) {
    using V = typename Lanes<S>::V;
    const V one = splat<S>(S(1));
    const V positive = from_bits<S>(bits_of<S>(x) & ~(x < V{})), negative = from_bits<S>(bits_of<S>(x) & (x < V{}));
    switch (function) {
        case 1: return silu<S>(x);
        case 2: return sigmoid<S>(x);
        case 3: return tanh<S>(x);
        case 4: return positive;
        case 5: return positive * positive;
        case 6: return softplus<S>(x);
        case 7: return -softplus<S>(-x);  // the logarithm of a sigmoid
        case 8: {                         // gelu by its approximation
            const V inner = x * fma(x * x, splat<S>(S(0.044715)), one) * splat<S>(S(0.7978845608028654));
            return splat<S>(S(0.5)) * x * (one + tanh<S>(inner));
        }
        case 9: return positive + one / (one - negative);  // heavy tail: 1 + x, or 1 / (1 - x) below 0
        case 10: return finite_exp<S>(x);
        default: return x;
    }
}

template <class T>
int activate(const ActivateArguments& a) {
    typedef typename Sum<T>::type S;
    using V = typename Lanes<S>::V;
    constexpr int64_t part = 1024, lanes = Lanes<S>::count;
    const int64_t parts = ceil_div(a.count, part);
    parallel_stage(a.rows * parts, a.threads, [&](int64_t i, int) {
        const int64_t row = i / parts, end = minimum(a.count, (i % parts + 1) * part);
        const T* x = at<T>(a.x, row * a.x_row);
        const T* addend = a.addend ? at<T>(a.addend, row * a.addend_row) : nullptr;
        const T* bias = a.bias ? at<T>(a.bias, row % a.bias_rows * a.bias_row) : nullptr;
        const T* factor = a.factor ? at<T>(a.factor, row % a.factor_rows * a.factor_row) : nullptr;
        const bool one_factor = factor && a.factor_step == 0;
        const V scale = splat<S>(S(a.scale)), slope = splat<S>(S(a.slope)), least = splat<S>(S(a.least));
        const V whole = one_factor ? scale * splat<S>(read_some(factor, 1)[0]) : scale;
        T* y = static_cast<T*>(a.y) + row * a.count;
        for (int64_t c = i % parts * part; c < end; c += lanes) {
            V v = read_some(x + c, end - c);
            if (bias) v = v + read_some(bias + c, end - c);
            v = apply<S>(a.function, slope * v);
            v = from_bits<S>((bits_of<S>(v) & ~(v < least)) | (bits_of<S>(least) & (v < least)));
            v = v * whole;
            if (factor && !one_factor) v = v * read_some(factor + c, end - c);
            if (addend) v = v + read_some(addend + c, end - c);
            write_some(y + c, v, end - c);
        }
    });
    return 0;
}

template <class T>
int widen_all(const WidenArguments& a) {
    constexpr int64_t lanes = Lanes<float>::count;
    float* y = static_cast<float*>(a.y);
    for (int64_t i = 0; i < a.count; i += lanes) write_some(y + i, read_some(at<T>(a.x, i), a.count - i), a.count - i);
    return 0;
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_DTYPES(activate, ActivateArguments, dtype, activate)

SSMZOO_EXPORT(widen)(const ssmzoo::WidenArguments* a) {
    using namespace ssmzoo::SSMZOO_ISA;
    return a->dtype == 2 ? widen_all<bfloat16>(*a) : widen_all<float16>(*a);
}
