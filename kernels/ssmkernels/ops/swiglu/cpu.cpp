// y = silu(scale gate) up for each number of a few rows, and its gradients: with u = scale gate and s = sigmoid(u),
//
//     dup = dy u s          dgate = dy up scale s (1 + u (1 - s))
#include "native/exports.h"
#include "native/math.h"
#include "native/parallel.h"
#include "native/tiles.h"

namespace ssmzoo {

// Strides count elements; channels are contiguous. T is the dtype.
struct SwigluArguments {
    const void *gate, *up;  // T: (rows d)
    void* y;                // T: (rows d), contiguous
    int64_t dtype, rows, d, gate_row, up_row, threads;
    double scale;
};

struct SwigluBackwardArguments {
    SwigluArguments forward;  // y unused
    const void* dy;           // T: (rows d)
    void *dgate, *dup;        // T: (rows d), contiguous
    int64_t dy_row;
};

namespace SSMZOO_ISA {
namespace {

constexpr int64_t kPart = 4096;  // a task's numbers, about

// f(row, c, left) for every vector of every row, `left` of whose channels remain.
template <class S, class F>
int for_vectors(const SwigluArguments& a, const F& f) {
    constexpr int64_t lanes = Lanes<S>::count;
    const int64_t each = a.d < kPart ? kPart / (a.d > 0 ? a.d : 1) : 1;
    return parallel_for(ceil_div(a.rows, each), a.threads, 0, [&](int64_t i, char*) {
        for (int64_t row = i * each; row < minimum(a.rows, (i + 1) * each); ++row) {
            int64_t c = 0;
            for (; c + lanes <= a.d; c += lanes) f(row, c, lanes);
            if (c < a.d) f(row, c, a.d - c);
        }
    });
}

template <class T>
int forward(const SwigluArguments& a) {
    typedef typename Sum<T>::type S;
    const auto scale = splat<S>(S(a.scale));
    return for_vectors<S>(a, [&](int64_t row, int64_t c, int64_t left) __attribute__((always_inline)) {
        const auto u = scale * read_some(at<T>(a.gate, row * a.gate_row + c), left);
        const auto up = read_some(at<T>(a.up, row * a.up_row + c), left);
        write_some(static_cast<T*>(a.y) + row * a.d + c, silu<S>(u) * up, left);
    });
}

template <class T>
int backward(const SwigluBackwardArguments& args) {
    typedef typename Sum<T>::type S;
    const SwigluArguments& a = args.forward;
    const auto scale = splat<S>(S(a.scale)), one = splat<S>(S(1));
    return for_vectors<S>(a, [&](int64_t row, int64_t c, int64_t left) __attribute__((always_inline)) {
        const auto u = scale * read_some(at<T>(a.gate, row * a.gate_row + c), left);
        const auto up = read_some(at<T>(a.up, row * a.up_row + c), left);
        const auto dy = read_some(at<T>(args.dy, row * args.dy_row + c), left);
        const auto s = sigmoid<S>(u);
        write_some(static_cast<T*>(args.dup) + row * a.d + c, dy * (u * s), left);
        const auto slope = s * fma(u, one - s, one);
        write_some(static_cast<T*>(args.dgate) + row * a.d + c, dy * up * (scale * slope), left);
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_DTYPES(swiglu, SwigluArguments, dtype, forward)
SSMZOO_EXPORT_DTYPES(swiglu_backward, SwigluBackwardArguments, forward.dtype, backward)
