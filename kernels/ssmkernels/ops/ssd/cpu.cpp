// The state-space dual's forward pass.
#include "native/exports.h"
#include "ssd/cpu.h"

namespace ssmzoo {
namespace SSMZOO_ISA {
namespace {

// A task's memory.
template <class S>
struct Forward {
    Shared<S> shared;
    Steps<S> steps;
    Outputs<S> outputs;
    S *factors, *fed, *Y, *D, *gate, *panel;  // factors: of each head, the state (n, width), then X (c, width)
    int64_t factor;                           // numbers from one head's to the next's

    int64_t take(S* p, const SsdArguments& a) {
        Memory<S> memory = {p, 0};
        shared.take(memory, a);
        steps.take(memory, a);
        outputs.take(memory, a);
        const int64_t width = outputs.width;
        factor = round_up((a.n + a.chunk) * width, kLine<S>);
        factors = memory.take(kBlock * factor);
        fed = memory.take(a.chunk * width);
        Y = memory.take(a.chunk * width);
        D = memory.take(kBlock * width);
        gate = memory.take(width);
        panel = memory.take(panel_size<S>(a.n + a.chunk));
        return memory.used;
    }

    // One chunk of one head: its outputs, and the state after it.
    void advance(const SsdArguments& a, const Sequence& s, Span t, int64_t head, S* state, const S* D, Next next) {
        const int64_t width = outputs.width;
        steps.read(a, s, t, head);
        S* X = state + a.n * width;
        const Rows x(a, s, t, head, a.x, a.x_batch, a.x_time, next.ahead(a, a.x_time));
        const Rows z(a, s, t, head, a.z, a.z_batch, a.z_time, next.ahead(a, a.z_time));
        const Rows y(a, s, t, head, a.y, a.length * a.heads * a.p, a.heads * a.p);
        for (int64_t i = 0; i < t.tokens; ++i) {
            read_row(X + i * width, x.from, a.dtype, x(i), a.p, a.scale ? S(1) : steps.delta[i]);
            x.fetch(a, i);
        }
        outputs.compute(a, t, shared, steps, state, Y, panel);
        if (a.scale) outputs.add_direct(a, t, shared, steps, X, Y);
        for (int64_t i = 0; i < t.tokens; ++i) {
            S* row = Y + i * width;
            const auto F = splat(a.scale ? steps.F[i] * steps.scale[i] : steps.F[i]);
            vectors<S>(width, [&](int64_t c) { store(fed + i * width + c, F * load(X + i * width + c)); });
            if (a.D) {
                read_row(gate, x.from, a.dtype, x(i), a.p);
                vectors<S>(width, [&](int64_t c) { store(row + c, fma(load(D + c), load(gate + c), load(row + c))); });
            }
            if (a.z) {
                read_row(gate, z.from, a.dtype, z(i), a.p);
                z.fetch(a, i);
                vectors<S>(width, [&](int64_t c) { store(row + c, load(row + c) * silu<S>(load(gate + c))); });
            }
            write_row(a.y, a.dtype, y(i), row, a.p);
        }
        product(shared.B_turned(), fed, width, state, width, a.n, width, t.tokens, panel, 0, {true, steps.whole});
    }
};

template <class S>
void block_forward(const SsdArguments& a, const Sequence& s, const Block& heads, char* scratch) {
    Forward<S> w;
    w.take(reinterpret_cast<S*>(scratch), a);
    const int64_t width = w.outputs.width, size = a.n * width;
    for (int64_t h = 0; h < heads.heads; ++h) {
        S* state = w.factors + h * w.factor;
        const int64_t head = heads.first + h;
        for (int64_t i = 0; i < size; ++i) state[i] = S(0);
        if (a.initial) transpose(state, width, at<S>(a.initial, (s.index * a.heads + head) * a.p * a.n), a.n, a.p, a.n);
        for (int64_t c = 0; c < width; ++c) w.D[h * width + c] = c < a.p ? skip<S>(a, head, c) : S(0);
    }
    for (int64_t chunk = 0; chunk * a.chunk < s.length; ++chunk) {
        const Span t = span<S>(a, s, chunk);
        w.shared.read(a, s, t, heads.group, w.panel);
        for (int64_t h = 0; h < heads.heads; ++h) {
            S* state = w.factors + h * w.factor;
            const int64_t head = heads.first + h;
            if (a.starts && chunk % kSegment == 0) {
                S* kept = static_cast<S*>(a.starts) + start_of(a, s, chunk / kSegment, head);
                for (int64_t j = 0; j < a.n; ++j)
                    memcpy(kept + j * a.p, state + j * width, sizeof(S) * static_cast<size_t>(a.p));
            }
            w.advance(a, s, t, head, state, w.D + h * width, Next::of(heads, h, 1));
        }
    }
    for (int64_t h = 0; h < heads.heads; ++h)
        transpose(static_cast<S*>(a.final_state) + (s.index * a.heads + heads.first + h) * a.p * a.n, a.n,
                  w.factors + h * w.factor, width, a.n, a.p);
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
