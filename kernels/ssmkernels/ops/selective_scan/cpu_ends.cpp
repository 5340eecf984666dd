// What a part of a sequence leaves in the state of a selective scan, or asks of the state before it (ends.py).
//
// A task takes one sequence and one tile of 64 channels, and walks away from the end in question: the decay from there
// on only grows. Where steps are positive, states whose decay has made everything further vanish take no part any more.
#include "native/exports.h"
#include "native/math.h"
#include "native/parallel.h"
#include "native/tiles.h"

namespace ssmzoo {

// S is float, or double where activations are. The last axis is contiguous.
struct ScanEndsArguments {
    const void *x, *delta;                // (1 l d), dtype
    const void *A, *maps, *delta_bias;    // S: (d n), (l g n), (d) or null
    const int32_t* cu_seqlens;            // (s + 1)
    void *found, *total;                  // S: (s d n), (s d)
    int64_t dtype, sequences, d, n, groups, softplus, left, threads, x_time, delta_time, maps_time;
};

namespace SSMZOO_ISA {
namespace {

constexpr int64_t kSteps = 64;  // of a chunk
constexpr int kStates = 4;      // in registers at a time

template <class S>
constexpr S vanished = S(-40);  // powers of two that add nothing to a sum, nor does the series of what comes after
template <>
constexpr double vanished<double> = -80;

template <class S>
bool all_below(typename Lanes<S>::V x, S bound) {
    S each[Lanes<S>::count];
    store(each, x);
    for (const S value : each)
        if (!(value < bound)) return false;
    return true;
}

template <class S>
struct Ends {
    S *rates, *sums, *distance, *value, *base, *bias;

    static int64_t size(int64_t n) { return (2 * n + 2 * kSteps + 2) * kTile; }

    Ends(char* scratch, int64_t n) {
        rates = reinterpret_cast<S*>(scratch);
        sums = rates + n * kTile;
        distance = sums + n * kTile;
        value = distance + kSteps * kTile;
        base = value + kSteps * kTile;
        bias = base + kTile;
    }
};

// N states from the j-th on, for one vector of channels, through a chunk whose maps begin at B.
template <class S, int N, bool guarded>
void add(const Ends<S>& e, const S* B, int64_t B_step, int64_t j, int64_t c, int64_t steps) {
    using V = typename Lanes<S>::V;
    V rate[N], sum[N];
    for (int i = 0; i < N; ++i) {
        rate[i] = load(e.rates + (j + i) * kTile + c);
        sum[i] = load(e.sums + (j + i) * kTile + c);
    }
    for (int64_t t = 0; t < steps; ++t) {
        const V distance = load(e.distance + t * kTile + c), value = load(e.value + t * kTile + c);
        for (int i = 0; i < N; ++i)
            sum[i] = fma(exp2_product<S, guarded>(distance, rate[i]), value * splat<S>(B[t * B_step + j + i]), sum[i]);
    }
    for (int i = 0; i < N; ++i) store(e.sums + (j + i) * kTile + c, sum[i]);
}

template <class S, bool guarded>
void add_some(const Ends<S>& e, const S* B, int64_t B_step, int64_t j, int64_t states, int64_t c, int64_t steps) {
    if (states == kStates) return add<S, kStates, guarded>(e, B, B_step, j, c, steps);
    for (int64_t i = j; i < j + states; ++i) add<S, 1, guarded>(e, B, B_step, i, c, steps);
}

template <class S, class T>
void ends_of_tile(const ScanEndsArguments& a, int64_t sequence, int64_t first, int64_t channels, int64_t group,
                  char* scratch) {
    using V = typename Lanes<S>::V;
    constexpr int64_t lanes = Lanes<S>::count;
    const Ends<S> e(scratch, a.n);
    const int64_t start = a.cu_seqlens[sequence], length = a.cu_seqlens[sequence + 1] - start;
    read_transposed(e.rates, at<S>(a.A, first * a.n), a.n, channels, S(Constants<S>::log2e));
    read_parameters(e.bias, a.delta_bias, first, channels);
    memset(e.sums, 0, sizeof(S) * static_cast<size_t>(a.n * kTile));
    memset(e.base, 0, sizeof(S) * kTile);
    bool alive = true;
    for (int64_t t0 = 0; t0 < length && alive; t0 += kSteps) {
        const int64_t steps = minimum(kSteps, length - t0);
        const int64_t row = a.left ? start + length - 1 - t0 : start + t0, step = a.left ? -1 : 1;
        for (int64_t c = 0; c < channels; c += lanes) {
            const int64_t count = channels - c;
            const V base = load(e.base + c), bias = load(e.bias + c);
            V walked{};
            for (int64_t t = 0; t < steps; ++t) {
                V dt = read_some(at<T>(a.delta, (row + t * step) * a.delta_time + first + c), count) + bias;
                if (a.softplus) dt = softplus<S>(dt);
                V x = read_some(at<T>(a.x, (row + t * step) * a.x_time + first + c), count);
                if (a.left) {
                    store(e.distance + t * kTile + c, base + walked);
                    x = x * dt;
                }
                walked = walked + dt;
                if (!a.left) store(e.distance + t * kTile + c, base + walked);
                store(e.value + t * kTile + c, x);
            }
            store(e.base + c, base + walked);
        }
        const S* B = at<S>(a.maps, row * a.maps_time + group * a.n);
        alive = !a.softplus;
        for (int64_t c = 0; c < channels; c += lanes) {
            const V nearest = load(e.distance + c), farthest = load(e.distance + (steps - 1) * kTile + c);
            for (int64_t j = 0; j < a.n; j += kStates) {
                const int64_t states = minimum(kStates, a.n - j);
                bool gone = a.softplus != 0, safe = a.softplus != 0;
                for (int64_t i = j; i < j + states; ++i) {
                    const V rate = load(e.rates + i * kTile + c);
                    gone = gone && all_below<S>(nearest * rate, vanished<S>);
                    safe = safe && all_below<S>(absolute<S>(farthest * rate), exp2_safe<S>);
                }
                if (gone) continue;
                alive = true;
                if (safe)
                    add_some<S, false>(e, B, step * a.maps_time, j, states, c, steps);
                else
                    add_some<S, true>(e, B, step * a.maps_time, j, states, c, steps);
            }
        }
    }
    write_transposed(static_cast<S*>(a.found) + (sequence * a.d + first) * a.n, e.sums, a.n, channels);
    memcpy(static_cast<S*>(a.total) + sequence * a.d + first, e.base, sizeof(S) * static_cast<size_t>(channels));
}

template <class T>
int ends(const ScanEndsArguments& a) {
    typedef typename Sum<T>::type S;
    const int64_t of_group = a.d / a.groups, per_group = ceil_div(of_group, kTile), tiles = a.groups * per_group;
    const size_t bytes = sizeof(S) * static_cast<size_t>(Ends<S>::size(a.n));
    return parallel_for(a.sequences * tiles, a.threads, bytes, [&](int64_t i, char* scratch) {
        const int64_t group = i % tiles / per_group, within = i % per_group * kTile;
        ends_of_tile<S, T>(a, i / tiles, group * of_group + within, minimum(kTile, of_group - within), group, scratch);
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT(selective_scan_ends)(const ssmzoo::ScanEndsArguments* a) {
    using namespace ssmzoo::SSMZOO_ISA;
    return by_dtype(a->dtype, [&](auto zero) { return ends<decltype(zero)>(*a); });
}
