// The linear recurrence, forward: h_t = a_t h_{t-1} + b_t.
#include "linear_recurrence/cpu.h"
#include "native/exports.h"

namespace ssmzoo {
namespace SSMZOO_ISA {
namespace {

template <class T, class A, class N>
void block(const RecurrenceArguments& args, int64_t sequence, int64_t first, int64_t count, bool large) {
    typedef typename Sum<T>::type S;
    const bool log_a = args.log_a, keep = args.states != nullptr;
    const int64_t numbers = N::parts * args.d;
    S state[kChannels] = {};
    if (args.initial) memcpy(state, at<S>(args.initial, sequence * numbers + first), static_cast<size_t>(count) * sizeof(S));
    const Stretch s = stretch(args, sequence);
    const A* a = at<A>(args.a, s.batch * args.a_batch + s.first * args.a_time + first);
    const T* b = at<T>(args.b, s.batch * args.b_batch + s.first * args.b_time + first);
    const int64_t row = (s.batch * args.length + s.first) * numbers + first;
    T* h = s.steps > 0 ? static_cast<T*>(args.h) + row : nullptr;  // nothing lies there where there are no tokens
    S* states = keep ? static_cast<S*>(args.states) + row : nullptr;
    for (int64_t t = 0; t < s.steps; ++t, a += args.a_time, b += args.b_time, h += numbers) {
        if (t + kAhead < s.steps) {
            fetch(b + kAhead * args.b_time, count);
            if (!args.fixed) fetch(a + kAhead * args.a_time, count);
        }
        by_vectors<S>(count, [&](int64_t c, int64_t left) __attribute__((always_inline)) {
            const auto v = N::multiply_add(N::decay(read_some(a + c, left), log_a), load(state + c), read_some(b + c, left));
            store(state + c, v);
            write_some(h + c, v, left, large);
            if (keep) write_some(states + c, v, left);
        });
        if (keep) states += numbers;
    }
    memcpy(static_cast<S*>(args.final_state) + sequence * numbers + first, state, static_cast<size_t>(count) * sizeof(S));
}

template <class T, class A, class N = RealNumbers<typename Sum<T>::type>>
int all(const RecurrenceArguments& args) {
    const bool large = is_large<T>(args);
    return for_blocks(args, [&](int64_t sequence, int64_t first, int64_t count) {
        block<T, A, N>(args, sequence, first, count, large);
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT(linear_recurrence)(const ssmzoo::RecurrenceArguments* a) {
    using namespace ssmzoo::SSMZOO_ISA;
    if (a->is_complex) {
        return by_sums(a->dtype, [&](auto zero) {
            typedef decltype(zero) T;
            return all<T, T, ComplexNumbers<T>>(*a);
        });
    }
    return by_dtype(a->dtype, [&](auto zero) {
        typedef decltype(zero) T;
        return a->a_wide ? all<T, typename Sum<T>::type>(*a) : all<T, T>(*a);
    });
}
