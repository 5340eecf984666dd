// What the selective scan's forward and backward passes share: arguments, tiles of channels, and the walk over time.
//
// Lanes are channels. A task takes one sequence and one tile of up to 64 channels of one group, and walks over time in
// chunks. What is read per (position, channel) is read once a chunk, widened, and laid out (time, 64) in scratch
// memory; the states of a few n at a time then stay in registers for the whole chunk.
#pragma once

#include "native/exports.h"
#include "native/math.h"
#include "native/parallel.h"
#include "native/rows.h"
#include "selective_scan/cpu_numbers.h"

namespace ssmzoo {

// S is float, or double where activations are. A, B, C and all states are real or complex; if
// complex, two reals a number: n and strides count reals. The last axis is contiguous.
struct ScanArguments {
    const void *u, *delta, *z;                          // (b l d), any floating dtype; z may be null
    const void *A, *B, *C;                              // S: (d n); (b l g n), or (d n) where fixed
    const void *D, *delta_bias, *initial;               // S: (d), (d), (s d n), or null
    const int32_t* cu_seqlens;                          // (s + 1) or null
    void *y, *final_state, *starts;                     // (b l d); S: (s d n); (chunks n d) or null
    int64_t dtype, sequences, length, d, n, groups, softplus, fixed_B, fixed_C, chunk, threads;
    int64_t u_batch, u_time, delta_batch, delta_time, z_batch, z_time, B_batch, B_time, C_batch, C_time;
};

namespace SSMZOO_ISA {

// One sequence: where it lies, and which of the saved states are its own.
struct Sequence {
    int64_t index, batch, start, length, first_chunk;
};

inline Sequence sequence(const ScanArguments& a, int64_t i) {
    if (!a.cu_seqlens) return {i, i, 0, a.length, i * ceil_div(a.length, a.chunk)};
    const int64_t start = a.cu_seqlens[i], end = a.cu_seqlens[i + 1];
    return {i, 0, start, end - start, start / a.chunk + i};  // at most length / chunk + 1 chunks each: none overlap
}

// Whether one activation is more than a cache holds.
inline bool is_large(const ScanArguments& a) {
    return (a.cu_seqlens ? 1 : a.sequences) * a.length * a.d * bytes_of(a.dtype) >= kLarge;
}

// One tile: its first channel, how many there are, and their group.
struct Tile {
    int64_t first, channels, group;
};

inline int64_t tiles_per_group(const ScanArguments& a) { return ceil_div(a.d / a.groups, kTile); }

inline Tile tile(const ScanArguments& a, int64_t i) {
    const int64_t per_group = tiles_per_group(a), size = a.d / a.groups;
    const int64_t group = i / per_group, within = i % per_group * kTile;
    return {group * size + within, minimum(kTile, size - within), group};
}

// Rows of another chunk, to be brought near while the present one is computed. Each lies in a page of its own, and with
// so few channels of it taken at a time, the machine would not see the next one coming. Rows need not exist.
struct Ahead {
    static constexpr int kArrays = 4;
    uintptr_t rows[kArrays];  // where none is given, the first once more
    int64_t steps[kArrays];   // in bytes
    int64_t size;             // of an element

    // Where each array begins, a null one left out, its first row in elements from there, and elements between rows.
    static Ahead of(int64_t dtype, const void* const (&arrays)[kArrays], const int64_t (&first)[kArrays],
                    const int64_t (&steps)[kArrays]) {
        Ahead ahead;
        ahead.size = bytes_of(dtype);
        for (int i = 0; i < kArrays; ++i) {
            const int k = arrays[i] ? i : 0;
            ahead.rows[i] = reinterpret_cast<uintptr_t>(arrays[k]) + static_cast<uintptr_t>(first[k] * ahead.size);
            ahead.steps[i] = steps[k] * ahead.size;
        }
        return ahead;
    }

    // The rows so many steps later.
    Ahead moved(int64_t by) const {
        Ahead ahead = *this;
        for (int i = 0; i < kArrays; ++i) ahead.rows[i] += static_cast<uintptr_t>(by * steps[i]);
        return ahead;
    }

    template <bool write>
    SSMZOO_INLINE void fetch(int64_t t, int64_t c) const {
        for (int i = 0; i < kArrays; ++i) {
            const uintptr_t at = rows[i] + static_cast<uintptr_t>(t * steps[i] + c * size);
            __builtin_prefetch(reinterpret_cast<const void*>(at), write, 2);
        }
    }
};

// What the input map B, or the output map C, varies over. What runs rarely is compiled for `unknown` alone.
enum class Over { time, channels, unknown };

// Such a map: at each time one number for all lanes, or for all time one a channel.
template <class K, Over over = Over::unknown>
struct Map {
    const typename K::S* p;
    int64_t stride;  // over time
    bool is_fixed;

    template <Over known>
    SSMZOO_INLINE Map<K, known> as() const {
        return {p, stride, is_fixed};
    }

