// The selective scan, backward through one chunk. With e_t the gradient of C_t h_t, and g_t that of h_t:
//
//     g_t = C_t e_t + a_{t+1} g_{t+1}             a_t = exp(dt_t A)
//     dC_t = sum_d h_t e_t      dB_t = sum_d g_t dt_t u_t      du_t = dt_t q_t + D e_t,   q_t = sum_n g_t B_t
//     ddt_t = u_t q_t + sum_n p_t A      dA = sum_t p_t dt_t      p_t = g_t a_t h_{t-1}
//
// Chunks are taken from the last to the first: from its saved first state a chunk's states are computed again.
#pragma once

#include "selective_scan/cpu.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

// What a task has beside its walk. All arrays are (., 64).
template <class K>
struct Adjoint {
    typedef typename K::S S;

    S *g, *dA, *dB, *dC, *dD, *dbias;  // dA to dbias in the order of Partial::parameters
    S *e, *y, *q, *ddt;                // of the chunk; ddt is sum_n p A
    S *decays, *states;                // of the chunk, for one group of n and vectors
    S *maps;                           // (chunk 2n) of the tile
    bool gated;
    bool safe;                         // decays need no guards in this chunk

    static constexpr int kVectors = 2;
    static constexpr int64_t kGroup = K::backward_states * K::parts * kVectors * Lanes<S>::count;

    static int64_t size(int64_t n, int64_t chunk) { return (4 * n + 2 + 4 * chunk) * kTile + 2 * chunk * kGroup; }

    S* take(S* p, int64_t n, int64_t chunk) {
        g = p;
        dA = g + n * kTile;
        dB = dA + n * kTile;
        dC = dB + n * kTile;
        dD = dC + n * kTile;
        dbias = dD + kTile;
        e = dbias + kTile;
        y = e + chunk * kTile;
        q = y + chunk * kTile;
        ddt = q + chunk * kTile;
        decays = ddt + chunk * kTile;
        states = decays + chunk * kGroup;
        return states + chunk * kGroup;
    }
};

// What the next chunk, which is the one before in time, will read and write.
struct AheadBoth {
    Ahead read, written;
};

// The decays of N states from the j-th on, for M vectors of channels from c on, through a chunk.
template <class K, bool guarded>
void all_decays(const Walk<K>& w, const Adjoint<K>& r, int64_t N, int64_t M, int64_t j, int64_t c, int64_t steps) {
    constexpr int64_t lanes = Lanes<typename K::S>::count;
    for (int64_t i = 0; i < N; ++i)
        for (int64_t m = 0; m < M; ++m) {
            const typename K::Rate rate = w.rate(j + i, c + m * lanes);
            for (int64_t t = 0; t < steps; ++t)
                K::store(r.decays + ((t * N + i) * M + m) * K::parts * lanes, lanes,
                         K::template decay<guarded>(load(w.dt + t * kTile + c + m * lanes), rate));
        }
}

