// What the loader asks first: which sources is this library built from, and what can this CPU run of it? And several
// kernels' calls in one.
//
// Compiled once, for the baseline. The build passes SSMZOO_SOURCES (their digest), SSMZOO_LAYOUTS (one line for each
// kernel: its name, then its arguments in their order), SSMZOO_COMPILER and SSMZOO_ISAS (the space-separated names of
// the instruction sets that it compiled for).
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#define SSMZOO_PUBLIC extern "C" __attribute__((visibility("default")))

SSMZOO_PUBLIC const char* ssmzoo_sources() { return SSMZOO_SOURCES; }

SSMZOO_PUBLIC const char* ssmzoo_layouts() { return SSMZOO_LAYOUTS; }

SSMZOO_PUBLIC const char* ssmzoo_compiler() { return SSMZOO_COMPILER; }

SSMZOO_PUBLIC const char* ssmzoo_isas() { return SSMZOO_ISAS; }

// Kernels one after another, each with its arguments, up to the first that fails.
SSMZOO_PUBLIC int ssmzoo_program(int (*const* kernels)(const void*), const void* const* arguments, long long count) {
    for (long long i = 0; i < count; ++i)
        if (const int failed = kernels[i](arguments[i])) return failed;
    return 0;
}

#if defined(__x86_64__)
namespace {

// What the CPU has, of which the operating system saves the registers. The compilers' __builtin_cpu_supports would do,
// but not every compiler knows each name, and what it asks at run time not every toolchain fills in.
struct Features {
    bool avx2 = false, avx512 = false, avxvnni = false, avx512vnni = false;

    Features() {
        unsigned a, b, c, d;
        const unsigned first = bit_FMA | bit_OSXSAVE | bit_AVX | bit_F16C;
        if (!__get_cpuid(1, &a, &b, &c, &d) || (c & first) != first) return;
        unsigned saved, high;
        asm volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
        const unsigned wide = bit_AVX512F | bit_AVX512VL | bit_AVX512DQ | bit_AVX512BW;
        avx2 = (saved & 0x06) == 0x06 && (b & bit_AVX2);
#if defined(__APPLE__)
        saved |= 0xe0;  // macOS saves these from their first use on, and says so only then
#endif
        avx512 = avx2 && (saved & 0xe6) == 0xe6 && (b & wide) == wide;
        avx512vnni = avx512 && (c & 1u << 11);
        if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) avxvnni = avx2 && (a & 1u << 4);
    }
};

}  // namespace
#endif

// Whether this CPU, and the operating system's saving of its registers, can run the named instruction set.
SSMZOO_PUBLIC int ssmzoo_can_run(const char* isa) {
    if (strcmp(isa, "baseline") == 0) return 1;
#if defined(__x86_64__)
    const Features found;
    if (strcmp(isa, "avx2") == 0) return found.avx2;
    if (strcmp(isa, "avxvnni") == 0) return found.avxvnni;
    if (strcmp(isa, "avx512") == 0) return found.avx512;
    if (strcmp(isa, "avx512vnni") == 0) return found.avx512vnni;
#elif defined(__aarch64__) && defined(__linux__)
    if (strcmp(isa, "dotprod") == 0) return (getauxval(AT_HWCAP) & 1ul << 20) != 0;
#elif defined(__aarch64__) && defined(__APPLE__)
    if (strcmp(isa, "dotprod") == 0) return 1;  // from the first of Apple's own chips for Macs on
#endif
    return 0;
}
