/* The logistic mixing of pqcli.core.entropy.mixing, for loops to build in. Its tables come from there. */
#pragma once
#include "rangecoder.h"

#define N_INPUTS 3
#define LEARNING 220 /* weights move by 220 / 2^24 of (error in 1/65536) * (log odds in 1/256) */
#define OCTAVE 256
#define LARGEST (12 * OCTAVE) /* log odds are cut off at 12 octaves */
#define SQUASH_SHIFT 2

/* `pqcli.core.entropy.mixing.TABLES`: four tables, one behind the other. */
typedef struct {
    const int64_t *log2, *exp2, *stretch, *squash;
} MixingTables;

static inline MixingTables mixing_tables(const int64_t *tables) {
    return (MixingTables){tables, tables + 256, tables + 512, tables + 512 + 4096};
}

/* floor(log2 value) octaves, and the fraction from the next eight bits, for 0 < value < 2^53. */
static inline int64_t log2_of(int64_t value, const MixingTables *tables) {
    union {
        double value;
        int64_t bits;
    } as = {(double)value}; /* its exponent and mantissa; exact */
    return ((as.bits >> 52) - 1023) * 256 + tables->log2[(as.bits >> 44) & 255];
}

/* About 2^(log / 256), for 0 <= log < 40 octaves. */
static inline int64_t exp2_of(int64_t log, const MixingTables *tables) {
    return (tables->exp2[log & 255] << (log >> 8)) >> 16;
}

/* One decision predicted by models a, b and c, all of which learn, as do the weights (N_INPUTS): the bit.

   A weight moves by less than 2^12 at a time, and log odds stay below 2^12: no sum overflows within 2^38 decisions. */
static inline int64_t code_mixed(
    int encoding, int64_t bit, Model *a, Model *b, Model *c, int64_t *weights, const MixingTables *tables,
    const int64_t *rates, Coder *coder
) {
    int64_t log_a = tables->stretch[a->probability >> 4];
    int64_t log_b = tables->stretch[b->probability >> 4];
    int64_t log_c = tables->stretch[c->probability >> 4];
    int64_t dot = weights[0] * log_a + weights[1] * log_b + weights[2] * log_c;
    int64_t odds = min_int(max_int(dot >> 16, -LARGEST), LARGEST - 1);
    int64_t probability = tables->squash[(odds + LARGEST) >> SQUASH_SHIFT];
    bit = code_bit(encoding, bit, probability, coder);
    int64_t error = ((bit << 16) - probability) * LEARNING;
    weights[0] += (error * log_a + (1 << 23)) >> 24;
    weights[1] += (error * log_b + (1 << 23)) >> 24;
    weights[2] += (error * log_c + (1 << 23)) >> 24;
    adapt(a, bit, rates);
    adapt(b, bit, rates);
    adapt(c, bit, rates);
    return bit;
}
