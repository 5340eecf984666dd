// The matrix memory's stabiliser, and with it how much the state keeps at each token and how much a token adds.
//
// m_t = max(log σ(f_t) + m_{t-1}, i_t); the state keeps exp(decay), decay = log σ(f_t) + m_{t-1} - m_t, and a token adds
// weight = exp(i_t - m_t). Lanes run over heads.
//
// Backward, with D the gradient of decay and W that of weight times weight, as if m were a constant, and M that of m
// through all but these two, the larger of m's two arguments also gets what m does to both, M - D - W:
//
//     where it was the old m     dm_old = M - W     di = W
//     where it was i             dm_old = D         di = M - D
//
// With dm_old for the gradient of log σ(f_t) + m_{t-1}. Either way, what would cancel is never added.
#include "mlstm/cpu.h"
#include "native/exports.h"

namespace ssmzoo {

struct MlstmGatesArguments {
    const void *i, *f;                   // S: (b l h), contiguous
    const void* initial;                 // S: (s h) or null
    const int32_t* cu_seqlens;           // (s + 1) or null
    void *m, *decay, *weight, *final_m;  // S: (b l h) each; (s h)
    int64_t dtype, sequences, length, heads, threads;
};

struct MlstmGatesBackwardArguments {
    const void *i, *f, *initial, *m;        // as forward
    const void *ddecay, *dweight, *dm;      // S: (b l h) each; of m as a part of the output of its own token
    const void* dfinal;                     // S: (s h)
    const int32_t* cu_seqlens;
    void *di, *df, *dinitial;               // S: (b l h), likewise, (s h)
    int64_t dtype, sequences, length, heads, threads;
};

namespace SSMZOO_ISA {
namespace {

// Vectors of a sequence's heads: f(first element of the first token, heads there, place among all sequences' heads).
template <class S, class A, class F>
int each(const A& a, const F& f) {
    constexpr int64_t lanes = Lanes<S>::count;
    const int64_t blocks = ceil_div(a.heads, lanes);
    return parallel_for(a.sequences * blocks, a.threads, 0, [&](int64_t task, char*) {
        const int64_t sequence = task / blocks, head = task % blocks * lanes;
        const int64_t start = a.cu_seqlens ? a.cu_seqlens[sequence] : sequence * a.length;
        const int64_t length = a.cu_seqlens ? a.cu_seqlens[sequence + 1] - start : a.length;
        f(start * a.heads + head, length, minimum(lanes, a.heads - head), sequence * a.heads + head);
    });
}

template <class S>
typename Lanes<S>::V initial(const void* from, int64_t place, int64_t count) {
    return from ? read_some(at<S>(from, place), count) : typename Lanes<S>::V{};
}

template <class S>
int forward(const MlstmGatesArguments& a) {
    using V = typename Lanes<S>::V;
    return each<S>(a, [&](int64_t first, int64_t length, int64_t count, int64_t place) {
        V m = initial<S>(a.initial, place, count);
        for (int64_t t = 0; t < length; ++t) {
            const int64_t at_token = first + t * a.heads;
            const V kept = log_sigmoid<S>(read_some(at<S>(a.f, at_token), count)) + m;
            const V i = read_some(at<S>(a.i, at_token), count);
            m = larger<S>(kept, i);
            write_some(static_cast<S*>(a.m) + at_token, m, count);
            write_some(static_cast<S*>(a.decay) + at_token, kept - m, count);
            write_some(static_cast<S*>(a.weight) + at_token, exp<S>(i - m), count);
        }
        write_some(static_cast<S*>(a.final_m) + place, m, count);
    });
}

template <class S>
int backward(const MlstmGatesBackwardArguments& a) {
    using V = typename Lanes<S>::V;
    return each<S>(a, [&](int64_t first, int64_t length, int64_t count, int64_t place) {
        V g = read_some(at<S>(a.dfinal, place), count);
        for (int64_t t = length - 1; t >= 0; --t) {
            const int64_t at_token = first + t * a.heads;
            const auto get = [&](const void* from) { return read_some(at<S>(from, at_token), count); };
            const V f = get(a.f), i = get(a.i), m = get(a.m);
            const V before = t ? read_some(at<S>(a.m, at_token - a.heads), count) : initial<S>(a.initial, place, count);
            const V kept = log_sigmoid<S>(f) + before;
            g = g + get(a.dm);
            const V D = get(a.ddecay), W = exp<S>(i - m) * get(a.dweight), half = splat(S(0.5)) * (g - D - W);
            const V of_kept = choose<S>(kept > i, g - W, choose<S>(kept < i, D, D + half));
            write_some(static_cast<S*>(a.di) + at_token, choose<S>(kept > i, W, choose<S>(kept < i, g - D, W + half)), count);
            write_some(static_cast<S*>(a.df) + at_token, of_kept * sigmoid<S>(-f), count);
            g = of_kept;
        }
        write_some(static_cast<S*>(a.dinitial) + place, g, count);
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_SUMS(mlstm_gates, MlstmGatesArguments, dtype, forward)

SSMZOO_EXPORT_SUMS(mlstm_gates_backward, MlstmGatesBackwardArguments, dtype, backward)
