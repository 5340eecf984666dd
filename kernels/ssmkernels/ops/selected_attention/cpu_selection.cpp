// Blocks that queries select by their weights on compressed keys (arXiv 2502.11089, equations 8 to 12).
//
// A tile of queries meets all compressed keys that its last one sees, which are turned over beforehand. Softmax, sums
// over heads and over the compressed keys of a block, and the choice of the largest follow query by query, in a core's
// own cache.
#include "attention/cpu_pieces.h"

namespace ssmzoo {

// Queries are the last l of `length` tokens; compressed key c stands for `stretch` tokens from c · stride on.
struct SelectionArguments {
    const void *q, *keys;  // (b l h d), any floating dtype; S: (b g pieces d kKeys), contiguous, zeros beyond the n of them
    int32_t* blocks;       // (b l g n_selected), contiguous
    int64_t dtype, batch, l, h, g, n, d, length, stretch, stride, block_size, n_selected, n_initial, n_local, threads;
    int64_t q_batch, q_time, q_head;
    double scale;
};

namespace SSMZOO_ISA {
namespace {

constexpr int64_t kLogits = 1 << 16;  // of a tile, at most, unless a single query has more: they stay in the second cache

template <class S>
struct Selection {
    const SelectionArguments& a;
    const int64_t groups, pieces, columns, overlap, per_block, blocks, queries, row;
    S *q, *logits, *weights, *spread, *best, *panel;
    int32_t* chosen;

    explicit Selection(const SelectionArguments& arguments)
        : a(arguments), groups(a.h / a.g), pieces(ceil_div(a.n, kKeys)), columns(pieces * kKeys + kLine<S>),
          overlap(a.stretch / a.stride), per_block(a.block_size / a.stride), blocks(ceil_div(a.length, a.block_size)),
          queries(minimum(maximum(kLogits / (columns * groups), 1), maximum(kTogether / groups, 1))),
          row(round_up(a.d, Lanes<S>::count)), chosen(nullptr) {}

    int64_t take(S* p) {
        Memory<S> memory = {p, 0};
        // Sums reach over the ends of the weights: zeros before the first, and up to the last block after the last one.
        const int64_t places = maximum(columns, blocks * per_block) + 2 * kLine<S> + overlap;
        q = memory.take(queries * groups * row);
        logits = memory.take(queries * groups * columns);
        weights = memory.take(places);
        spread = memory.take(places);
        best = memory.take(a.n_selected);
        chosen = reinterpret_cast<int32_t*>(memory.take(a.n_selected));
        panel = memory.take(panel_size<S>(row));
        return memory.used;
    }

    // Compressed keys whose stretches have ended at token `place`.
    int64_t seen(int64_t place) const {
        return place + 1 < a.stretch ? 0 : minimum(a.n, (place + 1 - a.stretch) / a.stride + 1);
    }

    // A row's logits of `count` keys → its softmax, added to the weights.
    void add_softmax(S* row_logits, int64_t count, S* to) const {
        using V = typename Lanes<S>::V;
        constexpr int64_t lanes = Lanes<S>::count;
        const Span span = {0, count};
        V tops = splat(kNothing<S>), sums = {};
        for (int64_t j = 0; j < count; j += lanes)
            tops = larger<S>(tops, within<S>(span, j, load(row_logits + j), kNothing<S>));
        S each[lanes];
        store(each, tops);
        S top = each[0];
        for (int i = 1; i < lanes; ++i) top = each[i] > top ? each[i] : top;
        for (int64_t j = 0; j < count; j += lanes) {
            const V weight = within<S>(span, j, exp2<S>(load(row_logits + j) - splat(top)), S(0));
            sums = sums + weight;
            store(row_logits + j, weight);
        }
        const V factor = splat(S(1) / sum_lanes<S, 1>(&sums)[0]);
        for (int64_t j = 0; j < count; j += lanes) store(to + j, fma(load(row_logits + j), factor, load(to + j)));
    }

