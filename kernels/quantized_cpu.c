// Rows of int8 and int4 pages times vectors, at the speed at which memory gives the rows; see quantized_cpu.py.
//
// Threads are those of torch's own pool. A row is reduced by one thread in one order, whatever their number: same
// inputs, same bits. Products accumulate in float32. Nothing is read beyond a row, but for prefetches, which may.

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
#define COLUMNS 128 // in a block at most: int4's
#define AHEAD 1024  // bytes between what is computed and what is asked of memory
#define ONCE 0, 0   // to be read, and not again: weights should not drive everything else out of the caches

typedef float lanes __attribute__((vector_size(64), aligned(4)));
typedef float eight __attribute__((vector_size(32), aligned(4)));
typedef float four __attribute__((vector_size(16), aligned(4)));
typedef uint32_t words __attribute__((vector_size(64), aligned(1)));  // rows of int8 begin anywhere
typedef int32_t integers __attribute__((vector_size(64), aligned(4)));

// A block of x in the order in which a block of weights is shifted out of its words.
typedef struct {
    lanes sums;  // over each lane's columns
    union {
        float f32[8][16];      // [place in a 32-bit word][word]
        uint16_t bf16[4][32];  // [place in a 16-bit word][word]
    };
} block;

// How the values lie: `bits` 4 or 8, `group` columns of int4 that share a scale, x in bfloat16 or in float32.
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

static void pack_block(const void *x, int64_t columns, format f, block *out) {
    uint16_t halves[COLUMNS] = {0};
    float values[COLUMNS] = {0};
    const int a_lane = 32 / f.bits;
    if (f.bf16) {
        memcpy(halves, x, columns * 2);
        for (int k = 0; k < COLUMNS; k++) values[k] = from_bf16(halves[k]);
    } else
        memcpy(values, x, columns * 4);
    for (int l = 0; l < 16; l++) {
        float total = 0;
        for (int i = 0; i < a_lane; i++) total += values[a_lane * l + i];
        out->sums[l] = total;
    }
    if (f.bits == 4 && f.bf16 && BF16_DOT)
        for (int i = 0; i < 4; i++)
            for (int l = 0; l < 32; l++) out->bf16[i][l] = halves[4 * l + i];
    else
        for (int i = 0; i < a_lane; i++)
            for (int l = 0; l < 16; l++) out->f32[i][l] = values[a_lane * l + i];
}

