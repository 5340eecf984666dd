// Which instruction set this translation unit is compiled for. Every kernel source is compiled once for each.
//
// All code lives in a namespace of the instruction set's own name. That is more than tidiness: an inline function with
// the same name in two units is one function to the linker, and a baseline machine must never get the AVX-512 copy.
// For the same reason kernels call no templates of the standard library.
#pragma once

#if defined(SSMZOO_ISA_avx512)
#define SSMZOO_ISA avx512
#define SSMZOO_VECTOR_BYTES 64
#elif defined(SSMZOO_ISA_avx2)
#define SSMZOO_ISA avx2
#define SSMZOO_VECTOR_BYTES 32
#else
#define SSMZOO_ISA baseline
#define SSMZOO_VECTOR_BYTES 16
#endif

#define SSMZOO_JOIN_(isa, name) ssmzoo_##isa##_##name
#define SSMZOO_JOIN(isa, name) SSMZOO_JOIN_(isa, name)

// A function of the C ABI: SSMZOO_EXPORT(scan) is ssmzoo_avx2_scan where AVX2 is compiled for.
#define SSMZOO_EXPORT(name) extern "C" __attribute__((visibility("default"))) int SSMZOO_JOIN(SSMZOO_ISA, name)

#define SSMZOO_INLINE inline __attribute__((always_inline))
