// The state-space dual's backward pass.
//
// A task goes through its sequence's segments from the last to the first: forward from the saved state to the state
// before each chunk, then through the chunks from the last to the first.
#include "native/exports.h"
#include "ssd/cpu_adjoint.h"

namespace ssmzoo {
namespace SSMZOO_ISA {
namespace {

template <class S>
void block_backward(const SsdBackwardArguments& b, const Sequence& s, const Block& heads, char* scratch) {
    const SsdArguments& a = b.forward;
    Backward<S> w;
    w.take(reinterpret_cast<S*>(scratch), a);
    const int64_t width = w.width, pairs = a.chunk * a.chunk, maps = a.n * a.chunk;
    const auto clear = [](S* p, int64_t count) { memset(p, 0, sizeof(S) * static_cast<size_t>(count)); };
    clear(w.dstates, kBlock * w.size);
    clear(w.states, kBlock * a.segment * w.size);
    clear(w.dD, kBlock * width);
    for (int64_t h = 0; h < heads.heads; ++h) {
        const int64_t head = heads.first + h;
        if (b.dfinal)
            transpose(w.dstates + h * w.size, width, at<S>(b.dfinal, (s.index * a.heads + head) * a.p * a.n), a.n, a.p,
                      a.n);
        for (int64_t c = 0; c < width; ++c) w.D[h * width + c] = c < a.p ? skip<S>(a, head, c) : S(0);
        w.dA[h] = w.dbias[h] = S(0);
    }
    const int64_t chunks = ceil_div(s.length, a.chunk);
    for (int64_t segment = ceil_div(chunks, a.segment) - 1; segment >= 0; --segment) {
        const int64_t first = segment * a.segment, count = minimum(a.segment, chunks - first);
        for (int64_t h = 0; h < heads.heads && !w.in_place(a); ++h) {
            const int64_t row = start_of(a, s, segment, heads.first + h);
            for (int64_t j = 0; j < a.n; ++j) starts_of<S>(a).read(w.state(h, 0) + j * width, row + j);
        }
        w.run_ahead(a, s, first, count, heads);
        for (int64_t k = count - 1; k >= 0; --k) {
            const Span t = span<S>(a, s, first + k);
            w.shared.read(a, s, t, heads.group, w.panel);
            clear(w.dG, pairs);
            clear(w.dB, maps);
            clear(w.dC, maps);
            for (int64_t h = 0; h < heads.heads; ++h)
                w.chunk(b, s, t, heads, h, w.before(a, s, segment, heads.first + h, h, k), Next::of(heads, h, -1));
            w.write_maps(b, s, t, heads);
        }
    }
    for (int64_t h = 0; h < heads.heads; ++h) {
        const int64_t own = s.index * a.heads + heads.first + h;
        if (b.dinitial)
            transpose(static_cast<S*>(b.dinitial) + own * a.p * a.n, a.n, w.dstates + h * w.size, width, a.n, a.p);
        static_cast<S*>(b.dA)[own] = w.dA[h];
        static_cast<S*>(b.dbias)[own] = w.dbias[h];
        memcpy(static_cast<S*>(b.dD) + own * a.p, w.dD + h * width, sizeof(S) * static_cast<size_t>(a.p));
    }
}

// Adds the parts of an array, (parts, count), in order, from element `first` on: into `to`, which may be the first one.
template <class S>
void add_parts(void* to, const void* array, int64_t parts, int64_t count, int64_t first, int64_t last) {
    const S *each = static_cast<const S*>(array), *before = each;
    S* sum = static_cast<S*>(to);
    for (int64_t part = 1; part < parts; ++part, before = sum)
        for (int64_t i = first; i < last; ++i) sum[i] = before[i] + each[part * count + i];
}

template <class S>
int backward(const SsdBackwardArguments& b) {
    const SsdArguments& a = b.forward;
    const int64_t parts = blocks_per_group(a), blocks = a.groups * parts;
    Backward<S> w;
    const size_t bytes = sizeof(S) * static_cast<size_t>(w.take(nullptr, a));
    const int failed = parallel_for(a.sequences * blocks, a.threads, bytes, [&](int64_t i, char* scratch) {
        block_backward<S>(b, sequence(a, i / blocks), block(a, i % blocks), scratch);
    });
    if (failed) return failed;
    add_parts<S>(b.dA, b.dA, a.sequences, a.heads, 0, a.heads);
    add_parts<S>(b.dbias, b.dbias, a.sequences, a.heads, 0, a.heads);
    add_parts<S>(b.dD, b.dD, a.sequences, a.heads * a.p, 0, a.heads * a.p);
    if (parts == 1) return 0;
    const int64_t count = tokens_of(a) * a.groups * a.n, piece = 4096;
    return parallel_for(ceil_div(count, piece), a.threads, 0, [&](int64_t i, char*) {
        add_parts<S>(b.dB_sum, b.dB, parts, count, i * piece, minimum((i + 1) * piece, count));
        add_parts<S>(b.dC_sum, b.dC, parts, count, i * piece, minimum((i + 1) * piece, count));
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_SUMS(ssd_backward, SsdBackwardArguments, forward.dtype, backward)
