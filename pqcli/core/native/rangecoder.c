/* Single decisions and integers of pqcli.core.entropy.rangecoder. */
#include "rangecoder.h"

#define N_INTEGER_MODELS 33
#define EVEN 32768

/* One adaptive decision. */
EXPORT int64_t code_decision(
    int8_t encoding, int64_t bit, Model *models, int64_t index, const int64_t *rates, int64_t *window, uint8_t *buffer
) {
    Coder coder = coder_of(window, buffer);
    bit = code_bit(encoding, bit, models[index].probability, &coder);
    adapt(&models[index], bit, rates);
    keep_coder(&coder, window);
    return bit;
}

/* One integer in [0, 2^32): an adaptive unary number of bits of value + 1, then those below the leading one. */
EXPORT int64_t code_integer(
    int8_t encoding, int64_t value, Model *models, int64_t first, const int64_t *rates, int64_t *window, uint8_t *buffer
) {
    Coder coder = coder_of(window, buffer);
    int64_t target = value + 1;
    int64_t n_bits = 0;
    while (encoding && target >> (n_bits + 1)) n_bits++;
    int64_t bits = 0;
    while (bits < N_INTEGER_MODELS - 1) {
        Model *model = &models[first + bits];
        int64_t bit = code_bit(encoding, bits < n_bits, model->probability, &coder);
        adapt(model, bit, rates);
        if (!bit) break;
        bits++;
    }
    int64_t result = 1;
    for (int64_t i = bits - 1; i >= 0; i--) {
        int64_t bit = code_bit(encoding, (target >> i) & 1, EVEN, &coder);
        result = (result << 1) | bit;
    }
    keep_coder(&coder, window);
    return result - 1;
}
