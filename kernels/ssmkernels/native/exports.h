// The C functions of kernels that are templates over the dtype of their call.
#pragma once

#include "half.h"

// The dtypes with kernels, a bit for each number: all, but in a build that a sanitizer watches, which calls few of them.
#ifndef SSMZOO_DTYPES
#define SSMZOO_DTYPES 15
#endif

namespace ssmzoo {
namespace SSMZOO_ISA {

// call(zero) with a zero of T, the dtype of this number; no kernel for it where a build leaves it out.
template <class T, int number, class Call>
SSMZOO_INLINE int if_built(const Call& call) {
    if constexpr ((SSMZOO_DTYPES >> number) & 1) return call(T());
    __builtin_trap();
}

// call(zero) with a zero of the dtype that Python gives this number.
template <class Call>
SSMZOO_INLINE int by_dtype(int64_t dtype, const Call& call) {
    switch (dtype) {
        case 0: return if_built<float, 0>(call);
        case 1: return if_built<double, 1>(call);
        case 2: return if_built<bfloat16, 2>(call);
        default: return if_built<float16, 3>(call);
    }
}

// The same with a zero of the dtype of sums: double where the dtype is float64, else float.
template <class Call>
SSMZOO_INLINE int by_sums(int64_t dtype, const Call& call) {
    return dtype == 1 ? if_built<double, 1>(call) : call(float());
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
#define SSMZOO_EXPORT_SUMS(name, Arguments, dtype, function)                               \
    SSMZOO_EXPORT(name)(const ssmzoo::Arguments* a) {                                      \
        using namespace ssmzoo::SSMZOO_ISA;                                                \
        return by_sums(a->dtype, [&](auto zero) { return function<decltype(zero)>(*a); }); \
    }
