// The selective scan, forward: h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t,  y_t = C_t h_t + D u_t, times silu(z_t).
#pragma once

#include "selective_scan/cpu.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

// N states from the j-th on, for one vector of channels c, through a chunk: adds their part to y.
template <class K, int N, bool guarded, Over over_B, Over over_C>
void advance(const Walk<K>& w, const Ahead& next, Map<K, over_B> B, Map<K, over_C> C, typename K::S* y, int64_t j,
             int64_t c, int64_t steps) {
    using V = typename K::V;
    typename K::Rate A[N];
    typename K::Number h[N];
    for (int i = 0; i < N; ++i) {
        A[i] = w.rate(j + i, c);
        h[i] = K::load(w.h + (j + i) * K::parts * kTile + c, kTile);
    }
    for (int64_t t = 0; t < steps; ++t) {
        if (j == 0) next.fetch<false>(t, c);
        const V dt = load(w.dt + t * kTile + c), dtu = load(w.dtu + t * kTile + c);
        V sum = load(y + t * kTile + c);
        for (int i = 0; i < N; ++i) {
            h[i] = fma(K::template decay<guarded>(dt, A[i]), h[i], dtu * B(t, j + i, c));
            sum = fma_real(h[i], C(t, j + i, c), sum);
        }
        store(y + t * kTile + c, sum);
    }
    for (int i = 0; i < N; ++i) K::store(w.h + (j + i) * K::parts * kTile + c, kTile, h[i]);
}

template <class K>
void advance_all(const Walk<K>& w, const Ahead& next, Map<K> B, Map<K> C, bool safe, typename K::S* y, int64_t n,
                 int64_t channels, int64_t steps) {
    for (int64_t c = 0; c < channels; c += Lanes<typename K::S>::count)
        in_groups<K::forward_states>(n / K::parts, [&](auto count, int64_t j) {
            constexpr int N = decltype(count)::value;
            if (!safe) return advance<K, N, true>(w, next, B, C, y, j, c, steps);
            with_maps<N == K::forward_states && K::often>(B, C, [&](auto b, auto c_) {
                advance<K, N, false>(w, next, b, c_, y, j, c, steps);
            });
        });
}

template <class K>
void scan_tile(const ScanArguments& a, const Sequence& s, Tile tile, char* scratch) {
    typedef typename K::S S;
    using V = typename K::V;
    const bool large = is_large(a);
    Walk<K> w;
    S* y = w.take(reinterpret_cast<S*>(scratch), a.n, a.chunk);
    S *wide_u = y + a.chunk * kTile, *wide = wide_u + a.chunk * kTile;
    const int64_t state = (s.index * a.d + tile.first) * a.n;
    w.read_tile(a, tile);
    if (a.initial)
        read_transposed(w.h, at<S>(a.initial, state), a.n, tile.channels, S(1));
    else
        memset(w.h, 0, sizeof(S) * static_cast<size_t>(a.n * kTile));
    for (int64_t t0 = 0; t0 < s.length; t0 += a.chunk) {
        const int64_t steps = minimum(a.chunk, s.length - t0);
        if (a.starts) {
            S* start = static_cast<S*>(a.starts) + (s.first_chunk + t0 / a.chunk) * a.n * a.d + tile.first;
            for (int64_t j = 0; j < a.n; ++j)
                memcpy(start + j * a.d, w.h + j * kTile, sizeof(S) * static_cast<size_t>(tile.channels));
        }
        const int64_t row = s.start + t0, out = (s.batch * a.length + row) * a.d + tile.first;
        const int64_t u_at = s.batch * a.u_batch + row * a.u_time + tile.first;
        const int64_t delta_at = s.batch * a.delta_batch + row * a.delta_time + tile.first;
        const int64_t z_at = s.batch * a.z_batch + row * a.z_time + tile.first;
        const Rows<S> u = rows<S>(a.dtype, a.u, u_at, a.u_time, steps, tile.channels, wide_u);
        const Rows<S> delta = rows<S>(a.dtype, a.delta, delta_at, a.delta_time, steps, tile.channels, wide);
        const bool safe = w.read_steps(a.softplus != 0, tile.channels, u, delta, steps);
        for (int64_t t = 0; t < steps; ++t)
            for (int64_t c = 0; c < tile.channels; c += Lanes<S>::count)
                store(y + t * kTile + c, a.D ? load(w.D + c) * u(t, c, tile.channels - c) : V{});
        const Ahead next = Ahead::of(a.dtype, {a.u, a.delta, a.z, large ? nullptr : a.y}, {u_at, delta_at, z_at, out},
                                     {a.u_time, a.delta_time, a.z_time, a.d})
                               .moved(a.chunk);
        advance_all(w, next, w.map_B(a, tile, s, t0), w.map_C(a, tile, s, t0), safe, y, a.n, tile.channels, steps);
        const Rows<S> z = rows<S>(a.dtype, a.z, z_at, a.z_time, steps, tile.channels, wide);
        const Results<S> results = {a.y, a.dtype, out, a.d, y, large};
        for (int64_t t = 0; t < steps; ++t)
            for (int64_t c = 0; c < tile.channels; c += Lanes<S>::count) {
                V sum = load(y + t * kTile + c);
                if (z.p) sum = sum * silu<S>(z(t, c, tile.channels - c));
                results.keep(t, c, sum, tile.channels - c);
            }
        results.finish(steps, tile.channels);
    }
    write_transposed(static_cast<S*>(a.final_state) + state, w.h, a.n, tile.channels);
}

template <class K>
int scan_as(const ScanArguments& a) {
    typedef typename K::S S;
    const int64_t tiles = a.groups * tiles_per_group(a), arrays = is_half(a.dtype) ? 3 : 1;
    const size_t bytes = sizeof(S) * static_cast<size_t>(Walk<K>::size(a.n, a.chunk) + arrays * a.chunk * kTile);
    return parallel_for(a.sequences * tiles, a.threads, bytes, [&](int64_t i, char* scratch) {
        scan_tile<K>(a, sequence(a, i / tiles), tile(a, i % tiles), scratch);
    });
}

// Numbers are Real or Complex.
template <template <class> class Numbers>
int scan(const ScanArguments& a) {
    return by_sums(a.dtype, [&](auto zero) { return scan_as<Numbers<decltype(zero)>>(a); });
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

