// Numbers in half precision, read and written, in a program of its own that any compiler makes and any machine, or one
// that is emulated, can run. One at a time they are compared with what rounding is by its definition, in double; whole
// vectors and parts of one with one at a time, bit for bit. All upper halves of a float take part, with lower ones on
// both sides of each border, and once more where subnormal numbers count as 0, as in kernels.
#include <math.h>
#include <stdio.h>

#include "native/pairs.h"
#include "native/parallel.h"

namespace {

using namespace ssmzoo::SSMZOO_ISA;

constexpr int kLanes = Lanes<float>::count;
constexpr uint32_t kLower[] = {0,      1,      0x0fff, 0x1000, 0x1001, 0x2fff, 0x3000, 0x3001, 0x5000,
                               0x7000, 0x7fff, 0x8000, 0x8001, 0x9000, 0xb000, 0xd000, 0xf000, 0xffff};

int failures = 0;

template <class T>
void fail(const char* what, uint32_t of, T found) {
    if (++failures <= 20) printf("%s of %08x: found %04x\n", what, of, found.bits);
}

float float_of(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

template <class T>
struct Format;

template <>
struct Format<bfloat16> {
    static constexpr int fraction = 7, least = -126, most = 127;
};

template <>
struct Format<float16> {
    static constexpr int fraction = 10, least = -14, most = 15;
};

// The nearest number of a format, ties to even: nearbyint's own rule. From half a step beyond the largest on, infinity.
template <class T>
double nearest(double x) {
    if (!(fabs(x) < INFINITY) || x == 0) return x;
    int exponent = ilogb(x);
    if (exponent < Format<T>::least) exponent = Format<T>::least;
    const double step = ldexp(1.0, exponent - Format<T>::fraction), y = nearbyint(x / step) * step;
    return fabs(y) < ldexp(1.0, Format<T>::most + 1) ? y : copysign(INFINITY, x);
}

// The number of a pattern, by its sign, exponent and fraction.
template <class T>
double value(T pattern) {
    constexpr int fraction = Format<T>::fraction, exponents = (1 << (15 - fraction)) - 1;
    const int exponent = pattern.bits >> fraction & exponents, rest = pattern.bits & ((1 << fraction) - 1);
    double size = ldexp(rest, Format<T>::least - fraction);
    if (exponent) size = ldexp(rest + (1 << fraction), exponent - 1 + Format<T>::least - fraction);
    if (exponent == exponents) size = rest ? NAN : INFINITY;
    return pattern.bits & 0x8000 ? -size : size;
}

bool same(double x, double y) { return x == y ? signbit(x) == signbit(y) : x != x && y != y; }

template <class F>
void flushing(bool flush, const F& work) {
    if (!flush) return work();
    const FlushSubnormals here;
    work();
}

template <class T>
void try_writing(uint32_t lower, bool flush) {
    for (uint32_t upper = 0; upper < 1 << 16; upper += kLanes) {
        float x[kLanes];
        for (int i = 0; i < kLanes; ++i) x[i] = float_of((upper + i) << 16 | lower);
        const int count = static_cast<int>(upper / kLanes) % (kLanes + 1);
        T alone[kLanes], whole[kLanes], part[kLanes];
        memset(part, 0xa5, sizeof part);
        flushing(flush, [&] {
            for (int i = 0; i < kLanes; ++i) narrow(x[i], alone + i);
            write(whole, load(x));
            write_some(part, load(x), count);
        });
        for (int i = 0; i < kLanes; ++i) {
            const uint32_t bits = (upper + i) << 16 | lower;
            if (!same(value(alone[i]), nearest<T>(x[i]))) fail("one number", bits, alone[i]);
            if (whole[i].bits != alone[i].bits) fail("a whole vector", bits, whole[i]);
            if (part[i].bits != (i < count ? whole[i].bits : 0xa5a5)) fail("a part of a vector", bits, part[i]);
        }
    }
}

// Rows of every length up to some pairs of vectors, each with another number at each place.
template <class T>
void try_rows(uint32_t lower, bool flush) {
    constexpr int most = 5 * kLanes;
    float x[most], wide[most];
    T alone[most], row[most], pair[2 * kLanes];
    int count = 0;
    for (uint32_t upper = 0; upper < 1 << 16; upper += kLanes, count = (count + 1) % (most + 1)) {
        for (int i = 0; i < most; ++i) x[i] = float_of((upper + i) << 16 | lower);
        memset(row, 0xa5, sizeof row);
        memset(wide, 0xa5, sizeof wide);
        flushing(flush, [&] {
            for (int i = 0; i < most; ++i) narrow(x[i], alone + i);
            write_row(row, x, count);
            write_pair(pair, load(x), load(x + kLanes));
            read_row(wide, alone, count);
        });
        for (int i = 0; i < most; ++i) {
            const uint32_t bits = (upper + i) << 16 | lower;
            if (row[i].bits != (i < count ? alone[i].bits : 0xa5a5)) fail("a row", bits, row[i]);
            if (i < 2 * kLanes && pair[i].bits != alone[i].bits) fail("a pair of vectors", bits, pair[i]);
            if (i < count ? !same(wide[i], value(alone[i])) : memcmp(wide + i, "\xa5\xa5\xa5\xa5", 4) != 0)
                fail("reading a row", bits, alone[i]);
        }
    }
}

template <class T>
void try_reading(bool flush) {
    for (uint32_t first = 0; first < 1 << 16; first += kLanes) {
        T patterns[kLanes];
        for (int i = 0; i < kLanes; ++i) patterns[i].bits = static_cast<uint16_t>(first + i);
        const int count = static_cast<int>(first / kLanes) % (kLanes + 1);
        float alone[kLanes], whole[kLanes], part[kLanes];
        flushing(flush, [&] {
            for (int i = 0; i < kLanes; ++i) alone[i] = widen(patterns[i]);
            store(whole, read(patterns));
            store(part, read_some(patterns, count));
        });
        for (int i = 0; i < kLanes; ++i) {
            const float rest = i < count ? whole[i] : 0.0f;
            if (!same(alone[i], value(patterns[i]))) fail("reading one number", first + i, patterns[i]);
            if (!same(whole[i], alone[i])) fail("reading a whole vector", first + i, patterns[i]);
            if (!same(part[i], rest)) fail("reading a part of a vector", first + i, patterns[i]);
        }
    }
}

}  // namespace

int main() {
    for (int flush = 0; flush < 2; ++flush) {
        for (const uint32_t lower : kLower) {
            try_writing<bfloat16>(lower, flush);
            try_writing<float16>(lower, flush);
            try_rows<bfloat16>(lower, flush);
            try_rows<float16>(lower, flush);
        }
        try_reading<bfloat16>(flush);
        try_reading<float16>(flush);
    }
    printf("%d failures\n", failures);
    return failures != 0;
}
