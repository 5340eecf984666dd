// The long convolution, and its adjoint by the input: on each circle the transform, the product with the taps' spectrum
// (conjugate for the adjoint), and back.
#include "fft_conv/cpu.h"
#include "native/exports.h"

namespace ssmzoo {
namespace SSMZOO_ISA {
namespace {

template <class T>
void convolve_block(const FftConvArguments& a, const Block& b, int64_t c, int64_t count,
                    const Complex<typename Sum<T>::type>* taps, Complex<typename Sum<T>::type>* x) {
    typedef typename Sum<T>::type S;
    const Roots<S> roots = roots_of<S>(a);
    const T* gate = a.gate ? at<T>(a.gate, b.gate + c) : nullptr;
    const int64_t time = b.start - a.lead;
    const Reader<T> inputs = reader(at<T>(a.u, b.u + c), a.u_time, a.adjoint ? gate : nullptr, a.gate_time, 0,
                                    2 * a.points, time, b.length, count);
    from_outside(x, a.points, roots, [&](int64_t j) { return inputs.point(j, a.points); });
    quarters<true, true>(x, a.points, roots, [&](Complex<S>* near, int64_t m) {
        const Complex<S>* spectrum = taps + (near - x);
        if (a.adjoint)
            for (int64_t j = 0; j < m; ++j) near[j] = times_conjugate(near[j], spectrum[j]);
        else
            for (int64_t j = 0; j < m; ++j) near[j] = near[j] * spectrum[j];
    });
    const int64_t first = a.lead, last = minimum(a.lead + a.block, b.length - time);
    const auto skip = a.skip ? read_some(at<S>(a.skip, c), count) : typename Lanes<S>::V{};
    T* y = static_cast<T*>(a.y) + b.y + c;
    const auto put = [&](int64_t place, typename Lanes<S>::V value) {
        if (place < first || place >= last) return;
        if (a.skip) value = fma(skip, inputs(place), value);
        if (gate && !a.adjoint) value = value * read_some(gate + (time + place) * a.gate_time, count);
        write_some(y + (time + place) * a.y_time, value, count);
    };
    to_outside(x, a.points, roots, [&](int64_t j, Complex<S> point) {
        put(j, point.re);
        put(j + a.points, point.im);
    });
}

template <class T>
int convolve(const FftConvArguments& a) {
    typedef typename Sum<T>::type S;
    constexpr int64_t lanes = Lanes<S>::count;
    const int64_t vectors = ceil_div(a.d, lanes), units = a.count * a.blocks;
    const size_t bytes = 2 * static_cast<size_t>(a.points) * sizeof(Complex<S>);
    return parallel_for(vectors * a.parts, a.threads, bytes, [&](int64_t task, char* scratch) {
        const int64_t c = task / a.parts * lanes, part = task % a.parts, count = minimum(lanes, a.d - c);
        Complex<S>* taps = reinterpret_cast<Complex<S>*>(scratch);
        spectrum(a, c, count, taps);
        for (int64_t i = units * part / a.parts; i < units * (part + 1) / a.parts; ++i) {
            const Block b = block_of(a, i);
            if (b.start < b.length) convolve_block<T>(a, b, c, count, taps, taps + a.points);
        }
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_DTYPES(fft_conv, FftConvArguments, dtype, convolve)
