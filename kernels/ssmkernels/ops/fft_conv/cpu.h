// What the long convolution's passes share: arguments, and sequences read onto circles.
//
// A sequence lies on circles (cpu_transform.h) of 2 M points, in blocks: each circle takes a window of the sequence, in
// which a block of outputs begins at the place ``lead``, and those alone are right on it.
#pragma once

#include "fft_conv/cpu_transform.h"

namespace ssmzoo {

// Strides count elements; channels are contiguous. T is u's dtype, S its precision.
struct FftConvArguments {
    const void *u, *gate;              // T: what is convolved, and what it or the result is multiplied by, or null
    const void *kernel, *reverse;      // S: (d taps) and (d ahead), rows apart as below
    const void* skip;                  // S: (d) or null
    const void* sequences;             // int64: offsets in u, gate and y, and the length, of each
    const void *quarters, *thirds;     // S: roots, by node
    void* y;                           // T
    int64_t dtype, count, blocks, parts, d, points, block, lead, taps, ahead, first_leaf, adjoint, threads;
    int64_t u_time, gate_time, y_time, kernel_row, reverse_row;
};

namespace SSMZOO_ISA {

// A block of a sequence, for the channels of one vector.
struct Block {
    int64_t u, gate, y;            // offsets of the sequence
    int64_t start, length;         // the first output's time, the sequence's length
};

inline Block block_of(const FftConvArguments& a, int64_t i) {
    const int64_t* sequence = static_cast<const int64_t*>(a.sequences) + i / a.blocks * 4;
    return {sequence[0], sequence[1], sequence[2], i % a.blocks * a.block, sequence[3]};
}

// Places [first, last) of a circle, whose place 0 is at time ``time``, as vectors of ``count`` channels; 0 outside.
template <class T>
struct Reader {
    typedef typename Sum<T>::type S;
    const T *x, *gate;
    int64_t step, gate_step, first, last, time, count;

    SSMZOO_INLINE typename Lanes<S>::V operator()(int64_t place) const {
        if (place < first || place >= last) return typename Lanes<S>::V{};
        const auto value = read_some(x + (time + place) * step, count);
        return gate ? value * read_some(gate + (time + place) * gate_step, count) : value;
    }

    SSMZOO_INLINE Complex<S> point(int64_t j, int64_t points) const { return {(*this)(j), (*this)(j + points)}; }
};

// The window [first, last) of places, cut off at the sequence's ends.
template <class T>
Reader<T> reader(const T* x, int64_t step, const T* gate, int64_t gate_step, int64_t first, int64_t last, int64_t time,
                 int64_t length, int64_t count) {
    return {x, gate, step, gate_step, first + time < 0 ? -time : first, minimum(last, length - time), time, count};
}

template <class S>
Roots<S> roots_of(const FftConvArguments& a) {
    return {at<S>(a.quarters, 0), at<S>(a.thirds, 0), a.first_leaf};
}

// The spectrum of the taps of the channels from c on, divided by M: lag j at the place j, lag -1 at the last with its
// sign turned. No tap lies M or more away.
template <class S>
void spectrum(const FftConvArguments& a, int64_t c, int64_t count, Complex<S>* x) {
    constexpr int64_t lanes = Lanes<S>::count;
    const Roots<S> roots = roots_of<S>(a);
    const S scale = S(1) / static_cast<S>(a.points);
    const auto value = [&](int64_t j) {
        S re[lanes] = {}, im[lanes] = {};
        if (j < a.taps)
            for (int64_t k = 0; k < count; ++k) re[k] = at<S>(a.kernel, (c + k) * a.kernel_row)[j] * scale;
        const int64_t back = a.points - 1 - j;
        if (back < a.ahead)
            for (int64_t k = 0; k < count; ++k) im[k] = -at<S>(a.reverse, (c + k) * a.reverse_row)[back] * scale;
        return Complex<S>{load(re), load(im)};
    };
    from_outside(x, a.points, roots, value);
    quarters<true, false>(x, a.points, roots, [](Complex<S>*, int64_t) {});
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
