// Root-mean-square normalisation, forward: y = v / sqrt(mean(v^2) + eps) * weight, with v = x, plus a residual, and a
// gate through silu before or after. Without x, v is the residual, which may be wider than y.
#include "native/exports.h"
#include "rms_norm/cpu.h"

namespace ssmzoo {
namespace SSMZOO_ISA {
namespace {

// Not inlined: beside another's, its loops would find no registers.
template <class T, class R>
__attribute__((noinline)) void norm_groups(const NormArguments& a, int64_t row, const R* r) {
    const T* gate = a.gate ? at<T>(a.gate, row * a.gate_row) : nullptr;
    const auto* weight = at<typename Sum<T>::type>(a.weight, 0);
    T* y = static_cast<T*>(a.y) + row * a.d;
    for (int64_t first = 0; first < a.d; first += a.group)
        norm_group<T>(r + first, gate ? gate + first : nullptr, a.gate_first, weight + first, y + first, a.group, a.eps);
}

template <class T, class R>
void norm_row(const NormArguments& a, int64_t row) {
    constexpr int64_t lanes = Lanes<typename Sum<T>::type>::count;
    if (!a.residual) return norm_groups<T>(a, row, at<T>(a.x, row * a.x_row));
    const R* r = at<R>(a.residual, row * a.residual_row);
    if (a.x) {
        const T* x = at<T>(a.x, row * a.x_row);
        R* summed = static_cast<R*>(a.summed) + row * a.d;
        for (int64_t c = 0; c < a.d; c += lanes)
            write_some(summed + c, read_some(x + c, a.d - c) + read_some(r + c, a.d - c), a.d - c);
        r = summed;
    }
    norm_groups<T>(a, row, r);
}

template <class T, class R>
int norm(const NormArguments& a) {
    return parallel_for(ceil_div(a.rows, kRows), a.threads, 0, [&](int64_t i, char*) {
        for (int64_t row = i * kRows; row < minimum(a.rows, (i + 1) * kRows); ++row) norm_row<T, R>(a, row);
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT(rms_norm)(const ssmzoo::NormArguments* a) {
    using namespace ssmzoo::SSMZOO_ISA;
    return by_dtype(a->dtype, [&](auto zero) {
        typedef decltype(zero) T;
        return a->residual_wide ? norm<T, typename Sum<T>::type>(*a) : norm<T, T>(*a);
    });
}
