/* The loop of pqcli.core.entropy.lossless: one byte plane through the range coder. */
#include "rangecoder.h"

#define LOCAL_LIMIT 60
#define EVEN 32768

/* Write or read the n bytes of `plane`; at each index in `starts` a new tensor begins.

   A byte is eight decisions down a binary tree. Each has a model for the whole plane and one for the tensor alone,
   forgotten at its end; they are averaged, weighing the tensor's the more the more often it was asked. */
EXPORT void code_plane(
    int8_t encoding, int64_t n, int64_t n_starts, uint8_t *plane, const int64_t *starts, int64_t start_count,
    Model *shared, Model *local, const int64_t *rates, int64_t *window, uint8_t *buffer
) {
    Coder coder = coder_of(window, buffer);
    int64_t tensor = 0;
    for (int64_t i = 0; i < n; i++) {
        while (tensor < n_starts && i == starts[tensor]) {
            for (int node = 0; node < 256; node++) local[node] = (Model){EVEN, 0};
            tensor++;
        }
        int64_t value = plane[i];
        int64_t node = 1;
        for (int place = 7; place >= 0; place--) {
            int64_t known = 4 + 3 * min_int(shared[node].count, 2);
            int64_t trust = 3 * min_int(local[node].count, LOCAL_LIMIT);
            if (start_count > 0 && node > 1) trust = 0;
            uint32_t weighed = (uint32_t)(known * shared[node].probability + trust * local[node].probability);
            int64_t probability = weighed / (uint32_t)(known + trust);
            int64_t bit = code_bit(encoding, (value >> place) & 1, probability, &coder);
            adapt(&shared[node], bit, rates);
            adapt(&local[node], bit, rates);
            node = 2 * node + bit;
        }
        if (!encoding) plane[i] = (uint8_t)node;
    }
    keep_coder(&coder, window);
}
