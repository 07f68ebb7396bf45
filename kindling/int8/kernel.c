/* Many tokens through a model of int8 weights: what model.Model does in NumPy, for kernel.py to compile.
 *
 * A vector is rounded to integers for each product with a matrix, of as many bits as the sums leave room for (at least 13
 * up to 4,096 columns), so that products and sums are of integers, which a processor does faster than of floats. All tokens of
 * a call are multiplied with a row of weights when it is read.
 *
 * A token's logits are the same bits in whatever company it comes. Sums of integers are exact in any order; a sum of floats is
 * of one token, in the order that is written here. The compiler is not allowed another (no -ffast-math, no fused operations).
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define SHARED (1 << 18) /* loops with fewer multiplications end before another thread has started */
#define APART __attribute__((noinline)) /* so that all sums of a loop have a register */
#define KEYS 64          /* of attention, at a time */

/* int8 rows (n, k) with a scale for each; bias (n) or NULL; q is NULL if the model has no such matrix */
typedef struct { const int8_t *q; const float *scale, *bias; int64_t n, k; } Matrix;
typedef struct { const float *weight, *bias; } Norm;
/* q_norm and k_norm (head_dim): weight NULL where QK-norm has no weights */
typedef struct { Norm norm_1, norm_2, q_norm, k_norm; Matrix qkv, proj, up, gate, down; } Block;
enum Activation { GELU, GELU_NEW, RELU, RELU2, SWIGLU };
typedef struct {
    int64_t n_layer, n_head, n_kv, head_dim, n_embd, d_ff, block_size, activation, rms, qk_norm;
    int64_t room; /* the tokens that x to back hold: all that are worked on at once */
    double eps;
    const Block *blocks;
    Matrix wte, wtp, head;        /* wtp: the bigram hash embedding */
    Norm norm_f;                  /* weight NULL: none */
    const float *wpe, *cos, *sin; /* (block_size, n_embd), (block_size, head_dim); NULL: none */
    float *x, *y, *qkv, *h, *g;   /* for each token: n_embd, n_embd, qkv.n, the larger of n_embd and d_ff, the same */
    float *back;                  /* what a token's rounded vector is multiplied with to be as it was */
    int16_t *rounded;
} Model;
/* (rows, n_layer, n_kv, block_size, head_dim), and a scale for each vector */
typedef struct { int16_t *keys, *values; float *key_scale, *value_scale; } Cache;
/* a token, its row of the bigram hash embedding, its row of the cache, its position, and whether its logits are wanted */
typedef struct { int64_t id, pair, row, position, wanted; } Token;

/* e^x to a relative 4e-6, as a power of 2 times a polynomial (Cephes); unlike expf, compilers vectorise it */
static inline float exponential(float x) {
    x = x > -87 ? x : -87; /* unlike fmaxf, compilers vectorise it */
    x = x < 88 ? x : 88;
    const float n = rintf(x * 1.44269504f), r = x - n * 0.693359375f + n * 2.12194440e-4f;
    const float p = ((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r
                     + 1.6666665459e-1f) * r + 5.0000001201e-1f;
    union { int32_t bits; float power; } two = {.bits = ((int32_t)n + 127) << 23};
    return (p * r * r + r + 1) * two.power;
}

/* the error function, to 5e-7 (Abramowitz and Stegun, 7.1.26) */
static inline float error_function(float x) {
    const float a = fabsf(x), t = 1 / (1 + 0.3275911f * a);
    const float series = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    return copysignf(1 - series * exponential(-a * a), x);
}

/* the sum of eight floats in an order of its own; the compiler may not choose one, so each sum of floats is written in lanes */
typedef float Lanes __attribute__((vector_size(32)));
enum { LANES = 8 };

static inline float sum_lanes(Lanes l) { return ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7])); }

