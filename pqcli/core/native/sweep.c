/* The one hot primitive of pqcli.core.kernels on a CPU; how it keeps a core busy is told in pqcli.core.kernels.cpu.

   Block sizes up to 16 have code of their own, in which all loops over coordinates are unrolled; larger ones share it
   with those that leave the same rest when divided by 8. */
#include <string.h>

#include "native.h"

#define GROUP 3                        /* registers of vectors in a tile */
#define TILE 4                         /* centroids in a tile */
#define GROUP_VECTORS (GROUP * LANES)  /* vectors in a tile */
#define BLOCK (16 * GROUP_VECTORS)     /* vectors transposed at a time */
#define UNROLLED 16
#define SCORES 16                      /* sums of scores, whatever the registers: one answer */

typedef float Floats __attribute__((ext_vector_type(LANES)));
typedef int32_t Ints __attribute__((ext_vector_type(LANES)));
typedef _Bool Bits __attribute__((ext_vector_type(LANES)));
typedef Floats FloatsAnywhere __attribute__((aligned(4)));
typedef Ints IntsAnywhere __attribute__((aligned(4)));
typedef float Eight __attribute__((ext_vector_type(8)));
typedef double Sums __attribute__((ext_vector_type(8)));
typedef Eight EightAnywhere __attribute__((aligned(4)));
typedef Sums SumsAnywhere __attribute__((aligned(8)));

#define INLINE static inline __attribute__((always_inline)) WIDE
#define UNROLL _Pragma("clang loop unroll_count(16)")
#if defined(__FMA__) || defined(__aarch64__)
#define UNROLL_PRODUCTS UNROLL
#else /* where a multiply-add is twenty instructions, that is enough of them */
#define UNROLL_PRODUCTS _Pragma("clang loop unroll(disable)")
#endif

/* for (t = 0; t < d; t++), where d - rest is a multiple of 8, or d is the rest */
#define OVER_COORDINATES(...) \
    for (int64_t first_of_8 = 0; first_of_8 < d - rest; first_of_8 += 8) { \
        SOME_COORDINATES(first_of_8, 8, __VA_ARGS__) \
    } \
    SOME_COORDINATES(d - rest, rest, __VA_ARGS__)
#define SOME_COORDINATES(FIRST, N, ...) \
    UNROLL_PRODUCTS for (int place = 0; place < (N); place++) { \
        int64_t t = (FIRST) + place; \
        __VA_ARGS__ \
    }

INLINE Floats load(const float *at) { return *(const FloatsAnywhere *)at; }

INLINE void store(float *at, Floats values) { *(FloatsAnywhere *)at = values; }

#if defined(__FMA__) || defined(__aarch64__)
/* a * b + c, rounded once. */
INLINE Floats fma_of(Floats a, Floats b, Floats c) { return __builtin_elementwise_fma(a, b, c); }
#else
typedef double Doubles __attribute__((ext_vector_type(LANES)));
typedef int64_t Longs __attribute__((ext_vector_type(LANES)));

/* a * b + c, rounded once, where the processor has no such instruction: the product is exact in double, and so is what
   the sum loses; a sum made odd by it rounds to float as the exact one does (Boldo and Melquiond 2008). */
INLINE Floats fma_of(Floats a, Floats b, Floats c) {
    Doubles product = __builtin_convertvector(a, Doubles) * __builtin_convertvector(b, Doubles);
    Doubles added = __builtin_convertvector(c, Doubles);
    Doubles sum = product + added;
    Doubles share = sum - product;
    Doubles lost = (product - (sum - share)) + (added - share);
    Longs bits = (Longs)sum;
    Longs is_inexact = (Longs)((lost > 0) | (lost < 0)); /* no: also of infinities, where it is NaN */
    Longs away = (Longs)((lost > 0) == (sum > 0));
    Longs odd = away ? bits | 1 : (bits - 1) | 1;
    bits = (is_inexact & (Longs)((bits & 1) == 0)) ? odd : bits;
    return __builtin_convertvector((Doubles)bits, Floats);
}
#endif

/* --- rows into columns ---------------------------------------------------------------------------------------------*/

#if LANES == 16
#define PICK(a, b, A, B) \
    __builtin_shufflevector( \
        a, b, A, 16 + B, A + 1, 17 + B, A + 2, 18 + B, A + 3, 19 + B, A + 4, 20 + B, A + 5, 21 + B, A + 6, 22 + B, \
        A + 7, 23 + B \
    )
