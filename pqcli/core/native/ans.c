/* The loops of pqcli.core.entropy.ans. Constants: precision 15, words of 32 bits, state in [2^30, 2^62). */
#include "native.h"

#define LOWEST (INT64_C(1) << 30)

/* The number of words written (first word first out of the encoder, last into the decoder), -1 if a symbol is absent
   from its table. A symbol never gives more than one word. */
EXPORT int64_t ans_encode(
    int64_t n, int64_t n_symbols, const uint16_t *symbols, const uint8_t *classes, const int32_t *frequencies,
    const int32_t *cumulative, uint32_t *words, int64_t *state
) {
    uint64_t x = LOWEST;
    int64_t n_words = 0;
    for (int64_t i = n - 1; i >= 0; i--) {
        int64_t entry = classes[i] * n_symbols + symbols[i];
        uint64_t f = (uint64_t)frequencies[entry];
        if (!f) return -1;
        if (x >= f << 47) {
            words[n_words++] = (uint32_t)x;
            x >>= 32;
        }
        uint64_t q = x / f;
        x = (q << 15) + (uint64_t)cumulative[entry] + (x - q * f);
    }
    *state = (int64_t)x;
    return n_words;
}

/* Fill `symbols`; whether the words sufficed, none is left, and the state is the encoder's first. */
EXPORT int8_t ans_decode(
    int64_t state, int64_t n, int64_t n_words, int64_t n_symbols, const uint32_t *words, const uint8_t *classes,
    const int32_t *frequencies, const int32_t *cumulative, const uint16_t *lookup, uint16_t *symbols
) {
    int64_t x = state;
    int64_t at = 0;
    for (int64_t i = 0; i < n; i++) {
        int64_t c = classes[i];
        int64_t slot = x & 0x7FFF;
        int64_t s = lookup[(c << 15) + slot];
        int64_t entry = c * n_symbols + s;
        symbols[i] = (uint16_t)s;
        x = (int64_t)frequencies[entry] * (x >> 15) + slot - cumulative[entry];
        if (x < LOWEST) {
            if (at == n_words) return 0;
            x = (x << 32) | words[at++];
        }
    }
    return at == n_words && x == LOWEST;
}
