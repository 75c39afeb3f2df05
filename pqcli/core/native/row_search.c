/* The search of pqcli.core.trellis.row_search: one row after another, the states side by side.

   Path metrics lie in memory even states first, then the odd ones. branch_metrics (n_steps,) int64: those of the four
   subsets, 16 bits each; path_metrics (2, n_states) uint16; taken (n_steps, bytes) uint8: a bit for each state,
   whether its better origin is the first one. The tables are those of viterbi.c, but are filled in entry by entry. */
#include <stdbool.h>
#include <string.h>

#include "trellis_costs.h"

enum {
    UNREACHED = 65535,    /* the path metric of a state that no path has come to */
    UNKNOWN_METRICS = -1, /* what tables hold where nothing was looked up yet */
    UNKNOWN_LEVEL = -128,
};
#define LARGEST_SQUARE 1e30
#define LEAST_SQUARE 1e-30

/* --- the walk, for each trellis ---------------------------------------------------------------------------------- */

#define XOR_OF(i, by) ((i) ^ (by))
#define TWICE_PLUS(i, odd) (2 * (i) + (odd))
#define LIST_1(f, i, x) f(i, x)
#define LIST_2(f, i, x) f(i, x), f((i) + 1, x)
#define LIST_4(f, i, x) LIST_2(f, i, x), LIST_2(f, (i) + 2, x)
#define LIST_8(f, i, x) LIST_4(f, i, x), LIST_4(f, (i) + 4, x)
#define LIST_16(f, i, x) LIST_8(f, i, x), LIST_8(f, (i) + 8, x)
#define LIST_32(f, i, x) LIST_16(f, i, x), LIST_16(f, (i) + 16, x)
#define LIST_64(f, i, x) LIST_32(f, i, x), LIST_32(f, (i) + 32, x)
#define UNROLLED _Pragma("clang loop unroll(full)")

#define JOINED_AS_THEY_ARE(a, b) a##b
#define JOINED(a, b) JOINED_AS_THEY_ARE(a, b)

/* n_steps > 0 steps of a walk: fills `taken`, from its first byte on, `chunk` states at a time.

   The path metrics are left in `here` after an even number of steps, in `there` after an odd number. */
typedef void Walk(const int64_t *branch_metrics, int64_t n_steps, uint16_t *here, uint16_t *there, uint8_t *taken);

/* `Crossings` in Python, and the walk for them. */
typedef struct {
    int64_t n_states, first, second, chunk;
    Walk *walk;
} RowTrellis;

/* A trellis for each number of states: the polynomials of pqcli.core.trellis.params. */
#define N_STATES 4
#define H0 05
#define H1 02
#include "row_walk.h"

#define N_STATES 8
#define H0 013
#define H1 04
#include "row_walk.h"

#define N_STATES 16
#define H0 023
#define H1 04
#include "row_walk.h"

#define N_STATES 32
#define H0 045
#define H1 010
#include "row_walk.h"

#define N_STATES 64
#define H0 0103
#define H1 024
#include "row_walk.h"

#define N_STATES 128
#define H0 0235
#define H1 0126
#include "row_walk.h"

#define N_STATES 256
#define H0 0515
#define H1 0362
#include "row_walk.h"

#define N_STATES 512
#define H0 01315
#define H1 0406
#include "row_walk.h"

#define N_STATES 1024
#define H0 02513
#define H1 01606
#include "row_walk.h"

#define N_STATES 2048
#define H0 05303
#define H1 02232
#include "row_walk.h"

static const RowTrellis *const TRELLISES[] = {
    &trellis_4,   &trellis_8,   &trellis_16,  &trellis_32,   &trellis_64,
    &trellis_128, &trellis_256, &trellis_512, &trellis_1024, &trellis_2048,
};

/* The trellis of so many states that is crossed so; null where there is no walk for it. */
static const RowTrellis *trellis_of(int64_t n_states, int64_t first, int64_t second) {
    for (size_t i = 0; i < sizeof TRELLISES / sizeof *TRELLISES; i++) {
        const RowTrellis *known = TRELLISES[i];
        if (known->n_states == n_states && known->first == first && known->second == second) return known;
    }
    return NULL;
}

/* Bytes of `taken` that one step takes. */
static int64_t taken_bytes(const RowTrellis *trellis) {
    return trellis->n_states / trellis->chunk * max_int(trellis->chunk / 8, 1);
}

