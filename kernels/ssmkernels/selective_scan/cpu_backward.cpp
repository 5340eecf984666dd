// The selective scan, backward. With e_t the gradient of C_t h_t, and g_t that of h_t:
//
//     g_t = C_t e_t + a_{t+1} g_{t+1}             a_t = exp(dt_t A)
//     dC_t = sum_d h_t e_t      dB_t = sum_d g_t dt_t u_t      du_t = dt_t q_t + D e_t,   q_t = sum_n g_t B_t
//     ddt_t = u_t q_t + sum_n p_t A      dA = sum_t p_t dt_t      p_t = g_t a_t h_{t-1}
//
// Chunks are taken from the last to the first: from its saved first state a chunk's states are computed again.
#include "selective_scan/cpu_windows.h"

namespace ssmzoo {

namespace SSMZOO_ISA {
namespace {

// What a task has beside its walk. All arrays are (., 64).
template <class S>
struct Adjoint {
    S *g, *dA, *dB, *dC, *dD, *dbias;  // dA to dbias in the order of Partial::parameters
    S *e, *y, *q, *ddt;                // of the chunk; ddt is sum_n p A
    S *decays, *states;                // of the chunk, for one group of n and vectors
    S *maps;                           // (chunk 2n) of the tile
    bool gated;

    static constexpr int kGroup = 4, kVectors = 2;

    static int64_t size(int64_t n, int64_t chunk) {
        return (4 * n + 2 + 4 * chunk) * kTile + 2 * chunk * kGroup * kVectors * Lanes<S>::count;
    }

