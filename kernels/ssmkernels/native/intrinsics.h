// The intrinsics of the instruction set.
//
// Reading all of immintrin.h takes GCC up to a second for each source, longer than many kernels take to compile. Its
// parts of AVX, AVX2, FMA and AVX-512F take a fifth to a third of that. They refuse to be read unless immintrin.h has
// said that it is there, by the same macro in every release up to GCC 14; later ones and other compilers read it whole.
#pragma once

#include "isa.h"

#if defined(__x86_64__) && SSMZOO_VECTOR_BYTES == 16
#include <emmintrin.h>
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 15
#include <smmintrin.h>
#if !defined(_IMMINTRIN_H_INCLUDED)
#define _IMMINTRIN_H_INCLUDED
#endif
#include <avxintrin.h>
// after avxintrin.h, whose types they use
#include <avx2intrin.h>
#include <f16cintrin.h>
#include <fmaintrin.h>
#if SSMZOO_VECTOR_BYTES == 64
#include <avx512fintrin.h>
#endif
#elif defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
