// Root-mean-square normalisation, backward. With q = 1 / sqrt(mean(v^2) + eps) over a group of m channels, and e the
// gradient of v q weight:
//
//     dv = q weight e - v q^3 / m sum(weight e v)      dweight = sum_rows e v q
//
// dweight is summed over the rows of each of at most 64 fixed parts, then over the parts in their order, so that
// threads change nothing.
#include "native/exports.h"
#include "rms_norm/cpu.h"

namespace ssmzoo {

struct NormBackwardArguments {
    NormArguments forward;                  // residual is the sum that the forward pass returned; y, summed unused
    const void *dy, *dsummed;               // T: (rows d); R: (rows d) or null
    void *dx, *dweight, *dgate, *dresidual; // T: (rows d); S: (d); T, R: (rows d) or null, contiguous
    void* parts;                            // S: (64 d), zeros
    int64_t dy_row, dsummed_row;
};

namespace SSMZOO_ISA {
namespace {

constexpr int64_t kParts = 64;

template <class T, class R, class Source>
void row_backward(const NormBackwardArguments& args, int64_t row, const Source* r, typename Sum<T>::type* dweight) {
    typedef typename Sum<T>::type S;
    using V = typename Lanes<S>::V;
    constexpr int64_t lanes = Lanes<S>::count;
    const NormArguments& a = args.forward;
    const T* gate = a.gate ? at<T>(a.gate, row * a.gate_row) : nullptr;
    const T* dy = at<T>(args.dy, row * args.dy_row);
    const R* dsummed = args.dsummed ? at<R>(args.dsummed, row * args.dsummed_row) : nullptr;
    const S* weight = at<S>(a.weight, 0);
    T* dx = static_cast<T*>(args.dx) + row * a.d;
    T* dgate = gate ? static_cast<T*>(args.dgate) + row * a.d : nullptr;
    R* dresidual = args.dresidual ? static_cast<R*>(args.dresidual) + row * a.d : nullptr;
    const V one = splat(S(1));
    for (int64_t first = 0; first < a.d; first += a.group) {
        V squares = {}, products = {};
        for (int64_t c = first; c < first + a.group; c += lanes) {
            const int64_t count = first + a.group - c;
            const V v = inside<T>(r, gate, a.gate_first, c, count);
            V e = read_some(dy + c, count) * read_some(weight + c, count);
            if (gate && !a.gate_first) e = e * silu<S>(read_some(gate + c, count));
            squares = fma(v, v, squares);
            products = fma(v, e, products);
        }
        const S root = inverse_root<S>(sum_of<S>(squares), a.group, a.eps);
        const V q = splat(root), pull = splat(root * root * root * sum_of<S>(products) / S(a.group));
        for (int64_t c = first; c < first + a.group; c += lanes) {
            const int64_t count = first + a.group - c;
            const V v = inside<T>(r, gate, a.gate_first, c, count), w = read_some(weight + c, count);
            V e = read_some(dy + c, count), dv;
            if (gate) {
                const V g = read_some(gate + c, count), sigma = sigmoid<S>(g), through = g * sigma;
                const V slope = sigma * fma(g, one - sigma, one);
                if (a.gate_first) {
                    dv = fma(-v, pull, q * w * e);
                    write_some(dgate + c, dv * read_some(r + c, count) * slope, count);
                    dv = dv * through;
                } else {
                    write_some(dgate + c, e * v * q * w * slope, count);
                    e = e * through;
                    dv = fma(-v, pull, q * w * e);
                }
            } else {
                dv = fma(-v, pull, q * w * e);
            }
            write_some(dweight + c, fma(e * v, q, read_some(dweight + c, count)), count);
            if (dsummed) dv = dv + read_some(dsummed + c, count);
            write_some(dx + c, dv, count);
            if (dresidual) write_some(dresidual + c, dv, count);
        }
    }
}

template <class T, class R>
int norm_backward(const NormBackwardArguments& args) {
    typedef typename Sum<T>::type S;
    const NormArguments& a = args.forward;
    const int64_t rows = ceil_div(a.rows, kParts);
    S* parts = static_cast<S*>(args.parts);
    const int result = parallel_for(kParts, a.threads, 0, [&](int64_t i, char*) {
        for (int64_t row = i * rows; row < minimum(a.rows, (i + 1) * rows); ++row) {
            if (a.residual)
                row_backward<T, R>(args, row, at<R>(a.residual, row * a.residual_row), parts + i * a.d);
            else
                row_backward<T, R>(args, row, at<T>(a.x, row * a.x_row), parts + i * a.d);
        }
    });
    if (result) return result;
    return parallel_for(ceil_div(a.d, kTile), a.threads, 0, [&](int64_t tile, char*) {
        for (int64_t c = tile * kTile; c < minimum(a.d, (tile + 1) * kTile); c += Lanes<S>::count) {
            const int64_t count = minimum(a.d, (tile + 1) * kTile) - c;
            typename Lanes<S>::V sum = {};
            for (int64_t i = 0; i < kParts; ++i) sum = sum + read_some(parts + i * a.d + c, count);
            write_some(static_cast<S*>(args.dweight) + c, sum, count);
        }
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT(rms_norm_backward)(const ssmzoo::NormBackwardArguments* a) {
    using namespace ssmzoo::SSMZOO_ISA;
    return by_dtype(a->forward.dtype, [&](auto zero) {
        typedef decltype(zero) T;
        return a->forward.residual_wide ? norm_backward<T, typename Sum<T>::type>(*a) : norm_backward<T, T>(*a);
    });
}
