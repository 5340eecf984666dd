// Keys and queries from the maps of a step, forward and backward. A task takes one head of one sequence.
#include "mamba3_scan/cpu_rotate.h"
#include "native/exports.h"

namespace ssmzoo {
namespace SSMZOO_ISA {
namespace {

// A task's memory: the angles of a step and their sines and cosines, in whole vectors; a map.
template <class S>
struct Angles {
    S *turns, *sine, *cosine, *map;

    int64_t take(S* p, const RotateArguments& a) {
        Memory<S> memory = {p, 0};
        const int64_t room = round_up(a.angle_count, Lanes<S>::count);
        turns = memory.take(room);
        sine = memory.take(room);
        cosine = memory.take(room);
        map = memory.take(round_up(a.n, Lanes<S>::count));
        return memory.used;
    }

    // The angles after one more step, and their sines and cosines.
    void advance(const RotateArguments& a, S delta, const S* rates) {
        const auto step = splat(delta * S(0.15915494309189535));
        vectors<S>(a.angle_count, [&](int64_t i) {
            const auto rate = load_some_or_all(rates + i, a.angle_count - i);
            store(turns + i, within_a_turn<S>(fma(step, rate, load(turns + i))));
        });
        read(a.angle_count);
    }

    void read(int64_t count) {
        vectors<S>(count, [&](int64_t i) { sine_cosine<S>(load(turns + i), sine + i, cosine + i); });
    }

