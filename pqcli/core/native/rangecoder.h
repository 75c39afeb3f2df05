/* The range coder of pqcli.core.entropy.rangecoder, for loops to build in. */
#pragma once
#include "native.h"

#define COUNT_LIMIT 500
#define FULL (INT64_C(1) << 48)
#define SPLIT (INT64_C(1) << 32)

/* What one coder carries from decision to decision; `window` in Python, with the bytes it reads or writes. */
typedef struct {
    int64_t low, span, code, position, length;
    uint8_t *buffer;
} Coder;

static inline Coder coder_of(const int64_t *window, uint8_t *buffer) {
    return (Coder){window[0], window[1], window[2], window[3], window[4], buffer};
}

static inline void keep_coder(const Coder *coder, int64_t *window) {
    window[0] = coder->low;
    window[1] = coder->span;
    window[2] = coder->code;
    window[3] = coder->position;
}

/* One decision with P(1) = probability / 65536: the bit. */
static inline int64_t code_bit(int encoding, int64_t bit, int64_t probability, Coder *coder) {
    int64_t bound = (coder->span >> 16) * probability;
    if (!encoding) bit = coder->code < bound;
    if (bit) {
        coder->span = bound;
    } else {
        coder->span -= bound;
        if (encoding)
            coder->low += bound;
        else
            coder->code -= bound;
    }
    if (coder->span < SPLIT) {
        coder->span <<= 16;
        if (encoding) {
            if (coder->low >= FULL) {
                coder->low -= FULL;
                int64_t i = coder->position - 1;
                while (coder->buffer[i] == 255) coder->buffer[i--] = 0;
                coder->buffer[i]++;
            }
            coder->buffer[coder->position] = (uint8_t)(coder->low >> 40);
            coder->buffer[coder->position + 1] = (uint8_t)(coder->low >> 32);
            coder->low = (coder->low & (SPLIT - 1)) << 16;
        } else {
            int64_t high = coder->position < coder->length ? coder->buffer[coder->position] : 0;
            int64_t rest = coder->position + 1 < coder->length ? coder->buffer[coder->position + 1] : 0;
            coder->code = (coder->code << 16) | (high << 8) | rest;
        }
        coder->position += 2;
    }
    return bit;
}

/* A probability of a one in 1/65536, and how many decisions it was learned from. */
typedef struct {
    int32_t probability, count;
} Model;

/* Move a model towards `bit`; probabilities stay in [32, 65504]. */
static inline void adapt(Model *model, int64_t bit, const int64_t *rates) {
    int64_t probability = model->probability;
    if (bit)
        probability += ((65535 - probability) * rates[model->count]) >> 16;
    else
        probability -= ((probability - 1) * rates[model->count]) >> 16;
    model->probability = (int32_t)min_int(max_int(probability, 32), 65504);
    if (model->count < COUNT_LIMIT) model->count++;
}
