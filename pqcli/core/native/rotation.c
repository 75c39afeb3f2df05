/* The loops of pqcli.core.trellis.rotation: a fixed order of operations, no fused or reordered arithmetic.

   basis (k, size) int32, normals (k, size) float, coefficients (k,) float, weights (rows, columns) float, rest
   (k, size) double. */
#include <math.h>

#include "native.h"

enum { WIDTH = 32 }; /* vectors rotated side by side: as many as the first cache holds, where they are not long */

/* Householder's QR in double, column by column: fills in zeroed normals and coefficients; scratch is `rest`.

   A basis vector that the earlier ones leave nothing of reflects nothing (its normal is zero). */
EXPORT void orthonormalize(
    const int32_t *restrict basis, const int64_t *restrict precisions, int64_t k, int64_t size, double *restrict rest,
    float *restrict normals, float *restrict coefficients
) {
    for (int64_t i = 0; i < k; i++) {
        double scale = 1.0;
        for (int64_t bit = 0; bit < precisions[i]; bit++) scale *= 0.5;
        for (int64_t j = 0; j < size; j++) rest[i * size + j] = (double)basis[i * size + j] * scale;
    }
    for (int64_t i = 0; i < k; i++) {
        double *vector = rest + i * size;
        float *normal = normals + i * size;
        double norm2 = 0.0;
        for (int64_t j = i; j < size; j++) norm2 += vector[j] * vector[j];
        if (norm2 == 0.0) continue;
        double norm = sqrt(norm2), sign = vector[i] < 0.0 ? -1.0 : 1.0;
        vector[i] += sign * norm;
        double largest = fabs(vector[i]);
        for (int64_t j = i; j < size; j++) {
            vector[j] /= largest;
            normal[j] = (float)vector[j];
        }
        double length2 = 0.0;
        for (int64_t j = i; j < size; j++) length2 += (double)normal[j] * (double)normal[j];
        double coefficient = 2.0 / length2;
        coefficients[i] = (float)coefficient;
        for (int64_t later = i + 1; later < k; later++) {
            double *other = rest + later * size;
            double dot = 0.0;
            for (int64_t j = i; j < size; j++) dot += normal[j] * other[j];
            dot *= coefficient;
            for (int64_t j = i; j < size; j++) other[j] -= dot * normal[j];
        }
    }
}

/* Apply the reflections 1 ... k, or k ... 1 (`inverse`), to every consecutive `size` columns of `weights`.

   Reflection i takes coefficients[i] * (normals[i] . x) * normals[i] off x. Sums run over ascending entries, for each
   vector by itself, so that the result depends neither on the vectors beside it nor on the machine. `block`
   (size, WIDTH) float is scratch. */
EXPORT void reflect(
    float *restrict weights, int64_t n_rows, int64_t n_columns, const float *restrict normals,
    const float *restrict coefficients, int64_t k, int64_t size, int8_t inverse, float *restrict block
) {
    int64_t n_vectors = n_rows * (n_columns / size); /* one behind the other, since columns are a multiple of size */
    float dot[WIDTH];
    for (int64_t start = 0; start < n_vectors; start += WIDTH) {
        int64_t n = min_int(WIDTH, n_vectors - start);
        for (int64_t v = 0; v < WIDTH; v++) {
            const float *vector = weights + (start + min_int(v, n - 1)) * size;
            for (int64_t i = 0; i < size; i++) block[i * WIDTH + v] = vector[i];
        }
        for (int64_t t = 0; t < k; t++) {
            int64_t which = inverse ? k - 1 - t : t;
            const float *normal = normals + which * size;
            for (int64_t v = 0; v < WIDTH; v++) dot[v] = 0;
            for (int64_t i = which; i < size; i++)
                for (int64_t v = 0; v < WIDTH; v++) dot[v] += normal[i] * block[i * WIDTH + v];
            for (int64_t v = 0; v < WIDTH; v++) dot[v] *= coefficients[which];
            for (int64_t i = which; i < size; i++)
                for (int64_t v = 0; v < WIDTH; v++) block[i * WIDTH + v] -= normal[i] * dot[v];
        }
        for (int64_t v = 0; v < n; v++) {
            float *vector = weights + (start + v) * size;
            for (int64_t i = 0; i < size; i++) vector[i] = block[i * WIDTH + v];
        }
    }
}
