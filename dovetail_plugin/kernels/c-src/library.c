/* The functions that Python calls, and how their work is divided among threads. */
#include <string.h>

#include "kernels.h"

/* OpenMP's entry for parallel regions, as torch's own copy of the library has it. Work in torch's threads does not fight
 * with torch for the cores, as threads of a second library would. */
typedef void parallel_function(void (*work)(void *), void *data, unsigned threads, unsigned flags);

static parallel_function *run_parallel;

/* Returns the number of the interface; see kernels.h. */
EXPORT int dovetail_interface(void) { return INTERFACE; }

/* Gives the library torch's threads: the address of GOMP_parallel, or NULL for one thread. */
EXPORT void dovetail_use_threads(parallel_function *function) { run_parallel = function; }

#ifdef HAS_KERNELS

/* Returns the sets of instructions that this CPU and its system have: bit n is set for number n. 0: there is none. */
EXPORT int dovetail_instructions(void) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return 0;
    const int avx512 = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return 1 << AVX2 | (__builtin_cpu_supports("avxvnni") != 0) << AVX_VNNI | avx512 << AVX512_VNNI;
}

/* A product of rows with weights; see `dovetail_linear`. */
struct linear {
    const uint8_t *weights;
    int64_t outputs, groups, panels;
    size_t panel_bytes;
    struct activations in;
    const struct kernel *kernel;
    const void *bias;
    void *out;
    enum number_type type;
    int64_t panels_a_task, tasks;
    int64_t next_task;
};

/* Writes the sums of some rows and one panel into the result. */
static void store(const struct linear *job, int64_t panel, int64_t first, int64_t count, float *sums) {
    const int64_t left = job->outputs - panel * PANEL, width = left < PANEL ? left : PANEL;
    const size_t size = job->type == FLOAT32 ? 4 : 2;
    char whole[PANEL * 4] = {0};
    float bias[PANEL];
    if (job->bias) memcpy(whole, (const char *)job->bias + panel * PANEL * size, width * size);
    to_floats(whole, job->type, PANEL, bias);
    for (int64_t r = 0; r < count; r++) {
        float *row = sums + r * PANEL;
        for (int64_t i = 0; i < width; i++) row[i] += bias[i];
        char converted[PANEL * 4];
        from_floats(row, job->type, PANEL, converted);
        memcpy((char *)job->out + ((first + r) * job->outputs + panel * PANEL) * size, converted, width * size);
    }
}

/* Computes some panels for all rows. The rows take turns with the panels, so that both are read from a cache. */
static void some_panels(const struct linear *job, int64_t from, int64_t to) {
    const int64_t rows = job->in.rows, most = job->kernel->most_rows, calls = (rows + most - 1) / most;
    float sums[MOST_ROWS * PANEL];
    for (int64_t c = 0; c < calls; c++) { /* near-equal parts of the rows */
        const int64_t first = rows * c / calls, count = rows * (c + 1) / calls - first;
        for (int64_t p = from; p < to; p++) {
            job->kernel->run(job->weights + p * job->panel_bytes, job->groups, &job->in, first, count, sums);
            store(job, p, first, count, sums);
        }
    }
}

static void linear_tasks(void *data) {
    struct linear *job = data;
    for (;;) {
        const int64_t task = __atomic_fetch_add(&job->next_task, 1, __ATOMIC_RELAXED);
        if (task >= job->tasks) return;
        const int64_t from = task * job->panels_a_task, to = from + job->panels_a_task;
        some_panels(job, from, to < job->panels ? to : job->panels);
    }
}

/* Opening a parallel region takes about 5 us, in which a core reads some 64 KiB. */
int worth(int64_t bytes, int threads) {
    const int64_t most = bytes >> 16;
    return most < threads ? (most > 1 ? (int)most : 1) : threads;
}

void in_threads(void (*work)(void *), void *data, int threads) {
    if (run_parallel && threads > 1)
        run_parallel(work, data, (unsigned)threads, 0);
    else
        work(data);
}

/* Multiplies quantized rows with packed weights: out[r][m] = sum over k of in[r][k] * W[m][k], plus bias[m].
 *
 * weights       packed weights, `outputs` x 32 * `groups`
 * numbers, scales, offsets   from `dovetail_quantize`, for this format
 * bias          [outputs] of `type`, or NULL
 * out           [rows][outputs] of `type`
 * instructions  number of a set that this CPU has
 *
 * Returns 0, or -1 if a number of a format, type or set of instructions is not one of this library's, or a size is 0 or
 * not one that the format has.
 */