/* the sum of (a - from_a) * (b - from_b); vectors of one length are always summed in the same order */
static inline float dot(const float *a, float from_a, const float *b, float from_b, int64_t n) {
    Lanes sums = {0};
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) {
        Lanes left, right;
        memcpy(&left, a + j, sizeof left);
        memcpy(&right, b + j, sizeof right);
        sums += (left - from_a) * (right - from_b);
    }
    float rest = 0;
    for (; j < n; j++) rest += (a[j] - from_a) * (b[j] - from_b);
    return sum_lanes(sums) + rest;
}

static inline float sum(const float *a, int64_t n) {
    Lanes sums = {0};
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) {
        Lanes next;
        memcpy(&next, a + j, sizeof next);
        sums += next;
    }
    float rest = 0;
    for (; j < n; j++) rest += a[j];
    return sum_lanes(sums) + rest;
}

/* round x (k) to integers up to `limit`; return what they are to be multiplied with to be as it was */
static float round_vector(const float *restrict x, int64_t k, float limit, int16_t *restrict r) {
    float lanes[LANES] = {0}, largest = 0;
    int64_t j = 0;
    for (; j + LANES <= k; j += LANES)
        for (int l = 0; l < LANES; l++) lanes[l] = fabsf(x[j + l]) > lanes[l] ? fabsf(x[j + l]) : lanes[l];
    for (; j < k; j++) lanes[0] = fabsf(x[j]) > lanes[0] ? fabsf(x[j]) : lanes[0];
    for (int l = 0; l < LANES; l++) largest = lanes[l] > largest ? lanes[l] : largest;
    const float by = largest > 0 ? limit / largest : 0;
    for (j = 0; j < k; j++) r[j] = (int16_t)(int32_t)rintf(x[j] * by);
    return largest / limit;
}

/* four rows of weights times a vector: four sums that do not wait for each other */
static APART void four(const int8_t *const w[4], const int16_t *restrict r, int64_t k, int32_t out[4]) {
    const int8_t *a = w[0], *b = w[1], *c = w[2], *d = w[3];
    int32_t sa = 0, sb = 0, sc = 0, sd = 0;
    for (int64_t j = 0; j < k; j++) {
        sa += a[j] * r[j];
        sb += b[j] * r[j];
        sc += c[j] * r[j];
        sd += d[j] * r[j];
    }
    out[0] = sa, out[1] = sb, out[2] = sc, out[3] = sd;
}

/* the same of two vectors, for which the weights are widened once; more at a time is not faster */
static APART void four_by_two(const int8_t *const w[4], const int16_t *restrict r, const int16_t *restrict s, int64_t k,
                              int32_t out_r[4], int32_t out_s[4]) {
    const int8_t *a = w[0], *b = w[1], *c = w[2], *d = w[3];
    int32_t ra = 0, rb = 0, rc = 0, rd = 0, sa = 0, sb = 0, sc = 0, sd = 0;
    for (int64_t j = 0; j < k; j++) {
        ra += a[j] * r[j];
        rb += b[j] * r[j];
        rc += c[j] * r[j];
        rd += d[j] * r[j];
        sa += a[j] * s[j];
        sb += b[j] * s[j];
        sc += c[j] * s[j];
        sd += d[j] * s[j];
    }
    out_r[0] = ra, out_r[1] = rb, out_r[2] = rc, out_r[3] = rd;
    out_s[0] = sa, out_s[1] = sb, out_s[2] = sc, out_s[3] = sd;
}

