/* The sums of all blocks, and how the work is divided among threads. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "attention.h"

#ifdef HAS_KERNELS
#pragma GCC target("avx2,f16c,fma")
#include "vector_math.h"

enum { MOST_BYTES = 32 << 20 /* of sums that are kept until they are added up */ };

/* Adds up the blocks of one query, and writes the result. */
static void add_blocks(const struct job *job, struct workspace *space, int64_t head, int64_t query) {
    const struct attention *call = job->call;
    const int64_t row = query / job->group, of_all = head * job->group + query % job->group;
    const int64_t blocks = (job->visible.common + job->visible.others[row] + BLOCK - 1) / BLOCK;
    const float sink = call->sinks ? call->sinks[of_all] : -INFINITY;
    float most = sink, weights[8], sum = 0, *total = space->sums;
    for (int64_t b = 0; b < blocks; b++) {
        const float of_block = sums_of(job, head, b, query)[job->width];
        most = of_block > most ? of_block : most;
    }
    memset(total, 0, job->width * sizeof(float));
    for (int64_t b = 0; b < blocks; b++) {
        const float *kept = sums_of(job, head, b, query);
        const __m256 weight = exp_of(_mm256_set1_ps(kept[job->width] - most));
        sum = fmaf(_mm256_cvtss_f32(weight), kept[job->width + 1], sum);
        for (int64_t d = 0; d < job->width; d += 8)
            _mm256_storeu_ps(total + d, _mm256_fmadd_ps(weight, _mm256_loadu_ps(kept + d), _mm256_loadu_ps(total + d)));
    }
    if (call->sinks) {
        _mm256_storeu_ps(weights, exp_of(_mm256_set1_ps(sink - most)));
        sum += weights[0];
    }
    const size_t size = bytes_of(call->type);
    char *out = (char *)call->out + ((job->first_row + row) * call->heads + of_all) * call->value_size * size;
    for (int64_t d = 0; d < call->value_size; d += 8) {
        float floats[8];
        char converted[32];
        for (int i = 0; i < 8; i++) floats[i] = blocks ? total[d + i] / sum : 0;
        from_floats(floats, call->type, 8, converted);
        memcpy(out + d * size, converted, smaller(call->value_size - d, 8) * size);
    }
}

/* A task is a part of the rows, and a block of a key head. Whoever does the last one of a head adds up its blocks. */
static void attention_tasks(void *data) {
    struct job *job = data;
    const int64_t own = __atomic_fetch_add(&job->next_workspace, 1, __ATOMIC_RELAXED);
    struct workspace *space = (void *)(job->workspaces + own * job->workspace_bytes);
    const int64_t of_head = job->blocks * job->parts, tasks = job->call->key_heads * of_head;
    for (;;) {
        const int64_t task = __atomic_fetch_add(&job->next_task, 1, __ATOMIC_RELAXED);
        if (task >= tasks) return;
        const int64_t head = task / of_head, block = task % of_head / job->parts, part = task % job->parts;
        compute_block(job, space, head, block, job->rows * part / job->parts, job->rows * (part + 1) / job->parts);
        if (__atomic_sub_fetch(&job->left[head], 1, __ATOMIC_ACQ_REL)) continue;
        for (int64_t query = 0; query < job->rows * job->group; query++) add_blocks(job, space, head, query);
    }
}

/* Computes the rows of a job. Returns -1 without memory. */
static int compute_rows(struct job *job, int threads) {
    const struct attention *call = job->call;
    if (find_visible(call, job->first_row, job->rows, &job->visible)) return -1;
    int64_t most = 0;
    for (int64_t r = 0; r < job->rows; r++)
        most = job->visible.others[r] > most ? job->visible.others[r] : most;
    const int64_t keys = job->visible.common + most;
    job->blocks = keys ? (keys + BLOCK - 1) / BLOCK : 1;
    const int64_t tasks = job->blocks * call->key_heads, wanted = threads > 1 ? 2 * threads : 1;
    job->parts = smaller((wanted + tasks - 1) / tasks, job->rows);
    job->next_workspace = job->next_task = 0;
    for (int64_t head = 0; head < call->key_heads; head++) job->left[head] = job->blocks * job->parts;
    in_threads(attention_tasks, job, threads);
    return 0;
}

/* Threads that a call is worth. A multiply-add takes about as long as reading a quarter of a byte. */
static int threads_for(const struct attention *call) {
    const int64_t numbers = call->cached * (call->size + call->value_size);
    return worth(numbers * call->heads * call->rows / 4 + numbers * call->key_heads * (int64_t)bytes_of(call->type),
                 call->threads);
}

/* Computes attention; see `struct attention`. With CAUSAL the last row sees all keys, and each row before it one less.
 *
 * Returns 0, -1 if a number or size is not one that this library takes, or -2 without memory.
 */
EXPORT int dovetail_attention(const struct attention *call) {
    if (call->type < FLOAT32 || call->type > FLOAT16) return -1;
    if (call->mask_type < NO_MASK || call->mask_type > FLOAT16) return -1;
    if (call->mask_type >= BOOL_MASK && !call->mask) return -1;
    if (call->instructions < AVX2 || call->instructions > AVX512_VNNI || call->threads < 1) return -1;
    if (call->rows < 1 || call->cached < 1 || call->cached > INT32_MAX - 8 || call->key_heads < 1) return -1;
    if (call->heads < 1 || call->heads % call->key_heads) return -1;
    if (call->size < 1 || call->size > MOST_SIZE || call->value_size < 1 || call->value_size > MOST_SIZE) return -1;
    const int threads = threads_for(call);
    struct job job = {.call = call, .group = call->heads / call->key_heads, .width = filled_up(call->value_size, 16)};
    job.multiply = call->instructions == AVX512_VNNI ? multiply_avx512 : multiply_avx2;
    const int64_t blocks = (call->cached + BLOCK - 1) / BLOCK;
    const int64_t row_bytes = blocks * call->heads * (job.width + 8) * (int64_t)sizeof(float);
    const int64_t fitting = row_bytes < MOST_BYTES ? MOST_BYTES / row_bytes : 1;
    const int64_t most_rows = smaller(smaller(fitting, ROWS_AT_ONCE), call->rows);
    job.workspace_bytes = filled_up(
        sizeof(struct workspace) + MOST_KEYS * (call->size + job.width) * (int64_t)sizeof(float), 64);
    job.workspaces = malloc(threads * job.workspace_bytes);
    job.sums = malloc(most_rows * row_bytes);
    job.left = malloc(call->key_heads * sizeof(int64_t));
    int failed = job.workspaces && job.sums && job.left ? 0 : -2;
    for (; !failed && job.first_row < call->rows; job.first_row += job.rows) {
        job.rows = smaller(call->rows - job.first_row, most_rows);
        failed = compute_rows(&job, threads) ? -2 : 0;
        free_visible(&job.visible);
    }
    free(job.workspaces), free(job.sums), free(job.left);
    return failed;
}
#endif