// Of each word the lowest nibble, less 8.
INLINE lanes nibbles(words w) {
#if defined(__AVX512F__)
    static const float values[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    return (lanes)_mm512_permutexvar_ps((__m512i)w, _mm512_loadu_ps(values));  // a lookup takes four bits of its index
#else
    return __builtin_convertvector((integers)(w & 15) - 8, lanes);
#endif
}

// Each lane's sum over its columns of (nibble - 8) * x, or of byte * x.
INLINE lanes dot_f32(const uint8_t *packed, const block *x, int bits) {
    const words w = *(const words *)packed;
    lanes even = {0}, odd = {0};
    for (int i = 0; i < 32 / bits; i += 2) {
        if (bits == 4) {
            even += nibbles(w >> 4 * i) * *(const lanes *)x->f32[i];
            odd += nibbles(w >> (4 * i + 4)) * *(const lanes *)x->f32[i + 1];
        } else {
            even += __builtin_convertvector((integers)(w << (24 - 8 * i)) >> 24, lanes) * *(const lanes *)x->f32[i];
            odd += __builtin_convertvector((integers)(w << (16 - 8 * i)) >> 24, lanes) * *(const lanes *)x->f32[i + 1];
        }
    }
    return even + odd;
}

#if BF16_DOT
INLINE lanes dot_bf16(const uint8_t *packed, const block *x) {
    static const uint16_t values[32] = {  // -8 to 7 in bfloat16, twice: a lookup takes five bits, of which four count
        0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
        0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000, 0x4040,
        0x4080, 0x40a0, 0x40c0, 0x40e0};
    __m512i w = _mm512_loadu_si512(packed), table = _mm512_loadu_si512(values);
    __asm__("" : "+v"(w));  // loaded once: compilers would fold a load into every shift
    __m512 even = _mm512_setzero_ps(), odd = even;
#define STEP(total, i)                                                                              \
    _mm512_dpbf16_ps(total, (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(w, 4 * i), table), \
                     (__m512bh)_mm512_loadu_si512(x->bf16[i]))
    even = STEP(even, 0);
    odd = STEP(odd, 1);
    even = STEP(even, 2);
    odd = STEP(odd, 3);
#undef STEP
    return (lanes)_mm512_add_ps(even, odd);
}
#else
#define dot_bf16(packed, x) dot_f32(packed, x, 4)
#endif

// A block's pairs of scale and zero (bfloat16, in a word), each over the lanes of its group.
INLINE words spread(const uint32_t *pairs, int group) {
    const words zero = {0}, lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    words w = zero + pairs[0];
    for (int g = 1; g < COLUMNS / group; g++) {
        const words here = (words)(lane >= zero + (uint32_t)(g * group / 8));
        w = (w & ~here) | ((zero + pairs[g]) & here);
    }
    return w;
}

// A block of a row times x; of int8 still without its scale, which is the row's.
INLINE lanes times(const uint8_t *packed, const uint32_t *pairs, const block *x, format f) {
    if (f.bits == 8) return dot_f32(packed, x, 8);
    const words w = spread(pairs, f.group);
    const lanes dot = f.bf16 ? dot_bf16(packed, x) : dot_f32(packed, x, 4);
    return (lanes)(w << 16) * dot + (lanes)(w & 0xffff0000) * x->sums;
}

// Rows 0 and `apart` times x: two at once, so that what is loaded of x serves both; far apart, so that memory sees two
// streams.
INLINE void two_rows(const uint8_t *packed, const uint32_t *scales, const block *x, int64_t apart, int64_t columns,
                     format f, float *y) {
    const int64_t row_bytes = columns * f.bits / 8, whole = row_bytes / BLOCK, left = row_bytes % BLOCK;
    const int64_t row_scales = f.bits == 8 ? 1 : columns / f.group, block_scales = f.bits == 8 ? 0 : COLUMNS / f.group;
    const uint8_t *packed2 = packed + apart * row_bytes;
    const uint32_t *scales2 = scales + apart * row_scales;
    lanes first = {0}, second = {0};
    for (int64_t b = 0; b < whole; b++) {
        __builtin_prefetch(packed + b * BLOCK + AHEAD, ONCE);
        __builtin_prefetch(packed2 + b * BLOCK + AHEAD, ONCE);
        first += times(packed + b * BLOCK, scales + b * block_scales, x + b, f);
        second += times(packed2 + b * BLOCK, scales2 + b * block_scales, x + b, f);
    }
    if (left) {
        uint8_t last[2][BLOCK] = {0};
        uint32_t pairs[2][COLUMNS / 32] = {0};
        const int64_t left_scales = row_scales - whole * block_scales;
        memcpy(last[0], packed + whole * BLOCK, left);
        memcpy(last[1], packed2 + whole * BLOCK, left);
        memcpy(pairs[0], scales + whole * block_scales, left_scales * 4);
        memcpy(pairs[1], scales2 + whole * block_scales, left_scales * 4);
        first += times(last[0], pairs[0], x + whole, f);
        second += times(last[1], pairs[1], x + whole, f);
    }
    const float *scale = (const float *)scales, *scale2 = (const float *)scales2;
    y[0] = f.bits == 8 ? sum(first) * *scale : sum(first);
    y[apart] = f.bits == 8 ? sum(second) * *scale2 : sum(second);
}

INLINE void page(const uint8_t *packed, const uint32_t *scales, const block *x, int64_t blocks, int64_t tokens,
                 int64_t rows, int64_t columns, format f, float *y) {
    const int64_t half = (rows + 1) / 2, row_scales = f.bits == 8 ? 1 : columns / f.group;
#pragma omp for schedule(static) nowait
    for (int64_t r = 0; r < half; r++) {
        const int64_t apart = r + half < rows ? half : 0;  // the middle one of an odd number has no other
        for (int64_t t = 0; t < tokens; t++)
            two_rows(packed + r * (columns * f.bits / 8), scales + r * row_scales, x + t * blocks, apart, columns, f,
                     y + t * rows + r);
    }
}

int64_t blocks_of(int bits, int64_t columns) { return (columns * bits / 8 + BLOCK - 1) / BLOCK; }

int64_t scratch_bytes(int bits, int64_t columns) { return blocks_of(bits, columns) * sizeof(block); }

// y[j, t, r] = sum over k of weight[slots[j]][r, k] * x[j, t, k], or x[0, t, k] where x is shared.
//
// Strides, from slot to slot, are in bytes; `scratch` has room for the blocks of every row of x.
void linear(int bits, int group, int bf16, const void *x, int shared, const uint8_t *weight, int64_t weight_stride,
            const uint8_t *scales, int64_t scales_stride, const int64_t *slots, int64_t jobs, int64_t tokens,
            int64_t rows, int64_t columns, block *scratch, float *y) {
    const int64_t blocks = blocks_of(bits, columns), columns_of_block = BLOCK * 8 / bits;
    const format given = {bits, group, bf16};
    for (int64_t row = 0; row < (shared ? 1 : jobs) * tokens; row++)
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t first = b * columns_of_block, left = columns - first;
            pack_block((const char *)x + (row * columns + first) * (bf16 ? 2 : 4),
                       left < columns_of_block ? left : columns_of_block, given, scratch + row * blocks + b);
        }
#pragma omp parallel
    for (int64_t j = 0; j < jobs; j++) {
        const uint8_t *packed = weight + slots[j] * weight_stride;
        const uint32_t *s = (const uint32_t *)(scales + slots[j] * scales_stride);
        const block *blocked = scratch + (shared ? 0 : j * tokens * blocks);
        float *out = y + j * tokens * rows;
#define PAGE(...) page(packed, s, blocked, blocks, tokens, rows, columns, (format){__VA_ARGS__}, out)
        if (bits == 8)
            PAGE(8, 0, 0);
        else if (bf16)
            group == 128 ? PAGE(4, 128, 1) : group == 64 ? PAGE(4, 64, 1) : PAGE(4, 32, 1);
        else
            group == 128 ? PAGE(4, 128, 0) : group == 64 ? PAGE(4, 64, 0) : PAGE(4, 32, 0);
#undef PAGE
    }
}

