/* Products of a few rows with packed weights, on a CPU. Plain C; the functions marked EXPORT are the library.
 *
 * Weights W (M outputs, K inputs) are packed in panels of 16 outputs. A panel is a stream of groups of 32 inputs. K and M
 * are filled up with zeros. A group holds 16 scales in half precision, one for each output, and then the numbers:
 *
 *   INT8  512 bytes: for each pair of inputs, two numbers of each output.       Weight = scale * number.
 *   INT4  256 bytes: for each eight inputs, four numbers of each output in the   Weight = scale * (number - 8).
 *         low halves of 64 bytes and the next four in the high halves.
 *
 * So these are the numbers of GGUF's Q8_0 and Q4_0, in another order.
 *
 * Activations are quantized for each row and group: to 16 bits for INT8 and to 8 bits for INT4. The products of a group
 * are added up as integers, exactly. The sums of the groups are then added as floats, one after another, with the same
 * operations whatever the instruction set and the number of rows. So the result of a row has the same bits alone and in
 * company, and on every CPU.
 */
#ifndef DOVETAIL_KERNELS_H
#define DOVETAIL_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* GCC's way to choose instructions for a file is used, and AVX-VNNI needs GCC 11. Other compilers make a library that
 * says it has no kernels. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 11
#define HAS_KERNELS 1
#endif
#endif

/* Number of the functions' signatures; raised with each change, so that a library of an earlier build is not called. */
enum { INTERFACE = 3 };

enum { PANEL = 16, GROUP = 32, MOST_ROWS = 12 /* of one call of a kernel */ };
enum format { INT8 = 0, INT4 = 1 };
enum number_type { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum instructions { AVX2 = 0, AVX_VNNI = 1, AVX512_VNNI = 2 };

/* Bytes of one group of a panel. */
static inline size_t group_bytes(enum format format) {
    return PANEL * sizeof(uint16_t) + (format == INT8 ? PANEL * GROUP : PANEL * GROUP / 2);
}

/* Bytes between the group that a kernel works on and the one that it fetches: about a microsecond of reading. */
enum { PREFETCH_AHEAD = 4096 };

/* Fetches all lines of a group further on. What the CPU fetches by itself ends at each page, and comes late when the
 * kernel works on several rows. The second level of the caches is near enough, and has room. */
static inline __attribute__((always_inline)) void prefetch_group(const uint8_t *group, enum format format) {
#pragma GCC unroll 16
    for (size_t at = 0; at < group_bytes(format); at += 64) __builtin_prefetch(group + PREFETCH_AHEAD + at, 0, 2);
}

/* Quantized activations of `rows` rows. `numbers` is [group][row][32] int16 or int8, `scales` is [group][row]. For INT4,
 * `offsets` is [group][row]: minus eight times the sum of the numbers, which is where the sum of a group begins. */
struct activations {
    const void *numbers;
    const float *scales;
    const int32_t *offsets;
    int64_t rows;
};

/* Sums over all groups for the rows first..first+count-1 and one panel, into sums[row - first][16].
 * `count` is at most the largest number of rows that the function takes. */
typedef void panel_function(const uint8_t *panel, int64_t groups, const struct activations *in, int64_t first,
                            int64_t count, float *sums);

struct kernel {
    panel_function *run;
    int64_t most_rows; /* of one call, at most MOST_ROWS */
};

extern const struct kernel avx2_kernels[2], avx_vnni_kernels[2], avx512_kernels[2];

/* Quantizes one group of 32 floats for INT8 and INT4 weights. */
void quantize_16_bits(const float *values, int16_t *numbers, float *scale);
void quantize_8_bits(const float *values, int8_t *numbers, float *scale, int32_t *offset);

/* Calls `work` in up to `threads` of torch's threads, if there are any; it takes its part of the work itself. */
void in_threads(void (*work)(void *), void *data, int threads);

/* Converts `count` numbers from or to floats; `count` is a multiple of 8. */
void to_floats(const void *from, enum number_type type, int64_t count, float *to);
void from_floats(const float *from, enum number_type type, int64_t count, void *to);

#endif
