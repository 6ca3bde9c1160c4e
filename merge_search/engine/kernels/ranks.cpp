/* Ranks of the entries of rows, and histograms of all entries, by 32-bit keys.

   `ranks.py` defines, before this file,

     B, O           types of an element of `base` and of `own`
     KEY_VALUE(i)   the number whose key is taken, from base[i] and own[i]
     IS_DELTA       1 if keys are of |number|, which is finite; 0 if they are of the number itself */

#include "../codegen/numbers.h"

/* A key orders as the numbers do, the largest first. */
#if IS_DELTA
static inline uint32_t key_of(float x) { return 0x7fffffffu - ((uint32_t)as_int(x) & 0x7fffffffu); }
#else
/* NaN comes before all numbers; both zeros have one key. */
static inline uint32_t key_of(float x) {
    const uint32_t u = (uint32_t)as_int(x + 0.0f), up = u & 0x80000000u ? ~u : u | 0x80000000u;
    return x != x ? 0 : ~up;
}
#endif
#define KEY(i) key_of(KEY_VALUE(i))

static const int64_t SHORT = 64;  /* entries of a row that are compared pair by pair */
static const int DIGIT = 11;
static const int64_t BLOCK = 4096;

/* Loads a row as pairs of key and position. Ascending pairs are descending scores, and equal scores keep their order.
   Returns the bits in which the keys differ. */
static uint32_t load(const B *__restrict base, const O *__restrict own, uint32_t n, uint64_t *__restrict pairs) {
    const uint32_t first = KEY(0);
    uint32_t differ = 0;
    for (uint32_t i = 0; i < n; i++) {
        const uint32_t key = KEY(i);
        differ |= key ^ first;
        pairs[i] = (uint64_t)key << 32 | i;
    }
    return differ;
}

template <class R>
static void rank_row(const B *base, const O *own, uint32_t n, R *__restrict out, uint64_t *from, uint64_t *to) {
    const uint32_t differ = load(base, own, n, from);
    if (n <= SHORT) {
        for (uint32_t i = 0; i < n; i++) {
            uint32_t before = 0;
            for (uint32_t j = 0; j < n; j++) before += from[j] < from[i];
            out[i] = (R)before;
        }
        return;
    }
    if (!differ) for (uint32_t i = 0; i < n; i++) out[i] = (R)i;
    const int end = differ ? 64 - __builtin_clz(differ) : 0;
    for (int shift = 32 + (differ ? __builtin_ctz(differ) : 0); shift < end; shift += DIGIT) {
        const int last = shift + DIGIT >= end, width = last ? end - shift : DIGIT;
        const uint32_t mask = (1u << width) - 1;
        uint32_t places[1 << DIGIT];
        memset(places, 0, sizeof(uint32_t) << width);
        for (uint32_t i = 0; i < n; i++) places[(uint32_t)(from[i] >> shift) & mask]++;
        for (uint32_t d = 0, total = 0; d <= mask; d++) { const uint32_t count = places[d]; places[d] = total; total += count; }
        if (last) for (uint32_t i = 0; i < n; i++) out[(uint32_t)from[i]] = (R)(int32_t)places[(uint32_t)(from[i] >> shift) & mask]++;
        else for (uint32_t i = 0; i < n; i++) to[places[(uint32_t)(from[i] >> shift) & mask]++] = from[i];
        uint64_t *swap = from; from = to; to = swap;
    }
}

template <class R>
static void rank(const B *base, const O *own, int64_t first, int64_t last, int64_t n, R *out, uint64_t *work) {
    for (int64_t row = first; row < last; row++)
        rank_row(base ? base + row * n : base, own + row * n, (uint32_t)n, out + row * n, work, work + n);
}

#define RANK(R) \
    extern "C" void rank_##R(const B *base, const O *own, int64_t first, int64_t last, int64_t n, R *out, uint64_t *work) \
    { rank(base, own, first, last, n, out, work); }
RANK(short)
RANK(int)
RANK(float)

/* Counts keys by bin. Keys are made a block at a time, so that they vectorise although the counting does not. */
extern "C" void count(const B *base, const O *own, int64_t n, int32_t shift, int64_t *bins) {
    const uint32_t last = 0xffffffffu >> shift;
    uint32_t keys[BLOCK];
    for (int64_t at = 0; at < n; at += BLOCK, own += BLOCK, base = base ? base + BLOCK : base) {
        const uint32_t m = (uint32_t)(n - at < BLOCK ? n - at : BLOCK);
        for (uint32_t i = 0; i < m; i++) keys[i] = last - (KEY(i) >> shift);
        for (uint32_t i = 0; i < m; i++) bins[keys[i]]++;
    }
}
