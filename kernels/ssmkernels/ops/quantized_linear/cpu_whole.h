// Products of 4-bit weights with an x of whole numbers.
//
// To turn each weight into a float takes longer than memory takes to bring it. So x is written as whole numbers of 24
// bits times a power of two, in chunks of up to 128 inputs: off by at most 2^-23 of a chunk's largest number, which is
// a float's own precision there. Products of their digits and weights are summed exactly (cpu_dot.h). An x that shall be
// rounded to 8 bits has one digit, and a scale that makes its chunk's largest number 127.
#pragma once

#include "native/product.h"
#include "quantized_linear/cpu.h"
#include "quantized_linear/cpu_dot.h"
#include "quantized_linear/cpu_spans.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

constexpr int32_t kMostWhole = 127 * 0x10101;  // the largest number of three digits of 8 bits; less than two of 12 hold
constexpr int kSmallest = -100;                // exponent of two: a chunk of smaller numbers keeps fewer bits
constexpr int kLater = 11;  // half the bits of a whole number: so many powers of two are taken out of the total at last
constexpr int64_t kAtOnce = 64;  // chunks whose factors are made ready together

// So many inputs, at most a chunk's, with zeros up to a whole block: x = scale · whole numbers, and their sum. False where
// one is not finite, or so large that sums could overflow before the powers of two are taken out of them.
template <int digits>
bool to_whole(const float* x, int64_t count, Whole<digits>& to, float& scale, float& sum) {
    const float largest = largest_of(x, count);
    if (!(largest <= (digits == 1 ? 3.4028234e38f : 1.2089258e24f))) return false;  // 2^80
    const auto power = [](int of) {
        const int32_t shifted = (of + 127) << 23;
        float value;
        memcpy(&value, &shifted, sizeof value);
        return value;
    };
    float factor = 1.0f;
    if constexpr (digits == 1) {
        scale = span_scale(largest);
    } else {
        int32_t bits;
        memcpy(&bits, &largest, sizeof bits);
        int exponent = (bits >> 23) - 127;
        if (exponent < kSmallest) exponent = kSmallest;
        if (largest * power(22 - exponent) > static_cast<float>(kMostWhole)) ++exponent;
        scale = power(exponent - 22 + kLater);
        factor = power(22 - exponent);
    }
    memset(to.digits, 0, sizeof to.digits);
    int32_t total = 0;
    constexpr int unused = 32 - kDigitBits;
    SumsI whole = {};
    for (int64_t k = 0; k < count; k += kLanes) {
        SumsF v;
        memcpy(&v, x + k, sizeof v);
        SumsI left = nearest(digits == 1 ? v / splat_sums(scale) : v * splat_sums(factor));
        whole += left;
        for (int d = digits - 1; d >= 0; --d) {
            const SumsI digit = digits == 1 ? left : (left << unused) >> unused;
            left = (left - digit) >> kDigitBits;
            put_digits(digit, to.digits[k / kVectorInputs][d] + place_of(k));
        }
    }
    for (int i = 0; i < kLanes; ++i) total += whole[i];
    sum = scale * static_cast<float>(total);
    return true;
}

// A row of x: a chunk starts with every group and after each kChunk inputs.
template <int digits>
struct WholeRow {
    const Whole<digits>* chunks;
    const float* scales;   // of the chunks
    const float* sums;     // of their inputs
    int64_t groups, each;  // chunks of a group
    bool finite;           // or else nothing of it counts
};

inline int64_t chunks_of_group(const WeightArguments& w) { return ceil_div(minimum(w.group, w.size), kChunk); }