INLINE void store(float value, int bf16, void *out, int64_t i) {
    if (bf16)
        ((uint16_t *)out)[i] = to_bf16(value);
    else
        ((float *)out)[i] = value;
}

INLINE void unpack_int8(const int8_t *q, const float *scales, int64_t rows, int64_t columns, int bf16, void *out) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = r * columns; i < (r + 1) * columns; i++) store(q[i] * scales[r], bf16, out, i);
}

INLINE void unpack_int4(const uint8_t *packed, const uint32_t *pairs, int64_t groups, int64_t group, int bf16,
                        void *out) {
#pragma omp parallel for schedule(static)
    for (int64_t g = 0; g < groups; g++) {
        const float scale = from_bf16(pairs[g] & 0xffff), zero = from_bf16(pairs[g] >> 16);
        for (int64_t i = g * group / 2; i < (g + 1) * group / 2; i++) {
            store(((packed[i] & 15) - 8) * scale + zero, bf16, out, 2 * i);
            store(((packed[i] >> 4) - 8) * scale + zero, bf16, out, 2 * i + 1);
        }
    }
}

// One matrix as it is: out[r, k] = byte * scale or (nibble - 8) * scale + zero, in float32 or that rounded to bfloat16.
void unpack(int bits, int64_t group, int bf16, const void *packed, const void *scales, int64_t rows, int64_t columns,
            void *out) {
    if (bits == 8)
        bf16 ? unpack_int8(packed, scales, rows, columns, 1, out) : unpack_int8(packed, scales, rows, columns, 0, out);
    else if (bf16)
        unpack_int4(packed, scales, rows * columns / group, group, 1, out);
    else
        unpack_int4(packed, scales, rows * columns / group, group, 0, out);
}