    static typename Lanes<S>::V load_some_or_all(const S* p, int64_t count) {
        return count >= Lanes<S>::count ? load(p) : load_some(p, count);
    }
};

// to = R(θ) from, or R(-θ) from; both may be the same.
template <class S>
void rotate(const RotateArguments& a, const Angles<S>& angles, const S* from, S* to, S direction) {
    const Pairs pairs(a);
    if (to != from) memcpy(to, from, sizeof(S) * static_cast<size_t>(a.n));
    const auto turn = [&](int64_t step, int64_t second) __attribute__((always_inline)) {
        for (int64_t i = 0; i < pairs.count; ++i) {
            const S one = from[i * step], other = from[i * step + second];
            const S sine = direction * angles.sine[i], cosine = angles.cosine[i];
            to[i * step] = one * cosine - other * sine;
            to[i * step + second] = one * sine + other * cosine;
        }
    };
    if (pairs.step == 2)
        turn(2, 1);
    else
        turn(1, pairs.second);
}

template <class S>
void head_forward(const RotateArguments& a, const HeadOf& h, char* scratch) {
    Angles<S> angles;
    angles.take(reinterpret_cast<S*>(scratch), a);
    const int64_t count = a.angle_count, group = h.head / (a.heads / a.groups), lanes = Lanes<S>::count;
    const S turn = S(6.283185307179586);
    const S* initial = a.initial ? at<S>(a.initial, (h.sequence * a.heads + h.head) * count) : nullptr;
    S* final_angle = static_cast<S*>(a.final_angle) + (h.sequence * a.heads + h.head) * count;
    for (int64_t i = 0; i < round_up(count, lanes); ++i) angles.turns[i] = initial && i < count ? initial[i] / turn : S(0);
    for (int64_t t = 0; t < h.length; ++t) {
        const int64_t row = h.row(a, t);
        angles.advance(a, *at<S>(a.dt, h.number(a, t)), at<S>(a.angles, (h.batch * a.length + h.start + t) * count));
        if (a.turns) memcpy(static_cast<S*>(a.turns) + row * count, angles.turns, sizeof(S) * static_cast<size_t>(count));
        for (int64_t r = 0; r < a.rank; ++r) {
            const auto make = [&](const void* of, int64_t offset, const void* bias, void* to) {
                read_row(angles.map, of, a.dtype, offset, a.n);
                const S* more = bias ? at<S>(bias, (h.head * a.rank + r) * a.n) : nullptr;
                if (more)
                    for (int64_t i = 0; i < a.n; ++i) angles.map[i] = angles.map[i] + more[i];
                rotate<S>(a, angles, angles.map, static_cast<S*>(to) + (row * a.rank + r) * a.n, S(1));
            };
            const int64_t time = h.start + t;
            make(a.B, h.batch * a.B_batch + time * a.B_time + r * a.B_rank + group * a.B_group, a.B_bias, a.k);
            make(a.C, h.batch * a.C_batch + time * a.C_time + r * a.C_rank + group * a.C_group, a.C_bias, a.q);
        }
    }
    for (int64_t i = 0; i < count; ++i)
        final_angle[i] = h.length || !initial ? angles.turns[i] * turn : initial[i];
}

// The gradients of a head's angles, step sizes and biases; what comes in for k and q is turned back in place.
template <class S>
void head_backward(const RotateBackwardArguments& b, const HeadOf& h, char* scratch) {
    const RotateArguments& a = b.forward;
    Angles<S> angles;
    const int64_t used = angles.take(reinterpret_cast<S*>(scratch), a), count = a.angle_count;
    S* total = reinterpret_cast<S*>(scratch) + used;  // the gradient of θ, from all later steps
    const int64_t own = h.sequence * a.heads + h.head;
    const Pairs pairs(a);
    for (int64_t i = 0; i < count; ++i) total[i] = b.dfinal ? *at<S>(b.dfinal, own * count + i) : S(0);
    S* biases[] = {static_cast<S*>(b.dB_bias) + own * a.rank * a.n, static_cast<S*>(b.dC_bias) + own * a.rank * a.n};
    for (S* bias : biases) memset(bias, 0, sizeof(S) * static_cast<size_t>(a.rank * a.n));
    for (int64_t i = count; i < round_up(count, Lanes<S>::count); ++i) angles.turns[i] = S(0);
    for (int64_t t = h.length - 1; t >= 0; --t) {
        const int64_t row = h.row(a, t);
        S* turns = static_cast<S*>(a.turns) + row * count;
        convert(angles.turns, turns, count);
        angles.read(count);
        for (int64_t r = 0; r < a.rank; ++r)
            for (int map = 0; map < 2; ++map) {
                const S* turned = static_cast<const S*>(map ? a.q : a.k) + (row * a.rank + r) * a.n;
                S* gradient = static_cast<S*>(map ? b.dq : b.dk) + (row * a.rank + r) * a.n;
                for (int64_t i = 0; i < count; ++i) {
                    const int64_t one = i * pairs.step, other = one + pairs.second;
                    total[i] = total[i] + (gradient[other] * turned[one] - gradient[one] * turned[other]);
                }
                rotate<S>(a, angles, gradient, gradient, S(-1));
                S* bias = biases[map] + r * a.n;
                for (int64_t i = 0; i < a.n; ++i) bias[i] = bias[i] + gradient[i];
            }
        const S delta = *at<S>(a.dt, h.number(a, t));
        const S* rates = at<S>(a.angles, (h.batch * a.length + h.start + t) * count);
        S sum = S(0);
        for (int64_t i = 0; i < count; ++i) {
            sum = sum + total[i] * rates[i];
            turns[i] = total[i] * delta;
        }
        static_cast<S*>(b.ddt)[h.number(a, t)] = sum;
    }
    convert(static_cast<S*>(b.dinitial) + own * count, total, count);
}

// to[i] = Σ_j from[j * stride + i] for `parts` j.
template <class S>
void add_rows(S* to, const S* from, int64_t parts, int64_t stride, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
    for (int64_t j = 1; j < parts; ++j)
        for (int64_t i = 0; i < count; ++i) to[i] = to[i] + from[j * stride + i];
}

// The sums over heads at one step.
template <class S>
void step_backward(const RotateBackwardArguments& b, int64_t batch, int64_t t) {
    const RotateArguments& a = b.forward;
    const int64_t heads = a.heads / a.groups, map = a.rank * a.n, place = batch * a.length + t;
    for (int64_t g = 0; g < a.groups; ++g) {
        const int64_t first = (batch * a.heads + g * heads) * a.length + t;
        for (int64_t r = 0; r < a.rank; ++r) {
            const int64_t from = first * map + r * a.n, to = ((place * a.rank + r) * a.groups + g) * a.n;
            add_rows(static_cast<S*>(b.dB) + to, static_cast<S*>(b.dk) + from, heads, a.length * map, a.n);
            add_rows(static_cast<S*>(b.dC) + to, static_cast<S*>(b.dq) + from, heads, a.length * map, a.n);
        }
    }
    const S* turns = static_cast<const S*>(a.turns) + (batch * a.heads * a.length + t) * a.angle_count;
    add_rows(static_cast<S*>(b.dangles) + place * a.angle_count, turns, a.heads, a.length * a.angle_count, a.angle_count);
}

template <class S>
int forward(const RotateArguments& a) {
    Angles<S> angles;
    const size_t bytes = sizeof(S) * static_cast<size_t>(angles.take(nullptr, a));
    return parallel_for(a.sequences * a.heads, a.threads, bytes,
                        [&](int64_t i, char* scratch) { head_forward<S>(a, HeadOf(a, i), scratch); });
}

template <class S>
int backward(const RotateBackwardArguments& b) {
    const RotateArguments& a = b.forward;
    Angles<S> angles;
    const size_t bytes = sizeof(S) * static_cast<size_t>(angles.take(nullptr, a) + a.angle_count);
    const int failed = parallel_for(a.sequences * a.heads, a.threads, bytes, [&](int64_t i, char* scratch) {
        head_backward<S>(b, HeadOf(a, i), scratch);
    });
    if (failed) return failed;
    const int64_t biases = a.heads * a.rank * a.n;
    void* const sums[] = {b.dB_bias, b.dC_bias};
    for (void* bias : sums)
        for (int64_t s = 1; s < a.sequences; ++s)
            for (int64_t i = 0; i < biases; ++i)
                static_cast<S*>(bias)[i] = static_cast<S*>(bias)[i] + static_cast<S*>(bias)[s * biases + i];
    const int64_t batches = a.cu_seqlens ? 1 : a.sequences;
    return parallel_for(batches * a.length, a.threads, 0,
                        [&](int64_t i, char*) { step_backward<S>(b, i / a.length, i % a.length); });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_SUMS(mamba3_rotate, RotateArguments, dtype, forward)

SSMZOO_EXPORT_SUMS(mamba3_rotate_backward, RotateBackwardArguments, forward.dtype, backward)
