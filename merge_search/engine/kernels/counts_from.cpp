/* Counts, for every edge, the numbers that are no smaller. */
#include <stdint.h>

extern "C" void counts_from(const float *x, int64_t n, const float *edges, int32_t last, int64_t *counts) {
    for (int64_t at = 0; at < n; at += 4096, x += 4096)
        for (int32_t e = 0; e < last; e++) {
            const int32_t m = (int32_t)(n - at < 4096 ? n - at : 4096);
            int32_t count = 0;
            for (int32_t i = 0; i < m; i++) count += x[i] >= edges[e];
            counts[e] += count;
        }
}