/* y (n, m.n) = m x + bias, of each x (n, m.k) */
static void product(const Model *model, const Matrix *m, const float *x, int64_t n, float *y) {
    const int64_t k = m->k, last = m->n - 1;
    const int64_t room = INT32_MAX / (127 * k);
    const float limit = room < INT16_MAX ? room : INT16_MAX;
    #pragma omp parallel for schedule(static) if (8 * n * k > SHARED)
    for (int64_t t = 0; t < n; t++) model->back[t] = round_vector(x + t * k, k, limit, model->rounded + t * k);
    #pragma omp parallel for schedule(static) if (m->n * k * n > SHARED)
    for (int64_t i = 0; i < m->n; i += 4) {
        int64_t rows[4];
        const int8_t *w[4];
        for (int s = 0; s < 4; s++) rows[s] = i + s < last ? i + s : last, w[s] = m->q + rows[s] * k;
        for (int64_t j = 0; j < 4 * k; j += 64) __builtin_prefetch(w[0] + 8 * k + j); /* two rounds ahead; harmless at the end */
        for (int64_t t = 0; t < n; t += 2) {
            const int16_t *r = model->rounded + t * k;
            int32_t sums[2][4];
            const int64_t both = t + 1 < n ? 2 : 1;
            if (both == 2) four_by_two(w, r, r + k, k, sums[0], sums[1]);
            else four(w, r, k, sums[0]);
            for (int64_t u = 0; u < both; u++)
                for (int s = 0; s < 4; s++)
                    y[(t + u) * m->n + rows[s]] =
                        sums[u][s] * model->back[t + u] * m->scale[rows[s]] + (m->bias ? m->bias[rows[s]] : 0);
        }
    }
}

/* y (n, n_embd) = the norm of each x; y may be x */
static void normalise(const Model *model, const Norm *norm, const float *x, int64_t n, float *y) {
    const int64_t C = model->n_embd;
    #pragma omp parallel for schedule(static) if (8 * n * C > SHARED)
    for (int64_t t = 0; t < n; t++) {
        const float *from = x + t * C;
        float *to = y + t * C, mean = 0;
        if (!model->rms) mean = sum(from, C) / C;
        const float over = 1 / sqrtf(dot(from, mean, from, mean, C) / C + (float)model->eps);
        for (int64_t j = 0; j < C; j++)
            to[j] = (from[j] - mean) * over * norm->weight[j] + (norm->bias ? norm->bias[j] : 0);
    }
}

/* QK-norm and rotary position of one head, in place; weight (head_dim) or NULL */
static void place(const Model *model, const float *weight, float *x, int64_t position) {
    const int64_t D = model->head_dim, half = D / 2;
    if (model->qk_norm) {
        const float over = 1 / sqrtf(dot(x, 0, x, 0, D) / D + (weight ? (float)model->eps : 1.1920929e-7f));
        for (int64_t j = 0; j < D; j++) x[j] *= over;
        if (weight)
            for (int64_t j = 0; j < D; j++) x[j] *= weight[j];
    }
    if (model->cos) {
        const float *c = model->cos + position * D, *s = model->sin + position * D;
        for (int64_t j = 0; j < half; j++) {
            const float a = x[j], b = x[j + half];
            x[j] = a * c[j] - b * s[j];
            x[j + half] = b * c[j + half] + a * s[j + half];
        }
    }
}

/* the first vector in the cache of a token's row, in a layer and head */
static inline int64_t first_of(const Model *model, const Token *token, int64_t layer, int64_t head) {
    return ((token->row * model->n_layer + layer) * model->n_kv + head) * model->block_size;
}

/* the largest integers of queries and keys whose products have room for their sum */
static inline float key_limit(const Model *model) {
    const float limit = floorf(sqrtf((float)(INT32_MAX / model->head_dim))) - 1;
    return limit < INT16_MAX ? limit : INT16_MAX;
}

/* store keys and values of all tokens */
static void extend(const Model *model, const Cache *cache, int64_t layer, int64_t n, const Token *tokens) {
    const int64_t D = model->head_dim, n_head = model->n_head, n_kv = model->n_kv;
    const float limit = key_limit(model);
    #pragma omp parallel for schedule(static) if (16 * n * n_kv * D > SHARED)
    for (int64_t t = 0; t < n; t++) {
        float *k = model->qkv + (t * (n_head + 2 * n_kv) + n_head) * D, *v = k + n_kv * D;
        for (int64_t i = 0; i < n_kv; i++) {
            const int64_t at = first_of(model, tokens + t, layer, i) + tokens[t].position;
            place(model, model->blocks[layer].k_norm.weight, k + i * D, tokens[t].position);
            cache->key_scale[at] = round_vector(k + i * D, D, limit, cache->keys + at * D);
            cache->value_scale[at] = round_vector(v + i * D, D, INT16_MAX, cache->values + at * D);
        }
    }
}

