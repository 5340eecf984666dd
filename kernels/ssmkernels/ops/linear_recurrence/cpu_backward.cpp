// The linear recurrence, backward. With g the gradient of the state, which runs back in time:
//
//     g_t = dh_t + conj(a_{t+1}) g_{t+1}        db_t = g_t        da_t = g_t conj(h_{t-1}),  times conj(a_t) for log a
//
// Where a is the same at all times, da is summed over each sequence, last step first, and by the caller over sequences.
#include "linear_recurrence/cpu.h"
#include "native/exports.h"

namespace ssmzoo {

struct RecurrenceBackwardArguments {
    RecurrenceArguments forward;         // states is that of the forward pass, or h where that has its dtype
    const void *dh, *dfinal;             // T: (b l d); S: (s d) or null
    void *da, *db, *dinitial;            // T or S: (b l d), or S: (s d) where a is fixed; T: (b l d); S: (s d)
    int64_t dh_batch, dh_time;
};

namespace SSMZOO_ISA {
namespace {

template <class T, class A, class N>
void block(const RecurrenceBackwardArguments& args, int64_t sequence, int64_t first, int64_t count, bool large) {
    typedef typename Sum<T>::type S;
    using V = typename Lanes<S>::V;
    const RecurrenceArguments& f = args.forward;
    const int64_t numbers = N::parts * f.d;
    S carry[kChannels] = {}, sum[kChannels] = {};
    const size_t bytes = static_cast<size_t>(count) * sizeof(S);
    if (args.dfinal) memcpy(carry, at<S>(args.dfinal, sequence * numbers + first), bytes);
    const Stretch s = stretch(f, sequence);
    const A* a = at<A>(f.a, s.batch * f.a_batch + s.first * f.a_time + first);
    const T* dh = at<T>(args.dh, s.batch * args.dh_batch + s.first * args.dh_time + first);
    const int64_t row = (s.batch * f.length + s.first) * numbers + first;
    const S* states = at<S>(f.states, row);
    const S* initial = f.initial ? at<S>(f.initial, sequence * numbers + first) : nullptr;
    T* db = static_cast<T*>(args.db) + row;
    A* da = static_cast<A*>(args.da) + row;
    const bool fixed = f.fixed, log_a = f.log_a;
    for (int64_t t = s.steps - 1; t >= 0; --t) {
        const A* now = a + t * f.a_time;
        const T* incoming = dh + t * args.dh_time;
        const S* before = t > 0 ? states + (t - 1) * numbers : initial;
        if (t > kAhead) {
            fetch(incoming - kAhead * args.dh_time, count);
            fetch(before - kAhead * numbers, count);
            if (!fixed) fetch(now - kAhead * f.a_time, count);
        }
        by_vectors<S>(count, [&](int64_t c, int64_t left) __attribute__((always_inline)) {
            const V g = read_some(incoming + c, left) + load(carry + c);
            const V alpha = N::decay(read_some(now + c, left), log_a);
            V slope = before ? N::conjugate_product(read_some(before + c, left), g) : V{};
            if (log_a) slope = N::conjugate_product(alpha, slope);
            write_some(db + t * numbers + c, g, left, large);
            if (fixed)
                store(sum + c, load(sum + c) + slope);
            else
                write_some(da + t * numbers + c, slope, left, large);
            store(carry + c, N::conjugate_product(alpha, g));
        });
    }
    if (fixed) memcpy(static_cast<S*>(args.da) + sequence * numbers + first, sum, bytes);
    memcpy(static_cast<S*>(args.dinitial) + sequence * numbers + first, carry, bytes);
}

template <class T, class A, class N = RealNumbers<typename Sum<T>::type>>
int all(const RecurrenceBackwardArguments& args) {
    const bool large = is_large<T>(args.forward);
    return for_blocks(args.forward, [&](int64_t sequence, int64_t first, int64_t count) {
        block<T, A, N>(args, sequence, first, count, large);
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT(linear_recurrence_backward)(const ssmzoo::RecurrenceBackwardArguments* a) {
    using namespace ssmzoo::SSMZOO_ISA;
    if (a->forward.is_complex) {
        return by_sums(a->forward.dtype, [&](auto zero) {
            typedef decltype(zero) T;
            return all<T, T, ComplexNumbers<T>>(*a);
        });
    }
    return by_dtype(a->forward.dtype, [&](auto zero) {
        typedef decltype(zero) T;
        return a->forward.a_wide ? all<T, typename Sum<T>::type>(*a) : all<T, T>(*a);
    });
}
