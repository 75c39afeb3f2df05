/* The loops of entropy-constrained PQ that are not the sweep; see pqcli.core.ecpq.loops. */
#include <math.h>
#include <string.h>

#include "native.h"

#define MAX_LENGTH 24 /* bits of the largest integer after an escape; larger values are stored as float32 */
#define RAW 31
#define MAX_SIDE_BITS 37

/* Turn a symbol into an escape (0) where that costs less; totals: the bits of all vectors, and their squared error.

   vectors (n, d) are magnitudes in grid units; importance (n_importances, d_importances) is (n, d), (1, d) or (1, 1). */
EXPORT void settle(
    int64_t n, int64_t d, int64_t n_symbols, const float *vectors, int64_t n_importances, int64_t d_importances,
    const float *importance, const uint8_t *classes, const uint16_t *magnitudes, const double *bits, double rate_weight,
    double step, uint16_t *symbols, double *totals
) {
    int by_vector = n_importances > 1;
    int weighed = by_vector || d_importances > 1;
    double total_bits = 0, total_error = 0;
    for (int64_t i = 0; i < n; i++) {
        const float *vector = vectors + i * d;
        const float *weights = importance + (by_vector ? i * d_importances : 0);
        const double *bits_of = bits + classes[i] * n_symbols;
        int64_t s = symbols[i];
        double error = 0;
        double cost = bits_of[s];
        if (s > 0) {
            const uint16_t *orbit = magnitudes + (s - 1) * d;
            for (int64_t t = 0; t < d; t++) {
                double e = (double)vector[t] - orbit[t];
                error += (double)weights[weighed ? t : 0] * e * e;
            }
        }
        if (s == 0 || error > rate_weight * 5 * (double)d) {
            double escape_error = 0;
            double escape_cost = bits_of[0];
            double limit = s ? error + rate_weight * cost : INFINITY;
            for (int64_t t = 0; t < d && escape_error + rate_weight * escape_cost < limit; t++) { /* both only rise */
                double x = vector[t];
                double whole = floor(x / step + 0.5);
                if (whole >= 1 << MAX_LENGTH) {
                    escape_cost += MAX_SIDE_BITS;
                } else {
                    escape_cost += 5;
                    double e = x - whole * step;
                    escape_error += (double)weights[weighed ? t : 0] * e * e;
                    int64_t number = (int64_t)whole;
                    escape_cost += number > 0;
                    for (; number > 1; number >>= 1) escape_cost += 1;
                }
            }
            if (s == 0 || escape_error + rate_weight * escape_cost < limit) {
                symbols[i] = 0;
                error = escape_error;
                cost = escape_cost;
            }
        }
        total_bits += cost;
        total_error += error;
    }
    totals[0] = total_bits;
    totals[1] = total_error;
}

/* Add to totals (m,) the bits of all symbols where vector i has table tables[j, which[i]], for each of m j. */
EXPORT void count_bits(
    int64_t m, int64_t n, int64_t n_rows, int64_t n_symbols, const uint16_t *symbols, const int64_t *which,
    const uint8_t *tables, const double *bits, double *totals
) {
    for (int64_t j = 0; j < m; j++) {
        double total = totals[j];
        for (int64_t i = 0; i < n; i++) total += bits[tables[j * n_rows + which[i]] * n_symbols + symbols[i]];
        totals[j] = total;
    }
}

/* Write the n low bits of `value` at bit position `at` of zeroed bytes; the position behind them. */
static inline int64_t put(uint8_t *bits, int64_t at, int64_t value, int64_t n) {
    for (int64_t i = 0; i < n; i++) bits[(at + i) >> 3] |= (uint8_t)(((value >> i) & 1) << ((at + i) & 7));
    return at + n;
}

/* The n bits at position `at`. */
static inline int64_t take(const uint8_t *bits, int64_t at, int64_t n) {
    int64_t value = 0;
    for (int64_t i = 0; i < n; i++) value |= (int64_t)((bits[(at + i) >> 3] >> ((at + i) & 7)) & 1) << i;
    return value;
}

/* Write the side bits of the vectors `start ...` of matrix (unscaled) to zeroed `out`; how many bits they are. */
EXPORT int64_t write_side(
    int64_t n, int64_t d, int64_t n_columns, const float *matrix, int64_t first_column, int64_t start,
    const uint16_t *symbols, const uint16_t *magnitudes, int64_t per_row, double step, uint8_t *out
) {
    int64_t at = 0;
    for (int64_t i = 0; i < n; i++) {
        const float *vector = matrix + (start + i) / per_row * n_columns + first_column + (start + i) % per_row * d;
        int64_t s = symbols[i];
        for (int64_t t = 0; t < d; t++) {
            float x = vector[t];
            int64_t negative = x < 0;
            if (s > 0) {
                if (magnitudes[(s - 1) * d + t] > 0) at = put(out, at, negative, 1);
                continue;
            }
            float size = fabsf(x);
            double whole = floor((double)size / step + 0.5);
            if (whole >= 1 << MAX_LENGTH) {
                uint32_t raw;
                memcpy(&raw, &size, sizeof raw);
                at = put(out, at, RAW, 5);
                at = put(out, at, negative, 1);
                at = put(out, at, raw, 31);
                continue;
            }
            int64_t number = (int64_t)whole;
            int64_t length = 0;
            while (number >> length) length++;
            at = put(out, at, length, 5);
            if (length) {
                at = put(out, at, negative, 1);
                at = put(out, at, number, length - 1);
            }
        }
    }
    return at;
}

/* Fill the vectors `start ...` of matrix from symbols and side bits; the bits read, -1 if they do not suffice.

   values (k, d) are the orbits' magnitudes times grid, in float32. */
EXPORT int64_t read_side(
    int64_t n, int64_t d, int64_t n_columns, const uint8_t *side, int64_t n_bits, int64_t first_column, int64_t start,
    const uint16_t *symbols, const float *values, float grid, float scale, int64_t step, int64_t per_row, float *matrix
) {
    int64_t at = 0;
    for (int64_t i = 0; i < n; i++) {
        float *vector = matrix + (start + i) / per_row * n_columns + first_column + (start + i) % per_row * d;
        int64_t s = symbols[i];
        for (int64_t t = 0; t < d; t++) {
            float x;
            if (s > 0) {
                x = values[(s - 1) * d + t];
                if (x > 0) {
                    if (at >= n_bits) return -1;
                    if ((side[at >> 3] >> (at & 7)) & 1) x = -x;
                    at++;
                }
                vector[t] = x * scale;
                continue;
            }
            if (at + 5 > n_bits) return -1;
            int64_t length = take(side, at, 5);
            at += 5;
            if (!length) {
                vector[t] = 0;
                continue;
            }
            int64_t needed = length == RAW ? 32 : length;
            if ((length > MAX_LENGTH && length != RAW) || at + needed > n_bits) return -1;
            int64_t negative = take(side, at, 1);
            if (length == RAW) {
                uint32_t raw = (uint32_t)take(side, at + 1, 31);
                memcpy(&x, &raw, sizeof x);
            } else {
                int64_t number = (INT64_C(1) << (length - 1)) | take(side, at + 1, length - 1);
                x = (float)(number * step) * grid;
            }
            at += needed;
            vector[t] = (negative ? -x : x) * scale;
        }
    }
    return at;
}
