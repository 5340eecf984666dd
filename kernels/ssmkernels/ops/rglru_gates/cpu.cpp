// The gates of the real-gated linear recurrent unit, forward: the decay a = exp(log_decay sigmoid(r)), and the input
// b = sqrt(1 - a^2) sigmoid(i) x, without the root at the first token of a sequence.
#include "native/exports.h"
#include "rglru_gates/cpu.h"

namespace ssmzoo {
namespace SSMZOO_ISA {
namespace {

constexpr int64_t kRows = 16;  // a task's

template <class T>
void gate_row(const GateArguments& args, int64_t row) {
    typedef typename Sum<T>::type S;
    using V = typename Lanes<S>::V;
    const int64_t p = args.p;
    const bool first = args.first && args.first[row] != 0;
    for_heads<T>(args, row, [&](int64_t head, const T* x, const T* gates) __attribute__((always_inline)) {
        const S* log_decay = at<S>(args.log_decay, head);
        S* a = static_cast<S*>(args.a) + row * args.heads * p + head;
        T* b = static_cast<T*>(args.b) + row * args.heads * p + head;
        for_channels<S>(p, [&](int64_t c, int64_t left) __attribute__((always_inline)) {
            const Gates<S> g(read_some(gates + c, left), read_some(gates + p + c, left), read_some(log_decay + c, left));
            const V input = g.input * read_some(x + c, left);
            write_some(a + c, g.a, left);
            write_some(b + c, first ? input : g.root * input, left);
        });
    });
}

template <class T>
int all(const GateArguments& args) {
    const int64_t rows = args.batch * args.length;
    return parallel_for(ceil_div(rows, kRows), args.threads, 0, [&](int64_t i, char*) {
        for (int64_t row = i * kRows; row < minimum(rows, (i + 1) * kRows); ++row) gate_row<T>(args, row);
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_DTYPES(rglru_gates, GateArguments, dtype, all)
