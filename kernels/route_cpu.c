// The tokens of one cache routed as route_cpu.py's numpy does, bit by bit: see there.
//
// Compiled without contraction: a product and a sum round twice, as they do in numpy.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define DEEPEST 8
#define MOST 1024  // experts

// A policy's function in postfix order, as expressions.py makes it.
typedef struct {
    int32_t code, place;
    double number;
    int64_t whole;
} step;

typedef struct {
    int64_t *slot_of, *page_of, *capacity, *last_use, *uses, *clock, *tokens;
    double *range_sum;
} cache;

typedef struct {
    const step *key, *evict;  // key or NULL
    int64_t key_steps, evict_steps;
    int64_t experts, k;
    const float *knobs, *table, *correction;  // or NULL; knobs as KNOBS has them
    float epsilon, scale;
    int32_t renormalise, needs_rank, needs_before, needs_noise, by_weight;
} rule;

enum { WORD, NUMBER, ADD, SUB, MULTIPLY, DIVIDE, LESS, LESS_EQUAL, MORE, MORE_EQUAL, EQUAL, OTHER, MINUS, SHIFT, AND };

#define EVALUATE(name, type, field)                                                                              \
    static void name(const step *steps, int64_t count, const type *const *words, int64_t n, type stack[][MOST]) { \
        int top = 0;                                                                                             \
        for (const step *s = steps; s < steps + count; s++) {                                                    \
            if (s->code <= NUMBER) {                                                                             \
                if (s->code == WORD)                                                                             \
                    memcpy(stack[top++], words[s->place], n * sizeof(type));                                     \
                else {                                                                                           \
                    for (int64_t i = 0; i < n; i++) stack[top][i] = (type)s->field;                              \
                    top++;                                                                                       \
                }                                                                                                \
                continue;                                                                                        \
            }                                                                                                    \
            type *b = stack[top - 1], *a = s->code == MINUS ? b : stack[top - 2];                                \
            OPERATORS(type)                                                                                      \
            if (s->code != MINUS) top--;                                                                         \
        }                                                                                                        \
    }
#define EACH(code, expression)                                 \
    case code:                                                 \
        for (int64_t i = 0; i < n; i++) a[i] = (expression);   \
        break;
#define OPERATORS(type)                  \
    switch (s->code) {                   \
        EACH(ADD, a[i] + b[i])           \
        EACH(SUB, a[i] - b[i])           \
        EACH(MULTIPLY, a[i] * b[i])      \
        EACH(DIVIDE, a[i] / b[i])        \
        EACH(LESS, a[i] < b[i])          \
        EACH(LESS_EQUAL, a[i] <= b[i])   \
        EACH(MORE, a[i] > b[i])          \
        EACH(MORE_EQUAL, a[i] >= b[i])   \
        EACH(EQUAL, a[i] == b[i])        \
        EACH(OTHER, a[i] != b[i])        \
        EACH(MINUS, -a[i])               \
        MORE_OF(type)                    \
    }
#define MORE_OF(type) MORE_OF_##type
#define MORE_OF_float
#define MORE_OF_int64_t              \
    EACH(SHIFT, a[i] << b[i])        \
    EACH(AND, a[i] & b[i])
EVALUATE(evaluate, float, number)
EVALUATE(evaluate_whole, int64_t, whole)

// numpy's sum of up to 128 numbers, in its order.
static float pairwise(const float *x, int64_t n) {
    if (n < 8) {
        float sum = n ? x[0] : 0;
        for (int64_t i = 1; i < n; i++) sum += x[i];
        return sum;
    }
    float r[8];
    memcpy(r, x, sizeof r);
    int64_t i = 8;
    for (; i + 8 <= n; i += 8)
        for (int l = 0; l < 8; l++) r[l] += x[i + l];
    float sum = ((r[0] + r[1]) + (r[2] + r[3])) + ((r[4] + r[5]) + (r[6] + r[7]));
    for (; i < n; i++) sum += x[i];
    return sum;
}

