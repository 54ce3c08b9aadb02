// One token through a decoder layer: attention, router, routing, and the experts if the pool has them; see layer_cpu.py.

#include <math.h>
#include <time.h>

#include "rows_cpu.h"

#define MOST 1024  // experts, as in route_cpu.c

// What the other files compute. They are compiled by themselves, with flags of their own, and come as pointers.
typedef void attend(const void *attention, const void *x, const void *cosine, const void *sine, int rotary, void *keys,
                    void *values, int64_t kv_stride, int64_t length, void *scratch, void *sum, void *normal);
typedef int route(const void *rule, const void *cache, int64_t tokens, const float *logits, const float *gates,
                  int64_t *ids, float *weights, int64_t *slots, uint8_t *hits, int64_t *missed, int64_t *taken,
                  int64_t *count);
typedef void token(const void *pages, int bf16, const void *x, const int64_t *frames, const float *gates, int64_t k,
                   void *scratch, float *y, void *out);

typedef struct {
    attend *attend;
    route *route;
    token *token;
    const void *attention, *rule, *cache, *pages;
    const void *weight, *bias;          // of the router, [E, H] and [E] or NULL
    const int64_t *held, *frame_of;     // of each slot
    int64_t *ids, *slots, *missed, *taken, *count;  // of the routing, [K]
    float *weights;
    uint8_t *hits;
    int64_t *tokens;    // of the cache, and its ranges: to stay as they are; or NULL
    double *range_sum;
    int64_t experts, hidden, k;
    int bf16, router_bf16, rounds_logits, rounds_weights, sigmoid;
} layer;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

// The router's logits: rows of its weight times x.
INLINE void router_rows(const layer *l, const float *x, const int bf16, float *logits) {
#pragma omp parallel for schedule(static)
    for (int64_t e = 0; e < l->experts; e++) {
        float parts[16] = {0}, sum = 0;
        int64_t i = 0;
        const int64_t at = e * l->hidden;
        for (; i + 16 <= l->hidden; i += 16)
            for (int j = 0; j < 16; j++) parts[j] += x[i + j] * number(l->weight, bf16, at + i + j);
        for (; i < l->hidden; i++) parts[i % 16] += x[i] * number(l->weight, bf16, at + i);
        for (int j = 0; j < 16; j++) sum += parts[j];
        logits[e] = rounded(l->bias ? sum + number(l->bias, bf16, e) : sum, l->rounds_logits);
    }
}

// The logits' scores, softmax or sigmoid.
INLINE void score(const layer *l, const float *logits, float *gates) {
    float most = -INFINITY, sum = 0;
    for (int64_t e = 0; e < l->experts; e++) most = logits[e] > most ? logits[e] : most;
    for (int64_t e = 0; e < l->experts; e++) gates[e] = l->sigmoid ? sigmoid(logits[e]) : exponential(logits[e] - most);
    for (int64_t e = 0; e < l->experts; e++) sum += gates[e];
    for (int64_t e = 0; e < l->experts && !l->sigmoid; e++) gates[e] /= sum;
}

// out = x + attention(norm(x)), normal = norm(out), and the token is routed. Gives 1 where its experts are in their
// slots: they are then in `out` too; 0 where some are not; and -1, with nothing routed, where a logit is not finite.
// `seconds` are those of the routing and of the experts. `y`, `wide` and `scratch` have room for [K, H] and [H] numbers,
// and for what attention and experts ask for.
int layer_step(const layer *l, const void *x, const void *cosine, const void *sine, int rotary, void *keys,
               void *values, int64_t kv_stride, int64_t length, void *scratch, float *y, float *wide, void *out,
               void *normal, double *seconds) {
    float logits[MOST], gates[MOST];
    int64_t frames[MOST];
    l->attend(l->attention, x, cosine, sine, rotary, keys, values, kv_stride, length, scratch, out, normal);
    const double attended = now();
    for (int64_t i = 0; i < l->hidden; i++) wide[i] = number(normal, l->bf16, i);
    l->router_bf16 ? router_rows(l, wide, 1, logits) : router_rows(l, wide, 0, logits);
    score(l, logits, gates);
    *l->count = 0;
    for (int64_t i = 0; i < l->k; i++) l->missed[i] = l->taken[i] = -1;
    const int64_t tokens = l->tokens ? *l->tokens : 0;
    const double range_sum = l->tokens ? *l->range_sum : 0;
    if (!l->route(l->rule, l->cache, 1, logits, gates, l->ids, l->weights, l->slots, l->hits, l->missed, l->taken, l->count))
        return -1;
    if (l->tokens) {
        *l->tokens = tokens;
        *l->range_sum = range_sum;
    }
    int whole = 1;
    for (int64_t i = 0; i < l->k; i++) {
        l->weights[i] = rounded(l->weights[i], l->rounds_weights);
        whole &= l->held[l->slots[i]] == l->ids[i];
        frames[i] = l->frame_of[l->slots[i]];
    }
    if (!whole) return 0;
    const double start = now();
    l->token(l->pages, l->bf16, normal, frames, l->weights, l->k, scratch, y, normal);
    for (int64_t i = 0; i < l->hidden; i++) store(number(out, l->bf16, i) + number(normal, l->bf16, i), l->bf16, out, i);
    seconds[0] = start - attended;
    seconds[1] = now() - start;
    return 1;
}
