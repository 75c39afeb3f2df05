/* The search of pqcli.core.trellis.viterbi: RUNS runs of the trellis side by side, one per SIMD lane.

   branch_metrics (n_steps, RUNS) int64: those of the four subsets, 16 bits each; path_metrics (n_states, RUNS) uint16;
   taken (n_steps, n_states) uint32: the decisions of all runs at a state; row_scale (rows,) and column_scale (columns,)
   float in quarter octaves. The tables, metric_table (2 N_CLASSES, N_BINS) int64 and level_table (2 N_CLASSES, N_BINS,
   4) int8, are filled in row by row; is_filled (2 N_CLASSES,) tells which rows are.

   A batch are the runs that start at row row0, row0 + run_rows, ...: columns column0 to column0 + width, of so many
   rows as make n_steps. Rows beyond the matrix count as weights of no size. */
#include <stdalign.h>
#include <stdbool.h>
#include <string.h>

#include "trellis_costs.h"

enum { RUNS = 32, BLOCK_STEPS = 64 };

/* --- branch metrics ---------------------------------------------------------------------------------------------- */

/* One row of the tables: what weights of one class and label cost, bin by bin. */
static void fill_tables(int64_t label, const ClassCosts *costs, int64_t *metrics, int8_t *levels) {
    for (int64_t bin = 0; bin < N_BINS; bin++) {
        float weight = middle_of(bin);
        metrics[bin] = packed_metrics(weight, label, costs, METRIC_UNIT);
        for (int64_t subset = 0; subset < 4; subset++)
            levels[4 * bin + subset] = (int8_t)best_level(weight, subset, label, costs);
    }
}

/* Fill in branch_metrics of a batch, and the rows of the tables that it needs. */
EXPORT void look_up_branch_metrics(
    const float *weights, const float *row_scale, const float *column_scale, const uint8_t *labels, int64_t n_rows,
    int64_t n_columns, int64_t row0, int64_t column0, int64_t width, int64_t n_steps, const float *bits,
    const float *slope, const float *points, float rate_weight, int64_t *metric_table, int8_t *level_table,
    uint8_t *is_filled, int64_t *branch_metrics
) {
    Costs costs = {bits, slope, points, rate_weight};
    int64_t run_rows = rows_of_run(n_columns);
    for (int64_t first = 0; first < n_steps; first += BLOCK_STEPS) {
        int64_t last = min_int(first + BLOCK_STEPS, n_steps);
        for (int64_t run = 0; run < RUNS; run++) {
            int64_t r = row0 + run * run_rows + first / width, j = column0 + first % width;
            for (int64_t step = first; step < last; step++) {
                float weight = 0;
                int64_t scale = 0, label = labels[j];
                if (r < n_rows) {
                    weight = weights[r * n_columns + j];
                    scale = class_of(row_scale[r], column_scale[j]);
                }
                int64_t row = 2 * scale + label;
                ClassCosts own = costs_of(&costs, scale);
                int64_t *metrics = metric_table + row * N_BINS;
                if (!is_filled[row]) {
                    is_filled[row] = 1;
                    fill_tables(label, &own, metrics, level_table + 4 * row * N_BINS);
                }
                branch_metrics[step * RUNS + run] = fabsf(weight) < REACH
                    ? metrics[bin_of(weight)]
                    : packed_metrics(weight, label, &own, METRIC_UNIT);
                if (++j == column0 + width) {
                    j = column0;
                    r++;
                }
            }
        }
    }
}