// The `count` experts of the highest numbers, the lower id among equals, in that order.
static void best(const float *values, int64_t n, int64_t count, int64_t *out) {
    int64_t found = 0;
    for (int64_t e = 0; e < n; e++) {
        if (found == count && !(values[e] > values[out[count - 1]])) continue;
        int64_t at = found < count ? found++ : count - 1;
        for (; at > 0 && values[e] > values[out[at - 1]]; at--) out[at] = out[at - 1];
        out[at] = e;
    }
}

// All experts in that order, by merging.
static void sorted(const float *values, int64_t n, int64_t *out) {
    static _Thread_local int64_t other[MOST];
    int64_t *from = out, *to = other;
    for (int64_t e = 0; e < n; e++) out[e] = e;
    for (int64_t width = 1; width < n; width *= 2) {
        for (int64_t first = 0; first < n; first += 2 * width) {
            int64_t mid = first + width < n ? first + width : n, end = mid + width < n ? mid + width : n;
            int64_t a = first, b = mid;
            for (int64_t i = first; i < end; i++)
                to[i] = b >= end || (a < mid && !(values[from[b]] > values[from[a]])) ? from[a++] : from[b++];
        }
        int64_t *swap = from;
        from = to;
        to = swap;
    }
    if (from != out) memcpy(out, from, n * sizeof *out);
}

// Touches k experts, the first of them last, and gives those that are absent the slots of others.
static void touch_and_place(const rule *r, const cache *c, int64_t k, const int64_t *chosen, int64_t *slots,
                            uint8_t *hits, int64_t *missed, int64_t *taken, int64_t *count) {
    static _Thread_local int64_t stack[DEEPEST][MOST], keys[MOST], last_use[MOST], uses[MOST], clock_now[MOST];
    const int64_t capacity = *c->capacity;
    int absent = 0;
    for (int64_t i = 0; i < k; i++) {
        const int64_t e = chosen[i];
        slots[i] = c->slot_of[e];
        hits[i] = slots[i] >= 0;
        absent += !hits[i];
        c->last_use[e] = *c->clock + k - i;
        c->uses[e]++;
    }
    if (absent) {
        const int64_t *words[] = {last_use, uses, clock_now};
        for (int64_t s = 0; s < capacity; s++) {
            const int64_t e = c->page_of[s] < 0 ? 0 : c->page_of[s];
            last_use[s] = c->last_use[e];
            uses[s] = c->uses[e];
            clock_now[s] = *c->clock;
        }
        evaluate_whole(r->evict, r->evict_steps, words, capacity, stack);
        for (int64_t s = 0; s < capacity; s++) keys[s] = c->page_of[s] < 0 ? INT64_MIN + s : stack[0][s];
        for (int64_t i = 0; i < k; i++)
            if (hits[i]) keys[slots[i]] = INT64_MAX;
        for (int64_t i = 0; i < k; i++) {
            if (hits[i]) continue;
            int64_t slot = 0;
            for (int64_t s = 1; s < capacity; s++)
                if (keys[s] < keys[slot]) slot = s;
            keys[slot] = INT64_MAX;
            if (c->page_of[slot] >= 0) c->slot_of[c->page_of[slot]] = -1;
            c->slot_of[chosen[i]] = slots[i] = slot;
            c->page_of[slot] = missed[*count] = chosen[i];
            taken[(*count)++] = slot;
        }
    }
    *c->clock += k;
}

// As numpy's step for tokens [T, K] that have been chosen, in the order of their weights.
void place(const rule *r, const cache *c, int64_t tokens, const int64_t *chosen, int64_t *slots, uint8_t *hits,
           int64_t *missed, int64_t *taken, int64_t *count) {
    for (int64_t t = 0; t < tokens; t++)
        touch_and_place(r, c, r->k, chosen + t * r->k, slots + t * r->k, hits + t * r->k, missed, taken, count);
}

static uint64_t noise_bits(uint64_t index) {
    uint64_t h = index & 0xFFFFFFFF;
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF;
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF;
    return (h ^ (h >> 16)) >> 8;
}

enum { VALUE, RANK, BEFORE, HAVE, SPAN, COST, NOISE, TABLE, A, B, WORDS };  // KEY_WORDS
enum { J, KNOB_A, KNOB_B, MISS, REGRET, SEED };                             // KNOBS

