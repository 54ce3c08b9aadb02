// int8, int4 and int2 pages times a few tokens, and a token's experts; see quantized_cpu.py.

#include "rows_cpu.h"

// A layer of pages, as `formats.PageFormat` lays them out: act(gate(x)) * up(x) goes to down.
typedef struct {
    matrix gate_up, down;
    int bits, group, gated, interleaved, activation;
} expert_pages;

int64_t scratch_bytes(int bits, int64_t columns) { return blocks_of(bits, columns) * sizeof(block); }

// y[t, r] of one matrix. `scratch` has room for the blocks of every row of x.
void linear(int bits, int group, int bf16, const void *x, const matrix *m, int64_t tokens, block *scratch, float *y) {
    const int64_t blocks = blocks_of(bits, m->columns), slot = 0;
    for (int64_t t = 0; t < tokens; t++) pack_row(bits, bf16, x, t, m->columns, scratch + t * blocks);
#pragma omp parallel
    multiply(bits, group, bf16, m, &slot, &tokens, 1, scratch, NULL, y);
}

enum { SILU, GELU, RELU, CLAMPED_SWIGLU };  // as `activations.py` has them

INLINE float activated(int activation, float v) {
    if (activation == SILU) return v * sigmoid(v);
    if (activation == GELU) return 0.5f * v * (1 + __builtin_erff(v * 0.70710678f));
    return v > 0 ? v : v == v ? 0 : v;
}

INLINE float at_most(float v, float most) { return v > most ? most : v; }  // NaN stays

// h of one row of gate and up, each with its bias, rounded to what x is in.
INLINE void activate_row(const float *rows, const float *bias, const expert_pages *p, int bf16, void *h) {
    const int64_t inner = p->down.columns;
    const int64_t step = p->interleaved ? 2 : 1, up_at = p->gated ? (p->interleaved ? 1 : inner) : 0;
    for (int64_t i = 0; i < inner; i++) {
        float gate = rows[i * step], up = rows[i * step + up_at];
        if (bias) {
            gate += bias[i * step];
            up += bias[i * step + up_at];
        }
        float value;
        if (p->activation == CLAMPED_SWIGLU) {
            gate = at_most(gate, 7);
            up = -at_most(-at_most(up, 7), 7);
            value = gate * sigmoid(1.702f * gate) * (up + 1);
        } else
            value = p->gated ? activated(p->activation, gate) * up : activated(p->activation, gate);
        store(value, bf16, h, i);
    }
}

int64_t experts_scratch_bytes(const expert_pages *p, int64_t pairs, int64_t tokens) {
    const int64_t of_x = blocks_of(p->bits, p->gate_up.columns), of_h = blocks_of(p->bits, p->down.columns);
    const int64_t numbers = p->gate_up.rows + p->down.columns;
    return (tokens * of_x + pairs * of_h) * sizeof(block) + pairs * (numbers * 4 + 8);
}

// y[i] = the expert in the i's slot of x[of[i]], in float32: the first counts[0] of the pairs i have slots[0], and so on
// for all jobs. Both matrices and what is between them in one parallel region.
void experts(const expert_pages *p, int bf16, const void *x, int64_t tokens, const int64_t *slots, const int64_t *counts,
             int64_t jobs, const int64_t *of, block *scratch, float *y) {
    const int64_t of_x = blocks_of(p->bits, p->gate_up.columns), of_h = blocks_of(p->bits, p->down.columns);
    const int64_t rows = p->gate_up.rows, inner = p->down.columns, hidden = p->down.rows;
    int64_t pairs = 0;
    for (int64_t j = 0; j < jobs; j++) pairs += counts[j];
    block *packed_h = scratch + tokens * of_x;
    int64_t *slot_of = (int64_t *)(packed_h + pairs * of_h);
    for (int64_t j = 0, i = 0; j < jobs; j++)
        for (int64_t end = i + counts[j]; i < end; i++) slot_of[i] = slots[j];
    float *wide = (float *)(slot_of + pairs), *h = wide + pairs * rows;
    for (int64_t t = 0; t < tokens; t++) pack_row(p->bits, bf16, x, t, p->gate_up.columns, scratch + t * of_x);
#pragma omp parallel
    {
        multiply(p->bits, p->group, bf16, &p->gate_up, slots, counts, jobs, scratch, of, wide);
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t pair = 0; pair < pairs; pair++) {
            const float *bias = p->gate_up.bias;
            if (bias) bias = (const float *)((const char *)bias + slot_of[pair] * p->gate_up.bias_stride);
            void *own = h + pair * inner;
#define ACTIVATE(bf16) activate_row(wide + pair * rows, bias, p, bf16, own)
            bf16 ? ACTIVATE(1) : ACTIVATE(0);
#undef ACTIVATE
            pack_row(p->bits, bf16, own, 0, inner, packed_h + pair * of_h);
        }
        multiply(p->bits, p->group, bf16, &p->down, slots, counts, jobs, packed_h, NULL, y);
        if (p->down.bias) {
#pragma omp barrier
#pragma omp for schedule(static)
            for (int64_t pair = 0; pair < pairs; pair++) {
                const char *bias = (const char *)p->down.bias + slot_of[pair] * p->down.bias_stride;
                for (int64_t i = 0; i < hidden; i++) y[pair * hidden + i] += ((const float *)bias)[i];
            }
        }
    }
}

