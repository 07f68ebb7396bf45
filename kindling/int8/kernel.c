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
#ifdef __AVX2__
#include <immintrin.h>
#endif

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
typedef struct { int8_t *keys, *values; float *key_scale, *value_scale; } Cache;
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

/* four rows of int8 times a vector, or two, for which the rows are widened once; for more there are not enough registers */
#ifdef __AVX2__ /* what compilers make of the loops below loads a vector anew for each row, and waits longer for memory */
typedef __m256i Ints;
static inline Ints load(const int16_t *r) { return _mm256_loadu_si256((const Ints *)r); }
static inline Ints widened(const int8_t *w) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)w)); }
static inline Ints plus_products(Ints sums, Ints a, Ints b) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    sums = _mm256_dpwssd_epi32(sums, a, b);
#else
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(a, b));
#endif
    __asm__ volatile("" : "+x"(sums)); /* in the order that is written, for which there are registers */
    return sums;
}
/* the sum of each of four, and of what is left of the rows from j on */
static inline void add_up(Ints a, Ints b, Ints c, Ints d, const int8_t *const w[4], const int16_t *r, int64_t j, int64_t k,
                          int32_t out[4]) {
    const Ints ab = _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    const Ints cd = _mm256_add_epi32(_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
    const Ints all = _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
    _mm_storeu_si128((__m128i *)out, _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
    for (; j < k; j++)
        for (int i = 0; i < 4; i++) out[i] += w[i][j] * r[j];
}
static APART void four(const int8_t *const w[4], const int16_t *r, int64_t k, int32_t out[4]) {
    const int8_t *a = w[0], *b = w[1], *c = w[2], *d = w[3], *next = a + 4 * k; /* the rows after these; harmless at the end */
    Ints sa = {0}, sb = {0}, sc = {0}, sd = {0};
    int64_t j = 0;
    for (; j + 32 <= k; j += 32) {
        __builtin_prefetch(next + 4 * j), __builtin_prefetch(next + 4 * j + 64);
        const Ints x = load(r + j), y = load(r + j + 16);
        sa = plus_products(plus_products(sa, widened(a + j), x), widened(a + j + 16), y);
        sb = plus_products(plus_products(sb, widened(b + j), x), widened(b + j + 16), y);
        sc = plus_products(plus_products(sc, widened(c + j), x), widened(c + j + 16), y);
        sd = plus_products(plus_products(sd, widened(d + j), x), widened(d + j + 16), y);
    }
    add_up(sa, sb, sc, sd, w, r, j, k, out);
}
static APART void four_by_two(const int8_t *const w[4], const int16_t *r, const int16_t *s, int64_t k, int32_t out_r[4],
                              int32_t out_s[4]) {
    const int8_t *a = w[0], *b = w[1], *c = w[2], *d = w[3], *next = a + 4 * k;
    Ints ra = {0}, rb = {0}, rc = {0}, rd = {0}, sa = {0}, sb = {0}, sc = {0}, sd = {0};
    int64_t j = 0;
    for (; j + 16 <= k; j += 16) {
        Ints x = load(r + j), y = load(s + j);
        __builtin_prefetch(next + 4 * j);
        __asm__("" : "+x"(x), "+x"(y)); /* loaded once, not for each row */
        Ints row = widened(a + j);
        ra = plus_products(ra, row, x), sa = plus_products(sa, row, y), row = widened(b + j);
        rb = plus_products(rb, row, x), sb = plus_products(sb, row, y), row = widened(c + j);
        rc = plus_products(rc, row, x), sc = plus_products(sc, row, y), row = widened(d + j);
        rd = plus_products(rd, row, x), sd = plus_products(sd, row, y);
    }
    add_up(ra, rb, rc, rd, w, r, j, k, out_r);
    add_up(sa, sb, sc, sd, w, s, j, k, out_s);
}
/* out (D) = the sum of n rows of int8, each times its number in r, in which there is room for one more */
static void mix(const int8_t *rows, int16_t *r, int64_t n, int64_t D, int32_t *out) {
    int64_t j = 0;
    r[n] = 0;
    for (; j + 16 <= D; j += 16) {
        Ints low = {0}, high = {0};
        for (int64_t t = 0; t < n; t += 2) { /* numbers of two rows side by side, as they are added in pairs */
            const int8_t *row = rows + t * D + j;
            const __m128i a = _mm_loadu_si128((const __m128i *)row);
            const __m128i b = t + 1 < n ? _mm_loadu_si128((const __m128i *)(row + D)) : a;
            const Ints both = _mm256_set1_epi32((uint16_t)r[t] | (uint32_t)(uint16_t)r[t + 1] << 16);
            low = plus_products(low, _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(a, b)), both);
            high = plus_products(high, _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(a, b)), both);
        }
        _mm256_storeu_si256((Ints *)(out + j), low);
        _mm256_storeu_si256((Ints *)(out + j + 8), high);
    }
    for (; j < D; j++) {
        out[j] = 0;
        for (int64_t t = 0; t < n; t++) out[j] += r[t] * rows[t * D + j];
    }
}
#else
static APART void four(const int8_t *const w[4], const int16_t *restrict r, int64_t k, int32_t out[4]) {
    const int8_t *a = w[0], *b = w[1], *c = w[2], *d = w[3];
    int32_t sa = 0, sb = 0, sc = 0, sd = 0;
    for (int64_t j = 0; j < k; j++) sa += a[j] * r[j], sb += b[j] * r[j], sc += c[j] * r[j], sd += d[j] * r[j];
    out[0] = sa, out[1] = sb, out[2] = sc, out[3] = sd;
}
static APART void four_by_two(const int8_t *const w[4], const int16_t *restrict r, const int16_t *restrict s, int64_t k,
                              int32_t out_r[4], int32_t out_s[4]) {
    const int8_t *a = w[0], *b = w[1], *c = w[2], *d = w[3];
    int32_t ra = 0, rb = 0, rc = 0, rd = 0, sa = 0, sb = 0, sc = 0, sd = 0;
    for (int64_t j = 0; j < k; j++) {
        ra += a[j] * r[j], rb += b[j] * r[j], rc += c[j] * r[j], rd += d[j] * r[j];
        sa += a[j] * s[j], sb += b[j] * s[j], sc += c[j] * s[j], sd += d[j] * s[j];
    }
    out_r[0] = ra, out_r[1] = rb, out_r[2] = rc, out_r[3] = rd;
    out_s[0] = sa, out_s[1] = sb, out_s[2] = sc, out_s[3] = sd;
}
static void mix(const int8_t *rows, int16_t *r, int64_t n, int64_t D, int32_t *restrict out) {
    memset(out, 0, D * sizeof *out);
    for (int64_t t = 0; t < n; t++)
        for (int64_t j = 0; j < D; j++) out[j] += r[t] * rows[t * D + j];
}
#endif

