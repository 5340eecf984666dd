// The long convolution's gradients by the taps and the skip: sums over all sequences and blocks of products of the
// spectra of outputs' gradients and conjugate inputs. A gradient that a block's outputs have meets its window of
// inputs.
#include "fft_conv/cpu.h"
#include "native/exports.h"

namespace ssmzoo {

struct FftConvBackwardArguments {
    FftConvArguments forward;            // u; gate; y is unused
    const void* g;                       // T: the gradients of y, as `sequences` has y
    void *dkernel, *dreverse, *dskip;    // S: contiguous (d taps), (d ahead), (d); null where nobody wants them
};

namespace SSMZOO_ISA {
namespace {

constexpr int64_t kChunk = 64;  // products that are added up by themselves: rounding grows with the longest sum

template <class T>
void correlate_vector(const FftConvBackwardArguments& args, int64_t c, int64_t count,
                      Complex<typename Sum<T>::type>* total) {
    typedef typename Sum<T>::type S;
    using V = typename Lanes<S>::V;
    constexpr int64_t lanes = Lanes<S>::count;
    const FftConvArguments& a = args.forward;
    const Roots<S> roots = roots_of<S>(a);
    Complex<S>*x = total + a.points, *g = x + a.points;
    memset(static_cast<void*>(total), 0, static_cast<size_t>(a.points) * sizeof(Complex<S>));
    V at_zero = {};
    for (int64_t i = 0; i < a.count * a.blocks; ++i) {
        const Block b = block_of(a, i);
        if (b.start >= b.length) continue;
        const T* gate = a.gate ? at<T>(a.gate, b.gate + c) : nullptr;
        const int64_t time = b.start - a.lead;
        const Reader<T> inputs =
            reader<T>(at<T>(a.u, b.u + c), a.u_time, nullptr, 0, 0, 2 * a.points, time, b.length, count);
        const Reader<T> gradients = reader(at<T>(args.g, b.y + c), a.y_time, gate, a.gate_time, a.lead,
                                           a.lead + a.block, time, b.length, count);
        for (int64_t first = gradients.first; args.dskip && first < gradients.last; first += kChunk) {
            V sum = {};
            for (int64_t place = first; place < minimum(first + kChunk, gradients.last); ++place)
                sum = fma(gradients(place), inputs(place), sum);
            at_zero = at_zero + sum;
        }
        if (!args.dkernel && !args.dreverse) continue;
        from_outside(x, a.points, roots, [&](int64_t j) { return inputs.point(j, a.points); });
        quarters<true, false>(x, a.points, roots, [](Complex<S>*, int64_t) {});
        from_outside(g, a.points, roots, [&](int64_t j) { return gradients.point(j, a.points); });
        quarters<true, false>(g, a.points, roots, [&](Complex<S>* near, int64_t m) {
            const int64_t first = near - g;
            for (int64_t j = 0; j < m; ++j)
                total[first + j] = total[first + j] + times_conjugate(near[j], x[first + j]);
        });
    }
    if (args.dskip) write_some(static_cast<S*>(args.dskip) + c, at_zero, count);
    if (!args.dkernel && !args.dreverse) return;
    quarters<false, true>(total, a.points, roots, [](Complex<S>*, int64_t) {});
    const S scale = S(1) / static_cast<S>(a.points);
    to_outside(total, a.points, roots, [&](int64_t j, Complex<S> point) {
        S re[lanes], im[lanes];
        store(re, point.re);
        store(im, point.im);
        const int64_t back = a.points - 1 - j;
        if (args.dkernel && j < a.taps)
            for (int64_t k = 0; k < count; ++k) static_cast<S*>(args.dkernel)[(c + k) * a.taps + j] = re[k] * scale;
        if (args.dreverse && back < a.ahead)
            for (int64_t k = 0; k < count; ++k) static_cast<S*>(args.dreverse)[(c + k) * a.ahead + back] = -im[k] * scale;
    });
}

template <class T>
int correlate(const FftConvBackwardArguments& args) {
    typedef typename Sum<T>::type S;
    constexpr int64_t lanes = Lanes<S>::count;
    const FftConvArguments& a = args.forward;
    const size_t bytes = 3 * static_cast<size_t>(a.points) * sizeof(Complex<S>);
    return parallel_for(ceil_div(a.d, lanes), a.threads, bytes, [&](int64_t task, char* scratch) {
        const int64_t c = task * lanes;
        correlate_vector<T>(args, c, minimum(lanes, a.d - c), reinterpret_cast<Complex<S>*>(scratch));
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_DTYPES(fft_conv_correlate, FftConvBackwardArguments, forward.dtype, correlate)
