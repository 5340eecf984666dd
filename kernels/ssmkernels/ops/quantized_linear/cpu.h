// Weights in few bits, read as vectors of float.
#pragma once

#include "native/half.h"
#include "native/tiles.h"

namespace ssmzoo {

// The same for all kernels of the op: y = x Wᵀ + bias, with W[o, k] = scales[o, k / group] (q[o, k] - zeros[…]).
struct WeightArguments {
    const void* weight;  // float kinds and int8: (outputs, size); 4 bits: (outputs, ceil(size / 32), 16) bytes
    const void *scales, *zeros;  // (outputs, ceil(size / group)) of `scales_dtype`, or null: 1; uint8, or null
    int64_t kind, scales_dtype, outputs, size, group;
};

namespace SSMZOO_ISA {

constexpr int64_t kBlock = 32;   // 4-bit weights: 16 bytes, whose low halves are the first 16 of them
constexpr int64_t kChunk = 128;  // weights of an output that are unpacked at once, all of one group
constexpr int64_t kNibbles = 5;  // the number that Python gives to weights of 4 bits
constexpr int kMiddle = 8;       // what 4-bit weights without zeros count from

struct Nibbles {
    uint8_t byte;
};

typedef uint8_t HalfBlock __attribute__((vector_size(kBlock / 2)));

struct integer8 {
    int8_t value;
};

struct natural8 {
    uint8_t value;
};

SSMZOO_INLINE float widen(integer8 x) { return static_cast<float>(x.value); }
SSMZOO_INLINE float widen(natural8 x) { return static_cast<float>(x.value); }

#if SSMZOO_VECTOR_BYTES == 64
template <>
SSMZOO_INLINE VF read(const integer8* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

template <>
SSMZOO_INLINE VF read(const natural8* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
#elif SSMZOO_VECTOR_BYTES == 32
template <>
SSMZOO_INLINE VF read(const integer8* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

template <>
SSMZOO_INLINE VF read(const natural8* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
#elif defined(__x86_64__)
SSMZOO_INLINE __m128i four_bytes(const void* p) {
    int32_t bytes;
    memcpy(&bytes, p, sizeof bytes);
    return _mm_cvtsi32_si128(bytes);
}

template <>
SSMZOO_INLINE VF read(const integer8* p) {
    const __m128i zero = _mm_setzero_si128();
    const __m128i upper = _mm_unpacklo_epi16(zero, _mm_unpacklo_epi8(zero, four_bytes(p)));  // each in its lane's top
    return _mm_cvtepi32_ps(_mm_srai_epi32(upper, 24));
}

template <>
SSMZOO_INLINE VF read(const natural8* p) {
    const __m128i zero = _mm_setzero_si128();
    return _mm_cvtepi32_ps(_mm_unpacklo_epi16(_mm_unpacklo_epi8(four_bytes(p), zero), zero));
}
#elif defined(__aarch64__)
SSMZOO_INLINE uint8x8_t four_bytes(const void* p) {
    uint32_t bytes;
    memcpy(&bytes, p, sizeof bytes);
    return vreinterpret_u8_u32(vdup_n_u32(bytes));
}

template <>
SSMZOO_INLINE VF read(const integer8* p) {
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(four_bytes(p))))));
}

template <>
SSMZOO_INLINE VF read(const natural8* p) {
    return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(four_bytes(p)))));
}
#endif

// Bytes in which so many of an output's weights lie: whole blocks in 4 bits.
template <class W>
SSMZOO_INLINE int64_t bytes_of(int64_t size) {
    return size * static_cast<int64_t>(sizeof(W));
}

template <>
SSMZOO_INLINE int64_t bytes_of<Nibbles>(int64_t size) {
    return (size + kBlock - 1) / kBlock * (kBlock / 2);
}

// The type that a kind of weights is multiplied from, and so many of an output's weights in it, from number k on: as they
// lie in memory, or in `spare` less the zero.
template <class W>
struct Decoded {
    typedef W type;
    static SSMZOO_INLINE const W* at(const char* row, int64_t k, int64_t, int, integer8*) {
        return reinterpret_cast<const W*>(row) + k;
    }
};

template <>
struct Decoded<Nibbles> {
    typedef integer8 type;
    static SSMZOO_INLINE const integer8* at(const char* row, int64_t k, int64_t count, int zero, integer8* spare) {
        const HalfBlock less = HalfBlock{} + static_cast<uint8_t>(zero);
        const char* from = row + bytes_of<Nibbles>(k);
        for (int64_t j = 0; j < count; j += kBlock, from += sizeof(HalfBlock)) {
            HalfBlock bytes;
            memcpy(&bytes, from, sizeof bytes);
            const HalfBlock halves[2] = {(bytes & 15) - less, (bytes >> 4) - less};
            memcpy(spare + j, halves, sizeof halves);
        }
        return spare;
    }
};

SSMZOO_INLINE float scale_of(const WeightArguments& w, int64_t i) {
    if (!w.scales) return 1.0f;
    switch (w.scales_dtype) {
        case 0: return *at<float>(w.scales, i);
        case 2: return widen(*at<bfloat16>(w.scales, i));
        default: return widen(*at<float16>(w.scales, i));
    }
}

SSMZOO_INLINE int zero_of(const WeightArguments& w, int64_t i) {
    return w.zeros ? *at<uint8_t>(w.zeros, i) : kMiddle;
}

// call(zero) with a zero of the type of this kind of weights, by the numbers that Python gives them.
template <class Call>
SSMZOO_INLINE int by_kind(int64_t kind, const Call& call) {
    switch (kind) {
        case 0: return call(float());
        case 2: return call(bfloat16());
        case 3: return call(float16());
        case 4: return call(integer8());
        default: return call(Nibbles());
    }
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
