// What native attention shares: arguments, ranges of queries, and pieces of the keys in a core's own cache.
//
// A range of queries that share a head of keys is one task. It takes one piece of the keys after another, and all heads
// of the queries that see some of it meet it in small matrix products, so many rows at once as make these efficient.
// Which queries see what of a piece, a template's `Keys` says.
#pragma once

#include "native/choose.h"
#include "native/exports.h"
#include "native/gemm.h"
#include "native/math.h"
#include "native/parallel.h"
#include "native/turn.h"
#include "ssd/cpu_rows.h"

namespace ssmzoo {

// Strides count elements; the last axis has 1. The h / g query heads of one of the g groups see the same keys.
struct AttentionArguments {
    const void *q, *k, *v;           // (b l h k), (b m h_kv k), (b m h_kv v): any floating dtype
    void *out, *exact, *lse, *sums;  // (b l h v); S: the same or null, (b h l) or null, likewise; contiguous
    int64_t dtype, batch, l, m, h, h_kv, g, k_size, v_size, threads;
    int64_t q_batch, q_time, q_head, k_batch, k_time, k_head, v_batch, v_time, v_head;
    double scale;
};

struct AttentionBackwardArguments {
    AttentionArguments forward;  // whose lse is null; out is the exact one where there is one
    int64_t out_dtype, parts;
    const void *d_out, *d_lse;   // (b l h v), contiguous, of the dtype of q; S: (b h l) or null
    void *dq, *dk, *dv;          // (b l h k), contiguous, of the dtype of q; S: (parts b g m k), (parts b g m v), zeros
};

namespace SSMZOO_ISA {

constexpr int64_t kRange = 512;    // queries of a range, at most
constexpr int64_t kLong = 4096;    // queries from which ranges have as many; fewer take half, to be enough tasks
constexpr int64_t kKeys = 64;      // of a piece
constexpr int64_t kAligned = 16;   // keys, a multiple of which a tile's first one is: whole vectors
constexpr int64_t kTogether = 96;  // rows of a product, heads of several queries, unless a single query has more

// Logits are powers of two, of which exponentials are the cheapest: queries are multiplied by scale · log2(e)
// beforehand.
constexpr double kLog2e = 1.4426950408889634;

template <class S>
constexpr S kNothing = -S(__builtin_inf());

inline int64_t maximum(int64_t a, int64_t b) { return a < b ? b : a; }

// Sizes that follow from others.
struct Sizes {
    int64_t groups, range, ranges, queries, rows;  // heads of a group; queries of a range; queries and rows of a tile
    int64_t k_row, v_row;

    Sizes(const AttentionArguments& a, int64_t lanes)
        : groups(a.h / a.g), range(a.l < kLong ? kRange / 2 : kRange), ranges(ceil_div(a.l, range)),
          queries(groups < kTogether ? kTogether / groups : 1), rows(queries * groups),
          k_row(round_up(a.k_size, lanes)), v_row(round_up(a.v_size, lanes)) {}
};

// Some queries of one group of heads of one sequence.
struct Range {
    int64_t batch, group, first, end, key_head;

    Range(const AttentionArguments& a, const Sizes& sizes, int64_t row, int64_t number)
        : batch(row / a.g), group(row % a.g), first(number * sizes.range), end(minimum(a.l, first + sizes.range)),
          key_head(group / (a.g / a.h_kv)) {}
};

// Keys `first` … `end` - 1.
struct Span {
    int64_t first, end;
};

// Queries that meet a piece at once: of its keys those from `first` to `end` take part, and row by row those in a span.
struct Tile {
    const int32_t* queries;  // numbers within the range
    const Span* spans;       // of each query, counted from the piece's first key
    int64_t count, first, end;

    // Whether they follow one another, so that their rows of the range lie as the tile's own do.
    bool follow() const {
        for (int64_t i = 1; i < count; ++i)
            if (queries[i] != queries[0] + i) return false;
        return true;
    }
};

// call(row of the tile, row within the range, span) for all of a tile.
template <class Call>
SSMZOO_INLINE void each_row(const Tile& tile, int64_t groups, const Call& call) {
    for (int64_t i = 0; i < tile.count; ++i)
        for (int64_t r = 0; r < groups; ++r)
            call(i * groups + r, tile.queries[i] * groups + r,
                 Span{tile.spans[i].first - tile.first, tile.spans[i].end - tile.first});
}

// Rows of a tile (rows, width), times a factor, out of (b l h size), whose strides these are.
template <class S>
void gather(S* to, int64_t width, S factor, const Range& range, const Tile& tile, int64_t groups, const void* from,
            int64_t dtype, int64_t batch, int64_t time, int64_t head, int64_t size) {
    each_row(tile, groups, [&](int64_t row, int64_t place, Span) {
        const int64_t i = range.first + place / groups, r = range.group * groups + place % groups;
        read_row(to + row * width, from, dtype, range.batch * batch + i * time + r * head, size, factor);
    });
}

// Lanes of the vector at j that a span has; all of them unless the vector crosses an end of it.
template <class S>
SSMZOO_INLINE typename Lanes<S>::V within(Span span, int64_t j, typename Lanes<S>::V x, S other) {
    using V = typename Lanes<S>::V;
    if (span.first <= j && j + Lanes<S>::count <= span.end) return x;
    S numbers[Lanes<S>::count];
    for (int i = 0; i < Lanes<S>::count; ++i) numbers[i] = S(i);
    const V index = load(numbers);
    return choose<S>((index >= splat(S(span.first - j))) & (index < splat(S(span.end - j))), x, splat(other));
}

// Keys or values of a piece: (kKeys, row) as they lie, zeros up to whole vectors, and turned over (row, kKeys).
template <class S>
struct Piece {
    S *rows, *turned;
    int64_t row;
    bool finite;

