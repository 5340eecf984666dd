// One token of a gated DeltaNet layer: projections, convolutions, norms of queries and keys, delta rule, norm and gate,
// projection. Bound by memory: every weight and state is read once, as it lies.
#include "causal_conv1d/cpu_step.h"
#include "delta_rule/cpu_step.h"
#include "native/finite.h"
#include "native/exports.h"
#include "native/product.h"
#include "rms_norm/cpu.h"

namespace ssmzoo {

// i = groups keys, j = heads values
struct GatedDeltanetStepArguments {
    void *q_state, *k_state, *v_state, *state;                           // S: (b w-1 i), likewise, (b w-1 j), (b heads keys values)
    const void* x;                                                       // T: (b m)
    const void *q_proj, *k_proj, *v_proj, *g_proj, *b_proj, *a_proj;     // T: (i m), (i m), (j m), (j m), (heads m), likewise
    const void *q_conv, *k_conv, *v_conv, *A_log, *dt_bias, *norm_weight;  // S: (i w), (i w), (j w), (heads), (heads), (values)
    const void* o_proj;                                                  // T: (m j)
    void* y;                                                             // T: (b m)
    void* scratch;                                                       // S: (b, m + 4 i + 4 j + 2 heads), then each thread's
    int64_t dtype, batch, m, heads, groups, keys, values, width, threads, thread_scratch, x_batch;
    double beta_scale, eps;
};

namespace SSMZOO_ISA {
namespace {

// A projection's rows, and where they go among those of one sequence.
struct Projection {
    const void* weight;
    int64_t rows, place;
};

template <class S>
struct Layer {
    int64_t i, j, outputs;
    S *x, *projected, *mixed, *o, *spare;  // (b m); (b, q k v g b a); (b, q k v); (b j); of the threads

