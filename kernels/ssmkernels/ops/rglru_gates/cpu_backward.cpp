// The gates of the real-gated linear recurrent unit, backward. With s(r), s(i) the open gates and q = sqrt(1 - a^2),
// whose derivative 1 / (2 q) by its square is cut off at 1000:
//
//     dlog_a = da a - 2 a^2 / (2 q) db s(i) x          dr = dlog_a log_decay s'(r)     dlog_decay = sum dlog_a s(r)
//     di = db q x s'(i)                                dx = db q s(i)
//
// log_decay's gradient is summed over the rows of each of at most 64 fixed parts, and over the parts by the caller.
#include "native/exports.h"
#include "rglru_gates/cpu.h"

namespace ssmzoo {

struct GateBackwardArguments {
    GateArguments forward;                // a, b unused
    const void *da, *db;                  // S and T: (b l h p), contiguous
    void *dx, *dgates, *dlog_decay;       // T: (b l h p); T: (b l h 2p); S: (parts h p), zeros; all contiguous
    int64_t parts;
};

namespace SSMZOO_ISA {
namespace {

template <class T>
void row_backward(const GateBackwardArguments& args, int64_t row, typename Sum<T>::type* sums) {
    typedef typename Sum<T>::type S;
    using V = typename Lanes<S>::V;
    const GateArguments& f = args.forward;
    const int64_t p = f.p, channels = f.heads * p;
    const bool first = f.first && f.first[row] != 0;
    const V one = splat(S(1)), steepest = splat(S(1000)), flat = splat(S(2.5e-7)), half = splat(S(0.5));
    for_heads<T>(f, row, [&](int64_t head, const T* x, const T* gates) __attribute__((always_inline)) {
        const S* log_decay = at<S>(f.log_decay, head);
        const S* da = at<S>(args.da, row * channels + head);
        const T* db = at<T>(args.db, row * channels + head);
        T* dx = static_cast<T*>(args.dx) + row * channels + head;
        T* dgates = static_cast<T*>(args.dgates) + 2 * (row * channels + head);
        for_channels<S>(p, [&](int64_t c, int64_t left) __attribute__((always_inline)) {
            const V rate = read_some(log_decay + c, left), u = read_some(x + c, left), e = read_some(db + c, left);
            const Gates<S> g(read_some(gates + c, left), read_some(gates + p + c, left), rate);
            V slope = read_some(da + c, left) * g.a, through = e;
            if (!first) {
                const V steep = g.rest < flat ? steepest : half / g.root;
                slope = slope - (g.a * g.a) * (steep + steep) * (e * g.input * u);
                through = e * g.root;
            }
            write_some(dx + c, through * g.input, left);
            write_some(dgates + c, slope * rate * (g.recurrence * (one - g.recurrence)), left);
            write_some(dgates + p + c, through * u * (g.input * (one - g.input)), left);
            write_some(sums + head + c, fma(slope, g.recurrence, read_some(sums + head + c, left)), left);
        });
    });
}

template <class T>
int all(const GateBackwardArguments& args) {
    typedef typename Sum<T>::type S;
    const GateArguments& f = args.forward;
    const int64_t rows = f.batch * f.length, each = ceil_div(rows, args.parts);
    return parallel_for(args.parts, f.threads, 0, [&](int64_t i, char*) {
        S* sums = static_cast<S*>(args.dlog_decay) + i * f.heads * f.p;
        for (int64_t row = i * each; row < minimum(rows, (i + 1) * each); ++row) row_backward<T>(args, row, sums);
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_DTYPES(rglru_gates_backward, GateBackwardArguments, forward.dtype, all)