    // The blocks of a query at `place`, by its weights on the first `count` compressed keys.
    void choose_blocks(int64_t place, const S* first_weight, int32_t* to) const {
        using V = typename Lanes<S>::V;
        constexpr int64_t lanes = Lanes<S>::count;
        const int64_t own = place / a.block_size, free = maximum(a.n_initial, own - a.n_local + 1);
        int64_t found = 0;
        for (int64_t block = 0; block < minimum(a.n_initial, own + 1); ++block) to[found++] = static_cast<int32_t>(block);
        for (int64_t block = free; block <= own; ++block) to[found++] = static_cast<int32_t>(block);
        const int64_t wanted = a.n_selected - found;
        for (int64_t i = 0; i < wanted; ++i) best[i] = kNothing<S>, chosen[i] = -1;
        const int64_t begin = a.n_initial * per_block, end = free * per_block;
        for (int64_t i = begin; i < end; i += lanes) {
            V sum = load(first_weight + i);
            for (int64_t o = 1; o < overlap; ++o) sum = sum + load(first_weight + i - o);
            store(spread + i, sum);
        }
        for (int64_t block = a.n_initial; block < free && wanted > 0; ++block) {
            S score = spread[block * per_block];
            for (int64_t i = 1; i < per_block; ++i) score += spread[block * per_block + i];
            if (!(score > best[wanted - 1])) continue;
            int64_t at = wanted - 1;
            for (; at > 0 && score > best[at - 1]; --at) best[at] = best[at - 1], chosen[at] = chosen[at - 1];
            best[at] = score;
            chosen[at] = static_cast<int32_t>(block);
        }
        for (int64_t i = 0; i < wanted; ++i) to[found + i] = chosen[i];
    }

    void run(int64_t batch, int64_t group, int64_t first, int64_t end) const {
        const int64_t rows = (end - first) * groups, before = a.length - a.l;
        const S* keys = static_cast<const S*>(a.keys) + (batch * a.g + group) * pieces * a.d * kKeys;
        for (int64_t i = 0; i < rows; ++i)
            read_row(q + i * row, a.q, a.dtype,
                     batch * a.q_batch + (first + i / groups) * a.q_time + (group * groups + i % groups) * a.q_head, a.d,
                     S(a.scale * kLog2e));
        const int64_t most = seen(before + end - 1);
        for (int64_t piece = 0; piece * kKeys < most; ++piece)
            multiply_some<S>({q, row, 1}, keys + piece * a.d * kKeys, kKeys, logits + piece * kKeys, columns, rows, kKeys,
                             a.d, panel);
        S* first_weight = weights + round_up(overlap, kLine<S>);
        for (int64_t i = first; i < end; ++i) {
            const int64_t place = before + i, count = seen(place);
            const int64_t summed = maximum(count, (place / a.block_size + 1) * per_block);
            memset(weights, 0, sizeof(S) * static_cast<size_t>(first_weight - weights + summed + kLine<S>));
            for (int64_t r = 0; r < groups && count > 0; ++r)
                add_softmax(logits + ((i - first) * groups + r) * columns, count, first_weight);
            choose_blocks(place, first_weight, a.blocks + ((batch * a.l + i) * a.g + group) * a.n_selected);
        }
    }
};

template <class S>
int select(const SelectionArguments& a) {
    Selection<S> layout(a);
    const int64_t tiles = ceil_div(a.l, layout.queries), bytes = int64_t(sizeof(S)) * layout.take(nullptr);
    return parallel_for(a.batch * a.g * tiles, a.threads, bytes, [&](int64_t task, char* scratch) {
        Selection<S> own(a);
        own.take(reinterpret_cast<S*>(scratch));
        const int64_t row = task / tiles, first = task % tiles * own.queries;
        own.run(row / a.g, row % a.g, first, minimum(a.l, first + own.queries));
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_SUMS(select_blocks, SelectionArguments, dtype, select)
