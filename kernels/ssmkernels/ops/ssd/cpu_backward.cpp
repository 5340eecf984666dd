// The state-space dual's backward pass.
//
// A task goes through its sequence's segments from the last to the first: forward from the saved state to the state
// before each chunk, then through the chunks from the last to the first. With dY the gradient of a chunk's outputs and
// dS' that of the state after it, and W = M ∘ (dY Xᵀ), each of the gradients is
//
//     dX = Mᵀ dY + F ∘ (B dS'ᵀ)                         dG = Σ_heads L ∘ (dY Xᵀ)
//     dC = dG B + Σ_heads E ∘ (dY S)                    dB = dGᵀ C + Σ_heads F ∘ (X dS')
//     dS = E_c dS' + (E ∘ dY)ᵀ C
//     da_k = Σ_{j < k ≤ i} W_ij + Σ_{i ≥ k} e_i + Σ_{j < k} f_j + E_c <S, dS'>
//
// where e_i = C_i · (E ∘ dY S)_i and f_j = X_j · (F ∘ B dS'ᵀ)_j. Nothing is a difference of long sums.
#include "ssd/cpu.h"

namespace ssmzoo {

struct SsdBackwardArguments {
    SsdArguments forward;             // whose outputs are not looked at
    const void *dy, *dfinal;          // (b l h p), contiguous; S: (s h p n) or null
    void *dx, *dz;                    // (b l h p); dz where there is a z
    void *ddt;                        // S: (b l h)
    void *dB, *dC;                    // S: (parts b l g n), of which the first takes the sum of all
    void *dA, *dD, *dbias;            // S: (s h), (s h p), (s h), likewise
    void *dinitial;                   // S: (s h p n) or null
};

namespace SSMZOO_ISA {
namespace {

// A task's memory.
template <class S>
struct Backward {
    using V = typename Lanes<S>::V;

    Shared<S> shared;
    Steps<S> steps;
    Outputs<S> outputs;
    // Of all heads: the state's gradient (n, width), and states before each chunk of a segment, each with room for X
    S *dstates, *states;
    // Of one: states ahead (n, width); X, x, dY, and two of them to scale, (c, width); turned, (width, c)
    S *factor, *x, *dY, *scaled, *dX, *X_turned, *dY_turned;
    S *L, *dM, *map, *sums;         // (c, c), (c, c), (n, c), (c)
    S *da, *e, *f, *gate;            // (c), (c), (c), (width)
    S *dB, *dC, *dG, *dG_turned;     // of all: (n, c), (n, c), (c, c): element (j, i), and turned
    S *D, *dD, *dA, *dbias, *panel;  // (heads, width), likewise, (heads), likewise
    int64_t width, size, room;       // p in whole vectors; numbers of a state, and of one with its room

    int64_t take(S* p, const SsdArguments& a) {
        Memory<S> memory = {p, 0};
        shared.take(memory, a);
        steps.take(memory, a);
        outputs.take(memory, a);
        width = outputs.width;
        const int64_t c = a.chunk, rows = c * width;
        size = round_up(a.n * width, kLine<S>);
        room = round_up((a.n + c) * width, kLine<S>);
        dstates = memory.take(kBlock * size);
        states = memory.take(kBlock * kSegment * size);
        factor = memory.take(room);
        S** const of_rows[] = {&x, &dY, &scaled, &dX, &X_turned, &dY_turned};
        for (S** array : of_rows) *array = memory.take(rows);
        S** const of_pairs[] = {&L, &dM, &dG, &dG_turned};
        for (S** array : of_pairs) *array = memory.take(c * c);
        S** const of_maps[] = {&map, &dB, &dC};
        for (S** array : of_maps) *array = memory.take(a.n * c);
        S** const of_tokens[] = {&sums, &da, &e, &f};
        for (S** array : of_tokens) *array = memory.take(c);
        gate = memory.take(width);
        D = memory.take(kBlock * width);
        dD = memory.take(kBlock * width);
        dA = memory.take(kBlock);
        dbias = memory.take(kBlock);
        panel = memory.take(panel_size<S>(a.n + c > width ? a.n + c : width));
        return memory.used;
    }

    S* state(int64_t head, int64_t chunk) const { return states + (head * kSegment + chunk) * size; }

    // x and X of a chunk, and F ∘ X.
    void read_inputs(const SsdArguments& a, const Sequence& s, Span t, int64_t head, S* X) {
        const Rows from = rows_of_x(a, s, t, head);
        for (int64_t i = 0; i < t.tokens; ++i) {
            const int64_t row = i * width;
            read_row(x + row, from.from, a.dtype, from(i), a.p);
            const V delta = splat(steps.delta[i]), F = splat(steps.F[i]);
            vectors<S>(width, [&](int64_t c) {
                const V fed = delta * load(x + row + c);
                store(X + row + c, fed);
                store(scaled + row + c, F * fed);
            });
        }
    }

