// A weight matrix times a few rows: bound by memory, so that each weight is read once, as it lies.
#pragma once

#include "inputs.h"
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

constexpr int64_t kStretch = 768;  // inputs at once, a multiple of every step: so many weights stay in the fastest cache

// Lines of the weights that come next, asked for at an even pace while several rows of x are multiplied with the present
// ones. Handed on by value, so that it stays in registers.
//
// One block of rows waits for memory, which has most on its way as the weights lie, for the second cache. Several blocks
// read the same weights from the first one, which is to have them when they begin: some of each of kOutputs rows, in the
// order in which they will be read.
class Pace {
    static constexpr int64_t line = 64;
    const char* next_;
    int64_t row_, each_, due_;
    size_t at_, end_;
    bool near_;

  public:
    // `bytes` of each row from `next` on, rows `row` bytes apart, within so many calls; if not near, they lie together
    Pace(bool near, const void* next, int64_t row, int64_t bytes, int64_t calls)
        : next_(static_cast<const char*>(next)), row_(row), each_(ceil_div(kOutputs * bytes, calls)), due_(0), at_(0),
          end_(static_cast<size_t>(kOutputs * ceil_div(bytes, line))), near_(near) {}

    SSMZOO_INLINE void fetch() {
        for (due_ += each_; due_ >= line && at_ < end_; due_ -= line, ++at_) {
            const int64_t output = static_cast<int64_t>(at_ % kOutputs), place = static_cast<int64_t>(at_ / kOutputs);
            if (near_)
                __builtin_prefetch(next_ + output * row_ + place * line, 0, 3);
            else
                __builtin_prefetch(next_ + static_cast<int64_t>(at_) * line, 0, 2);
        }
    }
};

// A number that a function's type may depend on.
template <int n>
struct Number {
    static constexpr int value = n;
};

// The sums of the lanes of each of n vectors, a multiple of kOutputs: as many at once as a vector has lanes, which takes
// a third of the additions that they take one by one, and gives the same bits.
template <class S, int n>
SSMZOO_INLINE void sum_each(const typename Lanes<S>::V* sums, S* to) {
    using V = typename Lanes<S>::V;
    constexpr int lanes = Lanes<S>::count, here = n < lanes ? n : lanes;
    constexpr int together = here == 12 ? 16 : here;  // a power of two
    V v[together], done;
    for (int i = 0; i < together; ++i) v[i] = i < here ? sums[i] : V{};
    done = sum_lanes<S, together>(v);
    memcpy(to, &done, sizeof(S) * here);
    if constexpr (n > here) sum_each<S, n - here>(sums + here, to + here);
}

// Where a block's vectors lie: numbers from a row to the next, from the first half to the second, from a step to the next.
struct Strides {
    int64_t row, half, step;
};

// add_products' sums of R rows of x over `length` inputs, onto the halves in `kept`, or onto 0 where they begin here.
// Where they end here, done(r, sums) with those of the kOutputs outputs.
template <class T, class S, int R, class Done>
SSMZOO_INLINE Pace add_block(const T* const* weights, const S* x, Strides strides, int64_t length, bool begins,
                             bool ends, typename Lanes<S>::V (*kept)[R][kOutputs], Pace pace, const Done& done) {
    using V = typename Lanes<S>::V;
    constexpr int64_t lanes = Lanes<S>::count;
    for (int64_t half = 0; half < 2; ++half) {
        V sum[R][kOutputs];
        for (int r = 0; r < R; ++r)
            for (int i = 0; i < kOutputs; ++i) sum[r][i] = begins ? V{} : kept[half][r][i];
        const T* from[kOutputs];
        for (int i = 0; i < kOutputs; ++i) from[i] = weights[i] + half * lanes;
        const S* own = x + half * strides.half;
        for (int64_t k = 0; k < length; k += 2 * lanes, own += strides.step) {
            pace.fetch();
            V v[R];
            for (int r = 0; r < R; ++r) v[r] = load(own + r * strides.row);
            for (int i = 0; i < kOutputs; ++i) {
                const V weight = read(from[i] + k);
                for (int r = 0; r < R; ++r) sum[r][i] = fma(weight, v[r], sum[r][i]);
            }
        }
        if (half == 1 && ends) {
            S each[R][kOutputs];
            for (int r = 0; r < R; ++r)
                for (int i = 0; i < kOutputs; ++i) sum[r][i] = kept[0][r][i] + sum[r][i];
            sum_each<S, R * kOutputs>(sum[0], each[0]);
            for (int r = 0; r < R; ++r) done(r, each[r]);
        } else {
            for (int r = 0; r < R; ++r)
                for (int i = 0; i < kOutputs; ++i) kept[half][r][i] = sum[r][i];
        }
    }
    return pace;
}

