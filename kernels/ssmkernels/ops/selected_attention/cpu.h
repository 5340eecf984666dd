// What the forward and backward passes of attention to selected blocks share: arguments, which queries see which block,
// and pieces of blocks in a core's own cache.
//
// A range of queries is one task. It takes one block of keys after another, gathers the queries of the range that selected
// the block, and all heads of these meet the block's keys in small matrix products. No product reaches beyond the keys
// that its queries see, so that it does not matter what a hidden key or value holds.
#pragma once

#include "native/exports.h"
#include "native/gemm.h"
#include "native/math.h"
#include "native/parallel.h"
#include "native/turn.h"
#include "ssd/cpu_rows.h"

namespace ssmzoo {

// Strides count elements; the last axis has 1.
struct SelectedArguments {
    const void *q, *k, *v;  // (b l h k), (b m h_kv k), (b m h_kv v): any floating dtype
    const int32_t* blocks;  // (b l g n), contiguous
    int64_t dtype, batch, l, m, h, h_kv, g, n, k_size, v_size, block_size, threads;
    int64_t q_batch, q_time, q_head, k_batch, k_time, k_head, v_batch, v_time, v_head;
    double scale;
    void *out, *exact, *lse, *sums;  // (b l h v); S: the same or null, (b h l) or null, likewise; contiguous
};

namespace SSMZOO_ISA {

constexpr int64_t kRange = 256;  // queries of a range
constexpr int64_t kKeys = 64;    // of a piece of a block, at most
constexpr int64_t kTogether = 96;  // rows of a product, query heads of several queries, if one query has no more

template <class S>
constexpr S kNothing = -S(__builtin_inf());

inline int64_t maximum(int64_t a, int64_t b) { return a < b ? b : a; }

// Sizes that follow from others.
struct Sizes {
    int64_t groups, blocks, ranges, queries, rows, k_row, v_row;

    Sizes(const SelectedArguments& a, int64_t lanes)
        : groups(a.h / a.g), blocks(ceil_div(a.m, a.block_size)), ranges(ceil_div(a.l, kRange)),
          queries(groups < kTogether ? kTogether / groups : 1), rows(queries * groups),
          k_row(round_up(a.k_size, lanes)), v_row(round_up(a.v_size, lanes)) {}
};

// Some queries of one selecting head of one sequence.
struct Range {
    int64_t batch, head, first, end;

    Range(const SelectedArguments& a, int64_t row, int64_t number)
        : batch(row / a.g), head(row % a.g), first(number * kRange), end(minimum(a.l, first + kRange)) {}

    int64_t key_head(const SelectedArguments& a) const { return head / (a.g / a.h_kv); }
};

// Which queries of a range see some of each block: numbers within the range, rising.
struct Lists {
    int32_t *starts, *queries, *latest;  // (blocks + 1), (range n), (blocks)

    static int64_t bytes(const SelectedArguments& a, const Sizes& sizes) {
        return round_up(int64_t(sizeof(int32_t)) * (2 * sizes.blocks + 1 + kRange * a.n), 64);
    }

    Lists(char* from, const Sizes& sizes)
        : starts(reinterpret_cast<int32_t*>(from)), queries(starts + 2 * sizes.blocks + 1),
          latest(starts + sizes.blocks + 1) {}

    // Calls call(block, number) for each query and each of its blocks that it sees some of, once.
    template <class Call>
    void each(const SelectedArguments& a, const Range& range, const Sizes& sizes, const Call& call) const {
        for (int64_t block = 0; block < sizes.blocks; ++block) latest[block] = -1;
        for (int64_t i = range.first; i < range.end; ++i) {
            const int32_t* named = a.blocks + ((range.batch * a.l + i) * a.g + range.head) * a.n;
            const int32_t number = static_cast<int32_t>(i - range.first);
            for (int64_t j = 0; j < a.n; ++j) {
                const int64_t block = named[j];
                if (block < 0 || block >= sizes.blocks || block * a.block_size > i + a.m - a.l) continue;
                if (latest[block] == number) continue;
                latest[block] = number;
                call(block, number);
            }
        }
    }

    void fill(const SelectedArguments& a, const Range& range, const Sizes& sizes) const {
        for (int64_t block = 0; block <= sizes.blocks; ++block) starts[block] = 0;
        each(a, range, sizes, [&](int64_t block, int32_t) { ++starts[block + 1]; });
        for (int64_t block = 0; block < sizes.blocks; ++block) starts[block + 1] += starts[block];
        each(a, range, sizes, [&](int64_t block, int32_t number) { queries[starts[block]++] = number; });
        for (int64_t block = sizes.blocks; block > 0; --block) starts[block] = starts[block - 1];
        starts[0] = 0;
    }
};

// (rows, columns) → (columns, kKeys): rows, at most kKeys, are there up to whole vectors, and so are columns.
template <class S>
void turn_piece(S* to, const S* from, int64_t rows, int64_t columns) {
    constexpr int64_t lanes = Lanes<S>::count;
    for (int64_t i = 0; i < rows; i += lanes)
        for (int64_t j = 0; j < columns; j += lanes) {
            typename Lanes<S>::V v[lanes];
            for (int64_t r = 0; r < lanes; ++r) v[r] = load(from + (i + r) * columns + j);
            turn<S>(v);
            for (int64_t r = 0; r < lanes; ++r) store(to + (j + r) * kKeys + i, v[r]);
        }
}

// Keys or values of a piece of a block: (kKeys, row) as they lie, with zeros up to whole vectors, and turned (row, kKeys).
template <class S>
struct Piece {
    S *rows, *turned;
    int64_t row;

