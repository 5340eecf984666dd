// The kernel of linear maps with quantised weights, in a program of its own that any compiler makes and any machine, or
// one that is emulated, can run: each kind of weights against sums in double. Prints a digest of the results' bits.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <initializer_list>

#include "quantized_linear/cpu.cpp"

namespace {

uint32_t state = 1;

uint32_t draw() {
    state = state * 1664525u + 1013904223u;
    return state >> 8;
}

float number() { return static_cast<float>(draw()) / (1 << 23) - 1.0f; }

uint64_t digest = 14695981039346656037ull;

void note(const void* p, size_t bytes) {
    for (size_t i = 0; i < bytes; ++i) digest = (digest ^ static_cast<const uint8_t*>(p)[i]) * 1099511628211ull;
}

void* take(int64_t bytes) {  // to the byte, so that a sanitizer sees what is read beyond
    void* found = malloc(static_cast<size_t>(bytes) + (bytes == 0));
    if (!found) exit(2);
    return found;
}

float half(uint16_t bits, bool brain) {
    const int exponent = (bits >> 10) & 31;
    if (!brain) return ldexpf(static_cast<float>((bits & 1023) | (exponent ? 1024 : 0)), (exponent ? exponent : 1) - 25);
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float f;
    memcpy(&f, &wide, sizeof f);
    return f;
}

int failures = 0;

void try_one(int64_t kind, int64_t size, int64_t group, int64_t outputs, int64_t rows, bool rounded, bool zeros,
             float scale) {
    const bool whole = kind >= 4;
    const int64_t groups = (size + group - 1) / group, row = kind == 5 ? (size + 31) / 32 * 16 : size;
    const int64_t each = kind == 0 ? 4 : kind < 4 ? 2 : 1;
    uint8_t* weight = static_cast<uint8_t*>(take(outputs * row * each));
    float* scales = static_cast<float*>(take(outputs * groups * 4));
    uint8_t* zero = static_cast<uint8_t*>(take(outputs * groups));
    float *x = static_cast<float*>(take(rows * size * 4)), *y = static_cast<float*>(take(rows * outputs * 4));
    for (int64_t i = 0; i < outputs * row; ++i) {
        const float f = number();
        const uint16_t positive = static_cast<uint16_t>(0x3800 + draw() % 1024);  // 0.5 and more, or 2^-15 in bfloat16
        if (kind == 0) memcpy(weight + 4 * i, &f, 4);
        if (kind == 2 || kind == 3) memcpy(weight + 2 * i, &positive, 2);
        if (whole) weight[i] = static_cast<uint8_t>(draw());
    }
    for (int64_t i = 0; i < outputs * groups; ++i) scales[i] = number(), zero[i] = static_cast<uint8_t>(draw() % 16);
    for (int64_t i = 0; i < rows * size; ++i) x[i] = number() * scale;
    const ssmzoo::WeightArguments w = {weight, whole ? scales : nullptr, zeros ? zero : nullptr, kind, 0, outputs, size, group};
    const ssmzoo::QuantizedLinearArguments a = {w, x, nullptr, y, 0, rows, size, 1, rounded};
    if (SSMZOO_JOIN(SSMZOO_ISA, quantized_linear)(&a)) exit(2);
    const int64_t span = group < 128 ? group : 128;
    double* read = static_cast<double*>(take(size * 8));  // a row of x as the kernel takes it
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t k = 0; k < size; ++k) read[k] = x[r * size + k];
        for (int64_t begin = 0; rounded && begin < size; begin += span) {
            const int64_t end = begin + span < size ? begin + span : size;
            float largest = 0;
            for (int64_t k = begin; k < end; ++k) largest = fmaxf(largest, fabsf(x[r * size + k]));
            const float step = fmaxf(largest / 127.0f, 0x1p-100f);
            for (int64_t k = begin; k < end; ++k) read[k] = static_cast<double>(nearbyintf(x[r * size + k] / step)) * step;
        }
        for (int64_t o = 0; o < outputs; ++o) {
            double sum = 0, sizes = 0;
            for (int64_t k = 0; k < size; ++k) {
                double q;
                const uint8_t* at = weight + o * row * each;
                if (kind == 5) {
                    const int byte = at[k / 32 * 16 + k % 16];
                    q = (k % 32 < 16 ? byte & 15 : byte >> 4) - (zeros ? zero[o * groups + k / group] : 8);
                } else if (kind == 4) {
                    q = static_cast<int8_t>(at[k]);
                } else if (kind == 0) {
                    float f;
                    memcpy(&f, at + 4 * k, 4);
                    q = f;
                } else {
                    uint16_t bits;
                    memcpy(&bits, at + 2 * k, 2);
                    q = half(bits, kind == 2);
                }
                const double by = whole ? scales[o * groups + k / group] : 1.0;
                sum += by * q * read[k];
                sizes += fabs(by) * (fabs(q) + (kind == 5 ? 16 : 0)) * fabs(read[k]);
            }
            const double off = fabs(y[r * outputs + o] - sum);
            if (!(off <= 1e-6 * sizes + 1e-37)) {
                if (failures++ < 9)
                    printf("weights %d, %d inputs in groups of %d, rounded %d, row %d, output %d: %g, not %g\n",
                           static_cast<int>(kind), static_cast<int>(size), static_cast<int>(group), rounded,
                           static_cast<int>(r), static_cast<int>(o), y[r * outputs + o], sum);
            }
        }
    }
    if (kind == 5) note(y, static_cast<size_t>(rows * outputs) * 4);
    free(weight), free(scales), free(zero), free(x), free(y), free(read);
}

}  // namespace

int main() {
    for (int64_t size : {1, 31, 32, 33, 64, 70, 96, 128, 129, 200, 300, 512, 2080, 9000})
        for (int64_t group : {32, 64, 96, 128, 256, 10000})
            for (int rounded = 0; rounded < 2; ++rounded) {
                if (rounded && group > 128 && group % 128 && group < size) continue;
                for (float scale : {1e-30f, 1.0f, 1e20f})
                    try_one(5, size, group < size ? group : size, 6, 3, rounded, scale == 1.0f, scale);
            }
    for (int64_t kind : {0, 2, 3, 4})
        for (int64_t size : {1, 15, 70, 300})
            for (int64_t rows : {1, 5}) try_one(kind, size, size, 6, rows, false, false, 1.0f);
    if (failures) return 1;
    printf("%016llx\n", static_cast<unsigned long long>(digest));
}
