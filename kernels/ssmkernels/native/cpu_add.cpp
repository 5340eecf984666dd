// x + y for each number of two contiguous tensors, as a layer adds to the residual stream: y may be in half precision
// beside a float stream. The sum has x's dtype.
#include "exports.h"
#include "parallel.h"
#include "tiles.h"

namespace ssmzoo {

struct AddArguments {
    const void *x, *y;
    void* sum;
    int64_t dtype, y_dtype, count, threads;  // y's dtype is x's, or x's is float
};

namespace SSMZOO_ISA {
namespace {

template <class X, class Y>
int add_all(const AddArguments& a) {
    constexpr int64_t part = 16384, lanes = Lanes<float>::count;
    const bool large = a.count * static_cast<int64_t>(sizeof(X)) >= kLarge;
    return parallel_for(ceil_div(a.count, part), a.threads, 0, [&](int64_t number, char*) {
        const int64_t first = number * part, count = minimum(part, a.count - first);
        const X* x = at<X>(a.x, first);
        const Y* y = at<Y>(a.y, first);
        X* sum = static_cast<X*>(a.sum) + first;
        for (int64_t i = 0; i < count; i += lanes)
            write_some(sum + i, read_some(x + i, count - i) + read_some(y + i, count - i), count - i, large);
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT(add)(const ssmzoo::AddArguments* a) {
    using namespace ssmzoo::SSMZOO_ISA;
    switch (4 * a->dtype + a->y_dtype) {
        case 0: return add_all<float, float>(*a);
        case 2: return add_all<float, bfloat16>(*a);
        case 3: return add_all<float, float16>(*a);
        case 10: return add_all<bfloat16, bfloat16>(*a);
        default: return add_all<float16, float16>(*a);
    }
}
