// A few rows times a matrix of weights in few bits. Bound by memory: each weight is read once for all rows, unpacked
// into the first cache, four outputs at a time, and multiplied there in float.
#include "quantized_linear/cpu_isa.h"  // first: it names the instruction set

#include "native/exports.h"
#include "native/math.h"
#include "native/parallel.h"
#include "native/product.h"
#include "quantized_linear/cpu.h"
#include "quantized_linear/cpu_spans.h"
#include "quantized_linear/cpu_whole.h"

namespace ssmzoo {

struct QuantizedLinearArguments {
    WeightArguments weight;
    const void* x;     // T: (rows, size), rows `x_row` apart
    const void* bias;  // float: (outputs), or null
    void* y;           // T: (rows, outputs), contiguous
    int64_t dtype, rows, x_row, threads;
    int64_t rounded;  // whether x is, to 8 bits; beside weights of 4
};

struct RoundArguments {
    const void* x;  // T: (rows, size), rows `x_row` apart
    void* to;       // float: (rows, size), contiguous
    int64_t dtype, rows, x_row, size, group, threads;
};

struct DequantizeArguments {
    WeightArguments weight;
    void* to;  // float: (outputs, size), contiguous
    int64_t threads;
};

namespace SSMZOO_ISA {
namespace {

constexpr int64_t kRows = 16;   // of x, for which each weight is read once
constexpr int64_t kSmall = 16;  // outputs of a task where there are few

// Adds scale (x weights) of four outputs over `count` inputs to their totals.
template <class W>
SSMZOO_INLINE void add_scaled(const W* const* weights, const float* x, int64_t count, const VF* scales, Ahead& ahead,
                              VF* totals) {
    add_products(weights, x, count, ahead, [&](int i, VF sum) { totals[i] = fma(scales[i], sum, totals[i]); });
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
        Ahead ahead(static_cast<const char*>(w.weight) + o * bytes, kOutputs * bytes), none;
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
                for (int i = 0; i < kOutputs; ++i)
                    weights[i] = Decoded<W>::at(from[i], k, count, zeros[i], decoded[i]);
                if (rows == 1) {
                    add_scaled(weights, x + k, count, scales, ahead, totals[0]);
                    continue;
                }
                const float* wide[kOutputs];
                for (int i = 0; i < kOutputs; ++i) {
                    for (int64_t j = 0; j < count; j += lanes)
                        write_some(widened[i] + j, read_some(weights[i] + j, count - j), kChunk - j);
                    wide[i] = widened[i];
                }
                ahead.fetch<kFirstCache>(kOutputs * bytes_of<W>(count));
                for (int64_t r = 0; r < rows; ++r)
                    add_scaled(wide, x + r * row + k, count, scales, none, totals[r]);
            }
        }
        for (int64_t r = 0; r < rows; ++r)
            for (int i = 0; i < kOutputs && o + i < last; ++i) put(r, o + i, sum_lanes<float, 1>(&totals[r][i])[0]);
    }
}

// A row of x as floats.
template <class T>
void widen_row(const T* from, int64_t size, float* to) {
    for (int64_t k = 0; k < size; k += Lanes<float>::count) write_some(to + k, read_some(from + k, size - k), size - k);
}

// All rows of x as floats, with zeros up to a whole block.
template <class T>
void widen_rows(const QuantizedLinearArguments& a, float* to) {
    const int64_t size = a.weight.size, row = ceil_div(size, kBlock) * kBlock;
    for (int64_t r = 0; r < a.rows; ++r) {
        widen_row(at<T>(a.x, r * a.x_row), size, to + r * row);
        for (int64_t k = size; k < row; ++k) to[r * row + k] = 0.0f;
    }
}

// task(first, last) for parts of the outputs.
template <class Task>
void by_outputs(const QuantizedLinearArguments& a, const Task& task) {
    const int64_t outputs = a.weight.outputs, each = outputs >= kRows * kTile ? kTile : kSmall;
    parallel_stage(ceil_div(outputs, each), a.threads,
                   [&](int64_t i, int) { task(i * each, minimum(outputs, (i + 1) * each)); });
}

template <class T>
SSMZOO_INLINE void give(const QuantizedLinearArguments& a, int64_t row, int64_t output, float value) {
    const float bias = a.bias ? *at<float>(a.bias, output) : 0.0f;
    narrow(value + bias, static_cast<T*>(a.y) + row * a.weight.outputs + output);
}