// Chooses for one token, of whose scores and logits [E]; gives the range of what it selects by. Nothing is updated.
static double choose(const rule *r, const cache *c, const float *logits, const float *scores, int64_t *chosen,
                     float *weights) {
    static _Thread_local float words[WORDS][MOST], stack[DEEPEST][MOST], picked[MOST];
    static _Thread_local int64_t order[MOST], kept[MOST];
    const int64_t n = r->experts, k = r->k;
    float *value = words[VALUE], most = -INFINITY, least = INFINITY;
    for (int64_t e = 0; e < n; e++) {
        value[e] = r->correction ? scores[e] + r->correction[e] : logits[e];
        most = value[e] > most ? value[e] : most;
        least = value[e] < least ? value[e] : least;
    }
    const double mean = *c->range_sum / (*c->tokens > 1 ? *c->tokens : 1);
    if (r->needs_rank) sorted(value, n, order);
    if (!r->key) {
        best(value, n, k, chosen);
    } else {
        if (r->needs_rank)
            for (int64_t i = 0; i < n; i++) words[RANK][order[i]] = i;
        if (r->needs_before) {
            double upto = 0;
            for (int64_t i = 0; i < n; i++) {
                words[BEFORE][order[i]] = (float)upto;
                upto += scores[order[i]];
            }
        }
        const uint64_t first = ((uint64_t)*c->tokens * n) + ((uint64_t)(int64_t)r->knobs[SEED] << 24);
        for (int64_t e = 0; e < n; e++) {
            words[HAVE][e] = c->slot_of[e] >= 0;
            words[SPAN][e] = (float)mean;
            words[COST][e] = c->slot_of[e] >= 0 ? 0 : r->knobs[MISS];
            if (r->needs_noise) words[NOISE][e] = (float)noise_bits(first + e) * 0x1p-24f;
            words[TABLE][e] = r->table ? r->table[e] : 0;
            words[A][e] = r->knobs[KNOB_A];
            words[B][e] = r->knobs[KNOB_B];
        }
        const float *seen[WORDS];
        for (int w = 0; w < WORDS; w++) seen[w] = words[w];
        evaluate(r->key, r->key_steps, seen, n, stack);
        const int64_t j = (int64_t)r->knobs[J] < k ? (int64_t)r->knobs[J] : k;
        best(value, n, j, kept);
        for (int64_t i = 0; i < j; i++) stack[0][kept[i]] = INFINITY;
        best(stack[0], n, k, chosen);
        for (int64_t i = 1; i < k; i++)  // in the order of their values
            for (int64_t at = i; at > 0; at--) {
                const int64_t a = chosen[at - 1], b = chosen[at];
                if (value[a] > value[b] || (value[a] == value[b] && a < b)) break;
                chosen[at - 1] = b;
                chosen[at] = a;
            }
    }
    if (r->by_weight)  // those of the same keep their order
        for (int64_t i = 1; i < k; i++)
            for (int64_t at = i; at > 0 && scores[chosen[at]] > scores[chosen[at - 1]]; at--) {
                const int64_t e = chosen[at];
                chosen[at] = chosen[at - 1];
                chosen[at - 1] = e;
            }
    for (int64_t i = 0; i < k; i++) picked[i] = scores[chosen[i]];
    const float whole = r->renormalise ? pairwise(picked, k) + r->epsilon : 1;
    for (int64_t i = 0; i < k; i++) {
        float weight = r->renormalise ? picked[i] / whole : picked[i];
        weights[i] = r->scale == 1 ? weight : weight * r->scale;
    }
    return (double)(most - least);
}

// Whether all numbers that `count` tokens select by are finite, and so are their differences.
static int all_finite(const rule *r, int64_t count, const float *logits, const float *gates) {
    for (int64_t i = 0; i < count * r->experts; i++) {
        const float value = r->correction ? gates[i] + r->correction[i % r->experts] : logits[i];
        if (!(fabsf(value) < 1e37f)) return 0;
    }
    return 1;
}

