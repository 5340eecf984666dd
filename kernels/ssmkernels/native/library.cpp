// What the loader asks first: does this library fit the Python code, what was built into it, what can this CPU run?
//
// Compiled once, for the baseline. The build passes SSMZOO_ABI, SSMZOO_COMPILER and SSMZOO_ISAS (the space-separated
// names of the instruction sets that it compiled for).
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#define SSMZOO_PUBLIC extern "C" __attribute__((visibility("default")))

// Raised whenever an argument structure or an exported function changes; the same number as in native/build.py.
SSMZOO_PUBLIC int ssmzoo_abi() { return SSMZOO_ABI; }

SSMZOO_PUBLIC const char* ssmzoo_compiler() { return SSMZOO_COMPILER; }

SSMZOO_PUBLIC const char* ssmzoo_isas() { return SSMZOO_ISAS; }

#if defined(__x86_64__)
// Clang's __builtin_cpu_supports does not know this one by name.
static bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

// Whether this CPU, and the operating system's saving of its registers, can run the named instruction set.
SSMZOO_PUBLIC int ssmzoo_can_run(const char* isa) {
    if (strcmp(isa, "baseline") == 0) return 1;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    if (strcmp(isa, "avx2") == 0) return avx2;
    if (strcmp(isa, "avx512") == 0)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
#endif
    return 0;
}