/* What `taken` has to have room for, in bytes a step; 0 where there is no walk for the trellis. */
EXPORT int64_t row_step_bytes(int64_t n_states, int64_t first, int64_t second) {
    const RowTrellis *trellis = trellis_of(n_states, first, second);
    return trellis ? taken_bytes(trellis) : 0;
}

/* --- one row ----------------------------------------------------------------------------------------------------- */

/* What does not change from row to row. */
typedef struct {
    Costs costs;
    const RowTrellis *trellis;
    const float *column_scale;
    int64_t *metric_table;
    int8_t *level_table;
    int64_t *branch_metrics;
    uint16_t *path_metrics;
    uint8_t *taken;
} Search;

/* 4 log2 of the root of a ratio, that is 2 log2 of it: the same number on every machine. */
static double quarter_octaves(double ratio) {
    int64_t exponent = 0;
    ratio = LEAST_SQUARE > ratio ? LEAST_SQUARE : ratio;
    ratio = LARGEST_SQUARE < ratio ? LARGEST_SQUARE : ratio;
    while (ratio >= 1.5) {
        ratio *= 0.5;
        exponent++;
    }
    while (ratio < 0.75) {
        ratio *= 2.0;
        exponent--;
    }
    double t = (ratio - 1.0) / (ratio + 1.0); /* |t| <= 0.2: the series for log is right to 1e-7 with four terms */
    double square = t * t;
    double series = t * (1.0 + square * (1.0 / 3 + square * (1.0 / 5 + square * (1.0 / 7 + square * (1.0 / 9)))));
    return 2.0 * (double)exponent + 2.0 * 2.8853900817779268 * series;
}

/* What a row is quantized as, in its own steps: the weights, and what earlier errors add. The sum of its squares.

   near (done,) are the shares of the errors (done, columns). */
static double fed_target(
    const float *restrict weights, const float *restrict fed, const float *restrict near, const float *restrict errors,
    int64_t done, float step, int64_t n_columns, float *restrict target
) {
    for (int64_t j = 0; j < n_columns; j++) target[j] = weights[j] + fed[j];
    int64_t i = 0;
    for (; i + 4 <= done; i += 4) { /* four at a time, which spares reading and writing the target */
        float a = near[i], b = near[i + 1], c = near[i + 2], d = near[i + 3];
        const float *first = errors + i * n_columns, *second = first + n_columns;
        const float *third = second + n_columns, *fourth = third + n_columns;
        for (int64_t j = 0; j < n_columns; j++)
            target[j] += a * first[j] + b * second[j] + c * third[j] + d * fourth[j];
    }
    for (; i < done; i++)
        for (int64_t j = 0; j < n_columns; j++) target[j] += near[i] * errors[i * n_columns + j];
    float inverse = 1.0f / step;
    for (int64_t j = 0; j < n_columns; j++) target[j] *= inverse;
    double energy = 0.0;
    for (int64_t j = 0; j < n_columns; j++) energy += (double)target[j] * (double)target[j];
    return energy;
}

/* branch_metrics[j - first] of columns first to last; fills in what the table lacks of them. */
static void branch_metrics_of_row(
    const Search *search, const float *row, float row_scale, int64_t label, int64_t first, int64_t last
) {
    for (int64_t j = first; j < last; j++) {
        float weight = row[j];
        int64_t scale = class_of(row_scale, search->column_scale[j]);
        ClassCosts own = costs_of(&search->costs, scale);
        int64_t found;
        if (fabsf(weight) < REACH) {
            int64_t bin = bin_of(weight);
            int64_t *known = search->metric_table + (2 * scale + label) * N_BINS + bin;
            found = *known;
            if (found == UNKNOWN_METRICS)
                *known = found = packed_metrics(middle_of(bin), label, &own, METRIC_UNIT);
        } else {
            found = packed_metrics(weight, label, &own, METRIC_UNIT);
        }
        search->branch_metrics[j - first] = found;
    }
}

