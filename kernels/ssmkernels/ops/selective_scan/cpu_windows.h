// Sums over channels and over sequences in the backward pass of the selective scan, in an order that no thread changes.
//
// Time is cut into windows. In each, every tile adds up its own channels' dB and dC, and its own parameters' gradients
// over one part of a sequence, into buffers; when all are through the window, the buffers are added up in their order.
#pragma once

#include "selective_scan/cpu.h"

namespace ssmzoo {

struct ScanBackwardArguments {
    ScanArguments forward;      // y, final_state and initial unused
    const void *dy, *dfinal;    // (b l d); S: (s d n) or null
    void *du, *ddelta, *dz;     // (b l d), contiguous; dz where z is
    void *dA, *dB, *dC;         // S: as A, B and C, contiguous; zero at first but for dB and dC over time
    void *dD, *ddelta_bias;     // S: (d), zero at first, or null
    void* dinitial;             // S: (s d n) or null
    int64_t dy_batch, dy_time;
};

namespace SSMZOO_ISA {

constexpr int64_t kItems = 16;             // parts of sequences in a window, at most
constexpr int64_t kWindowBytes = 8 << 20;  // of the tiles' sums, about

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

    // The next window of at most so many positions, a multiple of the chunk.
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

// dB or dC of one sequence's part: over the tiles of each group, in their order.
template <class S>
void add_tiles(const ScanArguments& a, const Partial<S>& partial, const Item& item, int64_t position, S* to, bool C) {
    const int64_t per_group = tiles_per_group(a), n = a.n;
    const int64_t row = item.s.batch * a.length + item.s.start + item.first * a.chunk + position;
    for (int64_t group = 0; group < a.groups; ++group)
        for (int64_t i = 0; i < per_group; ++i) {
            const int64_t at = (group * per_group + i) * partial.positions + item.offset + position;
            const S* from = partial.maps + at * 2 * n + (C ? n : 0);
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

// dB and dC of one chunk of a window, counted from the window's beginning.
template <class S>
void add_chunk(const ScanBackwardArguments& b, const Partial<S>& partial, const Window& window, int64_t chunk) {
    const ScanArguments& a = b.forward;
    int64_t k = window.count - 1;
    while (window.items[k].offset > chunk * a.chunk || window.items[k].first == window.items[k].last) --k;
    const Item& item = window.items[k];
    const int64_t begin = chunk * a.chunk - item.offset;
    const int64_t end = minimum(begin + a.chunk, item.s.length - item.first * a.chunk);
    for (int64_t position = begin; position < end; ++position) {
        if (!a.fixed_B) add_tiles(a, partial, item, position, static_cast<S*>(b.dB), false);
        if (!a.fixed_C) add_tiles(a, partial, item, position, static_cast<S*>(b.dC), true);
    }
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