// add_products for several rows of x, at most kRowsTogether, as Inputs has them: the same additions in the same order, so
// that each row gets the bits that it gets alone; done(r, sums) with the numbers themselves. `next` are the weights that
// will be read after these.
template <class T, class S, class Done>
SSMZOO_INLINE void add_products_of_rows(const T* const* weights, const S* x, int64_t row, int64_t count, int64_t size,
                                        const T* next, const Done& done) {
    using V = typename Lanes<S>::V;
    constexpr int64_t lanes = Lanes<S>::count, step = 2 * lanes;
    static_assert(kStretch % step == 0, "stretches are whole steps");
    V kept[2 * kRowsTogether][kOutputs];
    const int64_t blocks = ceil_div(count, kShared), whole = size / step * step;
    // `by`, rows `by_row` apart, from input k on
    const auto stretch = [&](const T* const* from, const S* by, int64_t by_row, int64_t k, int64_t length, bool begins,
                             bool ends, const T* then) {
        constexpr int64_t bytes = sizeof(T);
        Pace pace(blocks > 1, then, size * bytes, then ? minimum(kStretch, size) * bytes : 0, 2 * blocks * (length / step));
        blocks_of_rows(count, [&](int64_t r, int64_t rows) {
            const auto block = [&](auto number) {
                constexpr int R = decltype(number)::value;
                const Strides lined = {lanes, by_row / 2 * R, R * lanes}, as_they_lie = {by_row, lanes, step};
                pace = add_block<T, S, R>(from, by + r * by_row + (kLined ? k / 2 * R : k), kLined ? lined : as_they_lie,
                                          length, begins, ends, reinterpret_cast<V(*)[R][kOutputs]>(kept + 2 * r), pace,
                                          [&](int64_t i, const S* sums) { done(r + i, sums); });
            };
            if (rows == 1) block(Number<1>());
            if (rows == 2) block(Number<2>());
            if (rows == 3) block(Number<3>());
            if constexpr (kShared > 3)
                if (rows == 4) block(Number<4>());
        });
    };
    for (int64_t k = 0; k < whole; k += kStretch) {
        const T* from[kOutputs] = {weights[0] + k, weights[1] + k, weights[2] + k, weights[3] + k};
        const int64_t after = k + kStretch;
        const T* then = blocks == 1 ? next + kOutputs * k : after < size ? weights[0] + after : next;
        stretch(from, x, row, k, minimum(kStretch, whole - k), k == 0, whole == size && after >= size, then);
    }
    if (whole < size || size == 0) {
        T rest[kOutputs][step];
        memset(rest, 0, sizeof rest);
        for (int64_t i = 0; i < kOutputs; ++i)
            memcpy(rest[i], weights[i] + whole, static_cast<size_t>(size - whole) * sizeof(T));
        const T* from[kOutputs] = {rest[0], rest[1], rest[2], rest[3]};
        if (kLined && size > 0) return stretch(from, x, row, whole, step, whole == 0, true, nullptr);
        S rest_of_x[kRowsTogether][step];
        memset(rest_of_x, 0, sizeof rest_of_x);
        for (int64_t r = 0; r < count; ++r)
            memcpy(rest_of_x[r], x + r * row + whole, static_cast<size_t>(size - whole) * sizeof(S));
        stretch(from, rest_of_x[0], step, 0, step, whole == 0, true, nullptr);
    }
}

// weight (outputs size) times x (b size), plus a bias, for outputs [first, last); put(batch, output, values, count)
// takes kOutputs of them, or as many as there are. A row's bits do not depend on how many rows there are.
template <class T, class S, class Store>
void product(const void* weight, const void* bias, const Inputs<S>& x, int64_t batch, int64_t size, int64_t first,
             int64_t last, const Store& put) {
    using V = typename Lanes<S>::V;
    for (int64_t o = first; o < last; o += kOutputs) {
        const T* rows[kOutputs];
        S biases[kOutputs];
        for (int64_t i = 0; i < kOutputs; ++i) {
            const int64_t output = minimum(o + i, last - 1);
            rows[i] = at<T>(weight, output * size);
            biases[i] = bias ? *at<S>(bias, output) : S(0);
        }
        const auto give = [&](int64_t b, const S* sums) {
            S values[kOutputs];
            for (int64_t i = 0; i < kOutputs; ++i) values[i] = sums[i] + biases[i];
            put(b, o, values, minimum(kOutputs, last - o));
        };
        if (batch == 1) {
            V sums[kOutputs];
            S each[kOutputs];
            Ahead ahead(rows[0], kOutputs * size * static_cast<int64_t>(sizeof(T)));
            add_products(rows, x.from(0), size, ahead, [&](int i, V sum) { sums[i] = sum; });
            sum_each<S, kOutputs>(sums, each);
            give(0, each);
            continue;
        }
        for (int64_t b = 0; b < batch; b += kRowsTogether)
            add_products_of_rows(rows, x.from(b), x.size(), minimum(kRowsTogether, batch - b), size,
                                 b + kRowsTogether < batch ? rows[0] : rows[0] + kOutputs * size,
                                 [&](int64_t r, const S* sums) { give(b + r, sums); });
    }
}

// A part of the outputs: those of number `part` where each part has `each`, rounded into y, whose rows are `row` apart.
template <class T, class S, class Y>
void product_part(const void* weight, const void* bias, const Inputs<S>& x, int64_t batch, int64_t size, int64_t outputs,
                  int64_t each, int64_t part, Y* y, int64_t row) {
    const auto put = [&](int64_t b, int64_t o, const S* values, int64_t count) {
        Y* to = y + b * row + o;
        if (count == kOutputs)  // one store
            for (int64_t i = 0; i < kOutputs; ++i) narrow(values[i], to + i);
        else
            for (int64_t i = 0; i < count; ++i) narrow(values[i], to + i);
    };
    product<T>(weight, bias, x, batch, size, part * each, minimum(outputs, (part + 1) * each), put);
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
