// The instruction set, also one that adds products of bytes to another: VNNI, or Arm's dot products.
//
// Such a set is compiled for this op alone, under its own name; for other kernels the loader takes the set that it was
// added to, which is also what the headers see that all of them share.
#pragma once

#include "native/isa.h"

#if defined(SSMZOO_ISA_avx512vnni)
#undef SSMZOO_ISA
#define SSMZOO_ISA avx512vnni
#define SSMZOO_BYTE_PRODUCTS 1
#elif defined(SSMZOO_ISA_avxvnni)
#undef SSMZOO_ISA
#define SSMZOO_ISA avxvnni
#define SSMZOO_BYTE_PRODUCTS 1
#elif defined(SSMZOO_ISA_dotprod)
#undef SSMZOO_ISA
#define SSMZOO_ISA dotprod
#define SSMZOO_BYTE_PRODUCTS 1
#elif defined(__ARM_FEATURE_DOTPROD)  // Apple's compilers take them for granted
#define SSMZOO_BYTE_PRODUCTS 1
#else
#define SSMZOO_BYTE_PRODUCTS 0
#endif

#include "native/intrinsics.h"

#if SSMZOO_BYTE_PRODUCTS && defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 15
#if SSMZOO_VECTOR_BYTES == 64  // the other compilers have read these
#include <avx512vlintrin.h>
#include <avx512vnniintrin.h>
// after avx512vlintrin.h, whose masks it takes
#include <avx512vnnivlintrin.h>
#else
#include <avxvnniintrin.h>
#endif
#endif
