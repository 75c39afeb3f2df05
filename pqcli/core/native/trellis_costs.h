/* What a level costs a weight, and the cheapest level of a subset: for the searches of the trellis codec.

   Everything is float32, but for metrics, which are double until they are rounded. A comparison with NaN gives what
   Python's min and max give for the same order of arguments. */
#pragma once
#include <math.h>

#include "trellis.h"

#define METRIC_UNIT 512.0 /* branch and path metrics are integers in 1/512 of a squared step */

enum {
    N_COSTS = 32,    /* magnitudes whose bits are counted one by one */
    RESOLUTION = 64, /* weights are rounded to 1/64 of a step: it costs 0.001 dB, and metrics can be looked up */
    REACH = 16,      /* weights up to so many steps are looked up, larger ones computed one by one */
    N_BINS = 2 * REACH * RESOLUTION,
    DEAREST = 16383,
    REST_EVERY = 16, /* steps after which the least path metric is taken off all: 128 squared steps saturate */
};

/* `Costs` in Python: bits (N_CLASSES, 3, N_COSTS), slope (N_CLASSES,), points (3, N_POINTS). */
typedef struct {
    const float *bits, *slope, *points;
    float rate_weight;
} Costs;

/* Those of one class of scales. */
typedef struct {
    const float *bits, *points;
    float slope, rate_weight;
} ClassCosts;

static inline ClassCosts costs_of(const Costs *costs, int64_t scale) {
    return (ClassCosts){costs->bits + scale * 3 * N_COSTS, costs->points, costs->slope[scale], costs->rate_weight};
}

/* The search's guess of a weight's scale class, from 4 log2 of its row's and its column's scale. */
static inline int64_t class_of(float row_scale, float column_scale) {
    return min_int(max_int((int64_t)(row_scale + column_scale), 0), N_CLASSES - 1);
}

/* The bin of a weight whose magnitude is below REACH. */
static inline int64_t bin_of(float weight) {
    return min_int((int64_t)((weight + (float)REACH) * (float)RESOLUTION), N_BINS - 1);
}

/* The weight that stands for all of a bin. */
static inline float middle_of(int64_t bin) { return (float)(((double)bin + 0.5) / RESOLUTION - REACH); }

/* Squared error and cost of the bits of one level (of either sign) for a weight of magnitude `size`. */
static inline float cost_of(float size, int64_t level, int64_t which, const ClassCosts *costs) {
    int64_t magnitude = magnitude_of(level);
    int64_t entry = magnitude < N_COSTS ? magnitude : N_COSTS - 2 + (magnitude & 1);
    float beyond = (float)(magnitude - entry);
    float point = magnitude < N_POINTS ? costs->points[which * N_POINTS + magnitude] : (float)magnitude;
    float error = size - (level > 0 ? point : -point);
    return error * error + costs->rate_weight * (costs->bits[which * N_COSTS + entry] + costs->slope * beyond);
}

/* The magnitudes of a subset, signed for the weight's side: `residue` modulo 4, from `lowest` on. */
typedef struct {
    int64_t residue, lowest;
} Range;

static inline Range range_of(float weight, int64_t subset, int64_t label) {
    int64_t parity = subset >> 1, half = subset & 1;
    int64_t residue = label || parity == 0 ? parity + 2 * half : 3 - 2 * half;
    if (label == 1 && parity == 1 && weight < 0) residue = (4 - residue) & 3;
    return (Range){residue, label ? -4 : half ? 2 - parity : 0};
}

/* The largest level of a range that is not above a size, or so. */
static inline int64_t nearest_below(float size, Range range) {
    int64_t near = range.residue - 4 + 4 * (int64_t)((size - (float)(range.residue - 6)) * 0.25f);
    return max_int(near, range.lowest);
}

/* The level of a subset that costs a weight least, of the two nearest from below. */
static inline int64_t best_level(float weight, int64_t subset, int64_t label, const ClassCosts *costs) {
    float size = fabsf(weight);
    int64_t which = set_of(subset >> 1, label);
    Range range = range_of(weight, subset, label);
    int64_t near = nearest_below(size, range), lower = max_int(near - 4, range.lowest);
    int64_t level = cost_of(size, lower, which, costs) < cost_of(size, near, which, costs) ? lower : near;
    return weight < 0 ? -level : level;
}

/* Four costs, those of four subsets. Arithmetic on all of them at once is the same as on each, and said here, because
   compilers that find pairs in it by themselves work on what happens to lie beside the pairs in registers as well. */
typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourBits __attribute__((vector_size(16)));

/* `cost_of` four levels, one of each subset. */
static inline Four four_costs(float size, const int64_t *levels, int64_t odd_set, const ClassCosts *costs) {
    Four point, bits, beyond;
    for (int subset = 0; subset < 4; subset++) {
        int64_t which = subset < 2 ? 0 : odd_set, magnitude = magnitude_of(levels[subset]);
        int64_t entry = magnitude < N_COSTS ? magnitude : N_COSTS - 2 + (magnitude & 1);
        float known = costs->points[which * N_POINTS + min_int(magnitude, N_POINTS - 1)];
        float stands_for = magnitude < N_POINTS ? known : (float)magnitude;
        point[subset] = levels[subset] > 0 ? stands_for : -stands_for;
        bits[subset] = costs->bits[which * N_COSTS + entry];
        beyond[subset] = (float)(magnitude - entry);
    }
    Four error = size - point;
    return error * error + costs->rate_weight * (bits + costs->slope * beyond);
}

static inline uint64_t metric_of(float excess, double unit) {
    double metric = excess * unit;
    return (uint64_t)(int64_t)(DEAREST < metric ? DEAREST : metric);
}

static inline float lesser(float a, float b) { return b < a ? b : a; }

/* Branch metrics: what each of the four subsets costs more than the cheapest of them, 16 bits each. */
static inline int64_t packed_metrics(float weight, int64_t label, const ClassCosts *costs, double unit) {
    float size = fabsf(weight);
    int64_t near[4], lower[4];
    for (int subset = 0; subset < 4; subset++) {
        Range range = range_of(weight, subset, label);
        near[subset] = nearest_below(size, range);
        lower[subset] = max_int(near[subset] - 4, range.lowest);
    }
    Four best = four_costs(size, near, set_of(1, label), costs);
    Four other = four_costs(size, lower, set_of(1, label), costs);
    FourBits is_other = other < best;
    best = (Four)(((FourBits)other & is_other) | ((FourBits)best & ~is_other));
    best -= lesser(lesser(best[0], best[1]), lesser(best[2], best[3]));
    return (int64_t)(metric_of(best[0], unit) | metric_of(best[1], unit) << 16 | metric_of(best[2], unit) << 32 |
                     metric_of(best[3], unit) << 48);
}