// Routes logits [T, E] with their scores; 0, and nothing is done, where a number is not finite.
int route(const rule *r, const cache *c, int64_t tokens, const float *logits, const float *gates, int64_t *ids,
          float *weights, int64_t *slots, uint8_t *hits, int64_t *missed, int64_t *taken, int64_t *count) {
    const int64_t n = r->experts, k = r->k;
    if (!all_finite(r, tokens, logits, gates)) return 0;
    for (int64_t t = 0; t < tokens; t++) {
        *c->range_sum += choose(r, c, logits + t * n, gates + t * n, ids + t * k, weights + t * k);
        *c->tokens += 1;
        touch_and_place(r, c, k, ids + t * k, slots + t * k, hits + t * k, missed, taken, count);
    }
    return 1;
}

typedef struct {
    int64_t place, expert;
    float weight;
} use;

static int in_order(const void *a, const void *b) {
    const use *x = a, *y = b;
    if (x->place != y->place) return x->place < y->place ? -1 : 1;
    if (x->weight != y->weight) return x->weight > y->weight ? -1 : 1;
    return (x->expert > y->expert) - (x->expert < y->expert);
}

static int ascending(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// One step of tokens, `apart` tokens from each other, which have been chosen: see route_batch.py.
static void step_together(const rule *r, const cache *c, int64_t tokens, int64_t apart, const int64_t *ids,
                          const float *weights, int64_t *slots, uint8_t *hits, int64_t *missed, int64_t *taken,
                          int64_t *count, use *uses) {
    static _Thread_local int64_t ran[MOST], placed[MOST], slot_now[MOST];
    static _Thread_local uint8_t seen[MOST], there[MOST];
    const int64_t k = r->k, pairs = tokens * k;
    int64_t most = 0;
    for (int64_t i = 0; i < pairs; i++) {
        const int64_t at = i / k * apart * k + i % k;
        uses[i] = (use){i % k, ids[at], weights[at]};
        hits[at] = c->slot_of[ids[at]] >= 0;
    }
    qsort(uses, pairs, sizeof *uses, in_order);
    memset(seen, 0, sizeof seen);
    memset(slot_now, 0, sizeof slot_now);  // of those that have none after the step
    for (int64_t i = 0; i < pairs && most < *c->capacity; i++) {
        if (!seen[uses[i].expert]) ran[most++] = uses[i].expert;
        seen[uses[i].expert] = 1;
    }
    touch_and_place(r, c, most, ran, placed, there, missed, taken, count);
    for (int64_t i = 0; i < most; i++) slot_now[ran[i]] = placed[i];
    for (int64_t i = 0; i < pairs; i++) {
        const int64_t at = i / k * apart * k + i % k;
        slots[at] = slot_now[ids[at]];
    }
}

// `place` of N sequences of T steps, [N, T, K].
void place_batch(const rule *r, const cache *c, int64_t sequences, int64_t steps, const int64_t *ids,
                 const float *weights, int64_t *slots, uint8_t *hits, int64_t *missed, int64_t *taken, int64_t *count,
                 use *uses) {
    for (int64_t t = 0; t < steps; t++) {
        const int64_t at = t * r->k;
        step_together(r, c, sequences, steps, ids + at, weights + at, slots + at, hits + at, missed, taken, count, uses);
    }
}

// `route` of N sequences of T steps; `ranges` has room for N numbers, `uses` for N * K uses.
int route_batch(const rule *r, const cache *c, int64_t sequences, int64_t steps, const float *logits,
                const float *gates, int64_t *ids, float *weights, int64_t *slots, uint8_t *hits, int64_t *missed,
                int64_t *taken, int64_t *count, use *uses, double *ranges) {
    const int64_t n = r->experts, k = r->k;
    if (!all_finite(r, sequences * steps, logits, gates)) return 0;
    for (int64_t t = 0; t < steps; t++) {
        for (int64_t i = 0; i < sequences; i++) {
            const int64_t at = i * steps + t;
            ranges[i] = choose(r, c, logits + at * n, gates + at * n, ids + at * k, weights + at * k);
        }
        qsort(ranges, sequences, sizeof *ranges, ascending);
        for (int64_t i = 0; i < sequences; i++) *c->range_sum += ranges[i];
        *c->tokens += sequences;
        const int64_t at = t * k;
        step_together(r, c, sequences, steps, ids + at, weights + at, slots + at, hits + at, missed, taken, count, uses);
    }
    return 1;
}