    void take(Memory<S>& memory, int64_t width) {
        row = width;
        rows = memory.take(kKeys * row);
        turned = memory.take(kKeys * row);
    }

    void read(const void* from, int64_t dtype, int64_t offset, int64_t time, int64_t count, int64_t size) const {
        for (int64_t j = 0; j < count; ++j) read_row(rows + j * row, from, dtype, offset + j * time, size);
    }

    // Fills `turned` from `rows`.
    void turn(int64_t count) const {
        const int64_t whole = round_up(count, Lanes<S>::count);
        memset(rows + count * row, 0, sizeof(S) * static_cast<size_t>((whole - count) * row));
        turn_piece(turned, rows, whole, row);
    }
};

// C (rows, columns) = A (rows, inner) B (inner, columns), onto what is there if so told, as product of gemm.h has it; a few
// rows read B where it is.
template <class S>
void multiply_some(Left<S> A, const S* B, int64_t ldb, S* C, int64_t ldc, int64_t rows, int64_t columns, int64_t inner,
                   S* panel, Onto<S> onto = {false, S(0)}) {
    constexpr int64_t wide = kVectors * Lanes<S>::count;
    if (rows > 2 * kRows) return product(A, B, ldb, C, ldc, rows, columns, inner, panel, 0, onto);
    int64_t j = 0;
    for (; j + wide <= columns; j += wide)
        multiply_rows<S, kRows, kVectors, Shape::full>(A, B + j, ldb, C + j, ldc, rows, inner, 0, onto);
    for (; j < columns; j += Lanes<S>::count)
        multiply_rows<S, kRows, 1, Shape::full>(A, B + j, ldb, C + j, ldc, rows, inner, 0, onto);
}

// Rows (query heads) of the queries that meet a piece at once, and how many of its keys all of them see.
struct Tile {
    const int32_t* queries;  // numbers within the range
    int64_t count, seen;
};

// Goes through all blocks of a range: read(first key, count) for each piece of a block,
// meet(tile) for its queries, done(first key, count) after them.
template <class Read, class Meet, class Done>
void walk(const SelectedArguments& a, const Range& range, const Sizes& sizes, const Lists& lists, const Read& read,
          const Meet& meet, const Done& done) {
    for (int64_t block = 0; block < sizes.blocks; ++block) {
        const int32_t *next = lists.queries + lists.starts[block], *end = lists.queries + lists.starts[block + 1];
        const int64_t last = minimum(a.m, (block + 1) * a.block_size);
        for (int64_t key = block * a.block_size; key < last && next < end; key += kKeys) {
            const int64_t count = minimum(kKeys, last - key);
            const auto seen = [&](const int32_t* query) { return range.first + *query + a.m - a.l + 1 - key; };
            while (next < end && seen(next) <= 0) ++next;  // nor do they see a later piece
            if (next == end) break;
            read(key, count);
            const int32_t* query = next;
            for (; query < end && seen(query) < count; ++query) meet(Tile{query, 1, seen(query)});
            for (; query < end; query += sizes.queries) meet(Tile{query, minimum(sizes.queries, end - query), count});
            done(key, count);
        }
    }
}

// Where the range's head of keys, and that of values, has the key of this number.
inline int64_t key_place(const SelectedArguments& a, const Range& range, int64_t key) {
    return range.batch * a.k_batch + key * a.k_time + range.key_head(a) * a.k_head;
}

inline int64_t value_place(const SelectedArguments& a, const Range& range, int64_t key) {
    return range.batch * a.v_batch + key * a.v_time + range.key_head(a) * a.v_head;
}

// call(row of the tile, row within the range) for all of a tile.
template <class Call>
SSMZOO_INLINE void each_row(const Tile& tile, int64_t groups, const Call& call) {
    for (int64_t i = 0; i < tile.count; ++i)
        for (int64_t r = 0; r < groups; ++r) call(i * groups + r, tile.queries[i] * groups + r);
}

// Rows of a tile (rows, width) out of (b l h size), whose strides these are.
template <class S>
void gather(S* to, int64_t width, const Range& range, const Tile& tile, int64_t groups, const void* from, int64_t dtype,
            int64_t batch, int64_t time, int64_t head, int64_t size) {
    each_row(tile, groups, [&](int64_t row, int64_t place) {
        const int64_t i = range.first + place / groups, r = range.head * groups + place % groups;
        read_row(to + row * width, from, dtype, range.batch * batch + i * time + r * head, size);
    });
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
