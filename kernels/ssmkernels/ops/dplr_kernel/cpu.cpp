// S4's kernel, forward: K_t = C Ā^t B̄ for t in blocks of m, each channel by itself.
#include "dplr_kernel/cpu.h"

namespace ssmzoo {
namespace SSMZOO_ISA {
namespace {

template <class T>
int taps(const DplrArguments& a) {
    const Sizes s(a);
    const int64_t last = s.length - (s.blocks - 1) * s.m;  // taps in the last block
    const int64_t own = s.N * (s.m + s.blocks) + s.m + panel_size<T>(s.longest());
    const size_t bytes = static_cast<size_t>(Channel::bytes(s) + own * sizeof(T) + 64 * 8);
    return parallel_for(a.d, a.threads, bytes, [&](int64_t i, char* scratch) {
        Pieces memory{scratch};
        Channel c(s, memory);
        T* rows = memory.take<T>(s.N * s.m);  // transposed: (N m)
        T* columns = memory.take<T>(s.blocks * s.N);
        T* end = memory.take<T>(s.m);
        T* panel = memory.take<T>(panel_size<T>(s.longest()));
        c.compute(a, s, i);
        transpose(rows, s.m, c.rows, s.N, s.m, s.N);
        convert(columns, c.columns, s.blocks * s.N);
        T* K = static_cast<T*>(a.K) + i * s.length;
        product<T>({columns, s.N, 1}, rows, s.m, K, s.m, s.blocks - 1, s.m, s.N, panel);
        row_product(columns + (s.blocks - 1) * s.N, rows, s.m, end, s.m, s.N);
        memcpy(K + (s.blocks - 1) * s.m, end, sizeof(T) * static_cast<size_t>(last));
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT(dplr_kernel)(const ssmzoo::DplrArguments* a) {
    using namespace ssmzoo::SSMZOO_ISA;
    return a->single ? taps<float>(*a) : taps<double>(*a);
}
