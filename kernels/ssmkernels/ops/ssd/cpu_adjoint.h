// The gradients of a chunk of the state-space dual.
//
// With dY the gradient of the chunk's outputs, dS' that of the state after it, and W = M ∘ (dY Xᵀ), they are
//
//     dX = Mᵀ dY + F ∘ (B dS'ᵀ)                         dG = Σ_heads L ∘ (dY Xᵀ)
//     dC = dG B + Σ_heads E ∘ (dY S)                    dB = dGᵀ C + Σ_heads F ∘ (X dS')
//     dS = E_c dS' + (E ∘ dY)ᵀ C
//     da_k = Σ_{j < k ≤ i} W_ij + Σ_{i ≥ k} e_i + Σ_{j < k} f_j + E_c <S, dS'>
//
// where e_i = C_i · (E ∘ dY S)_i and f_j = X_j · (F ∘ B dS'ᵀ)_j. Nothing is a difference of long sums.
//
// With a scale and direct outputs, M is 0 at tokens j and i of one step, and these add, with g = x_j · dY_i,
//
//     dx_j += direct_j G_ji dY_i       dG_ji += direct_j g       ddirect_j += G_ji g
#pragma once

#include "ssd/cpu_adjoint_memory.h"

namespace ssmzoo {

struct SsdBackwardArguments {
    SsdArguments forward;             // whose outputs are not looked at
    const void *dy, *dfinal;          // (b l h p), contiguous; S: (s h p n) or null
    void *dx, *dz;                    // (b l h p); dz where there is a z
    void *ddt, *dscale, *ddirect;     // S: (b l h); the last two where there is a scale
    void *dB, *dC;                    // S: (parts b l g n), of which the first takes the sum of all
    void *dA, *dD, *dbias;            // S: (s h), (s h p), (s h), likewise
    void *dinitial;                   // S: (s h p n) or null
    int64_t map_part, map_batch, map_time, map_group;  // strides of dB and dC
};

namespace SSMZOO_ISA {

template <class S>
struct Backward : BackwardMemory<S> {
    using V = typename Lanes<S>::V;
    using Held = BackwardMemory<S>;
    using Held::shared, Held::steps, Held::outputs, Held::dstates, Held::states, Held::factor, Held::x, Held::dY,
          Held::scaled, Held::dX, Held::X_turned, Held::dY_turned, Held::L, Held::dM, Held::map, Held::sums, Held::da,
          Held::e, Held::f, Held::gate, Held::dB, Held::dC, Held::dG, Held::dG_turned, Held::D, Held::dD, Held::dA,
          Held::dbias, Held::panel, Held::width, Held::size, Held::room, Held::state, Held::swap_rows, Held::turn,
          Held::sum, Held::dot;

    // x and X of a chunk, and F ∘ X.
    void read_inputs(const SsdArguments& a, const Sequence& s, Span t, int64_t head, S* X, int64_t ahead) {
        const Rows from(a, s, t, head, a.x, a.x_batch, a.x_time, ahead);
        for (int64_t i = 0; i < t.tokens; ++i) {
            const int64_t row = i * width;
            read_row(x + row, from.from, a.dtype, from(i), a.p);
            from.fetch(a, i);
            const V delta = splat(steps.scale[i]), F = splat(steps.F[i]);
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
            read_inputs(a, s, t, head, factor, a.chunk * a.x_time);
            memcpy(state(h, k + 1), state(h, k), sizeof(S) * static_cast<size_t>(a.n * width));
            product(B_turned, scaled, width, state(h, k + 1), width, a.n, width, t.tokens, panel, 0,
                    {true, steps.whole});
        }
    }

    static const S* shared_B(const SsdArguments& a, const Sequence& s, Span t, int64_t head) {
        const int64_t group = head / (a.heads / a.groups);
        return at<S>(a.B, s.batch * a.B_batch + (s.start + t.start) * a.B_time + group * a.B_group);
    }

