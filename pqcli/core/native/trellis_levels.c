/* The loops of pqcli.core.trellis.loops: the entropy coding of levels, and what decoding undoes. */
#include <float.h>

#include "trellis_levels.h"

/* The class of a mean magnitude in 1/4096: floor(4 log2) from 64 (2^-6) on, its fractions rounded as specified. */
static inline int64_t scale_class(int64_t scale) {
    scale = max_int(scale, 64);
    int64_t octave = 63 - __builtin_clzll((uint64_t)scale);
    int64_t mantissa = (scale << 8) >> octave;
    int64_t quarter = (mantissa >= 304) + (mantissa >= 362) + (mantissa >= 430);
    return min_int((octave - 6) * 4 + quarter, N_CLASSES - 1);
}

/* `code_levels`, one way. `means` is scratch: mean and count of columns, then of phases. */
static inline __attribute__((always_inline)) int8_t code_levels_one_way(
    int encoding, int32_t *restrict levels, int64_t n_rows, int64_t n_columns, const uint8_t *restrict labels,
    const uint8_t *restrict row_labels, int64_t run_rows, int64_t period, int64_t scale0,
    const int64_t *restrict next_state, int64_t n_states, Model *restrict models, const int64_t *restrict rates,
    int64_t *restrict window, uint8_t *restrict buffer, int64_t *restrict means
) {
    Coder coder = coder_of(window, buffer);
    int64_t *column_mean = means, *column_count = means + n_columns;
    int64_t *phase_mean = means + 2 * n_columns, *phase_count = phase_mean + period;
    for (int64_t j = 0; j < n_columns; j++) column_count[j] = 2;
    for (int64_t phase = 0; phase < period; phase++) {
        phase_mean[phase] = scale0;
        phase_count[phase] = 1;
    }
    int64_t state = 0;
    for (int64_t r = 0; r < n_rows; r++) {
        if (r % run_rows == 0) state = 0;
        int64_t met = scale0 * 8, expected = scale0 * 8, phase = 0;
        for (int64_t j = 0; j < n_columns; j++) {
            if (j % RUN_COLUMNS == 0 && j > 0) state = 0;
            if (r == 0) column_mean[j] = phase_mean[phase];
            int64_t mean = column_mean[j];
            int64_t scale = scale_class(mean * met / expected);
            int64_t shift = max_int(0, (scale - LARGE_CLASS) >> 2);
            int64_t parity = state & 1, label = labels[j] | row_labels[r];
            Model *unary = models + (scale * 3 + set_of(parity, label)) * N_UNARY;
            int64_t level = encoding ? levels[r * n_columns + j] : 0;
            int64_t index = encoding ? index_of(level, parity, label) : 0;
            int64_t high = index >> shift, n = 0;
            while (n < N_UNARY) {
                int64_t bit = code_bit(encoding, high > n, unary[n].probability, &coder);
                adapt(&unary[n], bit, rates);
                if (!bit) break;
                n++;
            }
            if (n == N_UNARY || shift) {
                n = code_tail(encoding, index, n, shift, &coder);
                if (n < 0) return 0;
            }
            if (!encoding) level = magnitude_at(n, parity, label);
            if (level != 0) {
                int64_t is_negative = code_bit(encoding, level < 0, EVEN_ODDS, &coder);
                if (!encoding && level > MAX_LEVEL) return 0;
                if (!encoding && is_negative) level = -level;
            }
            if (!encoding) levels[r * n_columns + j] = (int32_t)level;
            if (n_states > 1) state = next_state[2 * state + branch(level, parity, label)];
            int64_t statistic = min_int(magnitude_of(level), MAX_STATISTIC) << 12;
            met = max_int(met + statistic - (met >> 8), 256);
            expected = max_int(expected + mean - (expected >> 8), 256);
            column_mean[j] = mean + (((statistic - mean) * rates[column_count[j]]) >> 16);
            if (column_count[j] < 250) column_count[j]++;
            if (r == 0) { /* no later row asks for the means of phases */
                phase_mean[phase] += ((statistic - phase_mean[phase]) * rates[phase_count[phase]]) >> 16;
                if (phase_count[phase] < 500) phase_count[phase]++;
                if (++phase == period) phase = 0;
            }
        }
    }
    keep_coder(&coder, window);
    return 1;
}

