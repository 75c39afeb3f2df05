/* The second coder of levels, of pqcli.core.trellis.mixing_loops: scale, sign and size are predicted from neighbours.

   levels, guesses (rows, columns) int32. Guesses are levels in 1/65536; clues are in 1/256 octaves, shares and taps in
   1/65536. */
#include "mixing.h"
#include "trellis_levels.h"

enum {
    PER_CLASS = 3 * N_UNARY,
    N_CLUES = 6,
    MAX_CLUE = 2 * 256,
    N_AGES = 10, /* shares are learned apart by the columns, or rows, seen so far: 0, 1, 2-3, ..., 256 and more */
    LEFT_TAPS = 8,
    N_TAPS = LEFT_TAPS + 7,
    N_GUESSES = 8,
    N_PHASES = 32,
    N_SURE = 16,

    BY_GUESS = N_CLASSES * PER_CLASS,
    BY_PHASE = BY_GUESS + N_CLASSES * N_GUESSES * PER_CLASS,
    SIGNS = BY_PHASE + N_CLASSES / 2 * N_PHASES * PER_CLASS,
    SIGNS_NEAR = SIGNS + 4 * N_SURE,
    SIGNS_FAR = SIGNS_NEAR + 2 * 27,
    SIGN_SET = PER_CLASS,

    LEAST_MEAN = 16,
    FIRST = 6 * 256, /* scales are kept within 2^6 and 2^27, the bounds of classes and of statistics */
    LAST = 27 * 256,
    TAP_RATE = 2621,
    TAP_FLOOR = 10,
    MAX_GUESS = 127,
    SHARE_RATE = 131,
    FIRST_SHARE_RATE = 2622,
    SHARE_RATE_WEIGHTS = 40000,
};
#define MOST_SEEN (INT64_C(1) << 40)

static inline int64_t sign_of(int64_t value) { return (value > 0) - (value < 0); }

static inline int64_t within(int64_t value, int64_t least, int64_t most) {
    return min_int(max_int(value, least), most);
}

/* 0 to 26: which of three levels are negative, zero or positive. */
static inline int64_t three_signs(int64_t a, int64_t b, int64_t c, int64_t factor) {
    return (sign_of(a) * factor + 1) * 9 + (sign_of(b) * factor + 1) * 3 + sign_of(c) * factor + 1;
}

static inline void fill(int64_t *values, int64_t n, int64_t value) {
    for (int64_t i = 0; i < n; i++) values[i] = value;
}

/* The levels that predict one: of its row, which end before it, of the row above, and of the one before that. */
typedef struct {
    const int64_t *row, *row_above, *row_before;
} Around;

/* Their sum by taps: a guess; and `energy`, the sum of their squares. `lag` is the period, 0 where there is none. */
static inline int64_t guess_of(const Around *around, const int64_t *taps, int64_t lag, int64_t *energy) {
    int64_t guess = 0, squares = TAP_FLOOR;
    for (int i = 0; i < LEFT_TAPS; i++) {
        int64_t near = around->row[i - LEFT_TAPS];
        guess += taps[i] * near;
        squares += near * near;
    }
    for (int i = 0; i < 3; i++) {
        int64_t near = around->row_above[i - 1];
        guess += taps[LEFT_TAPS + i] * near;
        squares += near * near;
    }
    int64_t near = around->row_before[0];
    guess += taps[LEFT_TAPS + 3] * near;
    squares += near * near;
    for (int i = 0; lag && i < 3; i++) {
        near = around->row[i - 1 - lag];
        guess += taps[LEFT_TAPS + 4 + i] * near;
        squares += near * near;
    }
    *energy = squares;
    return within(guess, -MAX_GUESS * 65536, MAX_GUESS * 65536);
}

