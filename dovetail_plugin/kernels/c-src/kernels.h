/* Products of a few rows with packed weights, attention and activations, on a CPU. Plain C; the functions marked EXPORT
 * are the library.
 *
 * Weights W (M outputs, K inputs) are packed in panels of 16 outputs. A panel is a stream of groups of 32 inputs. K and M
 * are filled up with zeros. A group holds 16 scales in half precision, one for each output, and then the numbers:
 *
 *   INT8  512 bytes: for each pair of inputs, two numbers of each output.       Weight = scale * number.
 *   INT4  256 bytes: for each eight inputs, four numbers of each output in the   Weight = scale * (number - 8).
 *         low halves of 64 bytes and the next four in the high halves.
 *
 * So these are the numbers of GGUF's Q8_0 and Q4_0, in another order. Those of Q4_K and Q6_K lie in blocks of eight groups,
 * and K is a multiple of 256. In front of the groups of a block lie scales in half precision, one for each output:
 *
 *   Q4_K  16 scales and 16 scales of minima. A group: 16 factors, 16 factors of minima (bytes), and numbers as in INT4.
 *         Weight = scale * factor * number - scale of the minimum * its factor.
 *   Q6_K  16 scales. A group: 16 signed factors (bytes) for its first 16 inputs, 16 for the others, and numbers as in
 *         INT8. Weight = scale * factor * number.
 *
 * Activations are quantized for each row and group: to 16 bits for INT8 and Q6_K and to 8 bits for INT4 and Q4_K. The
 * products of a group (of half a group in Q6_K) are added up as integers, exactly. The sums of the groups are then added as
 * floats, one after another, with the same operations whatever the instruction set and the number of rows. So the result
 * of a row has the same bits alone and in company, and on every CPU.
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

#define INLINE static inline __attribute__((always_inline))

/* GCC's way to choose instructions for a file is used, and AVX-VNNI needs GCC 11. Other compilers make a library that
 * says it has no kernels. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 11
#define HAS_KERNELS 1
#endif
#endif

/* Number of the functions' signatures; raised with each change, so that a library of an earlier build is not called. */
enum { INTERFACE = 6 };

enum { PANEL = 16, GROUP = 32, BLOCK_GROUPS = 8, MOST_ROWS = 12 /* of one call of a kernel */ };
enum format { INT8 = 0, INT4 = 1, Q4_K = 2, Q6_K = 3, FORMATS = 4 };
enum number_type { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum instructions { AVX2 = 0, AVX_VNNI = 1, AVX512_VNNI = 2 };

/* Whether weights of a format have 8-bit numbers, and activations have 16-bit ones. */
static inline int is_wide(enum format format) { return format == INT8 || format == Q6_K; }

/* Bytes of one group of a panel. Scales in half precision, and pairs of factors, take two bytes for each output. */
static inline size_t group_bytes(enum format format) {
    return PANEL * 2 + (is_wide(format) ? PANEL * GROUP : PANEL * GROUP / 2);
}

/* Bytes of the eight groups of one panel that have scales in common, for Q4_K and Q6_K. */
static inline size_t block_bytes(enum format format) {
    return (format == Q4_K ? PANEL * 4 : PANEL * 2) + BLOCK_GROUPS * group_bytes(format);
}

/* Bytes between the group that a kernel works on and the one that it fetches: some hundred nanoseconds of reading. */
enum { PREFETCH_AHEAD = 4096 };

/* Fetches all lines of a group further on. What the CPU fetches by itself ends at each page, and comes late when the
 * kernel works on several rows. The second level of the caches is near enough, and has room. */
INLINE void prefetch_group(const uint8_t *group, enum format format) {
#pragma GCC unroll 16
    for (size_t at = 0; at < group_bytes(format); at += 64) __builtin_prefetch(group + PREFETCH_AHEAD + at, 0, 2);
}

/* Quantized activations of `rows` rows. `numbers` is [group][row][32] int16 or int8, `scales` is [group][row]. For INT4,
 * `offsets` is [group][row]: minus eight times the sum of the numbers, which is where the sum of a group begins. For Q4_K
 * they are floats: minus the scale times the sum of the numbers, which a minimum is multiplied with. */
struct activations {
    const void *numbers;
    const float *scales;
    const void *offsets;
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

extern const struct kernel avx2_kernels[FORMATS], avx_vnni_kernels[FORMATS], avx512_kernels[FORMATS];

/* Quantizes one group of 32 floats to 16 bits, or to 8 with the sum's offset for INT4 and Q4_K. */
void quantize_16_bits(const float *values, int16_t *numbers, float *scale);
void quantize_8_bits(const float *values, int8_t *numbers, float *scale, int32_t *offset);

/* Converts `count` numbers from or to floats; `count` is a multiple of 8. */
void to_floats(const void *from, enum number_type type, int64_t count, float *to);
void from_floats(const float *from, enum number_type type, int64_t count, void *to);

/* Threads that reading so many bytes is worth, at most `threads`. */
int worth(int64_t bytes, int threads);

/* Runs a function in some of torch's threads, at the same time, or in the calling one. */
void in_threads(void (*work)(void *), void *data, int threads);

#endif
