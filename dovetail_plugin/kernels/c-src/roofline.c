/* The limits of this machine, for benchmarks: how fast memory is read, and how fast the kernels' instructions multiply.
 *
 * A mix is what a kernel does for each broadcast number, with everything else left out: weights and sums stay in
 * registers, and the numbers come from the first cache.
 */
#include "kernels.h"

#ifdef HAS_KERNELS
#include "steps_avx2.h"

enum mix { MIX_INT8 = 0, MIX_INT4 = 1, MIX_FLOAT = 2, MIXES = 3 };
enum { STEPS = 16, MOST_SUMS = 16, ROUNDS = 256 /* of a task */, BLOCK = 256, PART = 1 << 20 };

/* Defines a loop of ROUNDS * STEPS * count steps, each of which adds products of `a` and of `b` to a sum of its own. */
#define LOOP(name, isa, vector, load, count, step)                                           \
    static __attribute__((target(isa))) void name(const int32_t *numbers) {                  \
        vector sums[count];                                                                  \
        const vector a = load((const void *)numbers), b = load((const void *)(numbers + 16)); \
        _Pragma("GCC unroll 16") for (int i = 0; i < count; i++) sums[i] = a;                \
        for (int round = 0; round < ROUNDS; round++)                                         \
            _Pragma("GCC unroll 16") for (int n = 0; n < STEPS; n++)                         \
                _Pragma("GCC unroll 16") for (int i = 0; i < count; i += 2)                  \
                    step(sums[i], sums[i + 1], a, b, numbers[n * MOST_SUMS + i]);            \
        _Pragma("GCC unroll 16") for (int i = 0; i < count; i++) __asm__ volatile("" ::"v"(sums[i])); \
    }

/* The kernels broadcast four 8-bit numbers for each half of a panel. */
#define STEP_OF_FOURS(left, right, a, b, number)                                       \
    do {                                                                               \
        ADD_FOURS(left, a, number);                                                    \
        ADD_FOURS(right, b, number);                                                   \
    } while (0)
/* Assembly, because gcc would broadcast the numbers once, before the loop. */
#define STEP_OF_TWO(instruction, left, right, a, b, number)                            \
    do {                                                                               \
        __m256i x;                                                                     \
        __asm__("vpbroadcastd %3, %2\n\t" instruction " %2, %4, %0\n\t" instruction " %2, %5, %1" \
                : "+x"(left), "+x"(right), "=&x"(x)                                    \
                : "m"(number), "x"(a), "x"(b));                                        \
    } while (0)
#define STEP_OF_512(instruction, left, right, a, b, number)                            \
    __asm__(instruction " %2%{1to16%}, %3, %0\n\t" instruction " %2%{1to16%}, %4, %1"  \
            : "+v"(left), "+v"(right)                                                  \
            : "m"(number), "v"(a), "v"(b))

#define FMA(...) STEP_OF_TWO("vfmadd231ps", __VA_ARGS__)
#define DPWSSD(...) STEP_OF_TWO("%{vex%} vpdpwssd", __VA_ARGS__)
#define DPBUSD(...) STEP_OF_TWO("%{vex%} vpdpbusd", __VA_ARGS__)
#define FMA_512(...) STEP_OF_512("vfmadd231ps", __VA_ARGS__)
#define DPWSSD_512(...) STEP_OF_512("vpdpwssd", __VA_ARGS__)
#define DPBUSD_512(...) STEP_OF_512("vpdpbusd", __VA_ARGS__)