// x (size) with zeros up to a whole block, into as many chunks, scales and sums as there are.
template <int digits>
WholeRow<digits> whole_row(const WeightArguments& w, const float* x, Whole<digits>* chunks, float* scales,
                           float* sums) {
    const int64_t each = chunks_of_group(w);
    bool finite = true;
    for (int64_t begin = 0, group = 0; begin < w.size; begin += w.group, ++group) {
        const int64_t end = minimum(w.size, begin + w.group);
        for (int64_t k = begin, at = group * each; k < end; k += kChunk, ++at) {
            const int64_t count = ceil_div(minimum(kChunk, end - k), kBlock) * kBlock;
            finite = finite && to_whole(x + k, count, chunks[at], scales[at], sums[at]);
        }
    }
    return {chunks, scales, sums, ceil_div(w.size, w.group), each, finite};
}

// Chunks of a row of x in memory: whole vectors of them.
inline int64_t padded_chunks(int64_t chunks) { return ceil_div(chunks, Lanes<float>::count) * Lanes<float>::count; }

// What the products of kOutputs outputs with x are multiplied by, a chunk of x after another.
class Factors {
    static constexpr int64_t lanes = Lanes<float>::count;
    static constexpr int64_t most = kAtOnce * kOutputs;
    alignas(64) float scales_[most + lanes], zeros_[most + lanes];  // of the groups
    alignas(64) float factors_[kOutputs][kAtOnce];                  // of the chunks
    const WeightArguments& w_;

    template <class T>
    static void widen_all(const T* from, int64_t count, float* to) {
        int64_t g = 0;
        for (; g + lanes <= count; g += lanes) store(to + g, read(from + g));
        for (; g < count; ++g) to[g] = widen(from[g]);
    }

    // `count` groups from number `from` of all outputs' on.
    void read_groups(int64_t to, int64_t from, int64_t count) {
        switch (w_.scales_dtype) {
            case 0: widen_all(at<float>(w_.scales, from), count, scales_ + to); break;
            case 2: widen_all(at<bfloat16>(w_.scales, from), count, scales_ + to); break;
            default: widen_all(at<float16>(w_.scales, from), count, scales_ + to);
        }
        store(scales_ + to + count, VF{});
        if (!w_.zeros) return;
        widen_all(at<natural8>(w_.zeros, from), count, zeros_ + to);
        store(zeros_ + to + count, VF{});
    }

  public:
    explicit Factors(const WeightArguments& w) : w_(w) {
        if (!w.zeros)
            for (float& zero : zeros_) zero = static_cast<float>(kMiddle);
    }

    const float* of(int output) const { return factors_[output]; }

    // Makes those of chunks [begin, end) ready, for outputs from `first` to `last`; takes off what the zeros do.
    template <int digits>
    void make(const WholeRow<digits>& x, int64_t begin, int64_t end, int64_t first, int64_t last, SumsF* totals) {
        const bool single = x.each == 1;
        const int64_t group = single ? begin : begin / x.each, outputs = last - first;
        const int64_t groups = single ? end - begin : (end - 1) / x.each + 1 - group;
        if (groups == x.groups)
            read_groups(0, first * groups, outputs * groups);  // which lie together
        else
            for (int64_t i = 0; i < outputs; ++i) read_groups(i * groups, (first + i) * x.groups + group, groups);
        if (outputs < kOutputs) memset(factors_, 0, sizeof factors_);
        SumsI numbers;
        for (int i = 0; i < kLanes; ++i) numbers[i] = i;
        for (int64_t i = 0; i < outputs; ++i) {
            const float *scales = scales_ + i * groups, *zeros = zeros_ + i * groups;
            if (!single) {
                float off = 0.0f;
                int64_t within = begin - group * x.each;
                for (int64_t c = begin; c < end; ++c, ++within) {
                    if (within == x.each) ++scales, ++zeros, within = 0;
                    factors_[i][c - begin] = *scales * x.scales[c];
                    off += *scales * *zeros * x.sums[c];
                }
                totals[i][0] -= off;
                continue;
            }
            for (int64_t c = 0; c < groups; c += kLanes) {
                const SumsI own = (SumsI{} + static_cast<int32_t>(groups - c)) > numbers;
                const SumsF scale = reinterpret_cast<SumsF>(reinterpret_cast<SumsI>(sums_at(scales + c)) & own);
                const SumsF factors = scale * sums_at(x.scales + begin + c);
                memcpy(factors_[i] + c, &factors, sizeof factors);
                totals[i] = fma_sums(-(scale * sums_at(zeros + c)), sums_at(x.sums + begin + c), totals[i]);
            }
        }
    }
};