#define ROUNDS 4
#elif LANES == 8
#define PICK(a, b, A, B) __builtin_shufflevector(a, b, A, 8 + B, A + 1, 9 + B, A + 2, 10 + B, A + 3, 11 + B)
#define ROUNDS 3
#else
#define PICK(a, b, A, B) __builtin_shufflevector(a, b, A, 4 + B, A + 1, 5 + B)
#define ROUNDS 2
#endif
#define HALF (LANES / 2)

/* The `width` columns of LANES rows that lie one behind the other, each GROUP_VECTORS floats from the last.

   Interleaving the first half of all values with the second, log2(LANES) times, is the transpose. */
INLINE void transpose(int width, const float *rows, float *columns) {
    Floats now[UNROLLED], next[UNROLLED];
    int half = width / 2;
    UNROLL for (int i = 0; i < width; i++) now[i] = load(rows + i * LANES);
    for (int round = 0; round < ROUNDS; round++) {
        UNROLL for (int i = 0; i < half; i++) {
            if (width % 2) { /* the second half begins in the middle of a register */
                next[2 * i] = PICK(now[i], now[half + i], 0, HALF);
                next[2 * i + 1] = PICK(now[i], now[half + i + 1], HALF, 0);
            } else {
                next[2 * i] = PICK(now[i], now[half + i], 0, 0);
                next[2 * i + 1] = PICK(now[i], now[half + i], HALF, HALF);
            }
        }
        if (width % 2) next[width - 1] = PICK(now[half], now[width - 1], 0, HALF);
        UNROLL for (int i = 0; i < width; i++) now[i] = next[i];
    }
    UNROLL for (int i = 0; i < width; i++) store(columns + i * GROUP_VECTORS, now[i]);
}

/* Some columns of LANES rows that lie d floats apart. */
INLINE void transpose_part(int width, int64_t d, const float *rows, float *columns) {
    float part[LANES * UNROLLED];
    for (int lane = 0; lane < LANES; lane++) memcpy(part + lane * width, rows + lane * d, (size_t)width * sizeof *rows);
    transpose(width, part, columns);
}

/* Coordinates (groups, d, GROUP_VECTORS) of the n vectors of a block, whose rows are whole groups. */
INLINE void transpose_block(int64_t d, int64_t rest, int64_t n, const float *rows, float *coordinates) {
    for (int64_t first = 0; first < n; first += LANES) {
        const float *from = rows + first * d;
        float *to = coordinates + first / GROUP_VECTORS * GROUP_VECTORS * d + first % GROUP_VECTORS;
        if (d == rest) {
            transpose((int)d, from, to);
            continue;
        }
        for (int64_t t = 0; t < d - rest; t += 8) transpose_part(8, d, from + t, to + t * GROUP_VECTORS);
        if (rest) transpose_part((int)rest, d, from + d - rest, to + (d - rest) * GROUP_VECTORS);
    }
}

/* --- the best centroid ---------------------------------------------------------------------------------------------*/

/* Update best and chunk of the n vectors of a block with the centroids of chunks start to stop. */
INLINE void visit(
    int64_t d, int64_t rest, int64_t n, int64_t start, int64_t stop, const float *coordinates, const float *rows, const float *bias,
    float *best, int32_t *chunk
) {
    for (int64_t group = 0; group < n; group += GROUP_VECTORS, coordinates += GROUP_VECTORS * d) {
        Floats bests[GROUP];
        Ints chunks[GROUP];
        for (int p = 0; p < GROUP; p++) {
            bests[p] = load(best + group + p * LANES);
            chunks[p] = *(const IntsAnywhere *)(chunk + group + p * LANES);
        }
        for (int64_t name = start; name < stop; name++) {
            Floats largest[GROUP];
            for (int p = 0; p < GROUP; p++) largest[p] = (Floats)-__builtin_inff();
#pragma clang loop unroll(disable)
            for (int64_t first = name * LANES; first < (name + 1) * LANES; first += TILE) {
                const float *row = rows + first * d;
                const float *at = coordinates;
                __asm__ volatile("" : "+r"(at)); /* lest all coordinates are kept in registers, that is, spilled */
                Floats scores[TILE][GROUP];
                for (int j = 0; j < TILE; j++)
                    for (int p = 0; p < GROUP; p++) scores[j][p] = (Floats)bias[first + j];
                OVER_COORDINATES({
                    Floats x[GROUP];
                    for (int p = 0; p < GROUP; p++) x[p] = load(at + (t * GROUP + p) * LANES);
                    for (int j = 0; j < TILE; j++) {
                        Floats c = (Floats)row[j * d + t];
                        for (int p = 0; p < GROUP; p++) scores[j][p] = fma_of(c, x[p], scores[j][p]);
                    }
                })
                for (int j = 0; j < TILE; j++)
                    for (int p = 0; p < GROUP; p++)
                        largest[p] = scores[j][p] > largest[p] ? scores[j][p] : largest[p];
            }
            for (int p = 0; p < GROUP; p++) {
                Ints is_better = largest[p] > bests[p];
                bests[p] = is_better ? largest[p] : bests[p];
                chunks[p] = is_better ? (Ints)(int32_t)name : chunks[p];
            }
        }
        for (int p = 0; p < GROUP; p++) {
            store(best + group + p * LANES, bests[p]);
            *(IntsAnywhere *)(chunk + group + p * LANES) = chunks[p];
        }
    }
}