    explicit Layer(const GatedDeltanetStepArguments& a)
        : i(a.groups * a.keys), j(a.heads * a.values), outputs(2 * i + 2 * j + 2 * a.heads),
          x(static_cast<S*>(a.scratch)), projected(x + a.batch * a.m), mixed(projected + a.batch * outputs),
          o(mixed + a.batch * (2 * i + j)), spare(o + a.batch * j) {}
};

constexpr double kL2 = 1e-6;  // added to the sum of squares of a query or key

template <class S>
void normalise(S* to, const S* from, int64_t keys) {
    typename Lanes<S>::V squares = {};
    for (int64_t c = 0; c < keys; c += Lanes<S>::count) {
        const auto v = read_some(from + c, keys - c);
        squares = fma(v, v, squares);
    }
    const auto factor = splat(inverse_root<S>(sum_of<S>(squares), 1, kL2));
    for (int64_t c = 0; c < keys; c += Lanes<S>::count) store(to + c, factor * read_some(from + c, keys - c));
}

// Some columns of one head of one sequence.
template <class S>
void advance(const GatedDeltanetStepArguments& a, const Layer<S>& layer, int64_t batch, int64_t head, int64_t first,
             S* memory) {
    Step<S> step;
    step.take(memory, a.keys);
    Tile<S>& t = step.tile;
    const S* mixed = layer.mixed + batch * (2 * layer.i + layer.j);
    const S* gates = layer.projected + (batch + 1) * layer.outputs - 2 * a.heads;
    const int64_t group = head / (a.heads / a.groups), count = minimum(kStepPart, a.values - first);
    normalise(t.q, mixed + group * a.keys, a.keys);
    normalise(t.k, mixed + layer.i + group * a.keys, a.keys);
    for (int64_t c = 0; c < t.width; ++c) t.zeros[c] = S(0);
    t.kq[0] = dot(t.q, t.k, t.width);
    t.beta[0] = S(a.beta_scale) * sigmoid<S>(splat(gates[head]))[0];
    const auto rate = finite_exp<S>(splat(*at<S>(a.A_log, head)));
    t.decay[0] = exp<S>(-rate * softplus<S>(splat(gates[a.heads + head] + *at<S>(a.dt_bias, head))))[0];
    for (int64_t c = 0; c < count; c += Lanes<S>::count)
        store(step.row + c, read_some(mixed + 2 * layer.i + head * a.values + first + c, count - c));
    const int64_t own = batch * a.heads + head;
    step.advance(Decay::head, static_cast<S*>(a.state) + own * a.keys * a.values, a.keys, a.values, first,
                 inverse_root<S>(S(a.keys), 1, 0.0));
    for (int64_t c = 0; c < count; c += Lanes<S>::count)
        write_some(layer.o + own * a.values + first + c, load(step.row + c), count - c);
}

template <class T>
int gated_deltanet_step(const GatedDeltanetStepArguments& a) {
    typedef typename Sum<T>::type S;
    const Layer<S> layer(a);
    const int64_t i = layer.i, j = layer.j;
    Inputs<S> inputs(a.batch, a.m > j ? a.m : j);
    if (!inputs.ready()) return kOutOfMemory;
    for (int64_t b = 0; b < a.batch; ++b)
        for (int64_t k = 0; k < a.m; k += Lanes<S>::count)
            write_some(layer.x + b * a.m + k, read_some(at<T>(a.x, b * a.x_batch + k), a.m - k), a.m - k);
    const auto stage = [&](int64_t tasks, const auto& task) { parallel_stage(tasks, a.threads, task); };
    constexpr int64_t together = 4 * kOutputs;
    const Projection all[] = {{a.q_proj, i, 0},         {a.k_proj, i, i},
                              {a.v_proj, j, 2 * i},     {a.g_proj, j, 2 * i + j},
                              {a.b_proj, a.heads, 2 * (i + j)}, {a.a_proj, a.heads, 2 * (i + j) + a.heads}};
    int64_t pieces = 0;
    for (const Projection& p : all) pieces += ceil_div(p.rows, together);
    inputs.take(layer.x, a.m);
    stage(pieces, [&](int64_t task, int) {
        const Projection* p = all;
        for (; task >= ceil_div(p->rows, together); ++p) task -= ceil_div(p->rows, together);
        product_part<T>(p->weight, nullptr, inputs, a.batch, a.m, p->rows, together, task,
                        layer.projected + p->place, layer.outputs);
    });
    void* const states[] = {a.q_state, a.k_state, a.v_state};
    const void* const weights[] = {a.q_conv, a.k_conv, a.v_conv};
    const int64_t few = ceil_div(i, kTile), tiles = 2 * few + ceil_div(j, kTile);
    stage(a.batch * tiles, [&](int64_t task, int thread) {
        const int64_t b = task / tiles, tile = task % tiles, which = minimum(tile / few, 2);
        const int64_t first = (tile - which * few) * kTile, channels = which < 2 ? i : j;
        conv_step_tile(static_cast<S*>(states[which]) + b * (a.width - 1) * channels + first, channels,
                       layer.projected + b * layer.outputs + all[which].place + first,
                       at<S>(weights[which], first * a.width), static_cast<const S*>(nullptr), a.width, true,
                       layer.mixed + b * (2 * i + j) + all[which].place + first, minimum(kTile, channels - first),
                       layer.spare + thread * a.thread_scratch);
    });
    const int64_t parts = ceil_div(a.values, kStepPart);
    stage(a.batch * a.heads * parts, [&](int64_t task, int thread) {
        const int64_t own = task / parts;
        advance(a, layer, own / a.heads, own % a.heads, task % parts * kStepPart,
                layer.spare + thread * a.thread_scratch);
    });
    stage(a.batch * a.heads, [&](int64_t own, int) {
        S* o = layer.o + own * a.values;
        const S* gate = layer.projected + own / a.heads * layer.outputs + 2 * i + j + own % a.heads * a.values;
        norm_group<S>(static_cast<const S*>(o), gate, false, at<S>(a.norm_weight, 0), o, a.values, a.eps);
    });
    inputs.take(layer.o, j);
    stage(ceil_div(a.m, together), [&](int64_t task, int) {
        product_part<T>(a.o_proj, nullptr, inputs, a.batch, j, a.m, together, task, static_cast<T*>(a.y), a.m);
    });
    return 0;
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_DTYPES(gated_deltanet_step, GatedDeltanetStepArguments, dtype, gated_deltanet_step)