/* Write or read the levels of one matrix; false when what is read cannot be a stream.

   Contexts are backward-adaptive: the expected magnitude of a level is the running mean of its column times the ratio
   of magnitudes met and expected so far in its row. A column starts from the running mean of its phase (column modulo
   `period`), a phase from `scale0`; all in 1/4096. `means` (2 columns + 2 period,) is scratch. */
EXPORT int8_t code_levels(
    int8_t encoding, int32_t *levels, int64_t n_rows, int64_t n_columns, const uint8_t *labels,
    const uint8_t *row_labels, int64_t run_rows, int64_t period, int64_t scale0, const int64_t *next_state,
    int64_t n_states, Model *models, const int64_t *rates, int64_t *window, uint8_t *buffer, int64_t *means
) {
    return encoding ? code_levels_one_way(
                          1, levels, n_rows, n_columns, labels, row_labels, run_rows, period, scale0, next_state,
                          n_states, models, rates, window, buffer, means
                      )
                    : code_levels_one_way(
                          0, levels, n_rows, n_columns, labels, row_labels, run_rows, period, scale0, next_state,
                          n_states, models, rates, window, buffer, means
                      );
}

/* weights[r, j] = the reconstruction point of levels[r, j], walking the trellis as the coder does. */
EXPORT void dequantize(
    const int32_t *restrict levels, int64_t n_rows, int64_t n_columns, const uint8_t *restrict labels,
    const uint8_t *restrict row_labels, int64_t run_rows, const int64_t *restrict next_state,
    const float *restrict points, float *restrict weights
) {
    int64_t state = 0;
    for (int64_t r = 0; r < n_rows; r++) {
        if (r % run_rows == 0) state = 0;
        for (int64_t j = 0; j < n_columns; j++) {
            if (j % RUN_COLUMNS == 0 && j > 0) state = 0;
            int64_t level = levels[r * n_columns + j];
            int64_t parity = state & 1, label = labels[j] | row_labels[r];
            weights[r * n_columns + j] = point_of(level, set_of(parity, label), points);
            state = next_state[2 * state + branch(level, parity, label)];
        }
    }
}

/* which[r, j] = the set that levels[r, j] comes from, walking the trellis as the coder does. */
EXPORT void sets_of_levels(
    const int32_t *restrict levels, int64_t n_rows, int64_t n_columns, const uint8_t *restrict labels,
    const uint8_t *restrict row_labels, int64_t run_rows, const int64_t *restrict next_state, uint8_t *restrict which
) {
    int64_t state = 0;
    for (int64_t r = 0; r < n_rows; r++) {
        if (r % run_rows == 0) state = 0;
        for (int64_t j = 0; j < n_columns; j++) {
            if (j % RUN_COLUMNS == 0 && j > 0) state = 0;
            int64_t parity = state & 1, label = labels[j] | row_labels[r];
            which[r * n_columns + j] = (uint8_t)set_of(parity, label);
            state = next_state[2 * state + branch(levels[r * n_columns + j], parity, label)];
        }
    }
}

/* What would overflow becomes the largest float; NaN stays. */
static inline float bounded(float value) {
    value = -FLT_MAX > value ? -FLT_MAX : value;
    return FLT_MAX < value ? FLT_MAX : value;
}

/* Multiply by the step, in place. */
EXPORT void scale_up(float *weights, int64_t n_rows, int64_t n_columns, float step) {
    for (int64_t i = 0; i < n_rows * n_columns; i++) weights[i] = bounded(weights[i] * step);
}

/* Multiply every row by its step, as `scale_up` does. */
EXPORT void scale_rows(float *restrict weights, int64_t n_rows, int64_t n_columns, const float *restrict steps) {
    for (int64_t r = 0; r < n_rows; r++) scale_up(weights + r * n_columns, 1, n_columns, steps[r]);
}

/* Multiply every column by its step, as `scale_up` does. */
EXPORT void scale_columns(float *restrict weights, int64_t n_rows, int64_t n_columns, const float *restrict steps) {
    for (int64_t r = 0; r < n_rows; r++)
        for (int64_t j = 0; j < n_columns; j++)
            weights[r * n_columns + j] = bounded(weights[r * n_columns + j] * steps[j]);
}
