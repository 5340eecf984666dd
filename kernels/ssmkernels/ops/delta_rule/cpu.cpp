// The delta rule's forward pass: a task takes one sequence, one head and some columns of its state through time.
#include "delta_rule/cpu.h"
#include "native/exports.h"

namespace ssmzoo {
namespace SSMZOO_ISA {
namespace {

template <class S>
struct Forward {
    Tile<S> tile;
    S *state, *rows, *errors;  // errors: (c, width), where they are kept compact
    int64_t width;             // columns of a task at most, in whole vectors

    int64_t take(S* p, const DeltaArguments& a) {
        Memory<S> memory = {p, 0};
        tile.take(memory, a.keys, minimum(kChunk, a.length));
        width = round_up(minimum(kPart, a.values), Lanes<S>::count);
        state = memory.take(a.keys * width);
        rows = memory.take(minimum(kChunk, a.length) * width);
        errors = a.errors && is_half(a.dtype) ? memory.take(minimum(kChunk, a.length) * width) : nullptr;
        return memory.used;
    }

    void run(const DeltaArguments& a, const Sequence& s, int64_t head, int64_t first) {
        const int64_t values = minimum(kPart, a.values - first), columns = round_up(values, Lanes<S>::count);
        const int64_t own = (s.index * a.heads + head) * a.keys * a.values + first;
        into_blocks(state, a.initial ? at<S>(a.initial, own) : nullptr, a.values, a.keys, values);
        for (int64_t start = 0; start < s.length; start += kChunk) {
            if (a.starts && start % (kChunk * a.segment) == 0)
                keep_state(a, start_of(a, s, start / (kChunk * a.segment), head), first, values);
            tile.read(a, s, start, minimum(kChunk, s.length - start), head);
            for (int64_t i = 0; i < tile.tokens; ++i)
                read_row(rows + i * width, a.v, a.dtype,
                         s.batch * a.v_batch + (s.start + start + i) * a.v_time + head * a.v_head + first, values);
            const int64_t after = s.start + start + kChunk;
            Upcoming next = upcoming(a, s, start + kChunk, head, true);
            next.add(a.v, a.dtype, s.batch * a.v_batch + after * a.v_time + head * a.v_head + first, a.v_time, values);
            if (a.errors) {
                const KeptRows<S> kept = kept_errors<S>(a);
                const int64_t place = errors_of(a, s, head, start), row = kept.compact() ? width : kept.count;
                S* to = kept.compact() ? errors : static_cast<S*>(a.errors) + place * row + first;
                walk<S, true>(decay_of(a), state, 0, a.keys, tile, S(a.scale), rows, width, columns, next, to, row);
                for (int64_t i = 0; kept.compact() && i < tile.tokens; ++i)
                    kept.write(place + i, first, errors + i * width, values);
            } else {
                walk<S, false>(decay_of(a), state, 0, a.keys, tile, S(a.scale), rows, width, columns, next);
            }
            for (int64_t i = 0; i < tile.tokens; ++i)
                write_row(a.o, a.dtype,
                          ((s.batch * a.length + s.start + start + i) * a.heads + head) * a.values + first,
                          rows + i * width, values);
        }
        out_of_blocks(static_cast<S*>(a.final_state) + own, a.values, state, a.keys, values);
    }

    // The state's columns from `first` on, as rows from `row` on.
    void keep_state(const DeltaArguments& a, int64_t row, int64_t first, int64_t values) const {
        const KeptRows<S> kept = starts_of<S>(a);
        if (!kept.compact())
            return out_of_blocks(static_cast<S*>(a.starts) + row * a.values + first, a.values, state, a.keys, values);
        S line[kPart];
        for (int64_t j = 0; j < a.keys; ++j) {
            blocks<S>(round_up(values, Lanes<S>::count), [&](int64_t at, int64_t wide) {
                memcpy(line + at, state + at * a.keys + j * wide, sizeof(S) * static_cast<size_t>(wide));
            });
            kept.write(row + j, first, line, values);
        }
    }
};

static_assert(kPart == kOfStep, "a task writes numbers that share a step");

template <class S>
int forward(const DeltaArguments& a) {
    return by_columns<Forward<S>, S>(a);
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_SUMS(delta_rule, DeltaArguments, dtype, forward)
