// Rows of int8, int4 and int2 matrices times vectors, at the speed at which memory gives the rows.
//
// Threads are those of torch's own pool. A row is reduced by one thread in one order, whatever their number: same
// inputs, same bits. Products accumulate in float32. Nothing is read beyond a row, but for prefetches, which may.

#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define BF16_DOT 1
#else
#define BF16_DOT 0
#endif

#define INLINE static inline __attribute__((always_inline))
#define BLOCK 64    // bytes of a row that are multiplied together: 16 lanes of 4 bytes
#define COLUMNS 256 // in a block at most: int2's
#define AHEAD 1024  // bytes between what is computed and what is asked of memory
#define ONCE 0, 0   // to be read, and not again: weights should not drive everything else out of the caches

typedef float lanes __attribute__((vector_size(64), aligned(4)));
typedef float eight __attribute__((vector_size(32), aligned(4)));
typedef float four __attribute__((vector_size(16), aligned(4)));
typedef uint32_t words __attribute__((vector_size(64), aligned(1)));  // rows of int8 begin anywhere
typedef int32_t integers __attribute__((vector_size(64), aligned(4)));

// A block of x in the order in which a block of weights is shifted out of its words.
typedef struct {
    lanes sums;        // over each lane's columns
    lanes correction;  // of int2 in bfloat16: minus what `two_dots` makes of them too much
    union {
        float f32[16][16];     // [place in a 32-bit word][word]
        uint16_t bf16[8][32];  // [place in a 16-bit word][word]
    };
} block;

// How the values lie: `bits` 2, 4 or 8, `group` columns of int2 and int4 that share a scale, x in bfloat16 or float32.
typedef struct {
    int bits, group, bf16;
} format;

