// A few rows times a matrix of weights in few bits. Bound by memory: each weight is read once for all rows, unpacked
// into the first cache, four outputs at a time, and multiplied there in float.
#include "native/exports.h"
#include "native/math.h"
#include "native/parallel.h"
#include "native/product.h"
#include "quantized_linear/cpu.h"

namespace ssmzoo {

struct QuantizedLinearArguments {
    WeightArguments weight;
    const void* x;     // T: (rows, size), rows `x_row` apart
    const void* bias;  // float: (outputs), or null
    void* y;           // T: (rows, outputs), contiguous
    int64_t dtype, rows, x_row, threads;
};

struct DequantizeArguments {
    WeightArguments weight;
    void* to;  // float: (outputs, size), contiguous
    int64_t threads;
};

namespace SSMZOO_ISA {
namespace {

constexpr int64_t kRows = 16;  // of x, for which each weight is read once
constexpr int64_t kLine = 64;  // bytes that memory gives at once

// Adds scale (x weights) of four outputs over `count` inputs to their totals. The order of the additions depends on
// `count` alone.
template <class W>
SSMZOO_INLINE void add_products(const W* const* weights, const float* x, int64_t count, const VF* scales, VF* totals) {
    constexpr int64_t lanes = Lanes<float>::count;
    VF sums[2][kOutputs] = {};
    int64_t k = 0;
    for (; k + 2 * lanes <= count; k += 2 * lanes)
        for (int half = 0; half < 2; ++half) {
            const VF v = load(x + k + half * lanes);
            for (int i = 0; i < kOutputs; ++i)
                sums[half][i] = fma(read(weights[i] + k + half * lanes), v, sums[half][i]);
        }
    for (; k < count; k += lanes) {
        const VF v = load(x + k);  // 0 beyond the inputs
        for (int i = 0; i < kOutputs; ++i) sums[0][i] = fma(read_some(weights[i] + k, count - k), v, sums[0][i]);
    }
    for (int i = 0; i < kOutputs; ++i) totals[i] = fma(scales[i], sums[0][i] + sums[1][i], totals[i]);
}

// Outputs [first, last) of up to kRows rows x, `row` apart, with zeros up to a whole block; put takes each.
template <class W, class Store>
void tile(const WeightArguments& w, const float* x, int64_t rows, int64_t row, int64_t first, int64_t last,
          const Store& put) {
    typedef typename Decoded<W>::type D;
    constexpr int64_t lanes = Lanes<float>::count;
    const int64_t bytes = bytes_of<W>(w.size), groups = ceil_div(w.size, w.group);
    integer8 decoded[kOutputs][kChunk];
    float widened[kOutputs][kChunk];
    for (int64_t o = first; o < last; o += kOutputs) {
        VF totals[kRows][kOutputs];
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t i = 0; i < kOutputs; ++i) totals[r][i] = VF{};
        for (int64_t begin = 0, group = 0; begin < w.size; begin += w.group, ++group) {
            const int64_t end = minimum(w.size, begin + w.group);
            VF scales[kOutputs];
            int zeros[kOutputs];
            const char* from[kOutputs];
            for (int64_t i = 0; i < kOutputs; ++i) {
                const int64_t output = minimum(o + i, last - 1);
                scales[i] = splat(scale_of(w, output * groups + group));
                zeros[i] = zero_of(w, output * groups + group);
                from[i] = static_cast<const char*>(w.weight) + output * bytes;
            }
            for (int64_t k = begin, count; k < end; k += count) {
                count = minimum(kChunk, end - k);
                const D* weights[kOutputs];
                for (int i = 0; i < kOutputs; ++i) {
                    // The next outputs' weights, used but once: they shall not drive all else out of the caches
                    const char* next = from[i] + kOutputs * bytes + bytes_of<W>(k);
                    for (int64_t line = 0; line < bytes_of<W>(count); line += kLine)
                        __builtin_prefetch(next + line, 0, 0);
                    weights[i] = Decoded<W>::at(from[i], k, count, zeros[i], decoded[i]);
                }
                if (rows == 1) {
                    add_products(weights, x + k, count, scales, totals[0]);
                    continue;
                }
                const float* wide[kOutputs];
                for (int i = 0; i < kOutputs; ++i) {
                    for (int64_t j = 0; j < count; j += lanes)
                        write_some(widened[i] + j, read_some(weights[i] + j, count - j), kChunk - j);
                    wide[i] = widened[i];
                }
                for (int64_t r = 0; r < rows; ++r) add_products(wide, x + r * row + k, count, scales, totals[r]);
            }
        }
        for (int64_t r = 0; r < rows; ++r)
            for (int i = 0; i < kOutputs && o + i < last; ++i) put(r, o + i, sum_lanes<float, 1>(&totals[r][i])[0]);
    }
}

// A row of x as floats, with zeros up to a whole block.
template <class T>
void widen_row(const T* from, int64_t size, float* to) {
    constexpr int64_t lanes = Lanes<float>::count;
    for (int64_t k = 0; k < ceil_div(size, kBlock) * kBlock; k += lanes)
        store(to + k, k < size ? read_some(from + k, size - k) : VF{});
}

template <class T>
int few_rows(const QuantizedLinearArguments& a) {
    const WeightArguments& w = a.weight;
    const int64_t row = ceil_div(w.size, kBlock) * kBlock;
    const Scratch scratch(static_cast<size_t>(a.rows * row) * sizeof(float));
    if (!scratch.data) return kOutOfMemory;
    float* x = reinterpret_cast<float*>(scratch.data);
    for (int64_t r = 0; r < a.rows; ++r) widen_row(at<T>(a.x, r * a.x_row), w.size, x + r * row);
    return by_kind(w.kind, [&](auto weight) {
        parallel_stage(ceil_div(w.outputs, kTile), a.threads, [&](int64_t i, int) {
            for (int64_t r = 0; r < a.rows; r += kRows)
                tile<decltype(weight)>(w, x + r * row, minimum(kRows, a.rows - r), row, i * kTile,
                                       minimum(w.outputs, (i + 1) * kTile), [&](int64_t from, int64_t o, float value) {
                                           const float bias = a.bias ? *at<float>(a.bias, o) : 0.0f;
                                           narrow(value + bias, static_cast<T*>(a.y) + (r + from) * w.outputs + o);
                                       });
        });
        return 0;
    });
}

template <class W>
void dequantize_row(const WeightArguments& w, int64_t o, float* to) {
    const char* row = static_cast<const char*>(w.weight) + o * bytes_of<W>(w.size);
    const int64_t groups = ceil_div(w.size, w.group);
    integer8 decoded[kChunk];
    for (int64_t begin = 0, group = o * groups; begin < w.size; begin += w.group, ++group) {
        const int64_t end = minimum(w.size, begin + w.group);
        const VF scale = splat(scale_of(w, group));
        for (int64_t k = begin, count; k < end; k += count) {
            count = minimum(kChunk, end - k);
            const auto* weights = Decoded<W>::at(row, k, count, zero_of(w, group), decoded);
            for (int64_t j = 0; j < count; j += Lanes<float>::count)
                write_some(to + k + j, scale * read_some(weights + j, count - j), count - j);
        }
    }
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT(quantized_linear)(const ssmzoo::QuantizedLinearArguments* a) {
    using namespace ssmzoo::SSMZOO_ISA;
    switch (a->dtype) {
        case 0: return few_rows<float>(*a);
        case 2: return few_rows<bfloat16>(*a);
        default: return few_rows<float16>(*a);
    }
}

SSMZOO_EXPORT(dequantize)(const ssmzoo::DequantizeArguments* a) {
    using namespace ssmzoo::SSMZOO_ISA;
    const ssmzoo::WeightArguments& w = a->weight;
    return by_kind(w.kind, [&](auto weight) {
        return parallel_for(ceil_div(w.outputs, kTile), a->threads, 0, [&](int64_t i, char*) {
            for (int64_t o = i * kTile; o < minimum(w.outputs, (i + 1) * kTile); ++o)
                dequantize_row<decltype(weight)>(w, o, static_cast<float*>(a->to) + o * w.size);
        });
    });
}
