// y = x weightᵀ + bias for a few rows of x: the products of decoding.
#include "exports.h"
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
    Inputs<T> x(a.rows, a.size);
    if (!x.ready()) return kOutOfMemory;
    x.take(static_cast<const T*>(a.x), a.size);
    parallel_stage(ceil_div(a.outputs, kTile), a.threads, [&](int64_t i, int) {
        product_part<T>(a.weight, a.bias, x, a.rows, a.size, a.outputs, kTile, i, static_cast<T*>(a.y), a.outputs);
    });
    return 0;
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_SUMS(product, ProductArguments, dtype, few_rows)