// Adds so many chunks of x, all of this many blocks, times each output's weights times its factors to its total.
template <int blocks, int digits>
SSMZOO_INLINE void add_chunks(const char* const* weights, const Whole<digits>* x, const Factors& factors, int64_t from,
                              int64_t count, Ahead& ahead, SumsF* totals) {
    constexpr int64_t bytes = blocks * kBlock / 2;
    SumsF sums[kOutputs];
    const char* at[kOutputs];
    const float* by[kOutputs];
    for (int i = 0; i < kOutputs; ++i) {
        sums[i] = totals[i];
        at[i] = weights[i];
        by[i] = factors.of(i) + from;
    }
    for (int64_t c = 0; c < count; ++c) {
        ahead.fetch<kFirstCache>(kOutputs * bytes);
        for (int i = 0; i < kOutputs; ++i) {
            if (digits > 1 && !kManyRegisters) asm volatile("" : : : "memory");  // digits are read again: there are few registers
            sums[i] = fma_sums(dot<blocks>(at[i] + c * bytes, x[c]), splat_sums(by[i][c]), sums[i]);
        }
    }
    for (int i = 0; i < kOutputs; ++i) totals[i] = sums[i];
}

template <int number>
struct Blocks {
    static constexpr int count = number;
};

// call(Blocks) with as many as `count` inputs have, at most a chunk's.
template <class Call>
SSMZOO_INLINE void by_blocks(int64_t count, const Call& call) {
    switch (ceil_div(count, kBlock)) {
        case 1: return call(Blocks<1>());
        case 2: return call(Blocks<2>());
        case 3: return call(Blocks<3>());
        default: return call(Blocks<4>());
    }
}

// Outputs [first, last), at most kOutputs, of one row of x, from their rows of weights: the last one's again beyond it.
template <int digits>
void whole_product(const WeightArguments& w, const WholeRow<digits>& x, const char* const* weights, int64_t first,
                   int64_t last, Ahead& ahead, float* to) {
    const int64_t chunks = x.groups * x.each, span = minimum(w.group, kChunk);
    const bool alike = w.group % span == 0;  // all chunks but the last
    Factors factors(w);
    SumsF totals[kOutputs];
    for (int i = 0; i < kOutputs; ++i) totals[i] = SumsF{};
    int64_t k = 0, of_group = minimum(w.group, w.size);
    for (int64_t begin = 0; begin < chunks; begin += kAtOnce) {
        const int64_t end = minimum(chunks, begin + kAtOnce);
        factors.make(x, begin, end, first, last, totals);
        for (int64_t chunk = begin, run; chunk < end; chunk += run) {
            const int64_t count = minimum(span, (alike ? w.size : of_group) - k);
            if (count <= 0) break;  // the last group may have fewer chunks than others
            run = alike && count == span ? minimum(end - chunk, (w.size - k) / span) : 1;
            const char* at[kOutputs];
            for (int i = 0; i < kOutputs; ++i) at[i] = weights[i] + bytes_of<Nibbles>(k);
            by_blocks(count, [&](auto blocks) {
                add_chunks<decltype(blocks)::count>(at, x.chunks + chunk, factors, chunk - begin, run, ahead, totals);
            });
            k += run * count;
            if (k == of_group) of_group = minimum(of_group + w.group, w.size);
        }
    }
    sum_each(totals, to);
    for (int i = 0; i < kOutputs; ++i) to[i] *= digits > 1 ? 1.0f / (1 << kLater) : 1.0f;
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
