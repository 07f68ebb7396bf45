/* One token through a model of int8 weights: what model.Model does in NumPy, for kernel.py to compile.
 *
 * A vector is rounded to integers for each product with a matrix, of as many bits as the sums leave room for (at least 13
 * up to 4,096 columns), so that products and sums are of integers, which a processor does faster than of floats.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define SHARED (1 << 18) /* products with fewer multiplications end before another thread has started */

/* int8 rows (n, k) with a scale for each; bias (n) or NULL; q is NULL if the model has no such matrix */
typedef struct { const int8_t *q; const float *scale, *bias; int64_t n, k; } Matrix;
typedef struct { const float *weight, *bias; } Norm;
typedef struct { Norm norm_1, norm_2; Matrix qkv, proj, up, gate, down; } Block;
enum Activation { GELU, GELU_NEW, RELU, RELU2, SWIGLU };
typedef struct {
    int64_t n_layer, n_head, n_kv, head_dim, n_embd, d_ff, block_size, activation, rms, qk_norm;
    double eps;
    const Block *blocks;
    Matrix wte, wtp, head;        /* wtp: the bigram hash embedding */
    Norm norm_f;                  /* weight NULL: none */
    const float *wpe, *cos, *sin; /* (block_size, n_embd), (block_size, head_dim); NULL: none */
    float *keys, *values;         /* (n_layer, n_kv, block_size, head_dim) */
    float *x, *y, *qkv, *h, *g, *scores;
    int16_t *rounded;
} Model;

