// What the backward pass does alike for every kind of decay, with the letters of tiled.py.
//
// The forward pass has kept the state before each segment and the errors of all tokens, and with them U. So the states
// before a segment's other chunks are products of matrices, S' = e^(G_C) S + K̂ᵀ U, and turned over from the start, as
// they are needed. Then each chunk, from the last to the first, reads the gradient of its outputs, and solves for X.
// cpu_adjoint_head.h and cpu_adjoint_channels.h do the rest.
#pragma once

#include "delta_rule/cpu.h"
#include "native/gemm.h"

namespace ssmzoo {

struct DeltaBackwardArguments {
    DeltaArguments forward;     // whose outputs are not looked at
    const void *d_o, *dfinal;   // (b l h values), contiguous; S: (s h keys values) or null
    void *dq, *dk;              // S: (parts b l g keys); of the activations' dtype where no heads share keys
    void* dv;                   // (b l h values)
    void *dbeta, *ddecay;       // S: (b l h); as the log decay, or null
    void* dinitial;             // S: (s h keys values) or null
};

namespace SSMZOO_ISA {

constexpr int64_t kBlock = 16;  // tokens: chunks are padded to a whole number of blocks
constexpr int64_t kFetched = 3;  // tokens that are fetched at each of a chunk's products, of which there are 25 to 40
constexpr int64_t kHeads = 4;   // of a group, whose gradients of q and k are added in one part

template <class S>
void scale_row(S* row, int64_t size, S factor) {
    const auto by = splat(factor);
    vectors<S>(size, [&](int64_t c) { store(row + c, by * load(row + c)); });
}

template <class S>
struct Segment {
    using V = typename Lanes<S>::V;

    S* turned;                   // of each chunk of a segment S, (values, width)
    S *dstate, *dturned;         // dS' (keys, columns), and turned (values, width)
    S *given, *U, *U_turned;     // [dO; X] (2 n, columns), (n, columns), (values, c): n tokens in whole blocks
    S* panel;
    const S* errors;             // of a chunk's tokens, `row` numbers each
    S* wide_errors;              // those that are kept compact (c, columns)
    Upcoming next;               // tokens of the chunk after it, fetched a few at each product
    int64_t width, columns, row;

    void take(Memory<S>& memory, const DeltaArguments& a) {
        width = round_up(a.keys, Lanes<S>::count);
        columns = round_up(a.values, Lanes<S>::count);
        row = is_half(a.dtype) ? columns : kept_errors<S>(a).count;
        turned = memory.take(a.segment * columns * width);
        dstate = memory.take(a.keys * columns);
        dturned = memory.take(columns * width);
        given = memory.take(2 * kChunk * columns);
        U = memory.take(kChunk * columns);
        U_turned = memory.take(columns * kChunk);
        wide_errors = memory.take(is_half(a.dtype) ? kChunk * columns : 0);
        panel = memory.take(panel_size<S>(columns > width ? columns : width) + panel_size<S>(2 * kChunk));
    }

    // product, while some of the tokens that come next are fetched.
    template <Shape shape = Shape::full>
    void multiply(Left<S> A, const S* B, int64_t ldb, S* C, int64_t ldc, int64_t rows, int64_t size, int64_t inner,
                  int64_t edge = 0, Onto<S> onto = {false, S(0)}, const S* factors = nullptr) {
        next.fetch_some(kFetched);
        product<S, shape>(A, B, ldb, C, ldc, rows, size, inner, panel, edge, onto, factors);
    }

    // What chunk `chunk` of a sequence's head will read: only keys and errors to run ahead.
    void expect(const DeltaBackwardArguments& b, const Sequence& s, int64_t chunk, int64_t head, bool ahead) {
        const DeltaArguments& a = b.forward;
        const KeptRows<S> kept = kept_errors<S>(a);
        const int64_t start = chunk * kChunk, stride = kept.stride(), kind = kept.compact() ? a.dtype : sizeof(S) == 8;
        next = upcoming(a, s, start, head, !ahead);
        next.add(a.errors, kind, errors_of(a, s, head, start) * stride, stride, kept.compact() ? stride : a.values);
        if (ahead) return;
        next.add(b.d_o, a.dtype, ((s.batch * a.length + s.start + start) * a.heads + head) * a.values, a.heads * a.values,
                 a.values);
    }

    // The gradient of a head's final state, and, at the end, that of its initial one.
    void begin(const DeltaBackwardArguments& b, int64_t own) {
        const DeltaArguments& a = b.forward;
        for (int64_t j = 0; j < a.keys; ++j)
            for (int64_t c = 0; c < columns; c += Lanes<S>::count)
                store(dstate + j * columns + c,
                      b.dfinal ? read_some(at<S>(b.dfinal, own + j * a.values + c), a.values - c) : V{});
    }

    void end(const DeltaBackwardArguments& b, int64_t own) const {
        const DeltaArguments& a = b.forward;
        if (!b.dinitial) return;
        for (int64_t j = 0; j < a.keys; ++j)
            memcpy(static_cast<S*>(b.dinitial) + own + j * a.values, dstate + j * columns,
                   sizeof(S) * static_cast<size_t>(a.values));
    }

    // The state before a segment.
    void begin_segment(const DeltaBackwardArguments& b, const Sequence& s, int64_t segment, int64_t head) {
        const DeltaArguments& a = b.forward;
        transpose_kept(turned, width, starts_of<S>(a), start_of(a, s, segment, head), a.keys, dturned);
        for (int64_t c = 0; c < a.values; ++c)
            for (int64_t j = a.keys; j < width; ++j) turned[c * width + j] = S(0);
    }

