/* Two-byte floating-point numbers as float32 and back. Every conversion rounds as torch's does. */
#ifndef MERGE_SEARCH_NUMBERS_H
#define MERGE_SEARCH_NUMBERS_H

#include <stdint.h>
#include <string.h>

static inline float as_float(int32_t x) { float f; memcpy(&f, &x, 4); return f; }
static inline int32_t as_int(float x) { int32_t i; memcpy(&i, &x, 4); return i; }

static inline float from_bf16(uint16_t x) { return as_float((int32_t)((uint32_t)x << 16)); }

/* Rounds to bfloat16 in the upper half of a word. The lower half holds the bits that were rounded off. */
static inline uint32_t rounded_bf16(float x) {
    uint32_t u = (uint32_t)as_int(x), r = u + 0x7fffu + ((u >> 16) & 1u);
    return x != x ? 0x7fc00000u : r;
}
static inline uint16_t to_bf16(float x) { return (uint16_t)(rounded_bf16(x) >> 16); }

static inline float from_f16(uint16_t x) {
    int32_t u = (x & 0x7fff) << 13, e = x & 0x7c00;
    float f = as_float(u + (e == 0x7c00 ? 224 << 23 : 112 << 23)), small = as_float(u + (113 << 23)) - 0x1p-14f;
    return as_float(as_int(e == 0 ? small : f) | (x & 0x8000) << 16);
}
static inline uint16_t to_f16(float x) {
    int32_t u = as_int(x), a = u & 0x7fffffff;
    int32_t r = (a - (112 << 23) + 0xfff + ((a >> 13) & 1)) >> 13, small = as_int(as_float(a) + 0.5f) - (126 << 23);
    r = a < 113 << 23 ? small : r < 0x7c00 ? r : 0x7c00;
    return (uint16_t)((x != x ? 0x7e00 : r) | ((u >> 16) & 0x8000));
}

/* Two neighbours in one word: the first lies in the lower half. */
static inline uint32_t word_at(const void *p, int32_t i) { uint32_t w; memcpy(&w, (const char *)p + 4 * (int64_t)i, 4); return w; }
static inline void put_word(void *p, int32_t i, uint32_t w) { memcpy((char *)p + 4 * (int64_t)i, &w, 4); }
static inline float low_bf16(uint32_t w) { return as_float((int32_t)(w << 16)); }
static inline float high_bf16(uint32_t w) { return as_float((int32_t)(w & 0xffff0000u)); }
static inline uint32_t pair_bf16(float a, float b) { return rounded_bf16(a) >> 16 | (rounded_bf16(b) & 0xffff0000u); }
static inline float low_f16(uint32_t w) { return from_f16((uint16_t)w); }
static inline float high_f16(uint32_t w) { return from_f16((uint16_t)(w >> 16)); }
static inline uint32_t pair_f16(float a, float b) { return to_f16(a) | (uint32_t)to_f16(b) << 16; }

#endif
