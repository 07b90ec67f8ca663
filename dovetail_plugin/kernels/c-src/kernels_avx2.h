/* Kernels of 256-bit registers, included once for AVX2 and once for AVX-VNNI: half a panel fits a register.
 *
 * The file that includes this one defines
 *   ADD_PAIRS(left, right, a, b, pair)   adds the products of a and b with a pair of 16-bit numbers to two sums
 *   ADD_FOURS(part, w, fours)            adds the products of w with four 8-bit numbers to a part of a sum
 *   FIRST_PART(offset), SUM(part, offset)   how a part begins, and the sum that it holds in the end
 */
#include <immintrin.h>

#include "each_count.h"
#include "kernels.h"

enum { INT8_ROWS = 4, INT4_ROWS = 8 };

/* Adds the sum of one group to the float sums of a row and half a panel. */
INLINE void add_group(__m256i sum, __m256 weight_scales, float row_scale,
                      float *sums) {
    const __m256 scale = _mm256_mul_ps(weight_scales, _mm256_set1_ps(row_scale));
    _mm256_storeu_ps(sums, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, _mm256_loadu_ps(sums)));
}

/* Adds the sums of one group to the float sums of the rows, for both halves of a panel. */
INLINE void add_groups(const __m256i *left, const __m256i *right, __m256 left_scales, __m256 right_scales,
                       const float *scales, float *sums, const int rows) {
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        add_group(left[r], left_scales, scales[r], sums + r * PANEL);
        add_group(right[r], right_scales, scales[r], sums + r * PANEL + 8);
    }
}

INLINE void clear_sums(float *sums, const int rows) {
#pragma GCC unroll 16
    for (int i = 0; i < rows * 2; i++) _mm256_storeu_ps(sums + i * 8, _mm256_setzero_ps());
}

INLINE void clear_parts(__m256i *left, __m256i *right, const int rows) {
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) left[r] = right[r] = _mm256_setzero_si256();
}

INLINE __m256 half_scales(const uint8_t *group, int half) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)group + half));
}

INLINE __m256i widened(const uint8_t *bytes) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)bytes));
}

/* Adds the products of `count` pairs of inputs to the sums of the rows, for both halves of a panel. */
INLINE void add_pairs(const uint8_t *numbers, const int32_t *pairs, const int count,
                      __m256i *left, __m256i *right, const int rows) {
#pragma GCC unroll 2
    for (int p = 0; p < count; p++) {
        const __m256i a = widened(numbers + p * 32), b = widened(numbers + p * 32 + 16);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) ADD_PAIRS(left[r], right[r], a, b, pairs[r * (GROUP / 2) + p]);
    }
}

/* Adds the products of a group of 4-bit numbers to the parts of the rows, for half a panel. */
INLINE void add_fours(const uint8_t *numbers, const int32_t *fours, __m256i *parts,
                      const int rows) {
    const __m256i low = _mm256_set1_epi8(15);
#pragma GCC unroll 4
    for (int v = 0; v < GROUP / 8; v++) {
        const __m256i both = _mm256_loadu_si256((const __m256i *)(numbers + v * 64));
        const __m256i first_four = _mm256_and_si256(both, low);
        const __m256i next_four = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            ADD_FOURS(parts[r], first_four, fours[r * (GROUP / 4) + 2 * v]);
            ADD_FOURS(parts[r], next_four, fours[r * (GROUP / 4) + 2 * v + 1]);
        }
    }
}

INLINE void int8_rows(const uint8_t *panel, int64_t groups,
                      const struct activations *in, int64_t first, float *sums,
                      const int rows) {
    clear_sums(sums, rows);
    const int32_t *pairs = (const int32_t *)in->numbers + first * (GROUP / 2);
    const float *scales = in->scales + first;
    for (int64_t g = 0; g < groups; g++) {
        __m256i left[INT8_ROWS], right[INT8_ROWS];
        clear_parts(left, right, rows);
        const uint8_t *numbers = panel + PANEL * 2;
        prefetch_group(panel, INT8);
        add_pairs(numbers, pairs, GROUP / 2, left, right, rows);
        const __m256 left_scales = half_scales(panel, 0), right_scales = half_scales(panel, 1);
        add_groups(left, right, left_scales, right_scales, scales, sums, rows);
        panel += group_bytes(INT8);
        pairs += in->rows * (GROUP / 2);
        scales += in->rows;
    }
}

INLINE void int4_half(const uint8_t *group, int half, const int32_t *fours,
                      const float *scales, const int32_t *offsets, float *sums,
                      const int rows) {
    __m256i parts[INT4_ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) parts[r] = FIRST_PART(offsets[r]);
    add_fours(group + PANEL * 2 + half * 32, fours, parts, rows);
    const __m256 weight_scales = half_scales(group, half);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
        add_group(SUM(parts[r], offsets[r]), weight_scales, scales[r], sums + r * PANEL + half * 8);
}

INLINE void int4_rows(const uint8_t *panel, int64_t groups,
                      const struct activations *in, int64_t first, float *sums,
                      const int rows) {
    clear_sums(sums, rows);
    const int32_t *fours = (const int32_t *)in->numbers + first * (GROUP / 4);
    const float *scales = in->scales + first;
    const int32_t *offsets = (const int32_t *)in->offsets + first;
    for (int64_t g = 0; g < groups; g++) {
        prefetch_group(panel, INT4);
        int4_half(panel, 0, fours, scales, offsets, sums, rows);
        int4_half(panel, 1, fours, scales, offsets, sums, rows);
        panel += group_bytes(INT4);
        fours += in->rows * (GROUP / 4);
        scales += in->rows;
        offsets += in->rows;
    }
}

PANEL_FUNCTION(int8_panel, COUNTS_TO_4, int8_rows)
PANEL_FUNCTION(int4_panel, COUNTS_TO_8, int4_rows)
