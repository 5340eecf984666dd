// y = scale max(f(x + bias), least) factor for each number of a few rows, as between the products of one token.
#include "exports.h"
#include "parallel.h"
#include "tanh.h"
#include "tiles.h"

namespace ssmzoo {

struct ActivateArguments {
    const void *x, *bias, *factor;  // (rows, count), (count) or null, (rows, count) or null; rows are contiguous
    void* y;                        // (rows, count), contiguous
    int64_t dtype, function, rows, count, x_row, factor_row, threads;
    double least, scale;
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
        case 10: return exp<S>(x);
        default: return x;
    }
}

template <class S>
int activate(const ActivateArguments& a) {
    using V = typename Lanes<S>::V;
    constexpr int64_t part = 1024, lanes = Lanes<S>::count;
    const int64_t parts = ceil_div(a.count, part);
    parallel_stage(a.rows * parts, a.threads, [&](int64_t i, int) {
        const int64_t row = i / parts, end = minimum(a.count, (i % parts + 1) * part);
        const S *x = at<S>(a.x, row * a.x_row), *factor = a.factor ? at<S>(a.factor, row * a.factor_row) : nullptr;
        S* y = static_cast<S*>(a.y) + row * a.count;
        for (int64_t c = i % parts * part; c < end; c += lanes) {
            V v = read_some(x + c, end - c);
            if (a.bias) v = v + read_some(at<S>(a.bias, c), end - c);
            v = apply<S>(a.function, v);
            const V least = splat<S>(S(a.least));
            v = from_bits<S>((bits_of<S>(v) & ~(v < least)) | (bits_of<S>(least) & (v < least)));
            v = v * splat<S>(S(a.scale));
            if (factor) v = v * read_some(factor + c, end - c);
            write_some(y + c, v, end - c);
        }
    });
    return 0;
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_SUMS(activate, ActivateArguments, dtype, activate)