/* the largest integers for a vector of k, whose products with int8 have room for their sum */
static inline float limit_of(int64_t k) {
    const int64_t room = INT32_MAX / (127 * k);
    return room < INT16_MAX ? room : INT16_MAX;
}

/* four rows from i on, of `last` + 1, each k apart; the last one again in place of those that are missing */
static inline void four_rows(const int8_t *first, int64_t apart, int64_t i, int64_t last, const int8_t *w[4]) {
    for (int s = 0; s < 4; s++) w[s] = first + (i + s < last ? i + s : last) * apart;
}

/* y (4, or as many as are left) = the sums of rows i to i + 3, as they were before x was rounded, plus bias */
static inline void scale_four(const Matrix *m, int64_t i, const int32_t sums[4], float back, float *y) {
    typedef float Four __attribute__((vector_size(16)));
    typedef int32_t Whole __attribute__((vector_size(16)));
    Whole whole;
    memcpy(&whole, sums, sizeof whole);
    Four values = __builtin_convertvector(whole, Four) * back, scale, bias;
    if (i + 4 > m->n) {
        for (int s = 0; i + s < m->n; s++) y[s] = values[s] * m->scale[i + s] + (m->bias ? m->bias[i + s] : 0);
        return;
    }
    memcpy(&scale, m->scale + i, sizeof scale);
    values *= scale;
    if (m->bias) memcpy(&bias, m->bias + i, sizeof bias), values += bias;
    memcpy(y, &values, sizeof values);
}