/* Move every tap by its neighbour's share of the error. */
static inline void learn_taps(const Around *around, int64_t *taps, int64_t lag, int64_t pull) {
    for (int i = 0; i < LEFT_TAPS; i++) taps[i] += (pull * around->row[i - LEFT_TAPS]) >> 16;
    for (int i = 0; i < 3; i++) taps[LEFT_TAPS + i] += (pull * around->row_above[i - 1]) >> 16;
    taps[LEFT_TAPS + 3] += (pull * around->row_before[0]) >> 16;
    for (int i = 0; lag && i < 3; i++) taps[LEFT_TAPS + 4 + i] += (pull * around->row[i - 1 - lag]) >> 16;
}

/* `code_levels_mixed`, one way. */
static inline __attribute__((always_inline)) int8_t code_levels_one_way(
    int encoding, int32_t *restrict levels, int64_t n_rows, int64_t n_columns, const uint8_t *restrict labels,
    const uint8_t *restrict row_labels, int64_t run_rows, int64_t period, int64_t scale0,
    const int64_t *restrict next_state, Model *restrict models, int64_t *restrict weights,
    int64_t *restrict all_shares, int64_t *restrict all_taps, int64_t *restrict seen, int32_t *restrict guesses,
    const MixingTables *tables, const int64_t *restrict rates, int64_t *restrict window, uint8_t *restrict buffer,
    int64_t *restrict scratch
) {
    Coder coder = coder_of(window, buffer);
    int64_t is_convolution = period > 1, lag = is_convolution ? period : 0;
    int64_t *shares = all_shares + is_convolution * N_CLUES * N_AGES, *taps = all_taps + is_convolution * N_TAPS;
    int64_t *column_mean = scratch, *column_count = column_mean + n_columns;
    int64_t *phase_mean = column_count + n_columns, *phase_count = phase_mean + period;
    int64_t *recent_met = phase_count + period, *recent_expected = recent_met + period; /* by phase: of this row */
    int64_t *by_column = recent_expected + period; /* likewise by column: of two rows; one more at each end */
    int64_t margin = max_int(LEFT_TAPS, period + 1), n_past = margin + n_columns + 1;
    int64_t *past = by_column + 4 * (n_columns + 2); /* the levels of three rows */
    fill(column_mean, n_columns, 0);
    fill(column_count, n_columns, 2);
    fill(phase_mean, period, scale0);
    fill(phase_count, period, 1);
    fill(by_column, 4 * (n_columns + 2), scale0);
    fill(past, 3 * n_past, 0);
    int64_t state = 0, row_age = 0;
    for (int64_t r = 0; r < n_rows; r++) {
        if (r % run_rows == 0) state = 0;
        if (r >> row_age && row_age < N_AGES - 1) row_age++;
        int64_t share_rate = SHARE_RATE + FIRST_SHARE_RATE * SHARE_RATE_WEIGHTS / (SHARE_RATE_WEIGHTS + *seen);
        *seen = min_int(*seen + n_columns, MOST_SEEN);
        int64_t *met_here = by_column + 2 * (r & 1) * (n_columns + 2), *expected_here = met_here + n_columns + 2;
        const int64_t *met_above = by_column + 2 * (1 - (r & 1)) * (n_columns + 2);
        const int64_t *expected_above = met_above + n_columns + 2;
        int64_t *row = past + r % 3 * n_past;
        const int64_t *row_above = past + (r + 2) % 3 * n_past, *row_before = past + (r + 1) % 3 * n_past;
        int64_t met = scale0 * 8, expected = scale0 * 8, fast_met = scale0 * 8, fast_expected = scale0 * 8;
        fill(recent_met, period, scale0);
        fill(recent_expected, period, scale0);
        int64_t phase = 0, column_age = 0;
        for (int64_t j = 0; j < n_columns; j++) {
            if (j % RUN_COLUMNS == 0 && j > 0) state = 0;
            if (j >> column_age && column_age < N_AGES - 1) column_age++;
            if (r == 0) column_mean[j] = phase_mean[phase];
            int64_t mean = max_int(column_mean[j], LEAST_MEAN);

            /* the scale */
            int64_t log_mean = log2_of(mean, tables);
            int64_t three_met = met_above[j] + 2 * met_above[j + 1] + met_above[j + 2];
            int64_t three_expected = expected_above[j] + 2 * expected_above[j + 1] + expected_above[j + 2];
            int64_t clue[N_CLUES] = {
                log2_of(met, tables) - log2_of(expected, tables),
                log2_of(fast_met + fast_expected, tables) - log2_of(2 * fast_expected, tables),
                log2_of(max_int(phase_mean[phase], LEAST_MEAN), tables) - log_mean,
                log2_of(recent_met[phase] + recent_expected[phase], tables) -
                    log2_of(2 * recent_expected[phase], tables),
                log2_of(2 * three_met + three_expected, tables) - log2_of(3 * three_expected, tables),
                log2_of(met_here[j] + expected_here[j], tables) - log2_of(2 * expected_here[j], tables),
            };
            int64_t *share[N_CLUES] = {
                shares + column_age,
                shares + N_AGES + column_age,
                shares + 2 * N_AGES + row_age,
                shares + 3 * N_AGES + column_age,
                shares + 4 * N_AGES + row_age,
                shares + 5 * N_AGES,
            };
            int64_t plain = within(log_mean + clue[0], FIRST, LAST); /* its classes lie between those of the scale */
            int64_t log_scale = log_mean;
            for (int i = 0; i < N_CLUES; i++) {
                clue[i] = within(clue[i], -MAX_CLUE, MAX_CLUE);
                log_scale += (*share[i] * clue[i]) >> 16;
            }
            log_scale = within(log_scale, FIRST, LAST);
            int64_t scale = min_int((log_scale - FIRST) >> 6, N_CLASSES - 1);
            int64_t plain_scale = min_int((plain - FIRST + 32) >> 6, N_CLASSES - 1);

            /* the level itself */
            int64_t at = margin + j, energy;
            Around around = {row + at, row_above + at, row_before + at};
            int64_t guess = guess_of(&around, taps, lag, &energy);
            guesses[r * n_columns + j] = (int32_t)guess;
            int64_t sure = log2_of((magnitude_of(guess) >> 4) + 1, tables) - log_scale;

            int64_t shift = max_int(0, (scale - LARGE_CLASS) >> 2);
            int64_t parity = state & 1, label = labels[j] | row_labels[r];
            int64_t which = set_of(parity, label) * N_UNARY;
            int64_t coarse = min_int((log_scale - FIRST + 32) >> 7, N_CLASSES / 2 - 1);
            int64_t known_phase = period <= N_PHASES ? phase : 0;
            Model *a = models + plain_scale * PER_CLASS + which;
            int64_t how_sure = within((sure >> 7) + 5, 0, N_GUESSES - 1);
            Model *b = models + BY_GUESS + which + (scale * N_GUESSES + how_sure) * PER_CLASS;
            Model *c = models + BY_PHASE + which + (coarse * N_PHASES + known_phase) * PER_CLASS;
            int64_t level = encoding ? levels[r * n_columns + j] : 0;
            int64_t index = encoding ? index_of(level, parity, label) : 0;
            int64_t high = index >> shift, n = 0;
            while (n < N_UNARY &&
                   code_mixed(
                       encoding, high > n, a + n, b + n, c + n, weights + (which + n) * N_INPUTS, tables, rates, &coder
                   ))
                n++;
            if (n == N_UNARY || shift) {
                n = code_tail(encoding, index, n, shift, &coder);
                if (n < 0) return 0;
            }
            if (!encoding) level = magnitude_at(n, parity, label);
            if (level != 0) {
                int64_t magnitude = magnitude_of(level);
                if (magnitude > MAX_LEVEL) return 0;
                int64_t toward = guess < 0 ? -1 : 1;
                int64_t left = lag ? row[at - lag] : row[at - 2];
                a = models + SIGNS + within(((3 * sure) >> 8) + 10, 0, N_SURE - 1) * 4 + min_int(magnitude, 4) - 1;
                b = models + SIGNS_NEAR + 2 * three_signs(row[at - 1], left, row_above[at], toward) + is_convolution;
                c = models + SIGNS_FAR + 2 * three_signs(row[at - 2], row_above[at - 1], row_above[at + 1], toward) +
                    is_convolution;
                int64_t is_away = code_mixed(
                    encoding, level * toward < 0, a, b, c, weights + SIGN_SET * N_INPUTS, tables, rates, &coder
                );
                if (!encoding && (is_away == 1) == (toward > 0)) level = -level;
            }
            if (!encoding) levels[r * n_columns + j] = (int32_t)level;
            state = next_state[2 * state + branch(level, parity, label)];

            /* what all of these learn */
            int64_t known = within(level, -MAX_GUESS, MAX_GUESS);
            learn_taps(&around, taps, lag, floor_div((known * 65536 - guess) * TAP_RATE, energy));
            row[at] = known;
            int64_t statistic = min_int(magnitude_of(level), MAX_STATISTIC) << 12;
            int64_t scale_then = exp2_of(log_scale, tables);
            int64_t excess = floor_div((statistic - scale_then) * 65536, scale_then + 4096);
            int64_t pull = min_int(excess, 3 << 16) * share_rate;
            for (int i = 0; i < N_CLUES; i++) *share[i] = within(*share[i] + ((pull * clue[i]) >> 24), 0, 65536);
            met = max_int(met + statistic - (met >> 8), 256);
            expected = max_int(expected + mean - (expected >> 8), 256);
            fast_met = max_int(fast_met + statistic - (fast_met >> 4), 256);
            fast_expected = max_int(fast_expected + mean - (fast_expected >> 4), 256);
            recent_met[phase] += (statistic - recent_met[phase]) >> 2;
            recent_expected[phase] = max_int(recent_expected[phase] + ((mean - recent_expected[phase]) >> 2), 1);
            met_here[j + 1] = statistic;
            expected_here[j + 1] = mean;
            column_mean[j] += ((statistic - column_mean[j]) * rates[column_count[j]]) >> 16;
            if (column_count[j] < 120) column_count[j]++;
            phase_mean[phase] += ((statistic - phase_mean[phase]) * rates[phase_count[phase]]) >> 16;
            if (phase_count[phase] < 500) phase_count[phase]++;
            if (++phase == period) phase = 0;
        }
    }
    keep_coder(&coder, window);
    return 1;
}