    void take(Memory<S>& memory, int64_t width) {
        row = width;
        rows = memory.take(kKeys * row);
        turned = memory.take(kKeys * row + kLine<S>);  // a product that begins at a later key reads beyond
    }

    void read(const void* from, int64_t dtype, int64_t offset, int64_t time, int64_t count, int64_t size) {
        typename Lanes<S>::V zeros = {};  // NaN after an infinity or a NaN
        for (int64_t j = 0; j < count; ++j) {
            read_row(rows + j * row, from, dtype, offset + j * time, size);
            vectors<S>(row, [&](int64_t c) { zeros = fma(load(rows + j * row + c), splat(S(0)), zeros); });
        }
        finite = sum_lanes<S, 1>(&zeros)[0] == S(0);
    }

    // Fills `turned` from the first `count` of `rows`.
    void turn(int64_t count) const {
        constexpr int64_t lanes = Lanes<S>::count;
        memset(rows + count * row, 0, sizeof(S) * static_cast<size_t>((round_up(count, lanes) - count) * row));
        for (int64_t i = 0; i < count; i += lanes)
            for (int64_t j = 0; j < row; j += lanes) {
                typename Lanes<S>::V v[lanes];
                for (int64_t r = 0; r < lanes; ++r) v[r] = load(rows + (i + r) * row + j);
                ssmzoo::SSMZOO_ISA::turn<S>(v);
                for (int64_t r = 0; r < lanes; ++r) store(turned + (j + r) * kKeys + i, v[r]);
            }
    }
};

// 2^x for every x, as exp2_product has it, but of a number that is there: nothing is rounded before.
template <class S>
SSMZOO_INLINE typename Lanes<S>::V exp2(typename Lanes<S>::V x) {
    using C = Constants<S>;
    using V = typename Lanes<S>::V;
    const V bounded = clamp(x, splat<S>(S(-C::bias)), splat<S>(S(C::bias + 1)));
    const V shifted = bounded + splat<S>(C::magic);  // its low bits are the nearest integer
    const V f = bounded - (shifted - splat<S>(C::magic));
    const V p = fma(polynomial<S>(C::exp2, f), f, splat<S>(S(1)));
    return p * from_bits<S>((bits_of<S>(shifted) << C::mantissa) + bits_of<S>(splat<S>(S(1))));
}

// Where the range's head of keys, and that of values, has the key of this number.
inline int64_t key_place(const AttentionArguments& a, const Range& range, int64_t key) {
    return range.batch * a.k_batch + key * a.k_time + range.key_head * a.k_head;
}

inline int64_t value_place(const AttentionArguments& a, const Range& range, int64_t key) {
    return range.batch * a.v_batch + key * a.v_time + range.key_head * a.v_head;
}

// C (rows, columns) = A (rows, inner) B (inner, columns), onto what is there if so told, as product of gemm.h has it,
// to the bit. B is read where it is if its rows are short, so that they lie together in the first cache, or A's are
// few.
template <class S>
void multiply_some(Left<S> A, const S* B, int64_t ldb, S* C, int64_t ldc, int64_t rows, int64_t columns, int64_t inner,
                   S* panel, Onto<S> onto = {false, S(0)}) {
    constexpr int64_t wide = kVectors * Lanes<S>::count;
    constexpr int64_t near = 256 / int64_t(sizeof(S));
    if (rows > 2 * kRows && ldb > near) return product(A, B, ldb, C, ldc, rows, columns, inner, panel, 0, onto);
    int64_t j = 0;
    for (; j + wide <= columns; j += wide)
        multiply_rows<S, kRows, kVectors, Shape::full>(A, B + j, ldb, C + j, ldc, rows, inner, 0, onto);
    for (; j < columns; j += Lanes<S>::count)
        multiply_rows<S, kRows, 1, Shape::full>(A, B + j, ldb, C + j, ldc, rows, inner, 0, onto);
}

// Goes through the pieces of the keys that queries of a range see: read(first key, count), which returns whether a
// weight of 0 hides whatever a key of the piece holds; meet(tile) for all that see some of it; done(first key, count).
template <class Keys, class Read, class Meet, class Done>
void walk(const Keys& keys, const Range& range, const Sizes& sizes, const Read& read, const Meet& meet,
          const Done& done) {
    keys.pieces([&](int64_t key, int64_t count, const int32_t* query, const int32_t* end) {
        const bool finite = read(key, count);
        Span spans[kTogether];
        for (int64_t together; query < end; query += together) {
            together = minimum(sizes.queries, end - query);
            bool whole = true;
            for (int64_t i = 0; i < together; ++i) {
                const Span seen = keys.seen(range.first + query[i]);
                spans[i] = {maximum(0, seen.first - key), minimum(count, seen.end - key)};
                whole = whole && spans[i].first == 0 && spans[i].end == count;
            }
            if (whole || finite) {
                int64_t first = count, last = 0;
                for (int64_t i = 0; i < together; ++i) {
                    first = minimum(first, spans[i].first);
                    last = maximum(last, spans[i].end);
                }
                meet(Tile{query, spans, together, first / kAligned * kAligned, last});
            } else {
                for (int64_t i = 0; i < together; ++i)
                    if (spans[i].first < spans[i].end)
                        meet(Tile{query + i, spans + i, 1, spans[i].first, spans[i].end});
            }
        }
        done(key, count);
    });
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