/* the attention output of one head over the S vectors of the cache from `first`, KEYS at a time: when a larger score comes,
 * what was summed is scaled down */
static void attend_head(const int16_t *q, float scale, const Cache *cache, int64_t first, int64_t S, int64_t D,
                        float *restrict out) {
    float largest = -1e30f, total = 0, scores[KEYS];
    memset(out, 0, D * sizeof(float));
    for (int64_t from = first; from < first + S; from += KEYS) {
        const int64_t n = first + S - from < KEYS ? first + S - from : KEYS;
        const int16_t *keys = cache->keys + from * D, *values = cache->values + from * D;
        float top = largest;
        for (int64_t t = 0; t < n; t++) {
            int32_t products = 0;
            for (int64_t j = 0; j < D; j++) products += q[j] * keys[t * D + j];
            scores[t] = products * scale * cache->key_scale[from + t];
            top = scores[t] > top ? scores[t] : top;
        }
        const float shrink = exponential(largest - top);
        for (int64_t t = 0; t < n; t++) scores[t] = exponential(scores[t] - top);
        total = total * shrink + sum(scores, n);
        largest = top;
        for (int64_t t = 0; t < n; t++) scores[t] *= cache->value_scale[from + t];
        for (int64_t j = 0; j < D; j++) out[j] *= shrink;
        int64_t t = 0;
        for (; t + 4 <= n; t += 4) {
            const int16_t *v = values + t * D;
            const float *s = scores + t;
            for (int64_t j = 0; j < D; j++)
                out[j] += (s[0] * v[j] + s[1] * v[D + j]) + (s[2] * v[2 * D + j] + s[3] * v[3 * D + j]);
        }
        for (; t < n; t++)
            for (int64_t j = 0; j < D; j++) out[j] += scores[t] * values[t * D + j];
    }
    for (int64_t j = 0; j < D; j++) out[j] /= total;
}

/* y (n, n_embd) = the attention output of each token, which sees its row of the cache up to itself */
static void attend(const Model *model, const Cache *cache, int64_t layer, int64_t n, const Token *tokens, float *y) {
    const int64_t D = model->head_dim, n_head = model->n_head, n_kv = model->n_kv, width = (n_head + 2 * n_kv) * D;
    int64_t work = 0;
    for (int64_t t = 0; t < n; t++) work += 2 * (tokens[t].position + 1) * n_head * D;
    #pragma omp parallel for schedule(static, 1) if (work > SHARED)
    for (int64_t i = 0; i < n * n_head; i++) {
        const int64_t t = i / n_head, head = i % n_head, S = tokens[t].position + 1;
        float *q = model->qkv + t * width + head * D;
        int16_t *r = model->rounded + i * D;
        place(model, model->blocks[layer].q_norm.weight, q, tokens[t].position);
        const float scale = round_vector(q, D, key_limit(model), r) / sqrtf((float)D);
        attend_head(r, scale, cache, first_of(model, tokens + t, layer, head / (n_head / n_kv)), S, D, y + i * D);
    }
}

static void activate_token(const Model *model, float *restrict h, const float *restrict g) {
    const int64_t n = model->d_ff;
    switch (model->activation) {
    case GELU:
        for (int64_t j = 0; j < n; j++) h[j] *= 0.5f * (1 + error_function(h[j] * 0.70710678f));
        break;
    case GELU_NEW: /* half of 1 + tanh(u) is 1 / (1 + exp(-2 u)) */
        for (int64_t j = 0; j < n; j++) h[j] /= 1 + exponential(-1.59576912f * (h[j] + 0.044715f * h[j] * h[j] * h[j]));
        break;
    case RELU:
        for (int64_t j = 0; j < n; j++) h[j] = h[j] > 0 ? h[j] : 0;
        break;
    case RELU2:
        for (int64_t j = 0; j < n; j++) h[j] = h[j] > 0 ? h[j] * h[j] : 0;
        break;
    case SWIGLU:
        for (int64_t j = 0; j < n; j++) h[j] *= g[j] / (1 + exponential(-g[j]));
        break;
    }
}