INLINE float from_bf16(uint32_t bits) {
    float value;
    bits <<= 16;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint16_t to_bf16(float value) {  // to nearest, ties to even; a weight is never NaN
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

INLINE float sum(lanes v) {
    float all[16];
    *(lanes *)all = v;
    *(eight *)all += *(eight *)(all + 8);
    *(four *)all += *(four *)(all + 4);
    return (all[0] + all[2]) + (all[1] + all[3]);
}

// What the lowest bit of int2's value i counts where `values_bf16` takes it.
#define PLACE(i) (1 << 2 * ((i) % 3))

INLINE void pack_block(const void *x, int64_t columns, format f, block *out) {
    uint16_t halves[COLUMNS];
    float values[COLUMNS];
    const int a_lane = 32 / f.bits, a_word = 16 / f.bits, all = 16 * a_lane;
    memset(halves, 0, all * 2);
    memset(values, 0, all * 4);
    if (f.bf16) {
        memcpy(halves, x, columns * 2);
        for (int k = 0; k < all; k++) values[k] = from_bf16(halves[k]);
    } else
        memcpy(values, x, columns * 4);
    for (int l = 0; l < 16; l++) {
        float total = 0, correction = 0;
        for (int i = 0; i < a_lane; i++) {
            total += values[a_lane * l + i];
            if (f.bits == 2) correction -= values[a_lane * l + i] * (128.0f / PLACE(i % a_word) + 2);
        }
        out->sums[l] = total;
        if (f.bits == 2) out->correction[l] = correction;
    }
    if (f.bits < 8 && f.bf16 && BF16_DOT)
        for (int i = 0; i < a_word; i++)
            for (int l = 0; l < 32; l++) {
                const int k = a_word * l + i;
                out->bf16[i][l] = f.bits == 4 ? halves[k] : to_bf16(values[k] / PLACE(i));
            }
    else
        for (int i = 0; i < a_lane; i++)
            for (int l = 0; l < 16; l++) out->f32[i][l] = values[a_lane * l + i];
}

// Of each word the lowest 4 or 2 bits, less 8 or 2.
INLINE lanes lowest(words w, int bits) {
#if defined(__AVX512F__)
    static const float values[2][16] = {{-2, -1, 0, 1, -2, -1, 0, 1, -2, -1, 0, 1, -2, -1, 0, 1},
                                        {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7}};
    const __m512 table = _mm512_loadu_ps(values[bits == 4]);
    return (lanes)_mm512_permutexvar_ps((__m512i)w, table);  // a lookup takes four bits of its index
#else
    return __builtin_convertvector((integers)(w & ((1 << bits) - 1)) - (1 << (bits - 1)), lanes);
#endif
}

// Each lane's sum over its columns of (q - 8) * x or (q - 2) * x, or of byte * x.
INLINE lanes dot_f32(const uint8_t *packed, const block *x, int bits) {
    const words w = *(const words *)packed;
    lanes even = {0}, odd = {0};
    for (int i = 0; i < 32 / bits; i += 2) {
        if (bits < 8) {
            even += lowest(w >> bits * i, bits) * *(const lanes *)x->f32[i];
            odd += lowest(w >> bits * (i + 1), bits) * *(const lanes *)x->f32[i + 1];
        } else {
            even += __builtin_convertvector((integers)(w << (24 - 8 * i)) >> 24, lanes) * *(const lanes *)x->f32[i];
            odd += __builtin_convertvector((integers)(w << (16 - 8 * i)) >> 24, lanes) * *(const lanes *)x->f32[i + 1];
        }
    }
    return even + odd;
}

#if BF16_DOT
// Of each half of a word value i in bfloat16. Of int4 it is looked up, less 8. Of int2 it lies in the fraction of a
// number between 128 and 256, which a single instruction makes: 128 + PLACE(i) * q, three of them from one shift.
INLINE __m512bh values_bf16(__m512i w, int i, int bits) {
    static const uint16_t table[32] = {  // -8 to 7 in bfloat16, twice: a lookup takes five bits, of which four count
        0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
        0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000, 0x4040,
        0x4080, 0x40a0, 0x40c0, 0x40e0};
    if (bits == 4)
        return (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(w, 4 * i), _mm512_loadu_si512(table));
    const __m512i mask = _mm512_set1_epi16(3 * PLACE(i)), exponent = _mm512_set1_epi16(0x4300);
    return (__m512bh)_mm512_ternarylogic_epi32(_mm512_srli_epi16(w, 6 * (i / 3)), mask, exponent, 0xea);  // a & b | c
}
#endif

// `dot_f32` of a block of two rows; x in bfloat16 is multiplied as such, with both rows in turns. Int2's x is divided by
// PLACE, so that a product is too large by (128 / PLACE + 2) * x, and the sums begin at minus that: what cancels costs
// some 2e-6 of the result, where the rounding of x to bfloat16 has cost 2e-3.
INLINE void two_dots(const uint8_t *packed, const uint8_t *packed2, const block *x, format f, lanes *dots) {
#if BF16_DOT
    if (f.bf16) {
        __m512i w = _mm512_loadu_si512(packed), w2 = _mm512_loadu_si512(packed2);
        __asm__("" : "+v"(w), "+v"(w2));  // loaded once: compilers would fold a load into every shift
        __m512 even = f.bits == 4 ? _mm512_setzero_ps() : (__m512)x->correction, odd = _mm512_setzero_ps();
        __m512 even2 = even, odd2 = odd;
        for (int i = 0; i < 16 / f.bits; i += 2) {
            const __m512bh a = (__m512bh)_mm512_loadu_si512(x->bf16[i]);
            const __m512bh b = (__m512bh)_mm512_loadu_si512(x->bf16[i + 1]);
            even = _mm512_dpbf16_ps(even, values_bf16(w, i, f.bits), a);
            even2 = _mm512_dpbf16_ps(even2, values_bf16(w2, i, f.bits), a);
            odd = _mm512_dpbf16_ps(odd, values_bf16(w, i + 1, f.bits), b);
            odd2 = _mm512_dpbf16_ps(odd2, values_bf16(w2, i + 1, f.bits), b);
        }
        dots[0] = (lanes)_mm512_add_ps(even, odd);
        dots[1] = (lanes)_mm512_add_ps(even2, odd2);
        return;
    }
#endif
    dots[0] = dot_f32(packed, x, f.bits);
    dots[1] = dot_f32(packed2, x, f.bits);
}

// A block's pairs of scale and zero (bfloat16, in a word), each over the lanes of its group.
INLINE words spread(const uint32_t *pairs, format f) {
    const int count = BLOCK * 8 / f.bits / f.group;
    const words lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#if defined(__AVX512F__)
    const __m512i read = _mm512_maskz_loadu_epi32((1 << count) - 1, pairs);
    return (words)_mm512_permutexvar_epi32((__m512i)(lane / (16 / count)), read);
#else
    const words zero = {0};
    words w = zero + pairs[0];
    for (int g = 1; g < count; g++) {
        const words here = (words)(lane >= zero + (uint32_t)(g * 16 / count));
        w = (w & ~here) | ((zero + pairs[g]) & here);
    }
    return w;
#endif
}

// Adds a block of two rows times x to their sums; of int8 still without its scale, which is the row's.
INLINE void add_two(const uint8_t *packed, const uint8_t *packed2, const uint32_t *pairs, const uint32_t *pairs2,
                    const block *x, format f, lanes *sums) {
    lanes dots[2];
    two_dots(packed, packed2, x, f, dots);
    for (int i = 0; i < 2; i++)
        if (f.bits == 8)
            sums[i] += dots[i];
        else {
            const words w = spread(i ? pairs2 : pairs, f);
            sums[i] += (lanes)(w << 16) * dots[i] + (lanes)(w & 0xffff0000) * x->sums;
        }
}

// Rows 0 and `apart` times x: two at once, so that what is loaded of x serves both; far apart, so that memory sees two
// streams.
INLINE void two_rows(const uint8_t *packed, const uint32_t *scales, const block *x, int64_t apart, int64_t columns,
                     format f, float *y) {
    const int64_t row_bytes = columns * f.bits / 8, whole = row_bytes / BLOCK, left = row_bytes % BLOCK;
    const int64_t row_scales = f.bits == 8 ? 1 : columns / f.group;
    const int64_t block_scales = f.bits == 8 ? 0 : BLOCK * 8 / f.bits / f.group;
    const uint8_t *packed2 = packed + apart * row_bytes;
    const uint32_t *scales2 = scales + apart * row_scales;
    lanes sums[2] = {{0}};
    for (int64_t b = 0; b < whole; b++) {
        const int64_t at = b * BLOCK, at_scales = b * block_scales;
        __builtin_prefetch(packed + at + AHEAD, ONCE);
        __builtin_prefetch(packed2 + at + AHEAD, ONCE);
        add_two(packed + at, packed2 + at, scales + at_scales, scales2 + at_scales, x + b, f, sums);
    }
    if (left) {
        uint8_t last[2][BLOCK] = {0};
        uint32_t pairs[2][COLUMNS / 32] = {0};
        const int64_t left_scales = row_scales - whole * block_scales;
        memcpy(last[0], packed + whole * BLOCK, left);
        memcpy(last[1], packed2 + whole * BLOCK, left);
        memcpy(pairs[0], scales + whole * block_scales, left_scales * 4);
        memcpy(pairs[1], scales2 + whole * block_scales, left_scales * 4);
        add_two(last[0], last[1], pairs[0], pairs[1], x + whole, f, sums);
    }
    const float *scale = (const float *)scales, *scale2 = (const float *)scales2;
    y[0] = f.bits == 8 ? sum(sums[0]) * *scale : sum(sums[0]);
    y[apart] = f.bits == 8 ? sum(sums[1]) * *scale2 : sum(sums[1]);
}

INLINE void page(const uint8_t *packed, const uint32_t *scales, const block *x, const int64_t *of, int64_t blocks,
                 int64_t tokens, int64_t rows, int64_t columns, format f, float *y) {
    const int64_t half = (rows + 1) / 2, row_scales = f.bits == 8 ? 1 : columns / f.group;
#pragma omp for schedule(static) nowait
    for (int64_t r = 0; r < half; r++) {
        const int64_t apart = r + half < rows ? half : 0;  // the middle one of an odd number has no other
        for (int64_t t = 0; t < tokens; t++)
            two_rows(packed + r * (columns * f.bits / 8), scales + r * row_scales, x + (of ? of[t] : t) * blocks, apart,
                     columns, f, y + t * rows + r);
    }
}

typedef struct {
    const uint8_t *packed;
    int64_t packed_stride;  // bytes from a slot's to the next's
    const uint8_t *scales;
    int64_t scales_stride;
    const void *bias;  // or NULL
    int64_t bias_stride;
    int64_t rows, columns;
} matrix;

static int64_t blocks_of(int bits, int64_t columns) { return (columns * bits / 8 + BLOCK - 1) / BLOCK; }

// Row `row` of x, of all of `columns`, in the blocks' order.
INLINE void pack_row(int bits, int bf16, const void *x, int64_t row, int64_t columns, block *out) {
    const int64_t blocks = blocks_of(bits, columns), columns_of_block = BLOCK * 8 / bits;
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t first = b * columns_of_block, left = columns - first;
        const int64_t some = left < columns_of_block ? left : columns_of_block;
        const char *from = (const char *)x + (row * columns + first) * (bf16 ? 2 : 4);
#define PACK(bits) pack_block(from, some, (format){bits, 0, bf16}, out + b)
        bits == 8 ? PACK(8) : bits == 4 ? PACK(4) : PACK(2);
#undef PACK
    }
}

// A thread's share of y[i, r] = sum over k of m[slot][r, k] * x[of[i], k], or x[i, k] without `of`: the first counts[0]
// of the i with slots[0], and so on for all jobs.
static void multiply(int bits, int group, int bf16, const matrix *m, const int64_t *slots, const int64_t *counts,
                     int64_t jobs, const block *x, const int64_t *of, float *y) {
    const int64_t blocks = blocks_of(bits, m->columns), rows = m->rows, columns = m->columns;
    for (int64_t j = 0, first = 0; j < jobs; first += counts[j++]) {
        const uint8_t *packed = m->packed + slots[j] * m->packed_stride;
        const uint32_t *s = (const uint32_t *)(m->scales + slots[j] * m->scales_stride);
        const block *own = of ? x : x + first * blocks;
        const int64_t *rows_of = of ? of + first : NULL;
#define PAGE(...) page(packed, s, own, rows_of, blocks, counts[j], rows, columns, (format){__VA_ARGS__}, y + first * rows)
#define GROUPED(bits, bf16) \
    (group == 128 ? PAGE(bits, 128, bf16) : group == 64 ? PAGE(bits, 64, bf16) : PAGE(bits, 32, bf16))
        if (bits == 8)
            PAGE(8, 0, 0);
        else if (bits == 4)
            bf16 ? GROUPED(4, 1) : GROUPED(4, 0);
        else
            bf16 ? GROUPED(2, 1) : GROUPED(2, 0);
#undef GROUPED
#undef PAGE
    }
}

INLINE float number(const void *x, int bf16, int64_t i) {
    return bf16 ? from_bf16(((const uint16_t *)x)[i]) : ((const float *)x)[i];
}

INLINE float rounded(float value, int bf16) { return bf16 ? from_bf16(to_bf16(value)) : value; }

INLINE void store(float value, int bf16, void *out, int64_t i) {
    if (bf16)
        ((uint16_t *)out)[i] = to_bf16(value);
    else
        ((float *)out)[i] = value;
}

// e to the power of v to 1e-7 of it, by whole and rest of v / ln 2: libm's is called a number at a time.
INLINE float exponential(float v) {
    v = v < -87 ? -87 : v > 88 ? 88 : v;
    const float whole = __builtin_rintf(v * 1.44269504f);
    const float r = (v - whole * 0.693145752f) - whole * 1.42860677e-6f;
    const float p = 1 + r * (1 + r * (0.5f + r * (0.166666657f + r * (0.0416666396f + r * (0.00833345205f + r * 0.00139304355f)))));
    const int32_t power = ((int32_t)whole + 127) << 23;
    float scale;
    memcpy(&scale, &power, 4);
    return p * scale;
}

INLINE float sigmoid(float v) { return 1 / (1 + exponential(-v)); }
