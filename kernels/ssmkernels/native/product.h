// A weight matrix times a few rows: bound by memory, so that each weight is read once, as it lies.
#pragma once

#include "math.h"
#include "tiles.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

constexpr int64_t kOutputs = 4;  // of a product at once: they share each read of the input

// Weights that will be read next, fetched in the order in which they lie while others are multiplied: what the hardware
// fetches by itself ends with each short row. Which cache is best was measured on two cores of Zen 4: the second one for
// floats (26 to 31 GB/s, and 20 where they pass it by), the first one, without a place in the others, for 8 and 4 bits.
constexpr int kFirstCache = 0, kSecondCache = 2;

class Ahead {
    static constexpr int64_t line = 64, least = 2048, most = 16384;  // bytes; rows that are longer need no help
    const char* next_;

  public:
    Ahead() : next_(nullptr) {}
    Ahead(const void* weights, int64_t bytes)  // of which so many are at work
        : next_(bytes > most ? nullptr : static_cast<const char*>(weights) + (bytes > least ? bytes : least)) {}

    template <int cache>
    SSMZOO_INLINE void fetch(int64_t bytes) {
        if (!next_) return;
        for (int64_t i = 0; i < bytes; i += line) __builtin_prefetch(next_ + i, 0, cache);
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
        ahead.fetch<sizeof(T) == 1 ? kFirstCache : kSecondCache>(kOutputs * step * static_cast<int64_t>(sizeof(T)));
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

// Rows of the input that share each read of the weights: as many as there are registers for their sums.
#if SSMZOO_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int64_t kShared = 4;
#else
constexpr int64_t kShared = 3;
#endif
constexpr int64_t kRowsTogether = 16;  // rows whose sums are kept while the weights of kOutputs outputs are in a fast cache
constexpr int64_t kStretch = 768;  // inputs at once, a multiple of every step: so many weights stay in the fastest cache

// Lines of the next weights to come, asked for at an even pace while several rows are multiplied with the present ones.
class Pace {
    static constexpr int64_t line = 64;
    const char *next_, *end_;
    int64_t each_, due_;

  public:
    Pace(const void* next, int64_t bytes, int64_t calls)
        : next_(static_cast<const char*>(next)), end_(next_ + bytes), each_(ceil_div(bytes, calls)), due_(0) {}

    SSMZOO_INLINE void fetch() {
        for (due_ += each_; due_ >= line && next_ < end_; due_ -= line, next_ += line) __builtin_prefetch(next_, 0, 2);
    }
};

// One of the two halves of add_products' sums for R rows of x, `row` apart, over `count` inputs: sums[2 * i] onwards
// are those of row i.
template <class T, class S, int R>
SSMZOO_INLINE void add_half(const T* const* weights, const S* x, int64_t row, int64_t count,
                            typename Lanes<S>::V (*sums)[kOutputs], Pace& pace) {
    using V = typename Lanes<S>::V;
    constexpr int64_t step = 2 * Lanes<S>::count;
    V sum[R][kOutputs];
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < kOutputs; ++i) sum[r][i] = sums[2 * r][i];
    for (int64_t k = 0; k < count; k += step) {
        pace.fetch();
        V v[R];
        for (int r = 0; r < R; ++r) v[r] = load(x + r * row + k);
        for (int i = 0; i < kOutputs; ++i) {
            const V weight = read(weights[i] + k);
            for (int r = 0; r < R; ++r) sum[r][i] = fma(weight, v[r], sum[r][i]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < kOutputs; ++i) sums[2 * r][i] = sum[r][i];
}

// add_products for several rows of x, `row` apart, at most kRowsTogether: the same additions in the same order, so that
// each row gets the bits that it gets alone. `next` are the weights that will be read after these, for which
// the `first` rows ask.
template <class T, class S, class Done>
SSMZOO_INLINE void add_products_of_rows(const T* const* weights, const S* x, int64_t row, int64_t count, int64_t size,
                                        const T* next, bool first, const Done& done) {
    using V = typename Lanes<S>::V;
    constexpr int64_t lanes = Lanes<S>::count, step = 2 * lanes;
    static_assert(kStretch % step == 0, "stretches are whole steps");
    V sums[2 * kRowsTogether][kOutputs];
    memset(sums, 0, sizeof sums[0] * static_cast<size_t>(2 * count));
    const int64_t blocks = ceil_div(count, kShared), whole = size / step * step;
    Pace pace(next, first ? kOutputs * size * static_cast<int64_t>(sizeof(T)) : 0, 2 * blocks * (size / step) + 1);
    const auto stretch = [&](const T* const* from, const S* by, int64_t by_row, int64_t length) {
        for (int64_t n = 0; n < blocks; ++n) {  // of sizes that differ by one at most
            const int64_t r = count * n / blocks, rows = count * (n + 1) / blocks - r;
            for (int64_t half = 0; half < 2; ++half) {
                const T* at_half[kOutputs];
                for (int64_t i = 0; i < kOutputs; ++i) at_half[i] = from[i] + half * lanes;
                const S* own = by + r * by_row + half * lanes;
                V(*to)[kOutputs] = sums + 2 * r + half;
                if (rows == 1) add_half<T, S, 1>(at_half, own, by_row, length, to, pace);
                if (rows == 2) add_half<T, S, 2>(at_half, own, by_row, length, to, pace);
                if (rows == 3) add_half<T, S, 3>(at_half, own, by_row, length, to, pace);
                if constexpr (kShared > 3)
                    if (rows == 4) add_half<T, S, 4>(at_half, own, by_row, length, to, pace);
            }
        }
    };
    for (int64_t k = 0; k < whole; k += kStretch) {
        const T* from[kOutputs] = {weights[0] + k, weights[1] + k, weights[2] + k, weights[3] + k};
        stretch(from, x + k, row, minimum(kStretch, whole - k));
    }
    if (whole < size) {
        T rest[kOutputs][step];
        S rest_of_x[kRowsTogether][step];
        memset(rest, 0, sizeof rest);
        memset(rest_of_x, 0, sizeof rest_of_x);
        for (int64_t i = 0; i < kOutputs; ++i)
            memcpy(rest[i], weights[i] + whole, static_cast<size_t>(size - whole) * sizeof(T));
        for (int64_t r = 0; r < count; ++r)
            memcpy(rest_of_x[r], x + r * row + whole, static_cast<size_t>(size - whole) * sizeof(S));
        const T* from[kOutputs] = {rest[0], rest[1], rest[2], rest[3]};
        stretch(from, rest_of_x[0], step, step);
    }
    for (int64_t r = 0; r < count; ++r) {
        V both[kOutputs];
        for (int i = 0; i < kOutputs; ++i) both[i] = sums[2 * r][i] + sums[2 * r + 1][i];
        done(r, both);
    }
}

// The sums of the lanes of kOutputs vectors, which sum_lanes adds in the same order one by one.
template <class S>
SSMZOO_INLINE void sum_outputs(typename Lanes<S>::V* sums, S* to) {
    if constexpr (Lanes<S>::count >= kOutputs) {
        S all[Lanes<S>::count];
        store(all, sum_lanes<S, kOutputs>(sums));
        memcpy(to, all, sizeof(S) * kOutputs);
    } else {
        for (int i = 0; i < kOutputs; ++i) to[i] = sum_lanes<S, 1>(&sums[i])[0];
    }
}

// weight (outputs size) times `from` (b size), plus a bias, for outputs [first, last); put(batch, output, value) takes
// each. A row's bits do not depend on how many rows there are.
template <class T, class S, class Store>
void product(const void* weight, const void* bias, const S* from, int64_t batch, int64_t size, int64_t first,
             int64_t last, const Store& put) {
    using V = typename Lanes<S>::V;
    for (int64_t o = first; o < last; o += kOutputs) {
        const T* rows[kOutputs];
        for (int64_t i = 0; i < kOutputs; ++i) rows[i] = at<T>(weight, minimum(o + i, last - 1) * size);
        const auto give = [&](int64_t b, V* sums) {
            S each[kOutputs];
            sum_outputs<S>(sums, each);
            for (int64_t i = 0; i < kOutputs && o + i < last; ++i)
                put(b, o + i, each[i] + (bias ? *at<S>(bias, o + i) : S(0)));
        };
        if (batch == 1) {
            V sums[kOutputs];
            Ahead ahead(rows[0], kOutputs * size * static_cast<int64_t>(sizeof(T)));
            add_products(rows, from, size, ahead, [&](int i, V sum) { sums[i] = sum; });
            give(0, sums);
            continue;
        }
        for (int64_t b = 0; b < batch; b += kRowsTogether)
            add_products_of_rows(rows, from + b * size, size, minimum(kRowsTogether, batch - b), size,
                                 rows[0] + kOutputs * size, b == 0,
                                 [&](int64_t r, V* sums) { give(b + r, sums); });
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
