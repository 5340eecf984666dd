// The selective scan, backward. With e_t the gradient of C_t h_t, and g_t that of h_t:
//
//     g_t = C_t e_t + a_{t+1} g_{t+1}             a_t = exp(dt_t A)
//     dC_t = sum_d h_t e_t      dB_t = sum_d g_t dt_t u_t      du_t = dt_t q_t + D e_t,   q_t = sum_n g_t B_t
//     ddt_t = u_t q_t + sum_n p_t A      dA = sum_t p_t dt_t      p_t = g_t a_t h_{t-1}
//
// Chunks are taken from the last to the first: from its saved first state a chunk's states are computed again. Sums over
// channels are made in two steps: each tile adds up its own channels, into a buffer for a window of positions; when all
// tiles are through the window, the tiles are added up in their order. So the result never depends on the threads.
#include "selective_scan/cpu.h"

namespace ssmzoo {

struct ScanBackwardArguments {
    ScanArguments forward;  // y, final_state and initial unused
    const void *dy, *dfinal;             // (b l d); S: (s d n) or null
    void *du, *ddelta, *dz;              // (b l d), contiguous; dz where z is
    void *dA, *dB, *dC, *dD, *ddelta_bias, *dinitial;  // S; contiguous, shaped as what they are gradients of; the last two may be null
    int64_t dy_batch, dy_time;
};

namespace SSMZOO_ISA {
namespace {

constexpr int64_t kItems = 16;               // parts of sequences in a window, at most
constexpr int64_t kWindowBytes = 8 << 20;    // of the tiles' sums, about

// A part of a sequence: chunks [first, last) of it, whose positions start at `offset` in the window.
struct Item {
    Sequence s;
    int64_t first, last, offset;
};

struct Window {
    Item items[kItems];
    int64_t count, positions;
};

// Walks through all sequences, each from its last chunk to its first.
struct Cursor {
    int64_t index, chunks_left;

