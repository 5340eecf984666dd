// A weight matrix times a few rows: bound by memory, so that each weight is read once, as it lies.
#pragma once

#include "math.h"
#include "tiles.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

constexpr int64_t kOutputs = 4;  // of a product at once: they share each read of the input

// Weights that will be read next, fetched in the order in which they lie while others are multiplied: what the hardware
// fetches by itself ends with each short row. They are used but once and shall not drive all else out of the caches.
class Ahead {
    static constexpr int64_t line = 64, least = 2048, most = 16384;  // bytes; rows that are longer need no help
    const char* next_;

  public:
    Ahead() : next_(nullptr) {}
    Ahead(const void* weights, int64_t bytes)  // of which so many are at work
        : next_(bytes > most ? nullptr : static_cast<const char*>(weights) + (bytes > least ? bytes : least)) {}

    SSMZOO_INLINE void fetch(int64_t bytes) {
        if (!next_) return;
        for (int64_t i = 0; i < bytes; i += line) __builtin_prefetch(next_ + i, 0, 0);
        next_ += bytes;
    }
};

// done(i, sum) with the sum, over `size` inputs, of x times each of kOutputs rows of weights. The order of the
// additions depends on the size alone.
template <class T, class S, class Done>
SSMZOO_INLINE void add_products(const T* const* rows, const S* x, int64_t size, Ahead& ahead, const Done& done) {
    using V = typename Lanes<S>::V;
    constexpr int64_t lanes = Lanes<S>::count, step = 2 * lanes;
    V sums[2][kOutputs];  // in registers, as long as every loop over them is unrolled
    for (int i = 0; i < kOutputs; ++i) sums[0][i] = sums[1][i] = V{};
    const auto add = [&](const T* const* from, const S* by) {
        for (int half = 0; half < 2; ++half) {
            const V v = load(by + half * lanes);
            for (int i = 0; i < kOutputs; ++i) sums[half][i] = fma(read(from[i] + half * lanes), v, sums[half][i]);
        }
    };
    int64_t k = 0;
    for (; k + step <= size; k += step) {
        const T* from[kOutputs] = {rows[0] + k, rows[1] + k, rows[2] + k, rows[3] + k};
        ahead.fetch(kOutputs * step * static_cast<int64_t>(sizeof(T)));
        add(from, x + k);
    }
    if (k < size) {
        T rest[kOutputs][step];
        S rest_of_x[step];
        memset(rest, 0, sizeof rest);
        memset(rest_of_x, 0, sizeof rest_of_x);
        const size_t count = static_cast<size_t>(size - k);
        for (int i = 0; i < kOutputs; ++i) memcpy(rest[i], rows[i] + k, count * sizeof(T));
        memcpy(rest_of_x, x + k, count * sizeof(S));
        const T* from[kOutputs] = {rest[0], rest[1], rest[2], rest[3]};
        add(from, rest_of_x);
    }
    for (int i = 0; i < kOutputs; ++i) done(i, sums[0][i] + sums[1][i]);
}

// weight (outputs size) times `from` (b size), plus a bias, for outputs [first, last); put(batch, output, value) takes
// each.
template <class T, class S, class Store>
void product(const void* weight, const void* bias, const S* from, int64_t batch, int64_t size, int64_t first,
             int64_t last, const Store& put) {
    using V = typename Lanes<S>::V;
    for (int64_t o = first; o < last; o += kOutputs) {
        const T* rows[kOutputs];
        for (int64_t i = 0; i < kOutputs; ++i) rows[i] = at<T>(weight, minimum(o + i, last - 1) * size);
        for (int64_t b = 0; b < batch; ++b) {
            V sums[kOutputs];
            Ahead ahead = b ? Ahead() : Ahead(rows[0], kOutputs * size * static_cast<int64_t>(sizeof(T)));
            add_products(rows, from + b * size, size, ahead, [&](int i, V sum) { sums[i] = sum; });
            for (int i = 0; i < kOutputs && o + i < last; ++i)
                put(b, o + i, sum_lanes<S, 1>(&sums[i])[0] + (bias ? *at<S>(bias, o + i) : S(0)));
        }
    }
}

// A part of the outputs: those of number `part` where each part has `each`, rounded into y, whose rows are `row` apart.
template <class T, class S, class Y>
void product_part(const void* weight, const void* bias, const S* from, int64_t batch, int64_t size, int64_t outputs,
                  int64_t each, int64_t part, Y* y, int64_t row) {
    product<T>(weight, bias, from, batch, size, part * each, minimum(outputs, (part + 1) * each),
               [&](int64_t b, int64_t o, S value) { narrow(value, y + b * row + o); });
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
