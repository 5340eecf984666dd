// The linear recurrence, backward. With g the gradient of the state, which runs back in time:
//
//     g_t = dh_t + conj(a_{t+1}) g_{t+1}        db_t = g_t        da_t = g_t conj(h_{t-1}),  times conj(a_t) for log a
//
// Where a is the same at all times, da is summed over each sequence, last step first, and by the caller over sequences.
#include "linear_recurrence/cpu.h"

namespace ssmzoo {

struct RecurrenceBackwardArguments {
    RecurrenceArguments forward;         // states is that of the forward pass, or h where that has its dtype
    const void *dh, *dfinal;             // T: (b l d); S: (s d) or null
    void *da, *db, *dinitial;            // T or S: (b l d), or S: (s d) where a is fixed; T: (b l d); S: (s d)
    int64_t dh_batch, dh_time;
};

namespace SSMZOO_ISA {
namespace {

template <class T, class A>
void real_block(const RecurrenceBackwardArguments& args, int64_t sequence, int64_t first, int64_t count, bool large) {
    typedef typename Sum<T>::type S;
    constexpr int64_t lanes = Lanes<S>::count;
    using V = typename Lanes<S>::V;
    const RecurrenceArguments& f = args.forward;
    S carry[kChannels] = {}, sum[kChannels] = {};
    const size_t bytes = static_cast<size_t>(count) * sizeof(S);
    if (args.dfinal) memcpy(carry, at<S>(args.dfinal, sequence * f.d + first), bytes);
    const Stretch s = stretch(f, sequence);
    const A* a = at<A>(f.a, s.batch * f.a_batch + s.first * f.a_time + first);
    const T* dh = at<T>(args.dh, s.batch * args.dh_batch + s.first * args.dh_time + first);
    const int64_t row = (s.batch * f.length + s.first) * f.d + first;
    const S* states = at<S>(f.states, row);
    const S* initial = f.initial ? at<S>(f.initial, sequence * f.d + first) : nullptr;
    T* db = static_cast<T*>(args.db) + row;
    A* da = static_cast<A*>(args.da) + row;
    const bool fixed = f.fixed;
    for (int64_t t = s.steps - 1; t >= 0; --t) {
        const A* now = a + t * f.a_time;
        const T* incoming = dh + t * args.dh_time;
        const S* before = t > 0 ? states + (t - 1) * f.d : initial;
        if (t > kAhead) {
            fetch(incoming - kAhead * args.dh_time, count);
            fetch(before - kAhead * f.d, count);
            if (!fixed) fetch(now - kAhead * f.a_time, count);
        }
        for (int64_t c = 0; c < count; c += lanes) {
            const V g = read_some(incoming + c, count - c) + load(carry + c);
            const V alpha = decay<S>(read_some(now + c, count - c), f.log_a);
            V slope = before ? g * read_some(before + c, count - c) : V{};
            if (f.log_a) slope = slope * alpha;
            write_some(db + t * f.d + c, g, count - c, large);
            if (fixed)
                store(sum + c, load(sum + c) + slope);
            else
                write_some(da + t * f.d + c, slope, count - c, large);
            store(carry + c, alpha * g);
        }
    }
    if (fixed) memcpy(static_cast<S*>(args.da) + sequence * f.d + first, sum, bytes);
    memcpy(static_cast<S*>(args.dinitial) + sequence * f.d + first, carry, bytes);
}

template <class S>
void complex_block(const RecurrenceBackwardArguments& args, int64_t sequence, int64_t first, int64_t count) {
    const RecurrenceArguments& f = args.forward;
    const int64_t numbers = 2 * f.d;
    S carry[kChannels] = {}, sum[kChannels] = {};
    const S zeros[kChannels] = {};
    const size_t bytes = static_cast<size_t>(count) * sizeof(S);
    if (args.dfinal) memcpy(carry, at<S>(args.dfinal, sequence * numbers + first), bytes);
    const Stretch s = stretch(f, sequence);
    const S* a = at<S>(f.a, s.batch * f.a_batch + s.first * f.a_time + first);
    const S* dh = at<S>(args.dh, s.batch * args.dh_batch + s.first * args.dh_time + first);
    const int64_t row = (s.batch * f.length + s.first) * numbers + first;
    const S* states = at<S>(f.states, row);
    const S* initial = f.initial ? at<S>(f.initial, sequence * numbers + first) : zeros;
    S* db = static_cast<S*>(args.db) + row;
    S* da = static_cast<S*>(args.da) + row;
    const bool fixed = f.fixed;
    for (int64_t t = s.steps - 1; t >= 0; --t) {
        const S* now = a + t * f.a_time;
        const S* incoming = dh + t * args.dh_time;
        const S* before = t > 0 ? states + (t - 1) * numbers : initial;
        S* slope = fixed ? sum : da + t * numbers;
        for (int64_t c = 0; c < count; c += 2) {
            const S real = incoming[c] + carry[c], imaginary = incoming[c + 1] + carry[c + 1];
            S slope_real = real * before[c] + imaginary * before[c + 1];
            S slope_imaginary = imaginary * before[c] - real * before[c + 1];
            if (f.log_a) {
                const S along = slope_real * now[c] + slope_imaginary * now[c + 1];
                slope_imaginary = slope_imaginary * now[c] - slope_real * now[c + 1];
                slope_real = along;
            }
            db[t * numbers + c] = real;
            db[t * numbers + c + 1] = imaginary;
            slope[c] = fixed ? slope[c] + slope_real : slope_real;
            slope[c + 1] = fixed ? slope[c + 1] + slope_imaginary : slope_imaginary;
            carry[c] = now[c] * real + now[c + 1] * imaginary;
            carry[c + 1] = now[c] * imaginary - now[c + 1] * real;
        }
    }
    if (fixed) memcpy(static_cast<S*>(args.da) + sequence * numbers + first, sum, bytes);
    memcpy(static_cast<S*>(args.dinitial) + sequence * numbers + first, carry, bytes);
}

template <class T, class A>
int real(const RecurrenceBackwardArguments& args) {
    const RecurrenceArguments& f = args.forward;
    const bool large = f.sequences * f.length * f.d * static_cast<int64_t>(sizeof(T)) >= kLarge;
    return for_blocks(f, [&](int64_t sequence, int64_t first, int64_t count) {
        real_block<T, A>(args, sequence, first, count, large);
    });
}

template <class S>
int complex(const RecurrenceBackwardArguments& args) {
    return for_blocks(args.forward, [&](int64_t sequence, int64_t first, int64_t count) {
        complex_block<S>(args, sequence, first, count);
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT(linear_recurrence_backward)(const ssmzoo::RecurrenceBackwardArguments* a) {
    using namespace ssmzoo::SSMZOO_ISA;
    if (a->forward.is_complex) return a->forward.dtype == 1 ? complex<double>(*a) : complex<float>(*a);
    switch (a->forward.dtype) {
        case 0: return real<float, float>(*a);
        case 1: return real<double, double>(*a);
        case 2: return a->forward.a_wide ? real<bfloat16, float>(*a) : real<bfloat16, bfloat16>(*a);
        default: return a->forward.a_wide ? real<float16, float>(*a) : real<float16, float16>(*a);
    }
}