/* e^x to a relative 4e-6, as a power of 2 times a polynomial (Cephes); unlike expf, compilers vectorise it */
static inline float exponential(float x) {
    x = fminf(fmaxf(x, -87), 88);
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

/* y = m x + bias */
static void product(const Model *model, const Matrix *m, const float *x, float *y) {
    const int64_t n = m->n, k = m->k;
    float largest = 0;
    for (int64_t j = 0; j < k; j++) largest = fmaxf(largest, fabsf(x[j]));
    const int64_t room = INT32_MAX / (127 * k);
    const float limit = room < INT16_MAX ? room : INT16_MAX, back = largest / limit, by = largest > 0 ? limit / largest : 0;
    int16_t *restrict r = model->rounded;
    for (int64_t j = 0; j < k; j++) r[j] = (int16_t)lrintf(x[j] * by);
    #pragma omp parallel for schedule(static) if (n * k > SHARED)
    for (int64_t i = 0; i < n; i += 4) { /* four rows at a time, so that the sums do not wait for each other */
        const int64_t last = n - 1, ib = i + 1 < n ? i + 1 : last, ic = i + 2 < n ? i + 2 : last,
                      id = i + 3 < n ? i + 3 : last;
        const int8_t *a = m->q + i * k, *b = m->q + ib * k, *c = m->q + ic * k, *d = m->q + id * k;
        int32_t sa = 0, sb = 0, sc = 0, sd = 0;
        for (int64_t j = 0; j < 4 * k; j += 64) __builtin_prefetch(a + 8 * k + j); /* two rounds ahead; harmless at the end */
        for (int64_t j = 0; j < k; j++) {
            sa += a[j] * r[j];
            sb += b[j] * r[j];
            sc += c[j] * r[j];
            sd += d[j] * r[j];
        }
        const int64_t rows[4] = {i, ib, ic, id};
        const int32_t sums[4] = {sa, sb, sc, sd};
        for (int s = 0; s < 4; s++)
            y[rows[s]] = sums[s] * back * m->scale[rows[s]] + (m->bias ? m->bias[rows[s]] : 0);
    }
}

static void normalise(const Model *model, const Norm *norm, const float *x, float *y) {
    const int64_t n = model->n_embd;
    float mean = 0, square = 0;
    if (!model->rms) {
        for (int64_t j = 0; j < n; j++) mean += x[j];
        mean /= n;
    }
    for (int64_t j = 0; j < n; j++) square += (x[j] - mean) * (x[j] - mean);
    const float over = 1 / sqrtf(square / n + (float)model->eps);
    for (int64_t j = 0; j < n; j++) y[j] = (x[j] - mean) * over * norm->weight[j] + (norm->bias ? norm->bias[j] : 0);
}

/* QK-norm and rotary position of one head, in place */
static void place(const Model *model, float *x, int64_t position) {
    const int64_t D = model->head_dim, half = D / 2;
    if (model->qk_norm) {
        float square = 0;
        for (int64_t j = 0; j < D; j++) square += x[j] * x[j];
        const float over = 1 / sqrtf(square / D + 1.1920929e-7f);
        for (int64_t j = 0; j < D; j++) x[j] *= over;
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

/* the attention output of each head for the token at `position`, into y */
static void attend(const Model *model, int64_t layer, int64_t position, float *y) {
    const int64_t D = model->head_dim, n_head = model->n_head, n_kv = model->n_kv, S = position + 1;
    float *q = model->qkv, *k = q + n_head * D, *v = k + n_kv * D;
    for (int64_t i = 0; i < n_kv; i++) {
        const int64_t at = ((layer * n_kv + i) * model->block_size + position) * D;
        place(model, k + i * D, position);
        memcpy(model->keys + at, k + i * D, D * sizeof(float));
        memcpy(model->values + at, v + i * D, D * sizeof(float));
    }
    #pragma omp parallel for schedule(static) if (n_head * S * D > SHARED)
    for (int64_t i = 0; i < n_head; i++) {
        const int64_t from = (layer * n_kv + i / (n_head / n_kv)) * model->block_size * D;
        const float *keys = model->keys + from, *values = model->values + from;
        float *head = q + i * D, *out = y + i * D, *scores = model->scores + i * model->block_size;
        place(model, head, position);
        float largest = -1e30f, total = 0;
        for (int64_t t = 0; t < S; t++) {
            float sum = 0;
            for (int64_t j = 0; j < D; j++) sum += head[j] * keys[t * D + j];
            scores[t] = sum / sqrtf((float)D);
            largest = fmaxf(largest, scores[t]);
        }
        for (int64_t t = 0; t < S; t++) total += scores[t] = exponential(scores[t] - largest);
        memset(out, 0, D * sizeof(float));
        for (int64_t t = 0; t < S; t++)
            for (int64_t j = 0; j < D; j++) out[j] += scores[t] / total * values[t * D + j];
    }
}

static void activate(const Model *model, float *restrict h, const float *restrict g) {
    const int64_t n = model->d_ff;
    switch (model->activation) {
    case GELU:
        for (int64_t j = 0; j < n; j++) h[j] *= 0.5f * (1 + error_function(h[j] * 0.70710678f));
        break;
    case GELU_NEW: /* half of 1 + tanh(u) is 1 / (1 + exp(-2 u)) */
        for (int64_t j = 0; j < n; j++) h[j] /= 1 + exponential(-1.59576912f * (h[j] + 0.044715f * h[j] * h[j] * h[j]));
        break;
    case RELU:
        for (int64_t j = 0; j < n; j++) h[j] = fmaxf(h[j], 0);
        break;
    case RELU2:
        for (int64_t j = 0; j < n; j++) h[j] = fmaxf(h[j], 0) * fmaxf(h[j], 0);
        break;
    case SWIGLU:
        for (int64_t j = 0; j < n; j++) h[j] *= g[j] / (1 + exponential(-g[j]));
        break;
    }
}

/* the logits after one more token, whose row of the bigram hash embedding is `pair` */
void step(const Model *model, int64_t token, int64_t pair, int64_t position, float *logits) {
    const int64_t C = model->n_embd;
    float *x = model->x, *y = model->y, *h = model->h;
    for (int64_t j = 0; j < C; j++)
        x[j] = model->wte.q[token * C + j] * model->wte.scale[token] + (model->wpe ? model->wpe[position * C + j] : 0);
    if (model->wtp.q)
        for (int64_t j = 0; j < C; j++) x[j] += model->wtp.q[pair * C + j] * model->wtp.scale[pair];
    for (int64_t layer = 0; layer < model->n_layer; layer++) {
        const Block *block = model->blocks + layer;
        normalise(model, &block->norm_1, x, y);
        product(model, &block->qkv, y, model->qkv);
        attend(model, layer, position, y);
        if (block->proj.q) product(model, &block->proj, y, h);
        const float *from = block->proj.q ? h : y;
        for (int64_t j = 0; j < C; j++) x[j] += from[j];
        normalise(model, &block->norm_2, x, y);
        product(model, &block->up, y, h);
        if (block->gate.q) product(model, &block->gate, y, model->g);
        activate(model, h, model->g);
        product(model, &block->down, h, y);
        for (int64_t j = 0; j < C; j++) x[j] += y[j];
    }
    if (model->norm_f.weight) normalise(model, &model->norm_f, x, x);
    product(model, &model->head, x, logits);
}