    SSMZOO_INLINE bool fixed() const { return over == Over::unknown ? is_fixed : over == Over::channels; }

    SSMZOO_INLINE typename K::Number operator()(int64_t t, int64_t j, int64_t c) const {
        return fixed() ? K::load(p + j * K::parts * kTile + c, kTile) : K::splat(p + t * stride + j * K::parts);
    }
};

// f(B, C) for the maps as what they are if that is worth code of its own (`often`), else as ones of which any may be.
template <bool often, class K, class F>
SSMZOO_INLINE void with_maps(const Map<K>& B, const Map<K>& C, const F& f) {
    if constexpr (often) {
        if (!B.is_fixed && !C.is_fixed) return f(B.template as<Over::time>(), C.template as<Over::time>());
        if (!C.is_fixed) return f(B.template as<Over::channels>(), C.template as<Over::time>());
        if (!B.is_fixed) return f(B.template as<Over::time>(), C.template as<Over::channels>());
        return f(B.template as<Over::channels>(), C.template as<Over::channels>());
    } else {
        f(B, C);
    }
}

// A tile of parameters and its walk through a sequence. All scratch arrays are (., 64).
template <class K>
struct Walk {
    typedef typename K::S S;
    typedef typename K::V V;

    S *A, *rates, *B, *C, *D, *bias, *h;  // B and C where fixed; h is the state (n 64)
    S *dt, *dtu;                          // of the present chunk
    S limit;                              // of |dt|, for decays to go unguarded

    static int64_t size(int64_t n, int64_t chunk) {
        return (4 * n + n / K::parts * K::rate_parts + 2 * chunk + 2) * kTile;
    }

    S* take(S* p, int64_t n, int64_t chunk) {
        A = p;
        rates = A + n * kTile;
        B = rates + n / K::parts * K::rate_parts * kTile;
        C = B + n * kTile;
        h = C + n * kTile;
        dt = h + n * kTile;
        dtu = dt + chunk * kTile;
        D = dtu + chunk * kTile;
        bias = D + kTile;
        return bias + kTile;
    }

    SSMZOO_INLINE typename K::Rate rate(int64_t j, int64_t c) const {
        return K::load_rate(rates + j * K::rate_parts * kTile + c);
    }

    void read_tile(const ScanArguments& a, Tile tile) {
        const int64_t offset = tile.first * a.n;
        read_transposed(A, at<S>(a.A, offset), a.n, tile.channels, S(1));
        if (a.fixed_B) read_transposed(B, at<S>(a.B, offset), a.n, tile.channels, S(1));
        if (a.fixed_C) read_transposed(C, at<S>(a.C, offset), a.n, tile.channels, S(1));
        read_parameters(D, a.D, tile.first, tile.channels);
        read_parameters(bias, a.delta_bias, tile.first, tile.channels);
        S largest = S(0);
        bool finite = true;
        for (int64_t j = 0; j < a.n / K::parts; ++j)
            for (int64_t c = 0; c < kTile; c += Lanes<S>::count) {
                const typename K::Rate rate = K::rate(K::load(A + j * K::parts * kTile + c, kTile));
                K::store_rate(rates + j * K::rate_parts * kTile + c, rate);
                S reach[Lanes<S>::count];
                store(reach, K::reach(rate));
                for (const S size : reach) {
                    finite = finite && size - size == S(0);
                    if (size > largest) largest = size;
                }
            }
        limit = finite ? exp2_safe<S> / (largest + S(1)) : S(-1);
    }

    Map<K> map_B(const ScanArguments& a, Tile tile, const Sequence& s, int64_t t0) const {
        if (a.fixed_B) return {B, 0, true};
        return {at<S>(a.B, s.batch * a.B_batch + (s.start + t0) * a.B_time + tile.group * a.n), a.B_time, false};
    }

    Map<K> map_C(const ScanArguments& a, Tile tile, const Sequence& s, int64_t t0) const {
        if (a.fixed_C) return {C, 0, true};
        return {at<S>(a.C, s.batch * a.C_batch + (s.start + t0) * a.C_time + tile.group * a.n), a.C_time, false};
    }

    // u, delta → dt, dtu. Returns whether decays may go unguarded: |dt A| is small throughout, and nothing is NaN.
    bool read_steps(bool softplus_, int64_t channels, Rows<S> u, Rows<S> delta, int64_t steps) {
        const V bound = splat<S>(limit);
        auto safe = bound == bound;
        for (int64_t t = 0; t < steps; ++t)
            for (int64_t c = 0; c < channels; c += Lanes<S>::count) {
                const int64_t i = t * kTile + c, count = channels - c;
                V step = delta(t, c, count) + load(bias + c);
                if (softplus_) step = softplus<S>(step);
                store(dt + i, step);
                store(dtu + i, step * u(t, c, count));
                safe &= absolute<S>(step) <= bound;
            }
        bool all = true;
        for (int i = 0; i < Lanes<S>::count; ++i) all = all && safe[i] != 0;
        return all;
    }
};

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
