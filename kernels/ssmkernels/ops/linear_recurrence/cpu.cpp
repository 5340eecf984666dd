// The linear recurrence, forward: h_t = a_t h_{t-1} + b_t.
#include "linear_recurrence/cpu.h"

namespace ssmzoo {
namespace SSMZOO_ISA {
namespace {

template <class T, class A>
void real_block(const RecurrenceArguments& args, int64_t sequence, int64_t first, int64_t count, bool large) {
    typedef typename Sum<T>::type S;
    constexpr int64_t lanes = Lanes<S>::count;
    S state[kChannels] = {};
    if (args.initial) memcpy(state, at<S>(args.initial, sequence * args.d + first), static_cast<size_t>(count) * sizeof(S));
    const Stretch s = stretch(args, sequence);
    const A* a = at<A>(args.a, s.batch * args.a_batch + s.first * args.a_time + first);
    const T* b = at<T>(args.b, s.batch * args.b_batch + s.first * args.b_time + first);
    const int64_t row = (s.batch * args.length + s.first) * args.d + first;
    T* h = static_cast<T*>(args.h) + row;
    S* states = args.states ? static_cast<S*>(args.states) + row : nullptr;
    for (int64_t t = 0; t < s.steps; ++t, a += args.a_time, b += args.b_time, h += args.d) {
        if (t + kAhead < s.steps) {
            fetch(b + kAhead * args.b_time, count);
            if (!args.fixed) fetch(a + kAhead * args.a_time, count);
        }
        for (int64_t c = 0; c < count; c += lanes) {
            const auto v = fma(decay<S>(read_some(a + c, count - c), args.log_a), load(state + c), read_some(b + c, count - c));
            store(state + c, v);
            write_some(h + c, v, count - c, large);
            if (states) write_some(states + c, v, count - c);
        }
        if (states) states += args.d;
    }
    memcpy(static_cast<S*>(args.final_state) + sequence * args.d + first, state, static_cast<size_t>(count) * sizeof(S));
}

template <class S>
void complex_block(const RecurrenceArguments& args, int64_t sequence, int64_t first, int64_t count) {
    S state[kChannels] = {};
    const int64_t numbers = 2 * args.d;
    if (args.initial) memcpy(state, at<S>(args.initial, sequence * numbers + first), static_cast<size_t>(count) * sizeof(S));
    const Stretch s = stretch(args, sequence);
    const S* a = at<S>(args.a, s.batch * args.a_batch + s.first * args.a_time + first);
    const S* b = at<S>(args.b, s.batch * args.b_batch + s.first * args.b_time + first);
    S* h = static_cast<S*>(args.h) + (s.batch * args.length + s.first) * numbers + first;
    for (int64_t t = 0; t < s.steps; ++t, a += args.a_time, b += args.b_time, h += numbers) {
        for (int64_t c = 0; c < count; c += 2) {
            const S real = a[c] * state[c] - a[c + 1] * state[c + 1] + b[c];
            const S imaginary = a[c] * state[c + 1] + a[c + 1] * state[c] + b[c + 1];
            h[c] = state[c] = real;
            h[c + 1] = state[c + 1] = imaginary;
        }
    }
    memcpy(static_cast<S*>(args.final_state) + sequence * numbers + first, state, static_cast<size_t>(count) * sizeof(S));
}

template <class T, class A>
int real(const RecurrenceArguments& args) {
    const bool large = args.sequences * args.length * args.d * static_cast<int64_t>(sizeof(T)) >= kLarge;
    return for_blocks(args, [&](int64_t sequence, int64_t first, int64_t count) {
        real_block<T, A>(args, sequence, first, count, large);
    });
}

template <class S>
int complex(const RecurrenceArguments& args) {
    return for_blocks(args, [&](int64_t sequence, int64_t first, int64_t count) {
        complex_block<S>(args, sequence, first, count);
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT(linear_recurrence)(const ssmzoo::RecurrenceArguments* a) {
    using namespace ssmzoo::SSMZOO_ISA;
    if (a->is_complex) return a->dtype == 1 ? complex<double>(*a) : complex<float>(*a);
    switch (a->dtype) {
        case 0: return real<float, float>(*a);
        case 1: return real<double, double>(*a);
        case 2: return a->a_wide ? real<bfloat16, float>(*a) : real<bfloat16, bfloat16>(*a);
        default: return a->a_wide ? real<float16, float>(*a) : real<float16, float16>(*a);
    }
}