    // The states before each chunk of a segment, from the first's.
    void run_ahead(const SsdArguments& a, const Sequence& s, int64_t first, int64_t chunks, int64_t head, int64_t h) {
        for (int64_t k = 0; k + 1 < chunks; ++k) {
            const Span t = span<S>(a, s, first + k);
            const Left<S> B_turned = {shared_B(a, s, t, head), 1, a.B_time};
            steps.read(a, s, t, head);
            read_inputs(a, s, t, head, factor);
            memcpy(state(h, k + 1), state(h, k), sizeof(S) * static_cast<size_t>(a.n * width));
            product(B_turned, scaled, width, state(h, k + 1), width, a.n, width, t.tokens, panel, 0,
                    {true, steps.whole});
        }
    }

    static const S* shared_B(const SsdArguments& a, const Sequence& s, Span t, int64_t head) {
        const int64_t group = head / (a.heads / a.groups);
        return at<S>(a.B, s.batch * a.B_batch + (s.start + t.start) * a.B_time + group * a.n);
    }

    // dY, where there is a gate after the gate's gradient, and what it adds to the skip's.
    void read_gradients(const SsdBackwardArguments& b, const Sequence& s, Span t, int64_t head, const S* D, S* dD) {
        const SsdArguments& a = b.forward;
        const Rows dy = rows_of(a, s, t, head, b.dy), z = rows_of_z(a, s, t, head), dz = rows_of(a, s, t, head, b.dz);
        if (a.z) outputs.compute(a, t, shared, steps, factor, dX, panel);
        for (int64_t i = 0; i < t.tokens; ++i) {
            const int64_t row = i * width;
            read_row(dY + row, dy.from, a.dtype, dy(i), a.p);
            if (a.z) {
                read_row(gate, z.from, a.dtype, z(i), a.p);
                vectors<S>(width, [&](int64_t c) {
                    const V y = fma(load(D + c), load(x + row + c), load(dX + row + c)), g = load(gate + c);
                    const V sigma = sigmoid<S>(g), gradient = load(dY + row + c);
                    const V slope = sigma * fma(g, splat(S(1)) - sigma, splat(S(1)));
                    store(gate + c, gradient * y * slope);
                    store(dY + row + c, gradient * g * sigma);
                });
                write_row(b.dz, a.dtype, dz(i), gate, a.p);
            }
            if (a.D)
                vectors<S>(width, [&](int64_t c) {
                    store(dD + c, fma(load(dY + row + c), load(x + row + c), load(dD + c)));
                });
        }
    }

    // (c, width) → (width, c), zeros beyond the chunk's tokens.
    void turn(const SsdArguments& a, Span t, S* to, const S* from) const {
        transpose(to, a.chunk, from, width, t.tokens, a.p);
        for (int64_t c = 0; c < a.p; ++c)
            for (int64_t i = t.tokens; i < t.padded; ++i) to[c * a.chunk + i] = S(0);
    }

    // Σ_{j < k ≤ i} W_ij for each k into da, and L ∘ (dY Xᵀ) to dG.
    void pair_gradients(const SsdArguments& a, Span t, const S* X) {
        const int64_t stride = a.chunk;
        const S* M = outputs.M(a);
        product(Left<S>{X, width, 1}, dY_turned, stride, dM, stride, t.tokens, t.padded, a.p, panel);
        vectors<S>(t.padded, [&](int64_t i) { store(sums + i, V{}); });
        for (int64_t j = 0; j < t.tokens; ++j) {
            da[j] = j ? sum(sums, t.padded) : S(0);  // sums over rows j' < j of W, at i >= j
            const int64_t first = j / Lanes<S>::count * Lanes<S>::count;
            for (int64_t i = first; i < t.padded; i += Lanes<S>::count) {
                const int64_t place = j * stride + i;
                const V gradient = load(dM + place);
                store(sums + i, fma(load(M + place), gradient, load(sums + i)));
                store(dG + place, fma(load(L + place), gradient, load(dG + place)));
            }
            sums[j] = S(0);
        }
    }

    static S sum(const S* from, int64_t count) {
        V total = V{};
        vectors<S>(count, [&](int64_t i) { total = total + load(from + i); });
        return sum_lanes<S, 1>(&total)[0];
    }

    static S dot(const S* left, const S* right, int64_t count) {
        V total = V{};
        vectors<S>(count, [&](int64_t i) { total = fma(load(left + i), load(right + i), total); });
        return sum_lanes<S, 1>(&total)[0];
    }

