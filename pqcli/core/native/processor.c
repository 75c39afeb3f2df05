/* What the processor has: asked of the lowest library, to choose among the others. */
#include "native.h"

#if defined(__x86_64__)
#include <cpuid.h>

static int has(uint32_t word, uint32_t bits) { return (word & bits) == bits; }

/* 0: x86-64, 1: x86-64-v3 (AVX2, FMA and what came with them), 2: x86-64-v4 (AVX-512 F, BW, CD, DQ, VL). */
EXPORT int64_t highest_level(void) {
    uint32_t a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    if (!has(c, bit_SSE3 | bit_SSSE3 | bit_FMA | bit_CMPXCHG16B | bit_SSE41 | bit_SSE42)) return 0;
    if (!has(c, bit_MOVBE | bit_POPCNT | bit_OSXSAVE | bit_AVX | bit_F16C)) return 0;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0)); /* the registers that the system saves */
    if (!has(low, 0x06)) return 0;
    if (!__get_cpuid(0x80000001, &a, &b, &c, &d) || !has(c, bit_LAHF_LM | bit_LZCNT)) return 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !has(b, bit_BMI | bit_AVX2 | bit_BMI2)) return 0;
    if (!has(b, bit_AVX512F | bit_AVX512DQ | bit_AVX512CD | bit_AVX512BW | bit_AVX512VL) || !has(low, 0xe6)) return 1;
    return 2;
}
#endif

/* float32 in a register. */
EXPORT int64_t lanes(void) { return LANES; }