/* As look_up_branch_metrics, but squared errors count by importance, and nothing is looked up.

   importance * error^2 + rate_weight * bits is importance times the cost at a rate weight of rate_weight / importance.
*/
EXPORT void weigh_branch_metrics(
    const float *weights, const float *row_scale, const float *column_scale, const uint8_t *labels, int64_t n_rows,
    int64_t n_columns, int64_t row0, int64_t column0, int64_t width, int64_t n_steps, const float *bits,
    const float *slope, const float *points, float rate_weight, const float *row_importance,
    const float *column_importance, int64_t *branch_metrics
) {
    Costs costs = {bits, slope, points, rate_weight};
    int64_t run_rows = rows_of_run(n_columns);
    for (int64_t step = 0; step < n_steps; step++) {
        int64_t j = column0 + step % width, label = labels[j];
        for (int64_t run = 0; run < RUNS; run++) {
            int64_t r = row0 + run * run_rows + step / width;
            if (r >= n_rows) {
                branch_metrics[step * RUNS + run] = 0;
                continue;
            }
            float factor = row_importance[r] * column_importance[j];
            ClassCosts own = costs_of(&costs, class_of(row_scale[r], column_scale[j]));
            own.rate_weight = rate_weight / factor;
            branch_metrics[step * RUNS + run] =
                packed_metrics(weights[r * n_columns + j], label, &own, METRIC_UNIT * factor);
        }
    }
}

/* --- the walk ---------------------------------------------------------------------------------------------------- */

typedef uint16_t Lanes __attribute__((vector_size(2 * RUNS), aligned(2)));
typedef uint16_t FourLanes __attribute__((vector_size(8 * RUNS), aligned(8)));
typedef bool LaneBits __attribute__((ext_vector_type(RUNS)));

#define EIGHT(first) /* every fourth of 32 */ \
    (first), (first) + 4, (first) + 8, (first) + 12, (first) + 16, (first) + 20, (first) + 24, (first) + 28
#define SUBSET(four, subset) \
    __builtin_shufflevector( \
        four, four, EIGHT(subset), EIGHT((subset) + 32), EIGHT((subset) + 64), EIGHT((subset) + 96) \
    )

static inline void take_off_least(Lanes *path_metrics, int64_t n_states) {
    Lanes least = path_metrics[0];
    for (int64_t state = 1; state < n_states; state++)
        least = __builtin_elementwise_min(least, path_metrics[state]);
    for (int64_t state = 0; state < n_states; state++)
        path_metrics[state] = __builtin_elementwise_sub_sat(path_metrics[state], least);
}

/* The cheaper of two paths to a state, and a bit for every run: whether it is the first one. */
static inline void survive(Lanes a, Lanes b, Lanes *path_metric, uint32_t *taken) {
    Lanes least = __builtin_elementwise_min(a, b);
    LaneBits is_first = __builtin_convertvector(least == a, LaneBits);
    *path_metric = least;
    memcpy(taken, &is_first, sizeof *taken);
}

/* Walk n_steps steps: fills `taken`. moves (n_moves, 6) as `Trellis` in Python has them.

   The final path metrics are in path_metrics after an even number of steps, in `others` after an odd number. */
WIDE EXPORT void walk_runs(
    const int64_t *branch_metrics, int64_t n_steps, const int64_t *moves, int64_t n_moves, int64_t n_states,
    uint16_t *path_metrics, uint16_t *others, uint32_t *taken
) {
    Lanes *here = (Lanes *)path_metrics, *there = (Lanes *)others;
    for (int64_t step = 0; step < n_steps; step++) {
        if (step % REST_EVERY == 0) take_off_least(here, n_states);
        FourLanes four = *(const FourLanes *)(branch_metrics + step * RUNS);
        alignas(64) Lanes metrics[4] = {SUBSET(four, 0), SUBSET(four, 1), SUBSET(four, 2), SUBSET(four, 3)};
        for (int64_t i = 0; i < n_moves; i++) {
            const int64_t *move = moves + 6 * i;
            int64_t u = move[2], v = move[3], subset_a = move[4], subset_b = move[5];
            Lanes path_a = here[move[0]], path_b = here[move[1]];
            survive(
                __builtin_elementwise_add_sat(path_a, metrics[subset_a]),
                __builtin_elementwise_add_sat(path_b, metrics[subset_b]), there + u, taken + u
            );
            survive(
                __builtin_elementwise_add_sat(path_a, metrics[subset_a ^ 1]),
                __builtin_elementwise_add_sat(path_b, metrics[subset_b ^ 1]), there + v, taken + v
            );
        }
        taken += n_states;
        Lanes *reached = there;
        there = here;
        here = reached;
    }
}

