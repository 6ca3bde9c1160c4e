/* The loop over a tensor, around the body of an element-wise function.

   `loop_template.py` writes the lines above this file. They define `PART`, `BLOCK` and `LANES` (sizes), and

     ARRAYS            parameters: every array that `elements` writes or reads, the written ones first
     BLOCKS            arguments for written arrays of sums: a block each
     TENSORS(at)       arguments for them: the call's tensors, from element `at` on
     FLOATS, INTEGERS  the numbers of the call
     Results, body     what the body computes for one element, and the body itself
     LOAD(i)           arguments of the body: element i of every array that is read
     STORE(i, r)       stores the results of element i
     N_SUMS            how many sums the function makes; 0 if it stores tensors

   and, if `IS_PAIRED`, for the elements 2 i and 2 i + 1, which lie in one 32-bit word of each array:

     WORDS(i)          the words
     LOW, HIGH         arguments of the body: the first and the second element of the words
     STORE_PAIR(i, a, b)

   Compilers vectorise a counted loop from zero over arrays that cannot overlap, in a function by itself. A loop that starts
   elsewhere may wrap around as far as they know, and is left scalar where the processor cannot gather. */

static __attribute__((noinline)) void elements(ARRAYS, int32_t start, int32_t n, const float *F, const int32_t *K, int32_t index) {
    const float f[] = {FLOATS};
    const int32_t k[] = {INTEGERS};
#if IS_PAIRED
    for (int32_t i = 0; i < n / 2; i++) {
        WORDS(i)
        const Results low = body(f, k, index, start + 2 * i, LOW), high = body(f, k, index, start + 2 * i + 1, HIGH);
        STORE_PAIR(i, low, high)
    }
    if (n % 2) {
        const Results last = body(f, k, index, start + n - 1, LOAD(n - 1));
        STORE(N_SUMS ? BLOCK - 1 : n - 1, last)
    }
#else
    for (int32_t i = 0; i < n; i++) {
        const Results r = body(f, k, index, start + i, LOAD(i));
        STORE(i, r)
    }
#endif
}

#if N_SUMS
/* Adds a block to its lanes. There are enough lanes that additions do not wait for each other, and as many on every
   machine, so that a sum does not depend on the machine. */
static __attribute__((noinline)) void add_block(const float *__restrict block, double *__restrict lanes) {
    for (int32_t i = 0; i < BLOCK; i += LANES)
        for (int32_t l = 0; l < LANES; l++) lanes[l] += (double)block[i + l];
}

static void part(int64_t at, int32_t n, void *const *tensors, const float *F, const int32_t *K, int32_t index, double *sums) {
    float block[N_SUMS][BLOCK];
    double lanes[N_SUMS][LANES] = {};
    for (int32_t b = 0; b < n; b += BLOCK) {
        const int32_t m = n - b < BLOCK ? n - b : BLOCK;
        if (m < BLOCK) memset(block, 0, sizeof block);
        elements(BLOCKS, TENSORS(at + b), (int32_t)at + b, m, F, K, index);
        for (int32_t j = 0; j < N_SUMS; j++) add_block(block[j], lanes[j]);
    }
    for (int32_t j = 0; j < N_SUMS; j++)
        for (int32_t l = 0; l < LANES; l++) sums[j] += lanes[j][l];
}
#endif

/* Runs the parts begin..end of a tensor of n elements; `sums` has a row per part. */
extern "C" void merge(int64_t begin, int64_t end, int64_t n, void *const *tensors, const float *F, const int32_t *K, int32_t index, double *sums) {
    for (int64_t p = begin; p < end; p++) {
        const int64_t at = p * PART;
        const int32_t left = (int32_t)(n - at < PART ? n - at : PART);
#if N_SUMS
        part(at, left, tensors, F, K, index, sums + p * N_SUMS);
#else
        elements(TENSORS(at), (int32_t)at, left, F, K, index);
#endif
    }
}