LOOP(avx2_int8, "avx2", __m256i, _mm256_loadu_si256, 12, ADD_PAIRS)
LOOP(avx2_int4, "avx2", __m256i, _mm256_loadu_si256, 12, STEP_OF_FOURS)
LOOP(avx2_float, "avx2,fma", __m256i, _mm256_loadu_si256, 12, FMA)
LOOP(avx_vnni_int8, "avx2,avxvnni", __m256i, _mm256_loadu_si256, 12, DPWSSD)
LOOP(avx_vnni_int4, "avx2,avxvnni", __m256i, _mm256_loadu_si256, 12, DPBUSD)
LOOP(avx512_int8, "avx512f,avx512vnni", __m512i, _mm512_loadu_si512, 16, DPWSSD_512)
LOOP(avx512_int4, "avx512f,avx512vnni", __m512i, _mm512_loadu_si512, 16, DPBUSD_512)
LOOP(avx512_float, "avx512f", __m512i, _mm512_loadu_si512, 16, FMA_512)

struct loop {
    void (*run)(const int32_t *numbers);
    int64_t sums, products; /* products that are added to one sum in a step */
};

static const struct loop loops[3][MIXES] = {
    [AVX2] = {{avx2_int8, 12, 16}, {avx2_int4, 12, 32}, {avx2_float, 12, 8}},
    [AVX_VNNI] = {{avx_vnni_int8, 12, 16}, {avx_vnni_int4, 12, 32}, {avx2_float, 12, 8}},
    [AVX512_VNNI] = {{avx512_int8, 16, 32}, {avx512_int4, 16, 64}, {avx512_float, 16, 16}},
};

struct multiply {
    const struct loop *loop;
    int64_t tasks, next_task;
};

static void multiply_tasks(void *data) {
    struct multiply *job = data;
    int32_t numbers[STEPS * MOST_SUMS];
    for (uint32_t i = 0; i < STEPS * MOST_SUMS; i++) /* as floats, these are between 1 and 2 */
        numbers[i] = (int32_t)(0x3f800000u | (i * 2654435761u) >> 9);
    while (__atomic_fetch_add(&job->next_task, 1, __ATOMIC_RELAXED) < job->tasks) job->loop->run(numbers);
}

/* Multiplies and adds as fast as a set of instructions can with a mix, in all threads. A task takes some microseconds.
 *
 * Returns the number of products that were added, or -1 if the mix or the set of instructions is not one of this
 * library's, or a number is below 1. */
EXPORT int64_t dovetail_multiply(int mix, int instructions, int64_t tasks, int threads) {
    if (mix < MIX_INT8 || mix > MIX_FLOAT || instructions < AVX2 || instructions > AVX512_VNNI) return -1;
    if (tasks < 1 || threads < 1) return -1;
    struct multiply job = {&loops[instructions][mix], tasks, 0};
    in_threads(multiply_tasks, &job, threads);
    return tasks * ROUNDS * STEPS * job.loop->sums * job.loop->products;
}

struct read {
    const char *bytes;
    int64_t count, next_part;
};

static __attribute__((target("avx2"))) void read_tasks(void *data) {
    struct read *job = data;
    __m256i seen = _mm256_setzero_si256();
    for (;;) {
        const int64_t from = __atomic_fetch_add(&job->next_part, 1, __ATOMIC_RELAXED) * PART;
        if (from >= job->count) break;
        const int64_t to = from + PART < job->count ? from + PART : job->count;
        for (int64_t at = from; at + BLOCK <= to; at += BLOCK) {
#pragma GCC unroll 8
            for (int i = 0; i < BLOCK; i += 32)
                seen = _mm256_or_si256(seen, _mm256_loadu_si256((const __m256i *)(job->bytes + at + i)));
#pragma GCC unroll 4
            for (int i = 0; i < BLOCK; i += 64) __builtin_prefetch(job->bytes + at + PREFETCH_AHEAD + i, 0, 2);
        }
    }
    __asm__ volatile("" ::"x"(seen));
}

/* Reads memory once, in whole blocks of 256 bytes, in all threads. Returns 0, or -1 if a number is below 1. */
EXPORT int dovetail_read(const void *bytes, int64_t count, int threads) {
    if (count < 1 || threads < 1) return -1;
    struct read job = {bytes, count, 0};
    in_threads(read_tasks, &job, threads);
    return 0;
}
#endif