template <class T, class W>
int in_floats(const QuantizedLinearArguments& a) {
    const int64_t row = ceil_div(a.weight.size, kBlock) * kBlock;
    const Scratch scratch(static_cast<size_t>(a.rows * row) * sizeof(float));
    if (!scratch.data) return kOutOfMemory;
    float* x = reinterpret_cast<float*>(scratch.data);
    widen_rows<T>(a, x);
    for (int64_t r = 0; a.rounded && r < a.rows; ++r) round_spans(a.weight.group, a.weight.size, x + r * row);
    by_outputs(a, [&](int64_t first, int64_t last) {
        for (int64_t r = 0; r < a.rows; r += kRows)
            tile<W>(a.weight, x + r * row, minimum(kRows, a.rows - r), row, first, last,
                    [&](int64_t from, int64_t o, float value) { give<T>(a, r + from, o, value); });
    });
    return 0;
}

template <class T, int digits>
int in_whole_numbers(const QuantizedLinearArguments& a) {
    const WeightArguments& w = a.weight;
    const int64_t row = ceil_div(w.size, kBlock) * kBlock, bytes = bytes_of<Nibbles>(w.size);
    const int64_t groups = ceil_div(w.size, w.group), chunks = groups * chunks_of_group(w), padded = padded_chunks(chunks);
    const size_t each = sizeof(Whole<digits>) * chunks + sizeof(float) * (row + 2 * padded) + sizeof(WholeRow<digits>);
    const Scratch scratch(static_cast<size_t>(a.rows) * each);
    if (!scratch.data) return kOutOfMemory;
    Whole<digits>* whole = reinterpret_cast<Whole<digits>*>(scratch.data);
    WholeRow<digits>* rows = reinterpret_cast<WholeRow<digits>*>(whole + a.rows * chunks);
    float *x = reinterpret_cast<float*>(rows + a.rows), *scales = x + a.rows * row, *sums = scales + a.rows * padded;
    memset(scales, 0, sizeof(float) * 2 * a.rows * padded);
    widen_rows<T>(a, x);
    for (int64_t r = 0; r < a.rows; ++r) {
        rows[r] = whole_row(w, x + r * row, whole + r * chunks, scales + r * padded, sums + r * padded);
        if (!rows[r].finite && a.rounded) round_spans(w.group, w.size, x + r * row);
    }
    by_outputs(a, [&](int64_t begin, int64_t end) {
        for (int64_t o = begin; o < end; o += kOutputs) {
            const int64_t last = minimum(o + kOutputs, end);
            const char* weights[kOutputs];
            for (int i = 0; i < kOutputs; ++i)
                weights[i] = static_cast<const char*>(w.weight) + minimum(o + i, last - 1) * bytes;
            Ahead ahead(weights[0], kOutputs * bytes), none;
            for (int64_t r = 0; r < a.rows; ++r) {
                if (!rows[r].finite) continue;
                float y[kOutputs];
                whole_product(w, rows[r], weights, o, last, r ? none : ahead, y);
                for (int64_t i = o; i < last; ++i) give<T>(a, r, i, y[i - o]);
            }
        }
        for (int64_t r = 0; r < a.rows; ++r)
            if (!rows[r].finite)
                tile<Nibbles>(w, x + r * row, 1, row, begin, end,
                              [&](int64_t, int64_t o, float value) { give<T>(a, r, o, value); });
    });
    return 0;
}

// call(zero) with a zero of x's dtype, which is not float64.
template <class Call>
int by_float(int64_t dtype, const Call& call) {
    switch (dtype) {
        case 0: return if_built<float, 0>(call);
        case 2: return if_built<bfloat16, 2>(call);
        default: return if_built<float16, 3>(call);
    }
}

template <class T>
int few_rows(const QuantizedLinearArguments& a) {
    if (a.weight.kind == kNibbles) return a.rounded ? in_whole_numbers<T, 1>(a) : in_whole_numbers<T, kDigits>(a);
    return by_kind(a.weight.kind, [&](auto weight) { return in_floats<T, decltype(weight)>(a); });
}

template <class T>
int round_rows(const RoundArguments& a) {
    return parallel_for(a.rows, a.threads, 0, [&](int64_t r, char*) {
        float* to = static_cast<float*>(a.to) + r * a.size;
        widen_row(at<T>(a.x, r * a.x_row), a.size, to);
        round_spans(a.group, a.size, to);
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
    return by_float(a->dtype, [&](auto zero) { return few_rows<decltype(zero)>(*a); });
}

SSMZOO_EXPORT(round_inputs)(const ssmzoo::RoundArguments* a) {
    using namespace ssmzoo::SSMZOO_ISA;
    return by_float(a->dtype, [&](auto zero) { return round_rows<decltype(zero)>(*a); });
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
