/* Largest deltas, and histograms of deltas within a bracket, in one sweep over memory each.

   `thresholds.py` adds a line PAIR(B, O, NAME) for every pair of types that it needs. */

#include "../codegen/numbers.h"

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
static inline float to_float(bf16 x) { return from_bf16(x.bits); }
static inline float to_float(f16 x) { return from_f16(x.bits); }
static inline float to_float(float x) { return x; }
static const int64_t BLOCK = 4096;

/* Bits of |own - base|: they are ordered as the numbers are, with infinity and NaN above all. */
template <class B, class O>
static inline void sizes(const B *__restrict base, const O *__restrict own, int32_t n, uint32_t *__restrict bits) {
    for (int32_t i = 0; i < n; i++) {
        float delta = to_float(own[i]) - to_float(base[i]);
        uint32_t u; memcpy(&u, &delta, 4);
        bits[i] = u & 0x7fffffffu;
    }
}

template <class O> static inline void sizes(const void *, const O *__restrict own, int32_t n, uint32_t *__restrict bits) {
    for (int32_t i = 0; i < n; i++) {
        float x = to_float(own[i]);
        uint32_t u; memcpy(&u, &x, 4);
        bits[i] = u & 0x7fffffffu;
    }
}

template <class B, class O> static uint32_t largest(const void *base, const void *own, int64_t n) {
    uint32_t bits[BLOCK], most = 0;
    for (int64_t at = 0; at < n; at += BLOCK) {
        const int32_t m = (int32_t)(n - at < BLOCK ? n - at : BLOCK);
        if (base) sizes((const B *)base + at, (const O *)own + at, m, bits);
        else sizes((const void *)0, (const O *)own + at, m, bits);
        for (int32_t i = 0; i < m; i++) most = bits[i] > most ? bits[i] : most;
    }
    return most;
}

/* Counts what is at or above `high`; and by bins of 2^shift, what is at or above `low` and below `high`. */
template <class B, class O>
static int64_t count(const void *base, const void *own, int64_t n, uint32_t low, uint32_t high, int32_t shift, int64_t *bins) {
    uint32_t bits[BLOCK];
    uint8_t inside[BLOCK];
    int64_t above = 0;
    for (int64_t at = 0; at < n; at += BLOCK) {
        const int32_t m = (int32_t)(n - at < BLOCK ? n - at : BLOCK);
        if (m < BLOCK) memset(inside, 0, BLOCK);
        sizes((const B *)base + at, (const O *)own + at, m, bits);
        int32_t over = 0;
        for (int32_t i = 0; i < m; i++) over += bits[i] >= high;
        above += over;
        for (int32_t i = 0; i < m; i++) inside[i] = bits[i] - low < high - low;
        for (int32_t i = 0; i < m; i += 8) {  /* few are inside: eight at a time are passed over */
            uint64_t eight; memcpy(&eight, inside + i, 8);
            for (; eight; eight &= eight - 1) bins[(bits[i + (__builtin_ctzll(eight) >> 3)] - low) >> shift]++;
        }
    }
    return above;
}

#define PAIR(B, O, NAME) \
    extern "C" uint32_t largest_##NAME(const void *base, const void *own, int64_t n) { return largest<B, O>(base, own, n); } \
    extern "C" int64_t count_##NAME(const void *base, const void *own, int64_t n, uint32_t low, uint32_t high, int32_t shift, int64_t *bins) \
    { return count<B, O>(base, own, n, low, high, shift, bins); }