// N states from the j-th on, for M vectors of channels from c on, through a chunk: forward once more, then backward.
template <class K, int N, int M, Over over_B, Over over_C>
void chunk_adjoint(const Walk<K>& w, const Adjoint<K>& r, const AheadBoth& next, Map<K, over_B> B, Map<K, over_C> C,
                   int64_t n, int64_t j, int64_t c, int64_t steps) {
    typedef typename K::S S;
    using V = typename K::V;
    using Number = typename K::Number;
    constexpr int lanes = Lanes<S>::count;
    if (r.safe)
        all_decays<K, false>(w, r, N, M, j, c, steps);
    else
        all_decays<K, true>(w, r, N, M, j, c, steps);
    Number h[N][M];
    for (int i = 0; i < N; ++i)
        for (int m = 0; m < M; ++m) h[i][m] = K::load(w.h + (j + i) * K::parts * kTile + c + m * lanes, kTile);
    for (int64_t t = 0; t < steps; ++t)
        for (int m = 0; m < M; ++m) {
            if (j == 0) next.read.template fetch<false>(t, c + m * lanes);
            const int64_t at = t * kTile + c + m * lanes;
            const V dtu = load(w.dtu + at);
            V sum = load(r.y + at);
            for (int i = 0; i < N; ++i) {
                const int64_t k = ((t * N + i) * M + m) * K::parts * lanes, channel = c + m * lanes;
                h[i][m] = fma(K::load(r.decays + k, lanes), h[i][m], dtu * B(t, j + i, channel));
                sum = fma_real(h[i][m], C(t, j + i, channel), sum);
                K::store(r.states + k, lanes, h[i][m]);
            }
            if (r.gated) store(r.y + at, sum);
        }

    Number g[N][M], dA[N][M], dB[N][M], dC[N][M];
    for (int i = 0; i < N; ++i)
        for (int m = 0; m < M; ++m) {
            const int64_t at = (j + i) * K::parts * kTile + c + m * lanes;
            g[i][m] = K::load(r.g + at, kTile);
            dA[i][m] = K::load(r.dA + at, kTile);
            if (B.fixed()) dB[i][m] = K::load(r.dB + at, kTile);
            if (C.fixed()) dC[i][m] = K::load(r.dC + at, kTile);
        }
    for (int64_t t = steps - 1; t >= 0; --t) {
        Number dB_t[N], dC_t[N];  // where they vary: over the channels, lane by lane
        for (int i = 0; i < N; ++i) dB_t[i] = dC_t[i] = Number{};
        for (int m = 0; m < M; ++m) {
            if (j == 0) next.written.template fetch<true>(t, c + m * lanes);
            const int64_t channel = c + m * lanes, at = t * kTile + channel;
            const V dt = load(w.dt + at), dtu = load(w.dtu + at), e = load(r.e + at);
            V q = load(r.q + at), ddt = load(r.ddt + at);
            for (int i = 0; i < N; ++i) {
                const int64_t row = (j + i) * K::parts * kTile + channel;
                const int64_t k = ((t * N + i) * M + m) * K::parts * lanes;
                const Number before = t ? K::load(r.states + k - N * M * K::parts * lanes, lanes)
                                        : K::load(w.h + row, kTile);
                const Number after = K::load(r.states + k, lanes);
                const Number now = fma(C(t, j + i, channel), e, g[i][m]);
                q = fma_real(now, B(t, j + i, channel), q);
                if (B.fixed()) dB[i][m] = fma(now, dtu, dB[i][m]);
                else dB_t[i] = fma(now, dtu, dB_t[i]);
                if (C.fixed()) dC[i][m] = fma(after, e, dC[i][m]);
                else dC_t[i] = fma(after, e, dC_t[i]);
                g[i][m] = now * K::load(r.decays + k, lanes);
                const Number p = g[i][m] * before;
                ddt = fma_real(p, K::load(w.A + row, kTile), ddt);
                dA[i][m] = fma(p, dt, dA[i][m]);
            }
            store(r.q + at, q);
            store(r.ddt + at, ddt);
        }
        if (!B.fixed() || !C.fixed()) {
            constexpr int half = N * K::parts;
            V sums[2 * half];
            for (int i = 0; i < N; ++i) {
                K::split(dB_t[i], sums + i * K::parts);
                K::split(dC_t[i], sums + half + i * K::parts);
            }
            // These may be more than there are lanes: as many at a time as there are
            constexpr int at_once = 2 * half < lanes ? 2 * half : lanes;
            for (int first = 0; first < 2 * half; first += at_once) {
                S total[lanes];
                store(total, sum_lanes<S, at_once>(sums + first));
                for (int i = first; i < first + at_once; ++i)
                    r.maps[t * 2 * n + (i < half ? 0 : n) + j * K::parts + i % half] += total[i - first];
            }
        }
    }
    for (int i = 0; i < N; ++i)
        for (int m = 0; m < M; ++m) {
            const int64_t at = (j + i) * K::parts * kTile + c + m * lanes;
            K::store(r.g + at, kTile, g[i][m]);
            K::store(r.dA + at, kTile, dA[i][m]);
            if (B.fixed()) K::store(r.dB + at, kTile, dB[i][m]);
            if (C.fixed()) K::store(r.dC + at, kTile, dC[i][m]);
        }
}

template <class K, int M>
void all_states(const Walk<K>& w, const Adjoint<K>& r, const AheadBoth& next, Map<K> B, Map<K> C, int64_t n, int64_t c,
                int64_t steps) {
    in_groups<K::backward_states>(n / K::parts, [&](auto count, int64_t j) {
        constexpr int N = decltype(count)::value;
        with_maps<N == K::backward_states && M == 2 && K::often>(B, C, [&](auto b, auto c_) {
            chunk_adjoint<K, N, M>(w, r, next, b, c_, n, j, c, steps);
        });
    });
}

template <class K>
void all_channels(const Walk<K>& w, const Adjoint<K>& r, const AheadBoth& next, Map<K> B, Map<K> C, int64_t n,
                  int64_t channels, int64_t steps) {
    constexpr int64_t lanes = Lanes<typename K::S>::count;
    int64_t c = 0;
    for (; c + lanes < channels; c += 2 * lanes) all_states<K, 2>(w, r, next, B, C, n, c, steps);
    if (c < channels) all_states<K, 1>(w, r, next, B, C, n, c, steps);
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