EXPORT int dovetail_linear(const void *weights, int64_t outputs, int64_t groups, int format, const void *numbers,
                           const float *scales, const void *offsets, int64_t rows, const void *bias, void *out,
                           int type, int instructions, int threads) {
    const struct kernel *kernels[] = {avx2_kernels, avx_vnni_kernels, avx512_kernels};
    if (format < INT8 || format >= FORMATS || type < FLOAT32 || type > FLOAT16) return -1;
    if (instructions < AVX2 || instructions > AVX512_VNNI) return -1;
    if (outputs < 1 || groups < 1 || rows < 1 || threads < 1) return -1;
    const int in_blocks = format == Q4_K || format == Q6_K;
    if (in_blocks && groups % BLOCK_GROUPS) return -1;
    struct linear job = {
        .weights = weights,
        .outputs = outputs,
        .groups = groups,
        .panels = (outputs + PANEL - 1) / PANEL,
        .panel_bytes = in_blocks ? (size_t)groups / BLOCK_GROUPS * block_bytes(format)
                                 : (size_t)groups * group_bytes(format),
        .in = {numbers, scales, offsets, rows},
        .kernel = &kernels[instructions][format],
        .bias = bias,
        .out = out,
        .type = type,
    };
    /* Tasks of about 256 KiB of weights fit a cache beside the rows; there are enough of them for all threads. */
    threads = worth((rows + 7) / 8 * job.panels * (int64_t)job.panel_bytes, threads);
    const int64_t cached = (256 << 10) / (int64_t)job.panel_bytes, even = job.panels / (4 * (int64_t)threads);
    job.panels_a_task = cached < even ? cached : even;
    if (job.panels_a_task < 1) job.panels_a_task = 1;
    job.tasks = (job.panels + job.panels_a_task - 1) / job.panels_a_task;
    in_threads(linear_tasks, &job, threads);
    return 0;
}

/* Rows to quantize; see `dovetail_quantize`. */
struct quantize {
    const char *in;
    enum number_type type;
    int64_t rows, inputs, groups;
    enum format format;
    void *numbers;
    float *scales;
    void *offsets;
    int64_t next_group;
};

static void quantize_group(const struct quantize *job, int64_t group) {
    const size_t size = job->type == FLOAT32 ? 4 : 2;
    const int64_t left = job->inputs - group * GROUP, width = left < GROUP ? left : GROUP;
    for (int64_t r = 0; r < job->rows; r++) {
        const int64_t at = group * job->rows + r;
        const char *from = job->in + (r * job->inputs + group * GROUP) * size;
        char whole[GROUP * 4] = {0};
        float values[GROUP];
        if (width < GROUP) from = memcpy(whole, from, width * size);
        to_floats(from, job->type, GROUP, values);
        if (is_wide(job->format)) {
            quantize_16_bits(values, (int16_t *)job->numbers + at * GROUP, job->scales + at);
            continue;
        }
        int32_t offset;
        quantize_8_bits(values, (int8_t *)job->numbers + at * GROUP, job->scales + at, &offset);
        if (job->format == INT4)
            ((int32_t *)job->offsets)[at] = offset;
        else
            ((float *)job->offsets)[at] = job->scales[at] * (float)(offset / 8);
    }
}

static void quantize_tasks(void *data) {
    struct quantize *job = data;
    const int64_t most = 8; /* groups of one task */
    for (;;) {
        const int64_t from = __atomic_fetch_add(&job->next_group, most, __ATOMIC_RELAXED);
        if (from >= job->groups) return;
        for (int64_t g = from; g < from + most && g < job->groups; g++) quantize_group(job, g);
    }
}

/* Quantizes rows for weights of a format.
 *
 * in       [rows][inputs] of `type`
 * numbers  [groups][rows][32] int16 for INT8 and Q6_K, int8 for the others; groups = inputs / 32, rounded up
 * scales   [groups][rows]
 * offsets  [groups][rows], int32 for INT4 and floats for Q4_K; not written for the others
 *
 * Returns 0, or -1 if the number of the format or type is not one of this library's.
 */
EXPORT int dovetail_quantize(const void *in, int type, int64_t rows, int64_t inputs, int format, void *numbers,
                             float *scales, void *offsets, int threads) {
    if (format < INT8 || format >= FORMATS || type < FLOAT32 || type > FLOAT16) return -1;
    struct quantize job = {in, type, rows, inputs, (inputs + GROUP - 1) / GROUP, format, numbers, scales, offsets, 0};
    in_threads(quantize_tasks, &job, worth(rows * inputs, threads));
    return 0;
}

#else

EXPORT int dovetail_instructions(void) { return 0; }

#endif
