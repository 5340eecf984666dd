// The C functions of kernels that are templates over the dtype of their call.
#pragma once

#include "half.h"

namespace ssmzoo {
namespace SSMZOO_ISA {

// call(zero) with a zero of the dtype that Python gives this number.
template <class Call>
SSMZOO_INLINE int by_dtype(int64_t dtype, const Call& call) {
    switch (dtype) {
        case 0: return call(float());
        case 1: return call(double());
        case 2: return call(bfloat16());
        default: return call(float16());
    }
}

}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

// The function `name` of the C ABI, which runs function<T>(*a) with the T whose number is a->dtype.
#define SSMZOO_EXPORT_DTYPES(name, Arguments, dtype, function)                              \
    SSMZOO_EXPORT(name)(const ssmzoo::Arguments* a) {                                       \
        using namespace ssmzoo::SSMZOO_ISA;                                                 \
        return by_dtype(a->dtype, [&](auto zero) { return function<decltype(zero)>(*a); }); \
    }

// The same for a kernel that reads numbers of the dtype of sums alone: double where a->dtype is float64's.
#define SSMZOO_EXPORT_SUMS(name, Arguments, dtype, function)                \
    SSMZOO_EXPORT(name)(const ssmzoo::Arguments* a) {                       \
        using namespace ssmzoo::SSMZOO_ISA;                                 \
        return a->dtype == 1 ? function<double>(*a) : function<float>(*a);  \
    }