/* --- the way back ------------------------------------------------------------------------------------------------ */

/* Write the levels along the best path of every run of a batch, from its end to its start.

   Where it is_weighed, the levels are those of weigh_branch_metrics, else of the table; importances are not read. */
EXPORT void trace_back(
    const float *weights, const float *row_scale, const float *column_scale, const uint8_t *labels, int64_t n_rows,
    int64_t n_columns, int64_t row0, int64_t column0, int64_t width, int64_t n_steps, const float *bits,
    const float *slope, const float *points, float rate_weight, const int8_t *level_table, int8_t is_weighed,
    const float *row_importance, const float *column_importance, const uint16_t *path_metrics, int64_t n_states,
    const uint32_t *taken, const int32_t *backward, int32_t *levels
) {
    Costs costs = {bits, slope, points, rate_weight};
    int64_t run_rows = rows_of_run(n_columns);
    int32_t state[RUNS] = {0};
    for (int64_t s = 0; s < n_states; s++)
        for (int64_t run = 0; run < RUNS; run++)
            if (path_metrics[s * RUNS + run] < path_metrics[state[run] * RUNS + run]) state[run] = (int32_t)s;
    for (int64_t step = n_steps - 1; step >= 0; step--) {
        int64_t j = column0 + step % width, in_run = step / width, label = labels[j];
        for (int64_t run = 0; run < RUNS; run++) {
            int64_t s = state[run];
            int64_t origin = backward[2 * s + ((taken[step * n_states + s] >> run) & 1)], subset = origin & 3;
            state[run] = (int32_t)(origin >> 2);
            int64_t r = row0 + run * run_rows + in_run;
            if (r >= n_rows) continue;
            float weight = weights[r * n_columns + j];
            int64_t scale = class_of(row_scale[r], column_scale[j]), level;
            if (fabsf(weight) < REACH && !is_weighed) {
                level = level_table[((2 * scale + label) * N_BINS + bin_of(weight)) * 4 + subset];
            } else {
                ClassCosts own = costs_of(&costs, scale);
                if (is_weighed) own.rate_weight = rate_weight / (row_importance[r] * column_importance[j]);
                level = best_level(weight, subset, label, &own);
            }
            levels[r * n_columns + j] = (int32_t)level;
        }
    }
}

/* Add the levels found to counts (N_CLASSES, 3, N_COSTS) and sums (3, N_POINTS, 2) of |weight| and how many. */
EXPORT void gather_levels(
    const float *weights, const float *row_scale, const float *column_scale, const int32_t *levels,
    const uint8_t *labels, const uint8_t *row_labels, int64_t n_rows, int64_t n_columns, int64_t run_rows,
    const int64_t *next_state, double *counts, double *sums
) {
    int64_t state = 0;
    for (int64_t r = 0; r < n_rows; r++) {
        if (r % run_rows == 0) state = 0;
        for (int64_t j = 0; j < n_columns; j++) {
            if (j % RUN_COLUMNS == 0 && j > 0) state = 0;
            int64_t level = levels[r * n_columns + j], magnitude = magnitude_of(level);
            int64_t parity = state & 1, label = labels[j] | row_labels[r], which = set_of(parity, label);
            if (magnitude < N_COSTS)
                counts[(class_of(row_scale[r], column_scale[j]) * 3 + which) * N_COSTS + magnitude] += 1;
            if (magnitude < N_POINTS) {
                float weight = weights[r * n_columns + j];
                double *sum = sums + 2 * (which * N_POINTS + magnitude);
                sum[0] += level < 0 ? -weight : weight;
                sum[1] += 1;
            }
            state = next_state[2 * state + branch(level, parity, label)];
        }
    }
}