// out = sum over k of gates[k] * y[rows[k]], or y[k] without rows: the same bits whichever call has computed y.
void weigh(const float *gates, const float *y, const int64_t *rows, int64_t k, int64_t hidden, int bf16, void *out) {
    for (int64_t first = 0; first < hidden; first += 16) {
        const int64_t end = first + 16 < hidden ? first + 16 : hidden;
        float sums[16] = {0};
        for (int64_t j = 0; j < k; j++) {
            const float *row = y + (rows ? rows[j] : j) * hidden;
            for (int64_t i = first; i < end; i++) sums[i - first] += gates[j] * row[i];
        }
        for (int64_t i = first; i < end; i++) store(sums[i - first], bf16, out, i);
    }
}

// One token of experts in `slots`, weighed and summed; y [k, H] is scratch.
void token(const expert_pages *p, int bf16, const void *x, const int64_t *slots, const float *gates, int64_t k,
           block *scratch, float *y, void *out) {
    int64_t counts[k], of[k];
    for (int64_t j = 0; j < k; j++) {
        counts[j] = 1;
        of[j] = 0;
    }
    experts(p, bf16, x, 1, slots, counts, k, of, scratch, y);
    weigh(gates, y, NULL, k, p->down.rows, bf16, out);
}

INLINE void unpack_int8(const int8_t *q, const float *scales, int64_t rows, int64_t columns, int bf16, void *out) {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = r * columns; i < (r + 1) * columns; i++) store(q[i] * scales[r], bf16, out, i);
}

INLINE void unpack_groups(int bits, const uint8_t *packed, const uint32_t *pairs, int64_t groups, int64_t group,
                          int bf16, void *out) {
#pragma omp for schedule(static)
    for (int64_t g = 0; g < groups; g++) {
        const float scale = from_bf16(pairs[g] & 0xffff), zero = from_bf16(pairs[g] >> 16);
        for (int64_t i = g * group * bits / 16; i < (g + 1) * group * bits / 16; i++) {
            uint16_t word;
            memcpy(&word, packed + 2 * i, 2);
            for (int k = 0; k < 16 / bits; k++) {
                const int q = word >> bits * k & ((1 << bits) - 1);
                store((q - (1 << (bits - 1))) * scale + zero, bf16, out, 16 / bits * i + k);
            }
        }
    }
}

// One matrix as it is: out[r, k] = byte * scale or (q - 8 or 2) * scale + zero, in float32 or rounded to bfloat16.
void unpack(int bits, int64_t group, int bf16, const void *packed, const void *scales, int64_t rows, int64_t columns,
            void *out) {
#define GROUPS(bits, bf16) unpack_groups(bits, packed, scales, rows * columns / group, group, bf16, out)
#pragma omp parallel
    if (bits == 8)
        bf16 ? unpack_int8(packed, scales, rows, columns, 1, out) : unpack_int8(packed, scales, rows, columns, 0, out);
    else if (bits == 4)
        bf16 ? GROUPS(4, 1) : GROUPS(4, 0);
    else
        bf16 ? GROUPS(2, 1) : GROUPS(2, 0);
#undef GROUPS
}