static void activate(const Model *model, int64_t n, float *h, const float *g) {
    const int64_t F = model->d_ff;
    #pragma omp parallel for schedule(static) if (16 * n * F > SHARED)
    for (int64_t t = 0; t < n; t++) activate_token(model, h + t * F, g + t * F);
}

static void embed(const Model *model, const Token *token, float *x) {
    const int64_t C = model->n_embd;
    const Matrix *wte = &model->wte, *wtp = &model->wtp;
    for (int64_t j = 0; j < C; j++) x[j] = wte->q[token->id * C + j] * wte->scale[token->id];
    if (wtp->q)
        for (int64_t j = 0; j < C; j++) x[j] += wtp->q[token->pair * C + j] * wtp->scale[token->pair];
    if (model->wpe)
        for (int64_t j = 0; j < C; j++) x[j] += model->wpe[token->position * C + j];
}

static void add(float *restrict x, const float *restrict y, int64_t n) {
    for (int64_t j = 0; j < n; j++) x[j] += y[j];
}

/* move what the last layer still needs to the front: tokens whose logits are wanted; return their number */
static int64_t keep_wanted(const Model *model, int64_t n, Token *tokens) {
    const int64_t C = model->n_embd, width = model->blocks->qkv.n;
    int64_t kept = 0;
    for (int64_t t = 0; t < n; t++) {
        if (!tokens[t].wanted) continue;
        memmove(model->x + kept * C, model->x + t * C, C * sizeof(float));
        memmove(model->qkv + kept * width, model->qkv + t * width, width * sizeof(float));
        tokens[kept++] = tokens[t];
    }
    return kept;
}

/* the logits of the wanted ones of n tokens, of which there is room; return their number */
static int64_t forward_part(const Model *model, const Cache *cache, int64_t n, Token *tokens, float *logits) {
    const int64_t C = model->n_embd;
    float *x = model->x, *y = model->y, *h = model->h;
    for (int64_t t = 0; t < n; t++) embed(model, tokens + t, x + t * C);
    for (int64_t layer = 0; layer < model->n_layer; layer++) {
        const Block *block = model->blocks + layer;
        normalise(model, &block->norm_1, x, n, y);
        product(model, &block->qkv, y, n, model->qkv);
        extend(model, cache, layer, n, tokens);
        if (layer == model->n_layer - 1) n = keep_wanted(model, n, tokens);
        if (n == 0) return 0;
        attend(model, cache, layer, n, tokens, y);
        if (block->proj.q) product(model, &block->proj, y, n, h);
        add(x, block->proj.q ? h : y, n * C);
        normalise(model, &block->norm_2, x, n, y);
        product(model, &block->up, y, n, h);
        if (block->gate.q) product(model, &block->gate, y, n, model->g);
        activate(model, n, h, model->g);
        product(model, &block->down, h, n, y);
        add(x, y, n * C);
    }
    if (model->norm_f.weight) normalise(model, &model->norm_f, x, n, x);
    product(model, &model->head, x, n, logits);
    return n;
}

/* the logits after each wanted token; keys and values go to the cache. Tokens of one row are in order; `tokens` is scratch. */
void forward(const Model *model, const Cache *cache, int64_t n, Token *tokens, float *logits) {
    for (int64_t from = 0; from < n; from += model->room) {
        const int64_t part = n - from < model->room ? n - from : model->room;
        logits += forward_part(model, cache, part, tokens + from, logits) * model->head.n;
    }
}