/* y (n, m.n) = m x + bias, of each x (n, m.k) */
static void product(const Model *model, const Matrix *m, const float *x, int64_t n, float *y) {
    const int64_t k = m->k, last = m->n - 1;
    const float limit = limit_of(k);
    #pragma omp parallel for schedule(static) if (8 * n * k > SHARED)
    for (int64_t t = 0; t < n; t++) model->back[t] = round_vector(x + t * k, k, limit, model->rounded + t * k);
    /* in 16 parts, as a core may have other work, too */
    #pragma omp parallel for schedule(dynamic, m->n / 64 + 1) if (m->n * k * n > SHARED)
    for (int64_t i = 0; i < m->n; i += 4) {
        const int8_t *w[4];
        four_rows(m->q, k, i, last, w);
#ifndef __AVX2__
        for (int64_t j = 0; j < 4 * k; j += 64) __builtin_prefetch(w[0] + 8 * k + j); /* two rounds ahead; harmless at the end */
#endif
        for (int64_t t = 0; t < n; t += 2) {
            const int16_t *r = model->rounded + t * k;
            int32_t sums[2][4];
            const int64_t both = t + 1 < n ? 2 : 1;
            if (both == 2) four_by_two(w, r, r + k, k, sums[0], sums[1]);
            else four(w, r, k, sums[0]);
            for (int64_t u = 0; u < both; u++) scale_four(m, i, sums[u], model->back[t + u], y + (t + u) * m->n + i);
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

/* the vectors in the cache of a token's row, in a layer and head */
static inline Cache part_of(const Model *model, const Cache *cache, const Token *token, int64_t layer, int64_t head) {
    const int64_t at = ((token->row * model->n_layer + layer) * model->n_kv + head) * model->block_size, D = model->head_dim;
    return (Cache){cache->keys + at * D, cache->values + at * D, cache->key_scale + at, cache->value_scale + at};
}

static float round_to_bytes(const float *x, int64_t D, int16_t *restrict r, int8_t *restrict bytes) {
    const float back = round_vector(x, D, INT8_MAX, r);
    for (int64_t j = 0; j < D; j++) bytes[j] = (int8_t)r[j];
    return back;
}

/* store keys and values of all tokens */
static void extend(const Model *model, const Cache *cache, int64_t layer, int64_t n, const Token *tokens) {
    const int64_t D = model->head_dim, n_head = model->n_head, n_kv = model->n_kv;
    #pragma omp parallel for schedule(static) if (16 * n * n_kv * D > SHARED)
    for (int64_t t = 0; t < n; t++) {
        const int64_t position = tokens[t].position;
        float *k = model->qkv + (t * (n_head + 2 * n_kv) + n_head) * D, *v = k + n_kv * D;
        for (int64_t i = 0; i < n_kv; i++) {
            const Cache part = part_of(model, cache, tokens + t, layer, i);
            place(model, model->blocks[layer].k_norm.weight, k + i * D, position);
            part.key_scale[position] = round_to_bytes(k + i * D, D, model->rounded + t * D, part.keys + position * D);
            part.value_scale[position] = round_to_bytes(v + i * D, D, model->rounded + t * D, part.values + position * D);
        }
    }
}

/* the attention output of one head over S vectors of the cache, KEYS at a time: when a larger score comes, what was summed is
 * scaled down */
static void attend_head(const int16_t *q, float scale, const Cache *part, int64_t S, int64_t D, float *restrict out) {
    float largest = -1e30f, total = 0, scores[KEYS];
    int16_t rounded[KEYS + 1]; /* scores */
    int32_t products[KEYS], sums[D];
    const int8_t *w[4];
    memset(out, 0, D * sizeof(float));
    for (int64_t from = 0; from < S; from += KEYS) {
        const int64_t n = S - from < KEYS ? S - from : KEYS;
        for (int64_t t = 0; t < n; t++) __builtin_prefetch(part->values + (from + t) * D);
        for (int64_t t = 0; t < n; t += 4) {
            four_rows(part->keys, D, from + t, S - 1, w);
            four(w, q, D, products + t);
        }
        float top = largest;
        for (int64_t t = 0; t < n; t++) {
            scores[t] = products[t] * scale * part->key_scale[from + t];
            top = scores[t] > top ? scores[t] : top;
        }
        const float shrink = exponential(largest - top);
        for (int64_t t = 0; t < n; t++) scores[t] = exponential(scores[t] - top);
        total = total * shrink + sum(scores, n);
        largest = top;
        for (int64_t t = 0; t < n; t++) scores[t] *= part->value_scale[from + t];
        const float back = round_vector(scores, n, INT16_MAX, rounded);
        mix(part->values + from * D, rounded, n, D, sums);
        for (int64_t j = 0; j < D; j++) out[j] = out[j] * shrink + sums[j] * back;
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
        const float scale = round_vector(q, D, limit_of(D), r) / sqrtf((float)D);
        const Cache part = part_of(model, cache, tokens + t, layer, head / (n_head / n_kv));
        attend_head(r, scale, &part, S, D, y + i * D);
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