/* Write or read the levels of one matrix; false when what is read cannot be a stream. See `code_levels`.

   Takes the fields of a `Mixing`, and fills in the guesses. `scratch` is (9 columns + 7 period + 35,). */
EXPORT int8_t code_levels_mixed(
    int8_t encoding, int32_t *levels, int64_t n_rows, int64_t n_columns, const uint8_t *labels,
    const uint8_t *row_labels, int64_t run_rows, int64_t period, int64_t scale0, const int64_t *next_state,
    Model *models, int64_t *weights, int64_t *shares, int64_t *taps, int64_t *seen, int32_t *guesses,
    const int64_t *tables, const int64_t *rates, int64_t *window, uint8_t *buffer, int64_t *scratch
) {
    MixingTables mixing = mixing_tables(tables);
    return encoding ? code_levels_one_way(
                          1, levels, n_rows, n_columns, labels, row_labels, run_rows, period, scale0, next_state,
                          models, weights, shares, taps, seen, guesses, &mixing, rates, window, buffer, scratch
                      )
                    : code_levels_one_way(
                          0, levels, n_rows, n_columns, labels, row_labels, run_rows, period, scale0, next_state,
                          models, weights, shares, taps, seen, guesses, &mixing, rates, window, buffer, scratch
                      );
}

/* Move weights, in steps, by the fraction `share` towards their guesses, at most by `share`. In place. */
EXPORT void shrink(
    float *restrict weights, int64_t n_rows, int64_t n_columns, const int32_t *restrict guesses, float share
) {
    for (int64_t i = 0; i < n_rows * n_columns; i++) {
        float offset = (float)guesses[i] * (1.0f / 65536) - weights[i];
        offset = -1.0f > offset ? -1.0f : offset;
        offset = 1.0f < offset ? 1.0f : offset;
        weights[i] += share * offset;
    }
}