    // One chunk of one head.
    void chunk(const SsdBackwardArguments& b, const Sequence& s, Span t, int64_t head, int64_t h, const S* before) {
        const SsdArguments& a = b.forward;
        const int64_t stride = a.chunk, n = a.n;
        S *dstate = dstates + h * size, *X = factor + n * width;
        steps.read(a, s, t, head);
        memcpy(factor, before, sizeof(S) * static_cast<size_t>(n * width));
        read_inputs(a, s, t, head, X);
        read_gradients(b, s, t, head, D + h * width, dD + h * width);
        turn(a, t, X_turned, X);
        turn(a, t, dY_turned, dY);
        S* M = outputs.M(a);
        decays(t, steps.decay, shared.G, stride, outputs.row, [&](int64_t j, int64_t i, V decay, V G) {
            store(L + j * stride + i, decay);
            store(M + j * stride + i, decay * G);
        });
        pair_gradients(a, t, X);

        product(shared.B, dstate, width, dX, width, t.tokens, width, n, panel);
        for (int64_t i = 0; i < t.tokens; ++i) {
            const V F = splat(steps.F[i]);
            vectors<S>(width, [&](int64_t c) { store(dX + i * width + c, F * load(dX + i * width + c)); });
            f[i] = dot(dX + i * width, X + i * width, width);
        }
        product<S, Shape::upper>({M, stride, 1}, dY, width, dX, width, t.tokens, width, t.tokens, panel, 0,
                                 {true, S(1)});

        // Sums over heads: E ∘ (S dYᵀ) to dC, F ∘ (dS' Xᵀ) to dB
        product({before, width, 1}, dY_turned, stride, map, stride, n, t.padded, a.p, panel);
        vectors<S>(t.padded, [&](int64_t i) { store(e + i, V{}); });
        add_maps(t, steps.E, dC, stride, n, [&](int64_t place, int64_t i, V gradient) {
            store(e + i, fma(load(shared.C_turned + place), gradient, load(e + i)));
        });
        product({dstate, width, 1}, X_turned, stride, map, stride, n, t.padded, a.p, panel);
        add_maps(t, steps.F, dB, stride, n, [](int64_t, int64_t, V) {});

        write_steps(b, s, t, head, h, steps.whole * dot(before, dstate, n * width));
        write_inputs(b, s, t, head, D + h * width);
        product({shared.C_turned, stride, 1}, scaled, width, dstate, width, n, width, t.tokens, panel, 0,
                {true, steps.whole});
    }

    template <class Also>
    void add_maps(Span t, const S* decay, S* to, int64_t stride, int64_t n, const Also& also) const {
        for (int64_t j = 0; j < n; ++j)
            vectors<S>(t.padded, [&](int64_t i) {
                const int64_t place = j * stride + i;
                const V gradient = load(decay + i) * load(map + place);
                store(to + place, load(to + place) + gradient);
                also(place, i, gradient);
            });
    }

    // The gradients of dt, A and the bias, from dX, W, e, f and the state's share.
    void write_steps(const SsdBackwardArguments& b, const Sequence& s, Span t, int64_t head, int64_t h, S of_state) {
        const SsdArguments& a = b.forward;
        S later = S(0), earlier = S(0);
        for (int64_t i = t.tokens - 1; i >= 0; --i) {
            later = later + e[i];
            da[i] = da[i] + later + of_state;
        }
        for (int64_t i = 0; i < t.tokens; ++i) {
            da[i] = da[i] + earlier;
            earlier = earlier + f[i];
        }
        const S A = *at<S>(a.A, head), least = S(a.dt_least), most = S(a.dt_most);
        for (int64_t i = t.tokens; i < t.padded; ++i) da[i] = e[i] = S(0);
        for (int64_t i = 0; i < t.tokens; ++i) {
            dA[h] = dA[h] + steps.delta[i] * da[i];
            e[i] = dot(dX + i * width, x + i * width, width) + A * da[i];  // of Δ
        }
        vectors<S>(t.padded, [&](int64_t i) {
            V step = load(steps.raw + i), gradient = load(e + i);
            if (a.softplus) {
                gradient = gradient * sigmoid<S>(step);
                step = softplus<S>(step);
            }
            const auto within = (step >= splat(least)) & (step <= splat(most));
            store(e + i, from_bits<S>(bits_of<S>(gradient) & within));
        });
        S* to = static_cast<S*>(b.ddt) + (s.batch * a.length + s.start + t.start) * a.heads + head;
        for (int64_t i = 0; i < t.tokens; ++i) {
            to[i * a.heads] = e[i];
            dbias[h] = dbias[h] + e[i];
        }
    }

    // The gradient of x; and E ∘ dY into `scaled`.
    void write_inputs(const SsdBackwardArguments& b, const Sequence& s, Span t, int64_t head, const S* D) {
        const SsdArguments& a = b.forward;
        const Rows dx = rows_of(a, s, t, head, b.dx);
        for (int64_t i = 0; i < t.tokens; ++i) {
            const int64_t row = i * width;
            const V delta = splat(steps.delta[i]), E = splat(steps.E[i]);
            vectors<S>(width, [&](int64_t c) {
                const V gradient = load(dY + row + c);
                store(scaled + row + c, E * gradient);
                store(gate + c, fma(delta, load(dX + row + c), load(D + c) * gradient));
            });
            write_row(b.dx, a.dtype, dx(i), gate, a.p);
        }
    }

