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
// With a scale and direct outputs, M is 0 at tokens j and i of one step, and these add, with g = x_j · dY_i,
//
//     dx_j += direct_j G_ji dY_i       dG_ji += direct_j g       ddirect_j += G_ji g
#pragma once

#include "ssd/cpu_adjoint_memory.h"
#include "ssd/cpu_head_rows.h"

namespace ssmzoo {

struct SsdBackwardArguments {
    SsdArguments forward;             // whose outputs are not looked at, but for those that are divided
    const void *dy, *dfinal;          // (b l h p), contiguous; S: (s h p n) or null
    void *dx, *dz;                    // (b l h p); dz where there is a z
    void *ddt, *dscale, *ddirect, *dm;  // S: (b l h); the last three where there are scale, direct and m
    void *dB, *dC;                    // of dmap_dtype: (parts b l g n), where there are several in S
    void *dA, *dD, *dbias;            // S: (s h), (s h p), (s h), likewise
    void *dinitial;                   // S: (s h p n) or null
    void *dB_sum, *dC_sum;            // the sums of several parts, laid out as each of them; otherwise null
    int64_t dmap_dtype, map_part, map_batch, map_time, map_group;  // strides of dB and dC
};

namespace SSMZOO_ISA {

template <class S>
struct Backward : BackwardMemory<S> {
    using V = typename Lanes<S>::V;
    using Held = BackwardMemory<S>;
    using Rows = typename Held::Rows;
    using Held::shared, Held::steps, Held::outputs, Held::dstates, Held::states, Held::x, Held::dY, Held::dX,
          Held::x_turned, Held::dY_turned, Held::strip, Held::W, Held::sums, Held::da, Held::e, Held::f, Held::gate,
          Held::dB, Held::dC, Held::dG, Held::D, Held::dD, Held::dA, Held::dbias, Held::panel, Held::width, Held::size,
          Held::turn, Held::sum, Held::dot, Held::state, Held::dot_states, Held::coming_state, Held::products_within,
          Held::add_strip, Held::add_last;

    void read_inputs(const SsdArguments& a, const Sequence& s, Span t, int64_t head, Next next, Coming& coming) {
        const HeadRows from(a, s, t, head, a.x, a.x_batch, a.x_time, next);
        for (int64_t i = 0; i < t.tokens; ++i)
            read_channels(a, x + i * width, from.from, a.dtype, from(i), width, S(1));
        from.coming(a, coming);
    }

    // The states before each chunk of a segment, from the first's.
    void run_ahead(const SsdArguments& a, const Sequence& s, int64_t first, int64_t chunks, const Block& heads) {
        for (int64_t k = 0; k + 1 < chunks; ++k) {
            const Span t = span<S>(a, s, first + k);
            shared.read_B(a, s, t, heads.group);
            for (int64_t h = 0; h < heads.heads; ++h) {
                const int64_t head = heads.first + h;
                const Next next = Next::of(heads, h, 1);
                Coming coming;
                if (next.chunks) Shared<S>::coming(a, s, t, heads.group, next.chunks, false, coming);
                steps.read(a, s, t, head);
                read_inputs(a, s, t, head, next, coming);
                product(shared.B_turned(), x, width, state(h, k + 1), width, a.n, width, t.tokens, panel, 0,
                        {true, steps.whole, nullptr, -size}, steps.fed, &coming);
                coming.finish();
            }
        }
    }

