/* One block of the keys that rows see: scores, weights, and weighted values. */
#include <math.h>
#include <string.h>

#include "attention.h"

#ifdef HAS_KERNELS
#pragma GCC target("avx2,f16c,fma")
#include "vector_math.h"

/* Returns up to eight numbers of a type as floats, and zeros behind them. */
INLINE __m256 few_floats(const char *from, enum number_type type, int64_t count) {
    char whole[32] = {0};
    return eight_floats(count < 8 ? memcpy(whole, from, count * bytes_of(type)) : from, type);
}

/* Converts `count` numbers to floats times a factor, and fills up with zeros to a multiple of eight. */
static void load_floats(const char *from, enum number_type type, int64_t count, float factor, float *to) {
    for (int64_t i = 0; i < count; i += 8) {
        const __m256 x = few_floats(from + i * bytes_of(type), type, count - i);
        _mm256_storeu_ps(to + i, _mm256_mul_ps(x, _mm256_set1_ps(factor)));
    }
}

static const char *key_of(const struct attention *call, int64_t head, int64_t key) {
    return (const char *)call->keys + (head * call->key_head + key * call->key_row) * bytes_of(call->type);
}

static const char *value_of(const struct attention *call, int64_t head, int64_t key) {
    return (const char *)call->values + (head * call->value_head + key * call->value_row) * bytes_of(call->type);
}

