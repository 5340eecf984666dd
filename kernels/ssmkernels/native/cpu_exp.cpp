// e^x of each number of a contiguous tensor, where it does not overflow.
#include "finite.h"
#include "parallel.h"
#include "tiles.h"

namespace ssmzoo {

struct ExpArguments {
    const void* x;  // float
    void* y;
    int64_t count, threads;
};

namespace SSMZOO_ISA {
namespace {

int exp_of_all(const ExpArguments& a) {
    constexpr int64_t part = 4096, lanes = Lanes<float>::count;
    const float* x = static_cast<const float*>(a.x);
    float* y = static_cast<float*>(a.y);
    parallel_stage(ceil_div(a.count, part), a.threads, [&](int64_t number, int) {
        const int64_t end = minimum(a.count, (number + 1) * part);
        int64_t i = number * part;
        for (; i + lanes <= end; i += lanes) store(y + i, finite_exp<float>(load(x + i)));
        if (i < end) store_some(y + i, finite_exp<float>(load_some(x + i, end - i)), end - i);
    });
    return 0;
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT(exp)(const ssmzoo::ExpArguments* a) { return ssmzoo::SSMZOO_ISA::exp_of_all(*a); }