    // The state after chunk k of a segment, from token `from` of its sequence on: K̂ᵀ U onto what is left of the state
    // before. Row i of keys has to be multiplied by factors[i], for K̂ times β.
    void run_ahead(const DeltaBackwardArguments& b, const Sequence& s, int64_t from, int64_t head, int64_t k,
                   const S* keys, const S* factors, Onto<S> left) {
        constexpr int64_t part = 8 * kRows;  // of the state's columns: so that tokens are fetched at an even pace
        const int64_t size = columns * width;
        find_errors(b.forward, s, from, kChunk, head);
        for (int64_t c = 0; c < b.forward.values; c += part)
            multiply({errors + c, 1, row}, keys, width, turned + (k + 1) * size + c * width, width,
                     minimum(part, b.forward.values - c), width, kChunk, 0, left, factors);
    }

    void find_errors(const DeltaArguments& a, const Sequence& s, int64_t from, int64_t tokens, int64_t head) {
        const KeptRows<S> kept = kept_errors<S>(a);
        const int64_t place = errors_of(a, s, head, from);
        errors = kept.compact() ? wide_errors : at<S>(a.errors, place * row);
        for (int64_t i = 0; kept.compact() && i < tokens; ++i) kept.read(wide_errors + i * row, place + i);
    }

    const S* state_turned(int64_t k) const { return turned + k * columns * width; }

    // Of a chunk, with n tokens in whole blocks: dO, U, and both U and dS' turned.
    void read(const DeltaBackwardArguments& b, const Sequence& s, int64_t from, int64_t head, const Tile<S>& t, int64_t n) {
        const DeltaArguments& a = b.forward;
        find_errors(a, s, from, t.tokens, head);
        const int64_t padding = (n - t.tokens) * columns;
        for (int64_t i = 0; i < t.tokens; ++i) {
            read_row(given + i * columns, b.d_o, a.dtype,
                     ((s.batch * a.length + s.start + from + i) * a.heads + head) * a.values, a.values);
            const V beta = splat(t.beta[i]);
            const S* own = errors + i * row;
            vectors<S>(columns, [&](int64_t c) { store(U + i * columns + c, beta * load(own + c)); });
        }
        memset(given + t.tokens * columns, 0, sizeof(S) * static_cast<size_t>(padding));
        memset(U + t.tokens * columns, 0, sizeof(S) * static_cast<size_t>(padding));
        transpose(U_turned, kChunk, U, columns, n, a.values);
        transpose(dturned, width, dstate, columns, a.keys, columns);
        for (int64_t c = 0; c < columns; ++c)
            for (int64_t j = a.keys; j < width; ++j) dturned[c * width + j] = S(0);
    }

    // Of (I + M)ᵀ X = dU, which is where X shall be; M has the opposite sign.
    void solve(const S* M, int64_t n) {
        S* X = given + n * columns;
        for (int64_t first = n - kBlock; first >= 0; first -= kBlock) {
            const int64_t end = first + kBlock;
            if (end < n)
                multiply({M + end * kChunk + first, 1, kChunk}, X + end * columns, columns, X + first * columns, columns,
                         kBlock, columns, n - end, 0, {true, S(1)});
            for (int64_t i = end - 2; i >= first; --i)
                vectors<S>(columns, [&](int64_t c) {
                    V sum = load(X + i * columns + c);
                    for (int64_t j = i + 1; j < end; ++j)
                        sum = fma(splat(M[j * kChunk + i]), load(X + j * columns + c), sum);
                    store(X + i * columns + c, sum);
                });
        }
    }

    // The gradients of q, k, v and beta: of q and k the sums of what the group's heads give, of k in two parts.
    void write(const DeltaBackwardArguments& b, const Sequence& s, int64_t time, int64_t head, bool first, const Tile<S>& t,
               int64_t n, const S* of_q, S* of_k, const S* of_k_too) {
        const DeltaArguments& a = b.forward;
        const int64_t ratio = a.heads / a.groups, batches = a.cu_seqlens ? 1 : a.sequences;
        const int64_t part = head % ratio / kHeads * batches + s.batch;
        S* X = given + n * columns;
        for (int64_t i = 0; i < t.tokens; ++i) {
            const int64_t token = (s.batch * a.length + time + i) * a.heads + head;
            static_cast<S*>(b.dbeta)[token] = dot(X + i * columns, errors + i * row, columns);
            scale_row(X + i * columns, columns, t.beta[i]);
            write_row(b.dv, a.dtype, token * a.values, X + i * columns, a.values);
            const int64_t shared = ((part * a.length + time + i) * a.groups + head / ratio) * a.keys;
            if (ratio == 1) {
                S* both = of_k + i * width;
                vectors<S>(width, [&](int64_t c) { store(both + c, load(both + c) + load(of_k_too + i * width + c)); });
                write_row(b.dq, a.dtype, shared, of_q + i * width, a.keys);
                write_row(b.dk, a.dtype, shared, both, a.keys);
                continue;
            }
            S *dq = static_cast<S*>(b.dq) + shared, *dk = static_cast<S*>(b.dk) + shared;
            for (int64_t c = 0; c < a.keys; c += Lanes<S>::count) {
                const int64_t place = i * width + c, there = a.keys - c;
                V q = load(of_q + place), key = load(of_k + place) + load(of_k_too + place);
                if (!first) q = q + read_some(dq + c, there), key = key + read_some(dk + c, there);
                write_some(dq + c, q, there);
                write_some(dk + c, key, there);
            }
        }
    }
};

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