/* The assignments of the n vectors of a block: which lane of its chunk has a vector's best score. */
INLINE void settle(
    int64_t d, int64_t rest, int64_t n, int64_t k, const float *coordinates, const float *columns, const float *best,
    const int32_t *chunk, int32_t *assignments
) {
    for (int64_t group = 0; group < n; group += GROUP_VECTORS, coordinates += GROUP_VECTORS * d) {
        int64_t end = min_int(GROUP_VECTORS, n - group);
        for (int64_t i = 0; i < end; i++) {
            const float *x = coordinates + i;
            int64_t name = chunk[group + i];
            const float *column = columns + name * (d + 1) * LANES;
            Floats score = load(column + d * LANES);
            OVER_COORDINATES({ score = fma_of(load(column + t * LANES), (Floats)x[t * GROUP_VECTORS], score); })
            Bits equal = __builtin_convertvector(score == (Floats)best[group + i], Bits);
            uint32_t bits = 1 << 16; /* a NaN equals nothing: then any index will do, but it must be one */
            memcpy(&bits, &equal, sizeof equal);
            assignments[group + i] = (int32_t)min_int(name * LANES + __builtin_ctz(bits), k - 1);
        }
    }
}

/* Add the vectors of a block to the sums of their centroids.

   A loop of its own: the processor must know where the last vector went before it may load the next sum, and here it
   reads that from memory well ahead. */
INLINE void add_up(
    int64_t d, int64_t rest, int64_t n, const float *restrict rows, const float *restrict weights, int64_t weight_step,
    const int32_t *restrict assignments, double *restrict sums, double *restrict counts
) {
    int64_t whole = d == rest ? d / 8 * 8 : d - rest;
    for (int64_t i = 0; i < n; i++) {
        double weight = weights[i * weight_step];
        double *sum = sums + assignments[i] * d;
        counts[assignments[i]] += weight;
        const float *row = rows + i * d;
        for (int64_t t = 0; t < whole; t += 8) {
            SumsAnywhere *eight = (SumsAnywhere *)(sum + t);
            *eight += __builtin_convertvector(*(const EightAnywhere *)(row + t), Sums) * weight;
        }
        for (int64_t t = whole; t < d; t++) sum[t] += (double)row[t] * weight;
    }
}

/* --- one slab ------------------------------------------------------------------------------------------------------*/

/* n numbers of one of three types as float32. */
static WIDE void widen(int64_t dtype, int64_t n, const char *restrict numbers, float *restrict wide) {
    if (dtype == 0) {
        memcpy(wide, numbers, (size_t)n * sizeof *wide);
    } else if (dtype == 1) {
        for (int64_t i = 0; i < n; i++) wide[i] = (float)((const _Float16 *)numbers)[i];
    } else { /* bfloat16 is the upper half of a float32 */
        for (int64_t i = 0; i < n; i++) ((uint32_t *)wide)[i] = (uint32_t)((const uint16_t *)numbers)[i] << 16;
    }
}

