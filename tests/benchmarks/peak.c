/* Nothing but independent multiply-adds: what `kernels.py` takes for the peak of a processor. */
#include <stdint.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float Floats __attribute__((ext_vector_type(LANES)));

/* n turns of 4 multiply-adds in each of so many chains. */
#define PEAK(CHAINS) \
    __attribute__((min_vector_width(32 * LANES))) void peak_##CHAINS(int64_t n, float x, float *out) { \
        Floats values[CHAINS]; \
        for (int i = 0; i < CHAINS; i++) values[i] = (Floats)x; \
        for (int64_t turn = 0; turn < 4 * n; turn++) { \
            _Pragma("clang loop unroll(full)") for (int i = 0; i < CHAINS; i++) { \
                values[i] = __builtin_elementwise_fma(values[i], (Floats)x, (Floats)x); \
                __asm__ volatile("" : "+v"(values[i])); \
            } \
        } \
        for (int i = 0; i < CHAINS; i++) *(volatile float *)out = values[i][0]; \
    }

PEAK(8)
PEAK(10)
PEAK(12)
PEAK(14)
PEAK(16)
PEAK(24)
