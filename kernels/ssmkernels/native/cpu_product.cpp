// y = x weightᵀ + bias for a few rows of x: the products of decoding.
#include "parallel.h"
#include "product.h"
#include "tiles.h"

namespace ssmzoo {

struct ProductArguments {
    const void *x, *weight, *bias;  // T: (rows, size), (outputs, size), (outputs) or null, contiguous
    void* y;                        // T: (rows, outputs)
    int64_t dtype, rows, size, outputs, threads;
};

namespace SSMZOO_ISA {
namespace {

template <class T>
int few_rows(const ProductArguments& a) {
    const T* x = static_cast<const T*>(a.x);
    parallel_stage(ceil_div(a.outputs, kTile), a.threads, [&](int64_t i, int) {
        product<T>(a.weight, a.bias, x, a.rows, a.size, i * kTile, minimum(a.outputs, (i + 1) * kTile),
                   [&](int64_t b, int64_t o, T value) { static_cast<T*>(a.y)[b * a.outputs + o] = value; });
    });
    return 0;
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT(product)(const ssmzoo::ProductArguments* a) {
    using namespace ssmzoo::SSMZOO_ISA;
    return a->dtype == 0 ? few_rows<float>(*a) : few_rows<double>(*a);
}
