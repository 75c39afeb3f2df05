/* What the two coders of levels share: how a magnitude is counted, and what its unary code leaves open. */
#pragma once
#include "rangecoder.h"
#include "trellis.h"

enum {
    N_UNARY = 15,
    LARGE_CLASS = 38, /* from this class on the low bits of an index are sent as they are, one more per octave */
    MAX_STATISTIC = 1 << 15,
    MAX_LEVEL = 1 << 30,
    EVEN_ODDS = 32768, /* the probability of a raw bit */
};

/* What a level's magnitude is counted by: its place among those of its set. */
static inline int64_t index_of(int64_t level, int64_t parity, int64_t label) {
    return (magnitude_of(level) + (parity & (1 - label))) >> 1;
}

/* The magnitude that `index_of` counts by `index`. */
static inline int64_t magnitude_at(int64_t index, int64_t parity, int64_t label) {
    return parity && !label ? max_int(2 * index - 1, 0) : 2 * index + parity;
}

/* What of an index its `n` unary ones leave open, in raw bits: the index; -1 where what is read cannot be one.

   After N_UNARY ones, the excess in Exp-Golomb code; then the `shift` low bits. */
static int64_t code_tail(int encoding, int64_t index, int64_t n, int64_t shift, Coder *coder) {
    if (n == N_UNARY) {
        int64_t excess = (index >> shift) - N_UNARY + 1, n_bits = 0, bits = 0, value = 1;
        while (encoding && excess >> (n_bits + 1)) n_bits++;
        while (code_bit(encoding, bits < n_bits, EVEN_ODDS, coder))
            if (++bits > 30) return -1;
        for (int64_t i = bits - 1; i >= 0; i--)
            value = (value << 1) | code_bit(encoding, (excess >> i) & 1, EVEN_ODDS, coder);
        n += value - 1;
    }
    for (int64_t i = shift - 1; i >= 0; i--) n = (n << 1) | code_bit(encoding, (index >> i) & 1, EVEN_ODDS, coder);
    return n;
}