    Window next(const ScanArguments& a, int64_t most_positions) {
        Window w;
        w.count = w.positions = 0;
        while (index < a.sequences && w.count < kItems && w.positions + a.chunk <= most_positions) {
            const Sequence s = sequence(a, index);
            if (chunks_left < 0) chunks_left = ceil_div(s.length, a.chunk);
            const int64_t taken = minimum(chunks_left, (most_positions - w.positions) / a.chunk);
            w.items[w.count++] = {s, chunks_left - taken, chunks_left, w.positions};
            w.positions += taken * a.chunk;
            chunks_left -= taken;
            if (chunks_left == 0) ++index, chunks_left = -1;
        }
        return w;
    }
};

// Sums of one window before they are added up. S arrays.
template <class S>
struct Partial {
    S *maps;        // (tiles, positions, 2 n): dB and dC of each tile's channels
    S *parameters;  // (items, tiles, 3 n + 2, 64): dA, fixed dB and dC, dD, ddelta_bias
    S *carry;       // (tiles, n, 64): the gradient that enters the next window's last chunk
    int64_t positions, parameters_size;
};

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
void chunk_adjoint(const Walk<S>& w, const Adjoint<S>& r, Map<S, fixed_B> B, Map<S, fixed_C> C, int64_t n, int64_t j, int64_t c, int64_t steps) {
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
                for (int i = first; i < first + at_once; ++i) r.maps[t * 2 * n + (i < N ? 0 : n) + j + i % N] += total[i - first];
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
void all_states(const Walk<S>& w, const Adjoint<S>& r, Map<S, fixed_B> B, Map<S, fixed_C> C, int64_t n, int64_t c, int64_t steps) {
    int64_t j = 0;
    for (; j + 4 <= n; j += 4) chunk_adjoint<S, 4, M, fixed_B, fixed_C, guarded>(w, r, B, C, n, j, c, steps);
    if (n & 2) chunk_adjoint<S, 2, M, fixed_B, fixed_C, guarded>(w, r, B, C, n, j, c, steps), j += 2;
    if (n & 1) chunk_adjoint<S, 1, M, fixed_B, fixed_C, guarded>(w, r, B, C, n, j, c, steps);
}

template <class S, bool fixed_B, bool fixed_C, bool guarded>
void all_channels(const Walk<S>& w, const Adjoint<S>& r, Map<S, fixed_B> B, Map<S, fixed_C> C, int64_t n, int64_t channels, int64_t steps) {
    constexpr int64_t lanes = Lanes<S>::count;
    int64_t c = 0;
    for (; c + lanes < channels; c += 2 * lanes) all_states<S, 2, fixed_B, fixed_C, guarded>(w, r, B, C, n, c, steps);
    if (c < channels) all_states<S, 1, fixed_B, fixed_C, guarded>(w, r, B, C, n, c, steps);
}

template <class T, bool fixed_B, bool fixed_C>
void item_adjoint(const ScanBackwardArguments& b, const Item& item, int64_t item_index, int64_t tile_index, const Partial<typename Sum<T>::type>& partial, char* scratch) {
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
        r.maps = partial.maps + (tile_index * partial.positions + item.offset + (chunk - item.first) * a.chunk) * 2 * n;
        memset(r.maps, 0, sizeof(S) * static_cast<size_t>(steps * 2 * n));
        const Map<S, fixed_B> B = {fixed_B ? w.B : at<S>(a.B, s.batch * a.B_batch + row * a.B_time + tile_.group * n), fixed_B ? kTile : a.B_time};
        const Map<S, fixed_C> C = {fixed_C ? w.C : at<S>(a.C, s.batch * a.C_batch + row * a.C_time + tile_.group * n), fixed_C ? kTile : a.C_time};
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
                if (a.softplus) ddelta = ddelta * sigmoid<S>(read_some(delta + t * a.delta_time + c, count) + load(w.bias + c));
                write_some(static_cast<T*>(b.ddelta) + o, ddelta, count);
                store(r.dD + c, fma(e, x, load(r.dD + c)));
                store(r.dbias + c, load(r.dbias + c) + ddelta);
                if (z) {
                    const V gate = read_some(z + t * a.z_time + c, count), sigma = sigmoid<S>(gate);
                    const V slope = sigma * fma(gate, splat<S>(S(1)) - sigma, splat<S>(S(1)));
                    write_some(static_cast<T*>(b.dz) + o, read_some(dy + t * b.dy_time + c, count) * load(r.y + i) * slope, count);
                }
            }
    }
    if (item.first > 0)
        memcpy(carry, r.g, sizeof(S) * static_cast<size_t>(n * kTile));
    else if (b.dinitial)
        write_transposed(static_cast<S*>(b.dinitial) + state, r.g, n, tile_.channels);
    memcpy(partial.parameters + (item_index * tiles + tile_index) * partial.parameters_size, r.dA, sizeof(S) * static_cast<size_t>(partial.parameters_size));
}

// dB or dC of one sequence's part: over the tiles of each group, in their order.
template <class S>
void add_tiles(const ScanArguments& a, const Partial<S>& partial, const Item& item, int64_t position, S* to, bool C) {
    const int64_t per_group = tiles_per_group(a), n = a.n;
    const int64_t row = item.s.batch * a.length + item.s.start + item.first * a.chunk + position;
    for (int64_t group = 0; group < a.groups; ++group)
        for (int64_t i = 0; i < per_group; ++i) {
            const S* from = partial.maps + ((group * per_group + i) * partial.positions + item.offset + position) * 2 * n + (C ? n : 0);
            S* sum = to + (row * a.groups + group) * n;
            for (int64_t j = 0; j < n; ++j) sum[j] = (i ? sum[j] : S(0)) + from[j];
        }
}

// dA, fixed dB and dC, dD and ddelta_bias of one tile: over the window's parts, in their order.
template <class S>
void add_items(const ScanBackwardArguments& b, const Partial<S>& partial, const Window& window, int64_t tile_index) {
    const ScanArguments& a = b.forward;
    const Tile t = tile(a, tile_index);
    const int64_t n = a.n, tiles = a.groups * tiles_per_group(a);
    for (int64_t i = 0; i < window.count; ++i) {
        const S* from = partial.parameters + (i * tiles + tile_index) * partial.parameters_size;
        for (int64_t c = 0; c < t.channels; ++c) {
            const int64_t to = (t.first + c) * n;
            for (int64_t j = 0; j < n; ++j) {
                static_cast<S*>(b.dA)[to + j] += from[j * kTile + c];
                if (a.fixed_B) static_cast<S*>(b.dB)[to + j] += from[(n + j) * kTile + c];
                if (a.fixed_C) static_cast<S*>(b.dC)[to + j] += from[(2 * n + j) * kTile + c];
            }
            if (b.dD) static_cast<S*>(b.dD)[t.first + c] += from[3 * n * kTile + c];
            if (b.ddelta_bias) static_cast<S*>(b.ddelta_bias)[t.first + c] += from[(3 * n + 1) * kTile + c];
        }
    }
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
    const Partial<S> partial = {reinterpret_cast<S*>(maps.data), reinterpret_cast<S*>(sums.data), reinterpret_cast<S*>(carry.data), positions, parameters};
    const size_t bytes = sizeof(S) * static_cast<size_t>(Walk<S>::size(n, a.chunk) + Adjoint<S>::size(n, a.chunk));
    Cursor cursor = {0, -1};
    while (cursor.index < a.sequences) {
        const Window window = cursor.next(a, positions);
        int failed = parallel_for(window.count * tiles, a.threads, bytes, [&](int64_t i, char* scratch) {
            const Item& item = window.items[i / tiles];
            if (a.fixed_B && a.fixed_C) return item_adjoint<T, true, true>(b, item, i / tiles, i % tiles, partial, scratch);
            if (a.fixed_B) return item_adjoint<T, true, false>(b, item, i / tiles, i % tiles, partial, scratch);
            if (a.fixed_C) return item_adjoint<T, false, true>(b, item, i / tiles, i % tiles, partial, scratch);
            return item_adjoint<T, false, false>(b, item, i / tiles, i % tiles, partial, scratch);
        });
        failed = failed || parallel_for(tiles, a.threads, 0, [&](int64_t i, char*) { add_items(b, partial, window, i); });
        const int64_t chunks = ceil_div(window.positions, a.chunk);
        failed = failed || parallel_for(chunks, a.threads, 0, [&](int64_t i, char*) {
            int64_t k = window.count - 1;
            while (window.items[k].offset > i * a.chunk || window.items[k].first == window.items[k].last) --k;
            const Item& item = window.items[k];
            const int64_t begin = i * a.chunk - item.offset;
            const int64_t end = minimum(begin + a.chunk, item.s.length - item.first * a.chunk);
            for (int64_t position = begin; position < end; ++position) {
                if (!a.fixed_B) add_tiles(a, partial, item, position, static_cast<S*>(b.dB), false);
                if (!a.fixed_C) add_tiles(a, partial, item, position, static_cast<S*>(b.dC), true);
            }
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
