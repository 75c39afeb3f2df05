/* What all loops of the trellis codec share: levels, the sets they come from, and how they drive the trellis.

   Shapes: weights (rows, columns) float in units of the step; levels (rows, columns) int32; labels (columns,) and
   row_labels (rows,) uint8, either of them 1 where the odd set is pure; next_state (n_states, 2) int64. A state's low
   bit says whether its weight takes an even or an odd level. Reconstruction points (3, N_POINTS) float are indexed by
   *set*: 0 the even levels, 1 the odd levels and zero, 2 the odd levels alone. */
#pragma once
#include "native.h"

enum {
    RUN_COLUMNS = 4096, /* the trellis starts anew in state 0 at every multiple of this column ... */
    RUN_LENGTH = 2048,  /* ... and at every so many weights, in whole rows */
    N_POINTS = 8,       /* reconstruction points kept per set; a larger level stands for itself */
    N_CLASSES = 80,     /* scale classes: quarter octaves of the mean magnitude of a level, from 2^-6 upwards */
};

/* Rows of a run, unless every row is one. */
static inline int64_t rows_of_run(int64_t n_columns) { return max_int(1, RUN_LENGTH / max_int(1, n_columns)); }

static inline int64_t magnitude_of(int64_t level) { return level < 0 ? -level : level; }

/* The bit of a level that drives the trellis on: which half of its set it lies in. */
static inline int64_t branch(int64_t level, int64_t parity, int64_t label) {
    if (parity == 0) return (magnitude_of(level) >> 1) & 1;
    if (label) return ((level - 1) >> 1) & 1;
    return (magnitude_of(level) & 3) == 1;
}

/* The set that the level of a state comes from. */
static inline int64_t set_of(int64_t parity, int64_t label) { return parity + (parity & label); }

/* What a level stands for, in steps. */
static inline float point_of(int64_t level, int64_t which, const float *points) {
    int64_t magnitude = magnitude_of(level);
    float point = magnitude < N_POINTS ? points[which * N_POINTS + magnitude] : (float)magnitude;
    return level < 0 ? -point : point;
}