    // dY, where there is a gate after the gate's gradient, and what it adds to the skip's.
    void read_gradients(const SsdBackwardArguments& b, const Sequence& s, Span t, int64_t head, const S* D, S* dD,
                        Next next) {
        const SsdArguments& a = b.forward;
        const int64_t time = a.heads * a.p, batch = a.length * time;
        const Rows dy(a, s, t, head, b.dy, batch, time, next.ahead(a, time)), dz(a, s, t, head, b.dz, batch, time);
        const Rows z(a, s, t, head, a.z, a.z_batch, a.z_time, next.ahead(a, a.z_time));
        if (a.z && a.scale) {
            S* X = factor + a.n * width;
            swap_rows(X, x, t.tokens * width);
            outputs.compute(a, t, shared, steps, factor, dX, panel);
            swap_rows(X, x, t.tokens * width);
            outputs.add_direct(a, t, shared, steps, x, dX);
        } else if (a.z) {
            outputs.compute(a, t, shared, steps, factor, dX, panel);
        }
        for (int64_t i = 0; i < t.tokens; ++i) {
            const int64_t row = i * width;
            read_row(dY + row, dy.from, a.dtype, dy(i), a.p);
            dy.fetch(a, i);
            if (a.z) {
                read_row(gate, z.from, a.dtype, z(i), a.p);
                z.fetch(a, i);
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

    // What passes between the tokens of one step, to dG and ddirect.
    void direct_gradients(const SsdBackwardArguments& b, const Sequence& s, Span t, int64_t head) {
        const SsdArguments& a = b.forward;
        S* to = static_cast<S*>(b.ddirect) + (s.batch * a.length + s.start + t.start) * a.heads + head;
        for (int64_t j = 0; j < t.tokens; ++j) {
            S total = S(0);
            of_step(a, j, [&](int64_t i) {
                const S g = dot(x + j * width, dY + i * width, width);
                dG[j * a.chunk + i] = dG[j * a.chunk + i] + steps.direct[j] * g;
                total = total + shared.G[j * a.chunk + i] * g;
            });
            to[j * a.heads] = total;
        }
    }

    // One chunk of one head.
    void chunk(const SsdBackwardArguments& b, const Sequence& s, Span t, int64_t head, int64_t h, const S* before,
               Next next) {
        const SsdArguments& a = b.forward;
        const int64_t stride = a.chunk, n = a.n;
        S *dstate = dstates + h * size, *X = factor + n * width;
        steps.read(a, s, t, head);
        memcpy(factor, before, sizeof(S) * static_cast<size_t>(n * width));
        read_inputs(a, s, t, head, X, next.ahead(a, a.x_time));
        read_gradients(b, s, t, head, D + h * width, dD + h * width, next);
        turn(a, t, X_turned, X);
        turn(a, t, dY_turned, dY);
        S* M = outputs.M(a);
        decays(t, steps.decay, shared.G, stride, outputs.row, [&](int64_t j, int64_t i, V decay, V G) {
            store(L + j * stride + i, decay);
            store(M + j * stride + i, decay * G);
        });
        if (a.scale) {
            clear_steps(a, t, L);
            clear_steps(a, t, M);
        }
        pair_gradients(a, t, X);
        if (a.scale) direct_gradients(b, s, t, head);

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
            e[i] = a.scale ? A * da[i] : dot(dX + i * width, x + i * width, width) + A * da[i];  // of Δ
        }
        if (a.scale) {
            S* to = static_cast<S*>(b.dscale) + (s.batch * a.length + s.start + t.start) * a.heads + head;
            for (int64_t i = 0; i < t.tokens; ++i) to[i * a.heads] = dot(dX + i * width, x + i * width, width);
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
        const Rows dx(a, s, t, head, b.dx, a.length * a.heads * a.p, a.heads * a.p);
        for (int64_t i = 0; i < t.tokens; ++i) {
            const int64_t row = i * width;
            const V delta = splat(steps.scale[i]), E = splat(steps.E[i]);
            vectors<S>(width, [&](int64_t c) {
                const V gradient = load(dY + row + c);
                store(scaled + row + c, E * gradient);
                store(gate + c, fma(delta, load(dX + row + c), load(D + c) * gradient));
            });
            if (a.scale)
                of_step(a, i, [&](int64_t later) {
                    const V factor = splat(steps.direct[i] * shared.G[i * a.chunk + later]);
                    vectors<S>(width, [&](int64_t c) {
                        store(gate + c, fma(factor, load(dY + later * width + c), load(gate + c)));
                    });
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
        const int64_t offset = heads.part * b.map_part + s.batch * b.map_batch + (s.start + t.start) * b.map_time +
                               heads.group * b.map_group;
        transpose(static_cast<S*>(b.dB) + offset, b.map_time, dB, stride, n, t.tokens);
        transpose(static_cast<S*>(b.dC) + offset, b.map_time, dC, stride, n, t.tokens);
    }
};

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
