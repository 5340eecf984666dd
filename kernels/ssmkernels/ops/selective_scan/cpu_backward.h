// The selective scan, backward through whole sequences: chunks are taken from the last to the first, and from its saved
// first state a chunk's states are computed again.
#pragma once

#include "native/exports.h"
#include "selective_scan/cpu_adjoint.h"
#include "selective_scan/cpu_windows.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

template <class K, class T>
void item_adjoint(const ScanBackwardArguments& b, const Item& item, int64_t item_index, int64_t tile_index,
                  const Partial<typename K::S>& partial, char* scratch) {
    typedef typename K::S S;
    using V = typename K::V;
    constexpr int lanes = Lanes<S>::count;
    const ScanArguments& a = b.forward;
    const Sequence& s = item.s;
    const int64_t n = a.n, tiles = a.groups * tiles_per_group(a);
    const bool large = is_large<T>(a);
    const Tile tile_ = tile(a, tile_index);
    Walk<K> w;
    Adjoint<K> r;
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
        const Ahead read =
            Ahead::of<T>({u, delta, z, dy}, {a.u_time, a.delta_time, a.z_time, b.dy_time}).moved(-a.chunk);
        const T* const to[] = {at<T>(b.du, out), at<T>(b.ddelta, out), z ? at<T>(b.dz, out) : nullptr, nullptr};
        const AheadBoth next = {read, large ? read : Ahead::of<T>(to, {a.d, a.d, a.d, a.d}).moved(-a.chunk)};
        r.safe = safe;
        all_channels(w, r, next, w.map_B(a, tile_, s, t0), w.map_C(a, tile_, s, t0), n, tile_.channels, steps);
        for (int64_t t = 0; t < steps; ++t)
            for (int64_t c = 0; c < tile_.channels; c += lanes) {
                const int64_t i = t * kTile + c, count = tile_.channels - c, o = out + t * a.d + c;
                const V x = read_some(u + t * a.u_time + c, count), q = load(r.q + i), e = load(r.e + i);
                V du = load(w.dt + i) * q;
                if (a.D) du = fma(load(w.D + c), e, du);
                write_some(static_cast<T*>(b.du) + o, du, count, large);
                V ddelta = fma(x, q, load(r.ddt + i));
                if (a.softplus)
                    ddelta = ddelta * sigmoid<S>(read_some(delta + t * a.delta_time + c, count) + load(w.bias + c));
                write_some(static_cast<T*>(b.ddelta) + o, ddelta, count, large);
                store(r.dD + c, fma(e, x, load(r.dD + c)));
                store(r.dbias + c, load(r.dbias + c) + ddelta);
                if (z) {
                    const V gate = read_some(z + t * a.z_time + c, count), sigma = sigmoid<S>(gate);
                    const V slope = sigma * fma(gate, splat<S>(S(1)) - sigma, splat<S>(S(1)));
                    const V dz = read_some(dy + t * b.dy_time + c, count) * load(r.y + i) * slope;
                    write_some(static_cast<T*>(b.dz) + o, dz, count, large);
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

template <class K, class T>
int scan_backward_as(const ScanBackwardArguments& b) {
    typedef typename K::S S;
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
    const size_t bytes = sizeof(S) * static_cast<size_t>(Walk<K>::size(n, a.chunk) + Adjoint<K>::size(n, a.chunk));
    Cursor cursor = {0, -1};
    while (cursor.index < a.sequences) {
        const Window window = cursor.next(a, positions);
        int failed = parallel_for(window.count * tiles, a.threads, bytes, [&](int64_t i, char* scratch) {
            const int64_t part = i / tiles, tile_index = i % tiles;
            item_adjoint<K, T>(b, window.items[part], part, tile_index, partial, scratch);
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

// Numbers are Real or Complex.
template <template <class> class Numbers>
int scan_backward(const ScanBackwardArguments& b) {
    return by_dtype(b.forward.dtype, [&](auto zero) {
        typedef decltype(zero) T;
        return scan_backward_as<Numbers<typename Sum<T>::type>, T>(b);
    });
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