    // dY, where there is a gate after the gate's gradient, and what it adds to the skip's.
    void read_gradients(const SsdBackwardArguments& b, const Sequence& s, Span t, int64_t head, Rows before,
                        const S* D, S* dD, Next next, Coming& coming) {
        const SsdArguments& a = b.forward;
        const int64_t time = a.heads * stored(a), batch = a.length * time;
        const HeadRows dy(a, s, t, head, b.dy, batch, time, next), dz(a, s, t, head, b.dz, batch, time);
        const HeadRows z(a, s, t, head, a.z, a.z_batch, a.z_time, next);
        dy.coming(a, coming);
        z.coming(a, coming);
        if (a.z) {
            outputs.compute(a, t, shared, steps, before.p, x, dX, panel);
            if (a.direct) outputs.add_direct(a, t, shared, steps, x, dX);
        }
        for (int64_t i = 0; i < t.tokens; ++i) {
            const int64_t row = i * width;
            read_channels(a, dY + row, dy.from, a.dtype, dy(i), width, S(0));
            if (a.m) divide_gradient(a, place_of(a, s, t, head) + i * a.heads, dY + row, width);
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

    // From W = dY Xᵀ: M, L ∘ (dY Xᵀ) to dG, and Σ_{j < k ≤ i} W_ij for each k into da.
    void pair_gradients(const SsdArguments& a, Span t) {
        const int64_t stride = a.chunk;
        if (a.direct) clear_steps(a, t, W);
        decays(t, steps.decay, shared.G, stride, outputs.row, [&](int64_t j, int64_t i, V L, V G) {
            const int64_t place = j * stride + i;
            const V last = a.m ? load(dY_turned + stored(a) * stride + i) : V{};  // times 1, the last number of x
            const V M = L * G, gradient = splat(steps.scale[j]) * (load(W + place) + last);
            store(outputs.M + place, M);
            store(W + place, M * gradient);
            store(dG + place, fma(L, gradient, load(dG + place)));
        });
        if (a.direct) clear_steps(a, t, outputs.M);
        vectors<S>(t.padded, [&](int64_t i) { store(sums + i, V{}); });
        for (int64_t j = 0; j < t.tokens; ++j) {
            da[j] = j ? sum(sums, t.padded) : S(0);  // sums over rows j' < j of W, at i >= j
            for (int64_t i = j / Lanes<S>::count * Lanes<S>::count; i < t.padded; i += Lanes<S>::count)
                store(sums + i, load(sums + i) + load(W + j * stride + i));
            sums[j] = S(0);
        }
    }

    // What passes between the tokens of one step, to dG and ddirect.
    void direct_gradients(const SsdBackwardArguments& b, const Sequence& s, Span t, int64_t head) {
        const SsdArguments& a = b.forward;
        S* to = static_cast<S*>(b.ddirect) + place_of(a, s, t, head);
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
    void chunk(const SsdBackwardArguments& b, const Sequence& s, Span t, const Block& heads, int64_t h, Rows before,
               Next next) {
        const SsdArguments& a = b.forward;
        const int64_t head = heads.first + h;
        Coming coming;
        if (next.chunks) Shared<S>::coming(a, s, t, heads.group, next.chunks, true, coming);
        const int64_t stride = a.chunk, n = a.n;
        S* dstate = dstates + h * size;
        steps.read(a, s, t, head);
        read_inputs(a, s, t, head, next, coming);
        read_gradients(b, s, t, head, before, D + h * width, dD + h * width, next, coming);
        coming_state(a, s, t, head, next, coming);
        turn(a, t, x_turned, x);
        turn(a, t, dY_turned, dY);
        product_of_pairs<S>(a, {x, width, 1}, dY_turned, W, t, a.p, panel);
        if (a.m) products_within(a, t);

        // Sums over heads: E ∘ (S dYᵀ) to dC
        for (int64_t i = 0; i < t.padded; i += kStrip<S>) {
            const int64_t columns = minimum(kStrip<S>, t.padded - i);
            product({before.p, before.stride, 1}, dY_turned + i, stride, strip, kStrip<S>, n, columns, a.p, panel);
            if (a.m) add_last(a, place_of(a, s, t, head), t, i, columns, before, static_cast<S*>(b.dm));
            add_strip(i, columns, stride, n);
        }
        pair_gradients(a, t);
        if (a.direct) direct_gradients(b, s, t, head);

        product(shared.B, dstate, width, dX, width, t.tokens, width, n, panel);
        for (int64_t i = 0; i < t.tokens; ++i) f[i] = steps.fed[i] * dot(dX + i * width, x + i * width, width);
        product<S, Shape::upper>({outputs.M, stride, 1}, dY, width, dX, width, t.tokens, width, t.tokens, panel, 0,
                                 {true, S(1), steps.F});

        // F ∘ (dS' Xᵀ) to dB, with X = scale ∘ x
        for (int64_t c = 0; c < a.p; ++c)
            vectors<S>(t.padded, [&](int64_t i) {
                store(x_turned + c * stride + i, load(steps.fed + i) * load(x_turned + c * stride + i));
            });
        product<S>({dstate, width, 1}, x_turned, stride, dB, stride, n, t.padded, a.p, panel, 0, {true, S(1)}, nullptr,
                   &coming);

        const S of_state = steps.whole * dot_states(a, before, dstate);
        product({shared.C_turned, stride, 1}, dY, width, dstate, width, n, width, t.tokens, panel, 0,
                {true, steps.whole}, steps.E, &coming);
        coming.finish();
        write_steps(b, s, t, head, h, of_state);
        write_inputs(b, s, t, head, D + h * width);
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
            S* to = static_cast<S*>(b.dscale) + place_of(a, s, t, head);
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
        S* to = static_cast<S*>(b.ddt) + place_of(a, s, t, head);
        for (int64_t i = 0; i < t.tokens; ++i) {
            to[i * a.heads] = e[i];
            dbias[h] = dbias[h] + e[i];
        }
    }

    // The gradient of x.
    void write_inputs(const SsdBackwardArguments& b, const Sequence& s, Span t, int64_t head, const S* D) {
        const SsdArguments& a = b.forward;
        const int64_t time = a.heads * stored(a);
        const HeadRows dx(a, s, t, head, b.dx, a.length * time, time);
        const bool past = written_past<S>(b.dx, tokens_of(a) * time, stored(a));
        for (int64_t i = 0; i < t.tokens; ++i) {
            const int64_t row = i * width;
            if (!a.D && !a.direct) {
                write_row(b.dx, a.dtype, dx(i), dX + row, stored(a), past, steps.scale[i]);
                continue;
            }
            const V scale = splat(steps.scale[i]);
            vectors<S>(width, [&](int64_t c) {
                store(gate + c, fma(scale, load(dX + row + c), load(D + c) * load(dY + row + c)));
            });
            if (a.direct)
                of_step(a, i, [&](int64_t later) {
                    const V factor = splat(steps.direct[i] * shared.G[i * a.chunk + later]);
                    vectors<S>(width, [&](int64_t c) {
                        store(gate + c, fma(factor, load(dY + later * width + c), load(gate + c)));
                    });
                });
            write_row(b.dx, a.dtype, dx(i), gate, stored(a), past);
        }
    }

    // The gradients of B and C, once all heads have added theirs. dG lies turned where W was.
    void write_maps(const SsdBackwardArguments& b, const Sequence& s, Span t, const Block& heads) {
        const SsdArguments& a = b.forward;
        const int64_t stride = a.chunk, n = a.n;
        S* dG_turned = W;
        for (int64_t j = 0; j < t.tokens; ++j)
            for (int64_t i = t.tokens; i < t.padded; ++i) dG[j * stride + i] = S(0);
        for (int64_t i = 0; i < t.tokens; ++i)
            for (int64_t j = 0; j < t.padded; ++j) dG_turned[i * stride + j] = S(0);
        transpose(dG_turned, stride, dG, stride, t.tokens, t.tokens);
        const Onto<S> sum = {true, S(1)};
        for (int64_t i = 0; i < t.padded; i += kStrip<S>) {
            const int64_t columns = minimum(kStrip<S>, t.padded - i), first = i < a.rank ? 0 : i - a.rank + 1;
            product(shared.B_turned(), dG + i, stride, dC + i, stride, n, columns, last_row<S>(a, t, i), panel, 0, sum);
            product({shared.C_turned + first, stride, 1}, dG_turned + first * stride + i, stride, dB + i, stride, n,
                    columns, t.tokens - first, panel, 0, sum);
        }
        const int64_t offset = heads.part * b.map_part + s.batch * b.map_batch + (s.start + t.start) * b.map_time +
                               heads.group * b.map_group;
        write_map(b, t, b.dB, offset, dB);
        write_map(b, t, b.dC, offset, dC);
    }

    // The gradient of B or C, (n, c), by way of where B was.
    void write_map(const SsdBackwardArguments& b, Span t, void* to, int64_t first, const S* gradient) {
        const SsdArguments& a = b.forward;
        const int64_t row = Shared<S>::row(a);
        const bool past = blocks_per_group(a) == 1 && written_past<S>(to, tokens_of(a) * a.groups * a.n, a.n);
        transpose(shared.own, row, gradient, a.chunk, a.n, t.tokens);
        for (int64_t i = 0; i < t.tokens; ++i)
            write_row(to, b.dmap_dtype, first + i * b.map_time, shared.own + i * row, a.n, past);
    }
};

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo
