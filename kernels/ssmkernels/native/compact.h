// Rows of numbers that a forward pass keeps for its backward pass.
//
// Beside activations in half precision they are compact, 16 bits a number, so that they take no more room than activations
// do: up to 128 numbers are whole multiples of one step, the largest of them 32767 times it. Off by at most 2^-16 of the
// largest, where half precision itself would be off by up to 2^-9 of each. Numbers that are not finite make all of a row's
// 128 NaN: a sum over them is not finite either way.
#pragma once

#include "choose.h"
#include "rows.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

constexpr int64_t kOfStep = 128;  // numbers that share a step
constexpr int64_t kStepRoom = sizeof(float) / sizeof(int16_t);  // that a step takes, before its numbers

// 16-bit numbers that a compact row of `count` takes, an even one; and how far from its start column `first` has its step.
inline int64_t compact_size(int64_t count) {
    return (count + 1) / 2 * 2 + ceil_div(count, kOfStep) * kStepRoom;
}

inline int64_t compact_place(int64_t first) { return first / kOfStep * (kOfStep + kStepRoom); }

typedef int16_t Compact __attribute__((vector_size(SSMZOO_VECTOR_BYTES / 2)));

// Added to a float of at most 2^22 this rounds it to a whole number, which its lowest bits then hold.
constexpr float kWhole = 12582912;

// `from` has whole vectors.
inline void write_compact(int16_t* to, const float* from, int64_t count) {
    constexpr int64_t lanes = Lanes<float>::count;
    for (int64_t first = 0; first < count; first += kOfStep) {
        const int64_t numbers = minimum(kOfStep, count - first);
        const float* own = from + first;
        VF most = {}, strange = {};
        for (int64_t c = 0; c < numbers; c += lanes) {
            const VF x = read_some(own + c, numbers - c);
            most = larger<float>(most, absolute<float>(x));
            strange = fma(x, VF{}, strange);  // 0, but NaN where one is not finite
        }
        float largest = 0;
        for (int64_t i = 0; i < lanes; ++i) largest = most[i] > largest ? most[i] : largest;
        const float step = largest / 32767 + sum_lanes<float, 1>(&strange)[0];
        const bool none = step < 1e-37f;  // what is smaller still is 0 to most kernels
        const float kept = none ? 0 : step;
        const VF over = splat(none ? 0.0f : 1 / step);
        int16_t* place = to + compact_place(first);
        memcpy(place, &kept, sizeof kept);
        place += kStepRoom;
        for (int64_t c = 0; c < numbers; c += lanes) {
            const auto bits = bits_of<float>(fma(read_some(own + c, numbers - c), over, splat(kWhole)));
            const Compact whole = __builtin_convertvector(bits, Compact);
            memcpy(place + c, &whole, sizeof(int16_t) * static_cast<size_t>(minimum(lanes, numbers - c)));
        }
    }
}

// Writes whole vectors, with zeros beyond the row.
inline void read_compact(float* to, const int16_t* from, int64_t count) {
    constexpr int64_t lanes = Lanes<float>::count;
    for (int64_t first = 0; first < count; first += kOfStep) {
        const int64_t numbers = minimum(kOfStep, count - first);
        const int16_t* place = from + compact_place(first);
        float step;
        memcpy(&step, place, sizeof step);
        place += kStepRoom;
        for (int64_t c = 0; c < numbers; c += lanes) {
            Compact whole = {};
            memcpy(&whole, place + c, sizeof(int16_t) * static_cast<size_t>(minimum(lanes, numbers - c)));
            const VF x = splat(step) * __builtin_convertvector(whole, VF);
            VF kept = {};  // 0 beyond the row, where a step that is not finite would leave NaN
            memcpy(&kept, &x, sizeof(float) * static_cast<size_t>(minimum(lanes, numbers - c)));
            store(to + first + c, kept);
        }
    }
}

// Rows of `count` numbers from `p` on; S, or compact where activations of this dtype are half precision.
template <class S>
struct KeptRows {
    const void* p;
    int64_t dtype, count;

    bool compact() const { return is_half(dtype); }

    // From the start of one row to that of the next, in S or in 16-bit numbers.
    int64_t stride() const { return compact() ? compact_size(count) : count; }

    // Row `row` from column `first` on, a multiple of kOfStep, of so many numbers.
    void write(int64_t row, int64_t first, const S* from, int64_t numbers) const {
        if constexpr (sizeof(S) == sizeof(float))
            if (compact()) return write_compact(start(row) + compact_place(first), from, numbers);
        memcpy(static_cast<S*>(const_cast<void*>(p)) + row * count + first, from, sizeof(S) * static_cast<size_t>(numbers));
    }

    // A whole row; compact ones in whole vectors.
    void read(S* to, int64_t row) const {
        if constexpr (sizeof(S) == sizeof(float))
            if (compact()) return read_compact(to, start(row), count);
        memcpy(to, at<S>(p, row * count), sizeof(S) * static_cast<size_t>(count));
    }

  private:
    int16_t* start(int64_t row) const { return static_cast<int16_t*>(const_cast<void*>(p)) + row * compact_size(count); }
};

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