/* Rows of n vectors as float32, one behind the other; the last one fills its group. */
static WIDE void stage(int64_t dtype, int64_t d, int64_t n, const char *vectors, int64_t stride, float *rows) {
    int64_t n_runs = stride == d ? 1 : n;
    int64_t run = stride == d ? n * d : d;
    for (int64_t i = 0; i < n_runs; i++) widen(dtype, run, vectors + i * stride * (dtype ? 2 : 4), rows + i * run);
    for (int64_t i = n; i % GROUP_VECTORS; i++) memcpy(rows + i * d, rows + (n - 1) * d, (size_t)d * sizeof *rows);
}

typedef struct {
    int64_t dtype;          /* 0: float32, 1: float16, 2: bfloat16 */
    const char *vectors;    /* of the slab */
    int64_t stride;         /* elements from row to row */
    int64_t n;              /* vectors in the slab, at least 1 */
    const float *rows;      /* codebook, padded to whole chunks: (n_chunks * LANES, d) */
    const float *bias;      /* (n_chunks * LANES,), the padding is -inf */
    const float *columns;   /* the same once more with centroids along the lanes: (n_chunks, d + 1, LANES), bias last */
    int64_t n_chunks;
    int64_t tile;           /* chunks visited for a block of vectors at a time */
    int64_t k;
    float *scratch;         /* BLOCK * (2 * d + 2) */
    const float *weights;   /* SCORES of them readable from any vector on */
    int64_t weight_step;    /* 0: the first SCORES are for all */
    int32_t *assignments;
    int64_t accumulate;
    double *sums, *counts;
    double *score;          /* (SCORES,) */
} Slab;

INLINE void sweep(int64_t d, int64_t rest, const Slab *slab) {
    float *staged = slab->scratch, *coordinates = staged + BLOCK * d, *best = coordinates + BLOCK * d;
    int32_t *chunk = (int32_t *)(best + BLOCK);
    double score[SCORES] = {0};
    for (int64_t first = 0; first < slab->n; first += BLOCK) {
        int64_t n = min_int(slab->n - first, BLOCK);
        const char *vectors = slab->vectors + first * slab->stride * (slab->dtype ? 2 : 4);
        const float *rows = (const float *)vectors;
        if (slab->dtype || slab->stride != d || n % GROUP_VECTORS) {
            stage(slab->dtype, d, n, vectors, slab->stride, staged);
            rows = staged;
        }
        transpose_block(d, rest, n, rows, coordinates);
        for (int64_t i = 0; i < n; i += LANES) {
            store(best + i, (Floats)-__builtin_inff());
            *(IntsAnywhere *)(chunk + i) = (Ints)0;
        }
        for (int64_t start = 0; start < slab->n_chunks; start += slab->tile) {
            int64_t stop = min_int(start + slab->tile, slab->n_chunks);
            visit(d, rest, n, start, stop, coordinates, slab->rows, slab->bias, best, chunk);
        }
        settle(d, rest, n, slab->k, coordinates, slab->columns, best, chunk, slab->assignments + first);
        const float *weights = slab->weights + first * slab->weight_step;
        for (int64_t i = 0; i < n; i += SCORES) {
            for (int lane = 0; lane < SCORES; lane++) {
                double product = (double)best[i + lane] * (double)weights[i * slab->weight_step + lane];
                score[lane] += i + lane < n ? product : 0.0;
            }
        }
        if (slab->accumulate)
            add_up(d, rest, n, rows, weights, slab->weight_step, slab->assignments + first, slab->sums, slab->counts);
    }
    memcpy(slab->score, score, sizeof score);
}

/* Sweep one slab, a block of vectors at a time; see Slab. */
EXPORT WIDE void sweep_slab(
    int64_t d, int64_t dtype, const char *vectors, int64_t stride, int64_t n, const float *rows, const float *bias,
    const float *columns, int64_t n_chunks, int64_t tile, int64_t k, float *scratch, const float *weights,
    int64_t weight_step, int32_t *assignments, int64_t accumulate, double *sums, double *counts, double *score
) {
    Slab slab = {dtype, vectors, stride, n, rows, bias, columns, n_chunks, tile, k, scratch, weights, weight_step,
                 assignments, accumulate, sums, counts, score};
    switch (d <= UNROLLED ? d : UNROLLED + 1 + d % 8) {
#define CASE(D) case D: sweep(D, D, &slab); return;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
        CASE(9) CASE(10) CASE(11) CASE(12) CASE(13) CASE(14) CASE(15) CASE(16)
#undef CASE
#define CASE(R) case UNROLLED + 1 + R: sweep(d, R, &slab); return;
        CASE(0) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
#undef CASE
    }
}
