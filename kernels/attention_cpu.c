// One token through a layer's attention, from its hidden state to the experts' input; see attention_cpu.py.
//
// Every intermediate result is rounded as torch's own modules round theirs, to bfloat16 where the model is.

#include <math.h>

#include "rows_cpu.h"

typedef struct {
    const void *weight;  // or NULL
    float epsilon;
} norm;

typedef struct {
    matrix q, k, v, o;
    norm before, after, of_q, of_k;  // the last two of each head, or of all together
    int bits, group, o_group, bf16, heads, kv_heads, head, all_heads;
    float scaling;
} attention;

INLINE float inverse_size(const float *x, int64_t count, float epsilon) {
    float squares[16] = {0}, sum = 0;
    for (int64_t i = 0; i < count; i++) squares[i % 16] += x[i] * x[i];
    for (int i = 0; i < 16; i++) sum += squares[i];
    return 1 / sqrtf(sum / count + epsilon);
}

INLINE void normalise(float *x, const void *weight, float inverse, int64_t count, int bf16) {
    for (int64_t i = 0; i < count; i++) x[i] = rounded(rounded(x[i] * inverse, bf16) * number(weight, bf16, i), bf16);
}

// Rows with their bias, rounded.
INLINE void finish(float *y, const matrix *m, int bf16) {
    for (int64_t r = 0; r < m->rows; r++) y[r] = rounded(m->bias ? y[r] + number(m->bias, bf16, r) : y[r], bf16);
}

INLINE void rotate(float *x, const void *cosine, const void *sine, int rotary, int bf16) {
    const int half = rotary / 2;
    float turned[512];
    for (int i = 0; i < rotary; i++) {
        const float other = i < half ? -x[i + half] : x[i - half];
        const float straight = rounded(x[i] * number(cosine, bf16, i), bf16);
        turned[i] = rounded(straight + rounded(other * number(sine, bf16, i), bf16), bf16);
    }
    memcpy(x, turned, rotary * 4);
}

// The heads of one key and value head: softmax(q k) v over `length` tokens, each head's scores in its row of `scores`.
INLINE void attend_head(const attention *a, const float *q, const void *keys, const void *values, int64_t length,
                        int bf16, float *scores, float *out) {
    const int count = a->heads / a->kv_heads, head = a->head;
    float most[64];
    for (int h = 0; h < count; h++) most[h] = -INFINITY;
    for (int64_t t = 0; t < length; t++) {
        float key[512];
        for (int i = 0; i < head; i++) key[i] = number(keys, bf16, t * head + i);
        for (int h = 0; h < count; h++) {
            float parts[16] = {0}, sum = 0;
            int i = 0;
            for (; i + 16 <= head; i += 16)
                for (int l = 0; l < 16; l++) parts[l] += q[h * head + i + l] * key[i + l];
            for (; i < head; i++) parts[i % 16] += q[h * head + i] * key[i];
            for (int l = 0; l < 16; l++) sum += parts[l];
            scores[h * length + t] = sum *= a->scaling;
            if (!(sum <= most[h])) most[h] = sum;
        }
    }
    for (int h = 0; h < count; h++) {
        float *row = scores + h * length, sum = 0;
        for (int64_t t = 0; t < length; t++) row[t] = exponential(row[t] - most[h]);
        for (int64_t t = 0; t < length; t++) sum += row[t];
        for (int64_t t = 0; t < length; t++) row[t] /= sum;
        memset(out + h * head, 0, head * 4);
    }
    for (int64_t t = 0; t < length; t++) {
        float value[512];
        for (int i = 0; i < head; i++) value[i] = number(values, bf16, t * head + i);
        for (int h = 0; h < count; h++)
            for (int i = 0; i < head; i++) out[h * head + i] += scores[h * length + t] * value[i];
    }
}

int64_t attention_scratch_bytes(const attention *a, int64_t length) {
    const int64_t numbers = a->q.columns + 2 * a->q.rows + 2 * a->k.rows + a->o.rows + a->heads * (length + 1);
    return (blocks_of(a->bits, a->q.columns) + blocks_of(a->bits, a->o.columns)) * sizeof(block) + numbers * 4;
}

