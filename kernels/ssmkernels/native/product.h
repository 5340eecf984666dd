// A weight matrix times a few rows: bound by memory, so that each weight is read once, as it lies.
#pragma once

#include "math.h"
#include "tiles.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

constexpr int64_t kOutputs = 4;  // of a product at once: they share each read of the input

// weight (outputs size) times `from` (b size), plus a bias, for outputs [first, last); put(batch, output, value) takes
// each. The order of the additions depends on the size alone.
template <class T, class S, class Store>
void product(const void* weight, const void* bias, const S* from, int64_t batch, int64_t size, int64_t first,
             int64_t last, const Store& put) {
    using V = typename Lanes<S>::V;
    constexpr int64_t lanes = Lanes<S>::count;
    for (int64_t o = first; o < last; o += kOutputs) {
        const T* rows[kOutputs];
        for (int64_t i = 0; i < kOutputs; ++i) rows[i] = at<T>(weight, minimum(o + i, last - 1) * size);
        for (int64_t b = 0; b < batch; ++b) {
            const S* x = from + b * size;
            V sums[2][kOutputs] = {};
            int64_t k = 0;
            for (; k + 2 * lanes <= size; k += 2 * lanes)
                for (int half = 0; half < 2; ++half) {
                    // The next outputs' weights, used but once: they shall not drive all else out of the caches
                    for (int i = 0; i < kOutputs; ++i)
                        __builtin_prefetch(rows[i] + kOutputs * size + k + half * lanes, 0, 0);
                    const V v = load(x + k + half * lanes);
                    for (int i = 0; i < kOutputs; ++i)
                        sums[half][i] = fma(read(rows[i] + k + half * lanes), v, sums[half][i]);
                }
            for (; k < size; k += lanes) {
                const V v = read_some(x + k, size - k);
                for (int i = 0; i < kOutputs; ++i)
                    sums[0][i] = fma(read_some(rows[i] + k, size - k), v, sums[0][i]);
            }
            for (int i = 0; i < kOutputs && o + i < last; ++i) {
                V sum = sums[0][i] + sums[1][i];
                put(b, o + i, sum_lanes<S, 1>(&sum)[0] + (bias ? *at<S>(bias, o + i) : S(0)));
            }
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
