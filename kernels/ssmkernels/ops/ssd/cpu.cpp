// The state-space dual's forward pass.
#include "native/exports.h"
#include "ssd/cpu_head_rows.h"

namespace ssmzoo {
namespace SSMZOO_ISA {
namespace {

// A task's memory.
template <class S>
struct Forward {
    Shared<S> shared;
    Steps<S> steps;
    Outputs<S> outputs;
    S *states, *x, *Y, *D, *gate, *panel;  // (heads, n, width), (c, width), likewise, (heads, width), (width)
    int64_t size;                          // numbers of a state

    int64_t take(S* p, const SsdArguments& a) {
        Memory<S> memory = {p, 0};
        shared.take(memory, a);
        steps.take(memory, a);
        outputs.take(memory, a);
        const int64_t width = outputs.width;
        size = round_up(a.n * width, kLine<S>);
        states = memory.take(kBlock * size);
        x = memory.take(a.chunk * width);
        Y = memory.take(a.chunk * width);
        D = memory.take(kBlock * width);
        gate = memory.take(width);
        panel = memory.take(panel_size<S>(a.n > a.chunk ? a.n : a.chunk));
        return memory.used;
    }

    // The state before a chunk is kept, its first row in row `first`. Y is free for what goes past the caches: as many rows
    // as there are numbers in a line fill whole lines together, whatever their length.
    void keep(const SsdArguments& a, int64_t first, const S* state) {
        const auto kept = starts_of<S>(a);
        const int64_t width = outputs.width, together = kLine<S>, all = tokens_of(a) / (a.chunk * a.segment) * a.heads;
        int64_t j = 0;
        if (!kept.compact() && first % together == 0 && written_past<S>(a.starts, all * a.n * a.p, together * a.p))
            for (; j + together <= a.n; j += together) {
                for (int64_t r = 0; r < together; ++r)
                    memcpy(Y + r * a.p, state + (j + r) * width, sizeof(S) * static_cast<size_t>(a.p));
                S* to = static_cast<S*>(a.starts) + (first + j) * a.p;
                for (int64_t c = 0; c < together * a.p; c += Lanes<S>::count) stream(to + c, load(Y + c));
            }
        for (; j < a.n; ++j) kept.write(first + j, 0, state + j * width, a.p);
    }

    // One chunk of one head: its outputs, and the state after it.
    void advance(const SsdArguments& a, const Sequence& s, Span t, int64_t group, int64_t head, S* state, const S* D,
                 Next next) {
        const int64_t width = outputs.width;
        steps.read(a, s, t, head);
        const HeadRows from(a, s, t, head, a.x, a.x_batch, a.x_time, next);
        const HeadRows z(a, s, t, head, a.z, a.z_batch, a.z_time, next);
        const int64_t time = a.heads * stored(a);
        const HeadRows y(a, s, t, head, a.y, a.length * time, time);
        for (int64_t i = 0; i < t.tokens; ++i)
            read_channels(a, x + i * width, from.from, a.dtype, from(i), width, S(1));
        Coming coming;
        if (next.chunks) Shared<S>::coming(a, s, t, group, next.chunks, true, coming);
        from.coming(a, coming);
        z.coming(a, coming);
        outputs.compute(a, t, shared, steps, state, x, Y, panel, &coming);
        if (a.direct) outputs.add_direct(a, t, shared, steps, x, Y);
        for (int64_t i = 0; i < t.tokens; ++i) {
            S* row = Y + i * width;
            if (a.D)
                vectors<S>(width, [&](int64_t c) {
                    store(row + c, fma(load(D + c), load(x + i * width + c), load(row + c)));
                });
            if (a.z) {
                read_row(gate, z.from, a.dtype, z(i), a.p);
                vectors<S>(width, [&](int64_t c) { store(row + c, load(row + c) * silu<S>(load(gate + c))); });
            }
            const int64_t place = (s.batch * a.length + s.start + t.start + i) * a.heads + head;
            write_row(a.y, a.dtype, y(i), row, stored(a), false, a.m ? divide(a, place, row) : S(1));
        }
        product(shared.B_turned(), x, width, state, width, a.n, width, t.tokens, panel, 0, {true, steps.whole},
                steps.fed, &coming);
        coming.finish();
    }
};

template <class S>
void block_forward(const SsdArguments& a, const Sequence& s, const Block& heads, char* scratch) {
    Forward<S> w;
    w.take(reinterpret_cast<S*>(scratch), a);
    const int64_t width = w.outputs.width;
    for (int64_t h = 0; h < heads.heads; ++h) {
        S* state = w.states + h * w.size;
        const int64_t head = heads.first + h;
        for (int64_t i = 0; i < w.size; ++i) state[i] = S(0);
        if (a.initial) transpose(state, width, at<S>(a.initial, (s.index * a.heads + head) * a.p * a.n), a.n, a.p, a.n);
        for (int64_t c = 0; c < width; ++c) w.D[h * width + c] = c < a.p ? skip<S>(a, head, c) : S(0);
    }
    for (int64_t chunk = 0; chunk * a.chunk < s.length; ++chunk) {
        const Span t = span<S>(a, s, chunk);
        w.shared.read(a, s, t, heads.group, w.panel);
        for (int64_t h = 0; h < heads.heads; ++h) {
            S* state = w.states + h * w.size;
            const int64_t head = heads.first + h;
            if (a.starts && chunk % a.segment == 0) {
                w.keep(a, start_of(a, s, chunk / a.segment, head), state);
            }
            w.advance(a, s, t, heads.group, head, state, w.D + h * width, Next::of(heads, h, 1));
        }
    }
    for (int64_t h = 0; h < heads.heads; ++h)
        transpose(static_cast<S*>(a.final_state) + (s.index * a.heads + heads.first + h) * a.p * a.n, a.n,
                  w.states + h * w.size, width, a.n, a.p);
}

template <class S>
int forward(const SsdArguments& a) {
    const int64_t blocks = a.groups * blocks_per_group(a);
    Forward<S> w;
    const size_t bytes = sizeof(S) * static_cast<size_t>(w.take(nullptr, a));
    return parallel_for(a.sequences * blocks, a.threads, bytes, [&](int64_t i, char* scratch) {
        block_forward<S>(a, sequence(a, i / blocks), block(a, i % blocks), scratch);
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_SUMS(ssd, SsdArguments, dtype, forward)