/* Write the levels of columns first to last along the best path, and the points that they stand for. */
static void trace_row(
    const Search *search, const float *row, float row_scale, int64_t label, int64_t first, int64_t last,
    int32_t *levels, float *decoded
) {
    const RowTrellis *trellis = search->trellis;
    int64_t n_states = trellis->n_states, half = n_states / 2, chunk = trellis->chunk;
    int64_t chunk_bytes = max_int(chunk / 8, 1), step_bytes = taken_bytes(trellis);
    const uint16_t *path_metrics = search->path_metrics + (last - first) % 2 * n_states;
    int64_t best = 0;
    for (int64_t i = 0; i < n_states; i++)
        if (path_metrics[i] < path_metrics[best]) best = i;
    int64_t state = best < half ? 2 * best : 2 * (best - half) + 1;
    for (int64_t j = last - 1; j >= first; j--) {
        int64_t at = state / chunk * chunk_bytes + state % chunk / 8;
        int64_t branch = 1 - ((search->taken[(j - first) * step_bytes + at] >> (state % chunk % 8)) & 1);
        int64_t parity = state >= half;
        int64_t t = parity ? (state - half) ^ trellis->first : state;
        if (branch) t ^= trellis->second;
        state = 2 * t + parity;
        int64_t subset = 2 * parity + branch;
        float weight = row[j];
        int64_t scale = class_of(row_scale, search->column_scale[j]), level;
        ClassCosts own = costs_of(&search->costs, scale);
        if (fabsf(weight) < REACH) {
            int64_t bin = bin_of(weight);
            int8_t *known = search->level_table + ((2 * scale + label) * N_BINS + bin) * 4 + subset;
            level = *known;
            if (level == UNKNOWN_LEVEL) {
                level = best_level(middle_of(bin), subset, label, &own);
                *known = (int8_t)level;
            }
        } else {
            level = best_level(weight, subset, label, &own);
        }
        levels[j] = (int32_t)level;
        decoded[j] = point_of(level, set_of(parity, label), search->costs.points);
    }
}

/* --- rows -------------------------------------------------------------------------------------------------------- */

/* Quantize the rows in places first to last of the order, see `RowSearch.fill`; false where the trellis has no walk.

   near (last - first, last - first): what the errors of rows before, in `errors`, add to a row. weights, targets and
   levels (rows, columns), steps, row_scale, row_labels (rows,), fed (rows, columns) by place, decoded (columns,). */
EXPORT int8_t fill_rows(
    const float *weights, const float *steps, const int64_t *order, int64_t first, int64_t last, const float *fed,
    const float *near, float *errors, const float *column_scale, int64_t n_columns, double mean, double shrink,
    double pure_above, const float *bits, const float *slope, const float *points, float rate_weight,
    int64_t *metric_table, int8_t *level_table, int64_t n_states, int64_t first_crossing, int64_t second_crossing,
    int64_t *branch_metrics, uint16_t *path_metrics, uint8_t *taken, int32_t *levels, float *targets,
    float *row_scale, uint8_t *row_labels, float *decoded
) {
    const RowTrellis *trellis = trellis_of(n_states, first_crossing, second_crossing);
    if (!trellis) return 0;
    Search search = {
        {bits, slope, points, rate_weight}, trellis, column_scale, metric_table, level_table,
        branch_metrics, path_metrics, taken,
    };
    for (int64_t place = first; place < last; place++) {
        int64_t row = order[place], done = place - first;
        float *target = targets + row * n_columns;
        double energy = fed_target(
            weights + row * n_columns, fed + place * n_columns, near + done * (last - first), errors, done, steps[row],
            n_columns, target
        );
        double variance = (energy + shrink * mean) / ((double)n_columns + shrink);
        float scale = (float)quarter_octaves(variance / mean);
        int64_t label = variance > pure_above;
        row_scale[row] = scale;
        row_labels[row] = (uint8_t)label;
        for (int64_t start = 0; start < n_columns; start += RUN_COLUMNS) {
            int64_t stop = min_int(start + RUN_COLUMNS, n_columns);
            branch_metrics_of_row(&search, target, scale, label, start, stop);
            for (int64_t s = 0; s < n_states; s++) path_metrics[s] = UNREACHED;
            path_metrics[0] = 0;
            trellis->walk(branch_metrics, stop - start, path_metrics, path_metrics + n_states, taken);
            trace_row(&search, target, scale, label, start, stop, levels + row * n_columns, decoded);
        }
        for (int64_t j = 0; j < n_columns; j++)
            errors[done * n_columns + j] = weights[row * n_columns + j] - steps[row] * decoded[j];
    }
    return 1;
}
