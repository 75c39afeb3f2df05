/* Nothing but independent multiply-adds: what `kernels.py` takes for the peak of a processor. */
#include "../../pqcli/core/native/native.h"

typedef float Floats __attribute__((ext_vector_type(LANES)));

/* n turns of 4 multiply-adds in each of so many chains. */
#define PEAK(CHAINS) \
    EXPORT WIDE void peak_##CHAINS(int64_t n, float x, float *out) { \
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
