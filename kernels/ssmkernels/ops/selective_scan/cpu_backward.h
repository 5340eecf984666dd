// The selective scan, backward through whole sequences: chunks are taken from the last to the first, and from its saved
// first state a chunk's states are computed again.
#pragma once

#include "selective_scan/cpu_adjoint.h"
#include "selective_scan/cpu_windows.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

template <class K>
void item_adjoint(const ScanBackwardArguments& b, const Item& item, int64_t item_index, int64_t tile_index,
                  const Partial<typename K::S>& partial, char* scratch) {
    typedef typename K::S S;
    using V = typename K::V;
    constexpr int lanes = Lanes<S>::count;
    const ScanArguments& a = b.forward;
    const Sequence& s = item.s;
    const int64_t n = a.n, tiles = a.groups * tiles_per_group(a);
    const bool large = is_large(a);
    const Tile tile_ = tile(a, tile_index);
    Walk<K> w;
    Adjoint<K> r;
    S* wide = r.take(w.take(reinterpret_cast<S*>(scratch), n, a.chunk), n, a.chunk);
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
        const int64_t row = s.start + t0, out = (s.batch * a.length + row) * a.d + tile_.first;
        const int64_t u_at = s.batch * a.u_batch + row * a.u_time + tile_.first;
        const int64_t delta_at = s.batch * a.delta_batch + row * a.delta_time + tile_.first;
        const int64_t z_at = s.batch * a.z_batch + row * a.z_time + tile_.first;
        const int64_t dy_at = s.batch * b.dy_batch + row * b.dy_time + tile_.first;
        S* to = wide;
        const auto given = [&](const void* from, int64_t offset, int64_t stride) {
            const Rows<S> found = rows<S>(a.dtype, from, offset, stride, steps, tile_.channels, to);
            to += a.chunk * kTile;
            return found;
        };
        const Rows<S> u = given(a.u, u_at, a.u_time), delta = given(a.delta, delta_at, a.delta_time);
        const Rows<S> z = given(a.z, z_at, a.z_time), dy = given(b.dy, dy_at, b.dy_time);
        const bool safe = w.read_steps(a.softplus != 0, tile_.channels, u, delta, steps);
        for (int64_t t = 0; t < steps; ++t)
            for (int64_t c = 0; c < tile_.channels; c += lanes) {
                const int64_t i = t * kTile + c, count = tile_.channels - c;
                V e = dy(t, c, count);
                if (z.p) e = e * silu<S>(z(t, c, count));
                store(r.e + i, e);
                store(r.y + i, a.D && z.p ? load(w.D + c) * u(t, c, count) : V{});
                store(r.q + i, V{});
                store(r.ddt + i, V{});
            }
        const int64_t position = item.offset + (chunk - item.first) * a.chunk;
        r.maps = partial.maps + (tile_index * partial.positions + position) * 2 * n;
        memset(r.maps, 0, sizeof(S) * static_cast<size_t>(steps * 2 * n));
        const Ahead read = Ahead::of(a.dtype, {a.u, a.delta, a.z, b.dy}, {u_at, delta_at, z_at, dy_at},
                                     {a.u_time, a.delta_time, a.z_time, b.dy_time});
        const Ahead written =
            Ahead::of(a.dtype, {b.du, b.ddelta, z.p ? b.dz : nullptr, nullptr}, {out, out, out, out}, {a.d, a.d, a.d, a.d});
        const AheadBoth next = {read.moved(-a.chunk), (large ? read : written).moved(-a.chunk)};
        r.safe = safe;
        all_channels(w, r, next, w.map_B(a, tile_, s, t0), w.map_C(a, tile_, s, t0), n, tile_.channels, steps);
        const Results<S> du_to = {b.du, a.dtype, out, a.d, r.q, large};
        const Results<S> ddelta_to = {b.ddelta, a.dtype, out, a.d, r.ddt, large};
        const Results<S> dz_to = {b.dz, a.dtype, out, a.d, r.y, large};
        for (int64_t t = 0; t < steps; ++t)
            for (int64_t c = 0; c < tile_.channels; c += lanes) {
                const int64_t i = t * kTile + c, count = tile_.channels - c;
                const V x = u(t, c, count), q = load(r.q + i), e = load(r.e + i);
                V du = load(w.dt + i) * q;
                if (a.D) du = fma(load(w.D + c), e, du);
                du_to.keep(t, c, du, count);
                V ddelta = fma(x, q, load(r.ddt + i));
                if (a.softplus)
                    ddelta = ddelta * sigmoid<S>(delta(t, c, count) + load(w.bias + c));
                ddelta_to.keep(t, c, ddelta, count);
                store(r.dD + c, fma(e, x, load(r.dD + c)));
                store(r.dbias + c, load(r.dbias + c) + ddelta);
                if (z.p) {
                    const V gate = z(t, c, count), sigma = sigmoid<S>(gate);
                    const V slope = sigma * fma(gate, splat<S>(S(1)) - sigma, splat<S>(S(1)));
                    dz_to.keep(t, c, dy(t, c, count) * load(r.y + i) * slope, count);
                }
            }
        du_to.finish(steps, tile_.channels);
        ddelta_to.finish(steps, tile_.channels);
        if (z.p) dz_to.finish(steps, tile_.channels);
    }
    if (item.first > 0)
        memcpy(carry, r.g, sizeof(S) * static_cast<size_t>(n * kTile));
    else if (b.dinitial)
        write_transposed(static_cast<S*>(b.dinitial) + state, r.g, n, tile_.channels);
    memcpy(partial.parameters + (item_index * tiles + tile_index) * partial.parameters_size, r.dA,
           sizeof(S) * static_cast<size_t>(partial.parameters_size));
}

template <class K>
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
    const size_t bytes = sizeof(S) * static_cast<size_t>(Walk<K>::size(n, a.chunk) + Adjoint<K>::size(n, a.chunk) +
                                                           (is_half(a.dtype) ? 4 * a.chunk * kTile : 0));
    Cursor cursor = {0, -1};
    while (cursor.index < a.sequences) {
        const Window window = cursor.next(a, positions);
        int failed = parallel_for(window.count * tiles, a.threads, bytes, [&](int64_t i, char* scratch) {
            const int64_t part = i / tiles, tile_index = i % tiles;
            item_adjoint<K>(b, window.items[part], part, tile_index, partial, scratch);
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
    return by_sums(b.forward.dtype, [&](auto zero) { return scan_backward_as<Numbers<decltype(zero)>>(b); });
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