/* Writes eight vectors as the eight columns of a matrix whose rows are `stride` floats apart. */
INLINE void transpose(const __m256 *in, float *out, int64_t stride) {
    __m256 a[8], b[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps(in[i], in[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps(in[i], in[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
        b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
        b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
        b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(out + i * stride, _mm256_permute2f128_ps(b[i], b[i + 4], 0x20));
        _mm256_storeu_ps(out + (i + 4) * stride, _mm256_permute2f128_ps(b[i], b[i + 4], 0x31));
    }
}

/* Writes eight keys, or fewer and zeros, as columns: out[d][i] is number d of key i. */
static void transpose_eight(const struct attention *call, int64_t head, const int32_t *keys, int64_t count, float *out,
                            int64_t stride) {
    const size_t bytes = bytes_of(call->type);
    const char *from[8];
    for (int64_t k = 0; k < 8; k++) from[k] = key_of(call, head, keys[k < count ? k : 0]);
    for (int64_t d = 0; d < call->size; d += 8) {
        const int64_t numbers = smaller(call->size - d, 8);
        float last[64];
        __m256 in[8];
        for (int64_t k = 0; k < 8; k++) {
            const char *at = from[k] + d * bytes;
            _mm_prefetch(at + 16 * call->key_row * (int64_t)bytes, _MM_HINT_T0);
            in[k] = k < count ? few_floats(at, call->type, numbers) : _mm256_setzero_ps();
        }
        transpose(in, numbers < 8 ? last : out + d * stride, numbers < 8 ? 8 : stride);
        for (int64_t n = 0; numbers < 8 && n < numbers; n++) memcpy(out + (d + n) * stride, last + 8 * n, 32);
    }
}

/* Writes keys as columns; those up to a multiple of 16 are zeros. */
static void transpose_keys(const struct attention *call, int64_t head, const int32_t *keys, int64_t count, float *out) {
    const int64_t stride = filled_up(count, 16);
    for (int64_t i = 0; i < stride; i += 8) {
        const int64_t left = count - i;
        transpose_eight(call, head, keys + (left > 0 ? i : 0), left > 0 ? smaller(left, 8) : 0, out + i, stride);
    }
}

/* Finds the values of keys as rows of `width` floats: in the cache, or converted. */
static void find_values(const struct job *job, int64_t head, const int32_t *keys, int64_t count, float *out,
                        const float **rows) {
    const struct attention *call = job->call;
    for (int64_t i = 0; i < count; i++) {
        const char *from = value_of(call, head, keys[i]);
        if (call->type == FLOAT32 && call->value_size == job->width) {
            rows[i] = (const float *)from;
            for (int64_t byte = 0; byte < call->value_size * 4; byte += 64) _mm_prefetch(from + byte, _MM_HINT_T1);
            continue;
        }
        float *to = out + i * job->width;
        memset(to + job->width - 16, 0, 16 * sizeof(float));
        load_floats(from, call->type, call->value_size, 1, to);
        rows[i] = to;
    }
}

/* Returns the number of keys of a block that a row sees behind the common ones, and where they begin. */
static int64_t own_keys(const struct job *job, int64_t row, int64_t block, const int32_t **keys) {
    const int64_t first = block * BLOCK - job->visible.common, from = first > 0 ? first : 0;
    const int64_t count = smaller(job->visible.others[row], first + BLOCK) - from;
    *keys = job->visible.other_keys + row * job->visible.room + from;
    return count > 0 ? count : 0;
}

/* Joins two ascending lists. Returns the length of the new one, or -1 if it is longer than `most`. */
static int64_t joined(const int32_t *a, int64_t count_a, const int32_t *b, int64_t count_b, int32_t *out,
                      int64_t most) {
    int64_t i = 0, j = 0, n = 0;
    while (i < count_a || j < count_b) {
        if (n == most) return -1;
        const int32_t key = j >= count_b || (i < count_a && a[i] <= b[j]) ? a[i] : b[j];
        i += i < count_a && a[i] == key;
        j += j < count_b && b[j] == key;
        out[n++] = key;
    }
    return n;
}

/* Collects the keys of a block that rows from `row` on see, the `shared` ones first. Returns the first row whose keys
 * have no room; `count` is the number of keys. */
static int64_t collect_keys(const struct job *job, struct workspace *space, int64_t block, int64_t row, int64_t end,
                            int64_t shared, int64_t *count) {
    int32_t *others = space->keys + shared;
    int64_t found = 0;
    if (shared) memcpy(space->keys, job->visible.common_keys + block * BLOCK, shared * sizeof(int32_t));
    for (; row < end; row++) {
        const int32_t *own;
        const int64_t more = own_keys(job, row, block, &own);
        const int64_t length = joined(others, found, own, more, space->merged, MOST_KEYS - shared);
        if (length < 0) break;
        memcpy(others, space->merged, length * sizeof(int32_t));
        found = length;
    }
    *count = shared + found;
    return row;
}

/* Finds the places of a row's own keys, and their values. Returns how many there are. */
static int64_t find_own(const struct job *job, struct workspace *space, int64_t row, int64_t block, int64_t shared,
                        const float **values) {
    const int32_t *own;
    const int64_t count = own_keys(job, row, block, &own);
    for (int64_t i = 0, place = shared; i < count; i++) {
        while (space->keys[place] != own[i]) place++;
        space->places[i] = (int16_t)place;
        values[i] = space->values[place];
    }
    return count;
}

/* Reads what a row's mask adds to the scores of its keys in a block. */
static void find_added(const struct job *job, struct workspace *space, int64_t row, int64_t shared, int64_t own) {
    const struct attention *call = job->call;
    const size_t size = bytes_of(call->mask_type);
    const char *mask = (const char *)call->mask + (job->first_row + row) * call->mask_row * size;
    for (int64_t i = 0; i < shared + own; i++) {
        const int32_t key = space->keys[i < shared ? i : space->places[i - shared]];
        space->added[i] = _mm256_cvtss_f32(few_floats(mask + key * size, call->mask_type, 1));
    }
}

/* Turns scores into weights e^(score - maximum). Returns the maximum in out[0] and the sum of the weights in out[1]. */
static void weigh(float *scores, int64_t count, const float *added, float softcap, float *out) {
    __m256 most = _mm256_set1_ps(-INFINITY), sum = _mm256_setzero_ps();
    for (int64_t i = 0; i < count; i += 8) {
        __m256 x = _mm256_loadu_ps(scores + i);
        if (softcap != 0)
            x = _mm256_mul_ps(tanh_of(_mm256_div_ps(x, _mm256_set1_ps(softcap))), _mm256_set1_ps(softcap));
        if (added) x = _mm256_add_ps(x, _mm256_loadu_ps(added + i));
        _mm256_storeu_ps(scores + i, x);
        for (int64_t k = count; k < i + 8; k++) scores[k] = -INFINITY;
        most = _mm256_max_ps(most, _mm256_loadu_ps(scores + i));
    }
    float lanes[8], largest = -INFINITY;
    _mm256_storeu_ps(lanes, most);
    for (int i = 0; i < 8; i++) largest = lanes[i] > largest ? lanes[i] : largest;
    for (int64_t i = 0; i < count; i += 8) {
        const __m256 weight = exp_of(_mm256_sub_ps(_mm256_loadu_ps(scores + i), _mm256_set1_ps(largest)));
        _mm256_storeu_ps(scores + i, weight);
        sum = _mm256_add_ps(sum, weight);
    }
    _mm256_storeu_ps(lanes, sum);
    out[0] = largest;
    out[1] = ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

static void load_queries(const struct job *job, struct workspace *space, int64_t head, int64_t first, int64_t count) {
    const struct attention *call = job->call;
    for (int64_t i = 0; i < count; i++) {
        const int64_t row = job->first_row + (first + i) / job->group, of_group = (first + i) % job->group;
        const int64_t at = (head * job->group + of_group) * call->query_head + row * call->query_row;
        const char *from = (const char *)call->queries + at * bytes_of(call->type);
        load_floats(from, call->type, call->size, call->scale, space->queries + i * STRIDE);
    }
}

/* Computes a few queries and one block, whose keys are in the workspace. */
static void compute_tile(const struct job *job, struct workspace *space, int64_t head, int64_t block, int64_t first,
                         int64_t count, int64_t shared, int64_t keys) {
    const struct attention *call = job->call;
    int64_t own[TILE], runs[TILE];        /* of queries of the same row */
    float results[TILE][2];
    load_queries(job, space, head, first, count);
    job->multiply(space->queries, space->columns, space->scores, count, filled_up(keys, 16), call->size, 0);
    for (int64_t i = 0; i < count; i += runs[i]) {
        const int64_t row = (first + i) / job->group;
        runs[i] = smaller((row + 1) * job->group - first, count) - i;
        own[i] = find_own(job, space, row, block, shared, space->own_values[i]);
        if (call->mask_type >= 0) find_added(job, space, row, shared, own[i]);
        for (int64_t q = i; q < i + runs[i]; q++) {
            float *scores = space->scores + q * STRIDE;
            for (int64_t k = 0; k < own[i]; k++) scores[shared + k] = scores[space->places[k]];
            weigh(scores, shared + own[i], call->mask_type >= 0 ? space->added : NULL, call->softcap, results[q]);
        }
    }
    job->multiply(space->scores, space->values, space->sums, count, job->width, shared, 0);
    for (int64_t i = 0; i < count; i += runs[i]) {
        const float *weights = space->scores + i * STRIDE + shared;
        if (own[i])
            job->multiply(weights, space->own_values[i], space->sums + i * STRIDE, runs[i], job->width, own[i], 1);
        for (int64_t q = i; q < i + runs[i]; q++) {
            float *kept = sums_of(job, head, block, first + q);
            memcpy(kept, space->sums + q * STRIDE, job->width * sizeof(float));
            memcpy(kept + job->width, results[q], sizeof results[q]);
        }
    }
}

void compute_block(const struct job *job, struct workspace *space, int64_t head, int64_t block, int64_t row,
                   int64_t end) {
    const struct attention *call = job->call;
    const int64_t left = job->visible.common - block * BLOCK;
    const int64_t shared = left < 0 ? 0 : smaller(left, BLOCK);
    while (row < end) {
        int64_t keys;
        const int64_t next = collect_keys(job, space, block, row, end, shared, &keys);
        if (keys) {
            transpose_keys(call, head, space->keys, keys, space->numbers);
            for (int64_t d = 0; d < call->size; d++) space->columns[d] = space->numbers + d * filled_up(keys, 16);
            float *converted = space->numbers + call->size * MOST_KEYS;
            find_values(job, head, space->keys, keys, converted, space->values);
            const int64_t from = row * job->group, queries = (next - row) * job->group;
            const int64_t tiles = (queries + TILE - 1) / TILE;
            for (int64_t t = 0; t < tiles; t++) {
                const int64_t first = from + queries * t / tiles, after = from + queries * (t + 1) / tiles;
                compute_tile(job, space, head, block, first, after - first, shared, keys);
            }
        }
        row = next;
    }
}
#endif