    // The gradients of B and C, once all heads have added theirs.
    void write_maps(const SsdBackwardArguments& b, const Sequence& s, Span t, const Block& heads) {
        const SsdArguments& a = b.forward;
        const int64_t stride = a.chunk, n = a.n;
        for (int64_t j = 0; j < t.tokens; ++j)
            for (int64_t i = t.tokens; i < t.padded; ++i) dG[j * stride + i] = S(0);
        for (int64_t i = 0; i < t.tokens; ++i) {
            for (int64_t j = 0; j < t.padded; ++j) dG_turned[i * stride + j] = S(0);
        }
        transpose(dG_turned, stride, dG, stride, t.tokens, t.tokens);
        const Onto<S> sum = {true, S(1)};
        product(shared.B_turned(), dG, stride, dC, stride, n, t.padded, t.tokens, panel, 0, sum);
        product({shared.C_turned, stride, 1}, dG_turned, stride, dB, stride, n, t.padded, t.tokens, panel, 0, sum);
        const int64_t tokens = (a.cu_seqlens ? 1 : a.sequences) * a.length;
        const int64_t first = heads.part * tokens + s.batch * a.length + s.start + t.start;
        const int64_t offset = (first * a.groups + heads.group) * n;
        transpose(static_cast<S*>(b.dB) + offset, a.groups * n, dB, stride, n, t.tokens);
        transpose(static_cast<S*>(b.dC) + offset, a.groups * n, dC, stride, n, t.tokens);
    }
};

template <class S>
void block_backward(const SsdBackwardArguments& b, const Sequence& s, const Block& heads, char* scratch) {
    const SsdArguments& a = b.forward;
    Backward<S> w;
    w.take(reinterpret_cast<S*>(scratch), a);
    const int64_t width = w.width, pairs = a.chunk * a.chunk, maps = a.n * a.chunk;
    const auto clear = [](S* p, int64_t count) { memset(p, 0, sizeof(S) * static_cast<size_t>(count)); };
    clear(w.dstates, kBlock * w.size);
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
    for (int64_t segment = ceil_div(chunks, kSegment) - 1; segment >= 0; --segment) {
        const int64_t first = segment * kSegment, count = minimum(kSegment, chunks - first);
        for (int64_t h = 0; h < heads.heads; ++h) {
            const int64_t head = heads.first + h;
            const int64_t kept = ((s.first_segment + segment) * a.heads + head) * a.n * round_up(a.p, 16);
            memcpy(w.state(h, 0), at<S>(a.starts, kept), sizeof(S) * static_cast<size_t>(a.n * width));
            w.run_ahead(a, s, first, count, head, h);
        }
        for (int64_t k = count - 1; k >= 0; --k) {
            const Span t = span<S>(a, s, first + k);
            w.shared.read(a, s, t, heads.group, w.panel);
            clear(w.dG, pairs);
            clear(w.dB, maps);
            clear(w.dC, maps);
            for (int64_t h = 0; h < heads.heads; ++h) w.chunk(b, s, t, heads.first + h, h, w.state(h, k));
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

// Adds the parts of an array, (parts, count), to its first one, in order, from element `first` on.
template <class S>
void add_parts(void* array, int64_t parts, int64_t count, int64_t first, int64_t last) {
    S* sum = static_cast<S*>(array);
    for (int64_t part = 1; part < parts; ++part)
        for (int64_t i = first; i < last; ++i) sum[i] = sum[i] + sum[part * count + i];
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
    add_parts<S>(b.dA, a.sequences, a.heads, 0, a.heads);
    add_parts<S>(b.dbias, a.sequences, a.heads, 0, a.heads);
    add_parts<S>(b.dD, a.sequences, a.heads * a.p, 0, a.heads * a.p);
    if (parts == 1) return 0;
    const int64_t count = (a.cu_seqlens ? 1 : a.sequences) * a.length * a.groups * a.n, piece = 4096;
    return parallel_for(ceil_div(count, piece), a.threads, 0, [&](int64_t i, char*) {
        add_parts<S>(b.dB, parts, count, i * piece, minimum((i + 1) * piece, count));
        add_parts<S>(b.dC, parts, count, i * piece, minimum((i + 1) * piece, count));
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT(ssd_backward)(const ssmzoo::SsdBackwardArguments* b) {
    using namespace ssmzoo::SSMZOO_ISA;
    return b->forward.dtype == 1 ? backward<double>(*b) : backward<float>(*b);
}