    void take(S* p, int64_t n, int64_t chunk) {
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
        states = decays + chunk * kGroup * kVectors * Lanes<S>::count;
    }
};

// N states from the j-th on, for M vectors of channels from c on, through a chunk: forward once more, then backward.
template <class S, int N, int M, bool fixed_B, bool fixed_C, bool guarded>
void chunk_adjoint(const Walk<S>& w, const Adjoint<S>& r, Map<S, fixed_B> B, Map<S, fixed_C> C, int64_t n, int64_t j,
                   int64_t c, int64_t steps) {
    using V = typename Lanes<S>::V;
    constexpr int lanes = Lanes<S>::count;
    V h[N][M];
    for (int i = 0; i < N; ++i)
        for (int m = 0; m < M; ++m) h[i][m] = load(w.h + (j + i) * kTile + c + m * lanes);
    for (int64_t t = 0; t < steps; ++t)
        for (int m = 0; m < M; ++m) {
            const int64_t at = t * kTile + c + m * lanes;
            const V dt = load(w.dt + at), dtu = load(w.dtu + at);
            V sum = load(r.y + at);
            for (int i = 0; i < N; ++i) {
                const int64_t k = ((t * N + i) * M + m) * lanes, channel = c + m * lanes;
                const V decay = exp2_product<S, guarded>(dt, load(w.A_log2e + (j + i) * kTile + channel));
                h[i][m] = fma(decay, h[i][m], dtu * B(t, j + i, channel));
                sum = fma(h[i][m], C(t, j + i, channel), sum);
                store(r.decays + k, decay);
                store(r.states + k, h[i][m]);
            }
            if (r.gated) store(r.y + at, sum);
        }

    V g[N][M], dA[N][M], dB[N][M], dC[N][M];
    for (int i = 0; i < N; ++i)
        for (int m = 0; m < M; ++m) {
            const int64_t at = (j + i) * kTile + c + m * lanes;
            g[i][m] = load(r.g + at);
            dA[i][m] = load(r.dA + at);
            if (fixed_B) dB[i][m] = load(r.dB + at);
            if (fixed_C) dC[i][m] = load(r.dC + at);
        }
    for (int64_t t = steps - 1; t >= 0; --t) {
        V sums[2 * N];
        for (int i = 0; i < 2 * N; ++i) sums[i] = V{};
        for (int m = 0; m < M; ++m) {
            const int64_t channel = c + m * lanes, at = t * kTile + channel;
            const V dt = load(w.dt + at), dtu = load(w.dtu + at), e = load(r.e + at);
            V q = load(r.q + at), ddt = load(r.ddt + at);
            for (int i = 0; i < N; ++i) {
                const int64_t k = ((t * N + i) * M + m) * lanes;
                const V before = t ? load(r.states + k - N * M * lanes) : load(w.h + (j + i) * kTile + channel);
                const V now = fma(C(t, j + i, channel), e, g[i][m]);
                q = fma(now, B(t, j + i, channel), q);
                if (fixed_B) dB[i][m] = fma(now, dtu, dB[i][m]);
                else sums[i] = fma(now, dtu, sums[i]);
                if (fixed_C) dC[i][m] = fma(load(r.states + k), e, dC[i][m]);
                else sums[N + i] = fma(load(r.states + k), e, sums[N + i]);
                g[i][m] = now * load(r.decays + k);
                const V p = g[i][m] * before;
                ddt = fma(p, load(w.A + (j + i) * kTile + channel), ddt);
                dA[i][m] = fma(p, dt, dA[i][m]);
            }
            store(r.q + at, q);
            store(r.ddt + at, ddt);
        }
        // 2 N sums may be more than there are lanes: as many at a time as there are
        constexpr int at_once = 2 * N < lanes ? 2 * N : lanes;
        if (!fixed_B || !fixed_C)
            for (int first = 0; first < 2 * N; first += at_once) {
                S total[lanes];
                store(total, sum_lanes<S, at_once>(sums + first));
                for (int i = first; i < first + at_once; ++i)
                    r.maps[t * 2 * n + (i < N ? 0 : n) + j + i % N] += total[i - first];
            }
    }
    for (int i = 0; i < N; ++i)
        for (int m = 0; m < M; ++m) {
            const int64_t at = (j + i) * kTile + c + m * lanes;
            store(r.g + at, g[i][m]);
            store(r.dA + at, dA[i][m]);
            if (fixed_B) store(r.dB + at, dB[i][m]);
            if (fixed_C) store(r.dC + at, dC[i][m]);
        }
}

template <class S, int M, bool fixed_B, bool fixed_C, bool guarded>
void all_states(const Walk<S>& w, const Adjoint<S>& r, Map<S, fixed_B> B, Map<S, fixed_C> C, int64_t n, int64_t c,
                int64_t steps) {
    int64_t j = 0;
    for (; j + 4 <= n; j += 4) chunk_adjoint<S, 4, M, fixed_B, fixed_C, guarded>(w, r, B, C, n, j, c, steps);
    if (n & 2) chunk_adjoint<S, 2, M, fixed_B, fixed_C, guarded>(w, r, B, C, n, j, c, steps), j += 2;
    if (n & 1) chunk_adjoint<S, 1, M, fixed_B, fixed_C, guarded>(w, r, B, C, n, j, c, steps);
}

template <class S, bool fixed_B, bool fixed_C, bool guarded>
void all_channels(const Walk<S>& w, const Adjoint<S>& r, Map<S, fixed_B> B, Map<S, fixed_C> C, int64_t n,
                  int64_t channels, int64_t steps) {
    constexpr int64_t lanes = Lanes<S>::count;
    int64_t c = 0;
    for (; c + lanes < channels; c += 2 * lanes) all_states<S, 2, fixed_B, fixed_C, guarded>(w, r, B, C, n, c, steps);
    if (c < channels) all_states<S, 1, fixed_B, fixed_C, guarded>(w, r, B, C, n, c, steps);
}

template <class T, bool fixed_B, bool fixed_C>
void item_adjoint(const ScanBackwardArguments& b, const Item& item, int64_t item_index, int64_t tile_index,
                  const Partial<typename Sum<T>::type>& partial, char* scratch) {
    typedef typename Sum<T>::type S;
    using V = typename Lanes<S>::V;
    constexpr int lanes = Lanes<S>::count;
    const ScanArguments& a = b.forward;
    const Sequence& s = item.s;
    const int64_t n = a.n, tiles = a.groups * tiles_per_group(a);
    const Tile tile_ = tile(a, tile_index);
    Walk<S> w;
    Adjoint<S> r;
    r.take(w.take(reinterpret_cast<S*>(scratch), n, a.chunk), n, a.chunk);
    r.gated = a.z != nullptr;
    w.read_tile(a, tile_);

    const int64_t state = (s.index * a.d + tile_.first) * n;
    S* carry = partial.carry + tile_index * n * kTile;
    if (item.last < ceil_div(s.length, a.chunk))
        memcpy(r.g, carry, sizeof(S) * static_cast<size_t>(n * kTile));
    else if (b.dfinal)
        read_transposed(r.g, at<S>(b.dfinal, state), n, tile_.channels, S(1));
    else
        memset(r.g, 0, sizeof(S) * static_cast<size_t>(n * kTile));
    memset(r.dA, 0, sizeof(S) * static_cast<size_t>(partial.parameters_size));

    for (int64_t chunk = item.last - 1; chunk >= item.first; --chunk) {
        const int64_t t0 = chunk * a.chunk, steps = minimum(a.chunk, s.length - t0);
        const S* start = at<S>(a.starts, (s.first_chunk + chunk) * n * a.d + tile_.first);
        for (int64_t j = 0; j < n; ++j)
            for (int64_t c = 0; c < tile_.channels; c += lanes)
                store(w.h + j * kTile + c, read_some(start + j * a.d + c, tile_.channels - c));
        const bool safe = w.template read_steps<T>(a, tile_, s, t0, steps);
        const int64_t row = s.start + t0, out = (s.batch * a.length + row) * a.d + tile_.first;
        const T* u = at<T>(a.u, s.batch * a.u_batch + row * a.u_time + tile_.first);
        const T* dy = at<T>(b.dy, s.batch * b.dy_batch + row * b.dy_time + tile_.first);
        const T* z = a.z ? at<T>(a.z, s.batch * a.z_batch + row * a.z_time + tile_.first) : nullptr;
        const T* delta = at<T>(a.delta, s.batch * a.delta_batch + row * a.delta_time + tile_.first);
        for (int64_t t = 0; t < steps; ++t)
            for (int64_t c = 0; c < tile_.channels; c += lanes) {
                const int64_t i = t * kTile + c, count = tile_.channels - c;
                V e = read_some(dy + t * b.dy_time + c, count);
                if (z) e = e * silu<S>(read_some(z + t * a.z_time + c, count));
                store(r.e + i, e);
                store(r.y + i, a.D && z ? load(w.D + c) * read_some(u + t * a.u_time + c, count) : V{});
                store(r.q + i, V{});
                store(r.ddt + i, V{});
            }
        const int64_t position = item.offset + (chunk - item.first) * a.chunk;
        r.maps = partial.maps + (tile_index * partial.positions + position) * 2 * n;
        memset(r.maps, 0, sizeof(S) * static_cast<size_t>(steps * 2 * n));
        const Map<S, fixed_B> B = w.template map_B<fixed_B>(a, tile_, s, t0);
        const Map<S, fixed_C> C = w.template map_C<fixed_C>(a, tile_, s, t0);
        if (safe)
            all_channels<S, fixed_B, fixed_C, false>(w, r, B, C, n, tile_.channels, steps);
        else
            all_channels<S, fixed_B, fixed_C, true>(w, r, B, C, n, tile_.channels, steps);
        for (int64_t t = 0; t < steps; ++t)
            for (int64_t c = 0; c < tile_.channels; c += lanes) {
                const int64_t i = t * kTile + c, count = tile_.channels - c, o = out + t * a.d + c;
                const V x = read_some(u + t * a.u_time + c, count), q = load(r.q + i), e = load(r.e + i);
                V du = load(w.dt + i) * q;
                if (a.D) du = fma(load(w.D + c), e, du);
                write_some(static_cast<T*>(b.du) + o, du, count);
                V ddelta = fma(x, q, load(r.ddt + i));
                if (a.softplus)
                    ddelta = ddelta * sigmoid<S>(read_some(delta + t * a.delta_time + c, count) + load(w.bias + c));
                write_some(static_cast<T*>(b.ddelta) + o, ddelta, count);
                store(r.dD + c, fma(e, x, load(r.dD + c)));
                store(r.dbias + c, load(r.dbias + c) + ddelta);
                if (z) {
                    const V gate = read_some(z + t * a.z_time + c, count), sigma = sigmoid<S>(gate);
                    const V slope = sigma * fma(gate, splat<S>(S(1)) - sigma, splat<S>(S(1)));
                    const V dz = read_some(dy + t * b.dy_time + c, count) * load(r.y + i) * slope;
                    write_some(static_cast<T*>(b.dz) + o, dz, count);
                }
            }
    }
    if (item.first > 0)
        memcpy(carry, r.g, sizeof(S) * static_cast<size_t>(n * kTile));
    else if (b.dinitial)
        write_transposed(static_cast<S*>(b.dinitial) + state, r.g, n, tile_.channels);
    memcpy(partial.parameters + (item_index * tiles + tile_index) * partial.parameters_size, r.dA,
           sizeof(S) * static_cast<size_t>(partial.parameters_size));
}

template <class T>
int scan_backward(const ScanBackwardArguments& b) {
    typedef typename Sum<T>::type S;
    const ScanArguments& a = b.forward;
    const int64_t n = a.n, tiles = a.groups * tiles_per_group(a);
    const int64_t affordable = kWindowBytes / (tiles * 2 * n * static_cast<int64_t>(sizeof(S))) / a.chunk;
    const int64_t needed = ceil_div(a.length * (a.cu_seqlens ? 1 : a.sequences), a.chunk) + a.sequences;
    const int64_t positions = a.chunk * minimum(needed, affordable < 1 ? 1 : affordable);
    const int64_t parameters = (3 * n + 2) * kTile;
    const Scratch maps(sizeof(S) * static_cast<size_t>(tiles * positions * 2 * n));
    const Scratch sums(sizeof(S) * static_cast<size_t>(minimum(kItems, a.sequences) * tiles * parameters));
    const Scratch carry(sizeof(S) * static_cast<size_t>(tiles * n * kTile));
    if (!maps.data || !sums.data || !carry.data) return kOutOfMemory;
    const Partial<S> partial = {reinterpret_cast<S*>(maps.data), reinterpret_cast<S*>(sums.data),
                                reinterpret_cast<S*>(carry.data), positions, parameters};
    const size_t bytes = sizeof(S) * static_cast<size_t>(Walk<S>::size(n, a.chunk) + Adjoint<S>::size(n, a.chunk));
    Cursor cursor = {0, -1};
    while (cursor.index < a.sequences) {
        const Window window = cursor.next(a, positions);
        int failed = parallel_for(window.count * tiles, a.threads, bytes, [&](int64_t i, char* scratch) {
            const int64_t part = i / tiles, tile_index = i % tiles;
            const Item& item = window.items[part];
            if (a.fixed_B && a.fixed_C) return item_adjoint<T, true, true>(b, item, part, tile_index, partial, scratch);
            if (a.fixed_B) return item_adjoint<T, true, false>(b, item, part, tile_index, partial, scratch);
            if (a.fixed_C) return item_adjoint<T, false, true>(b, item, part, tile_index, partial, scratch);
            return item_adjoint<T, false, false>(b, item, part, tile_index, partial, scratch);
        });
        const int64_t chunks = ceil_div(window.positions, a.chunk);
        failed = failed || parallel_for(tiles + chunks, a.threads, 0, [&](int64_t i, char*) {
            if (i < tiles) return add_items(b, partial, window, i);
            add_chunk(b, partial, window, i - tiles);
        });
        if (failed) return failed;
    }
    return 0;
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT(selective_scan_backward)(const ssmzoo::ScanBackwardArguments* b) {
    using namespace ssmzoo::SSMZOO_ISA;
    switch (b->forward.dtype) {
        case 0: return scan_backward<float>(*b);
        case 1: return scan_backward<double>(*b);
        case 2: return scan_backward<bfloat16>(*b);
        default: return scan_backward<float16>(*b);
    }
}
