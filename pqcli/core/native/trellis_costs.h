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

typedef struct {
    float cost;
    int64_t level;
} Choice;

/* The level of a subset that costs a weight least, and the cost: of the two nearest from below, the cheaper. */
static inline Choice best_level(float weight, int64_t subset, int64_t label, const ClassCosts *costs) {
    int64_t parity = subset >> 1, half = subset & 1, which = set_of(parity, label);
    float size = fabsf(weight);
    int64_t lowest = label ? -4 : half ? 2 - parity : 0;
    int64_t residue = label || parity == 0 ? parity + 2 * half : 3 - 2 * half;
    if (label == 1 && parity == 1 && weight < 0) residue = (4 - residue) & 3;
    int64_t near = max_int(residue - 4 + 4 * (int64_t)((size - (float)(residue - 6)) * 0.25f), lowest);
    int64_t lower = max_int(near - 4, lowest);
    Choice best = {cost_of(size, near, which, costs), near};
    float cost = cost_of(size, lower, which, costs);
    if (cost < best.cost) best = (Choice){cost, lower};
    if (weight < 0) best.level = -best.level;
    return best;
}

static inline uint64_t metric_of(float excess, double unit) {
    double metric = excess * unit;
    return (uint64_t)(int64_t)(DEAREST < metric ? DEAREST : metric);
}

static inline float lesser(float a, float b) { return b < a ? b : a; }

/* Branch metrics: what each of the four subsets costs more than the cheapest of them, 16 bits each. */
static inline int64_t packed_metrics(float weight, int64_t label, const ClassCosts *costs, double unit) {
    float a = best_level(weight, 0, label, costs).cost;
    float b = best_level(weight, 1, label, costs).cost;
    float c = best_level(weight, 2, label, costs).cost;
    float d = best_level(weight, 3, label, costs).cost;
    float least = lesser(lesser(a, b), lesser(c, d));
    return (int64_t)(metric_of(a - least, unit) | metric_of(b - least, unit) << 16 | metric_of(c - least, unit) << 32 |
                     metric_of(d - least, unit) << 48);
}