INLINE void step(const attention *a, const void *x, const void *cosine, const void *sine, int rotary, void *keys,
                 void *values, int64_t kv_stride, int64_t length, block *scratch, void *sum_out, void *normal_out, const int bf16) {
    const int64_t hidden = a->q.columns, size = bf16 ? 2 : 4, head = a->head;
    block *packed = scratch, *packed_o = packed + blocks_of(a->bits, hidden);
    float *wide = (float *)(packed_o + blocks_of(a->bits, a->o.columns)), *q = wide + hidden, *k = q + a->q.rows;
    float *v = k + a->k.rows, *out = v + a->v.rows, *y = out + a->q.rows, *scores = y + a->o.rows;
    const int64_t slot = 0, one = 1;
    for (int64_t i = 0; i < hidden; i++) wide[i] = number(x, bf16, i);
    normalise(wide, a->before.weight, inverse_size(wide, hidden, a->before.epsilon), hidden, bf16);
    for (int64_t i = 0; i < hidden; i++) store(wide[i], bf16, normal_out, i);
    pack_row(a->bits, bf16, normal_out, 0, hidden, packed);
#pragma omp parallel
    {
        multiply(a->bits, a->group, bf16, &a->q, &slot, &one, 1, packed, NULL, q);
        multiply(a->bits, a->group, bf16, &a->k, &slot, &one, 1, packed, NULL, k);
        multiply(a->bits, a->group, bf16, &a->v, &slot, &one, 1, packed, NULL, v);
#pragma omp barrier
#pragma omp single
        {
            finish(q, &a->q, bf16);
            finish(k, &a->k, bf16);
            finish(v, &a->v, bf16);
            if (a->of_q.weight && a->all_heads) {
                normalise(q, a->of_q.weight, inverse_size(q, a->q.rows, a->of_q.epsilon), a->q.rows, bf16);
                normalise(k, a->of_k.weight, inverse_size(k, a->k.rows, a->of_k.epsilon), a->k.rows, bf16);
            }
        }
#pragma omp for schedule(static)
        for (int g = 0; g < a->kv_heads; g++) {
            const int count = a->heads / a->kv_heads;
            float *own = k + g * head, *queries = q + g * count * head;
            char *key = (char *)keys + g * kv_stride * size, *value = (char *)values + g * kv_stride * size;
            if (a->of_k.weight && !a->all_heads) {
                normalise(own, a->of_k.weight, inverse_size(own, head, a->of_k.epsilon), head, bf16);
                for (float *each = queries; each < queries + count * head; each += head)
                    normalise(each, a->of_q.weight, inverse_size(each, head, a->of_q.epsilon), head, bf16);
            }
            rotate(own, cosine, sine, rotary, bf16);
            for (int h = 0; h < count; h++) rotate(queries + h * head, cosine, sine, rotary, bf16);
            for (int64_t i = 0; i < head; i++) {
                store(own[i], bf16, key, length * head + i);
                store(v[g * head + i], bf16, value, length * head + i);
            }
            float *own_scores = scores + g * count * (length + 1);
            attend_head(a, queries, key, value, length + 1, bf16, own_scores, out + g * count * head);
        }
#pragma omp single
        {
            for (int64_t i = 0; i < a->o.columns; i++) store(out[i], bf16, q, i);  // q is done with
            pack_row(a->bits, bf16, q, 0, a->o.columns, packed_o);
        }
        multiply(a->bits, a->o_group, bf16, &a->o, &slot, &one, 1, packed_o, NULL, y);
    }
    finish(y, &a->o, bf16);
    for (int64_t i = 0; i < hidden; i++) {
        wide[i] = rounded(number(x, bf16, i) + y[i], bf16);
        store(wide[i], bf16, sum_out, i);
    }
    normalise(wide, a->after.weight, inverse_size(wide, hidden, a->after.epsilon), hidden, bf16);
    for (int64_t i = 0; i < hidden; i++) store(wide[i], bf16, normal_out, i);
}

// sum_out = x + attention(norm(x)) and normal_out = norm(sum_out), all [H]. The token's key and value become number
// `length` of the cache, whose heads are `kv_stride` numbers apart; cosine and sine have `rotary` numbers.
void attend(const attention *a, const void *x, const void *cosine, const void *sine, int rotary, void *keys,
            void *values, int64_t kv_stride, int64_t length, block *scratch, void *sum_out, void *normal_out) {
    if (a->bf16)
        step(a, x, cosine, sine, rotary, keys, values, kv_stride, length, scratch, sum_out, normal_out, 1);
    else
        step(a, x, cosine, sine, rotary, keys, values, kv_stride, length, scratch, sum_out, normal_out, 0);
}
