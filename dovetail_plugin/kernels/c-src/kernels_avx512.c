/* Kernels for CPUs with AVX-512 VNNI: one register holds the sums of a row and a panel. */
#include "kernels.h"

#ifdef HAS_KERNELS
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")
#include <immintrin.h>

/* With few rows each row has several chains of sums, because an addition takes longer than two rows take turns. */
#define CHAINS(rows) ((rows) >= 8 ? 1 : (rows) >= 3 ? 2 : 4)

INLINE __m512 halves(const uint8_t *sixteen) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)sixteen));
}

INLINE void clear_sums(__m512 *sums, const int rows) {
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) sums[r] = _mm512_setzero_ps();
}

INLINE void store_sums(const __m512 *sums, float *out, const int rows) {
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) _mm512_storeu_ps(out + r * PANEL, sums[r]);
}

INLINE void clear_parts(__m512i *parts, const int count) {
#pragma GCC unroll 48
    for (int i = 0; i < count; i++) parts[i] = _mm512_setzero_si512();
}

/* Adds the chains of each row, and the sum of the group to the float sums of the rows. */
INLINE void add_group(const __m512 weight_scales, const __m512i *parts,
                      const int chains, const float *scales, __m512 *sums,
                      const int rows) {
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        __m512i sum = parts[r * chains];
#pragma GCC unroll 4
        for (int c = 1; c < chains; c++) sum = _mm512_add_epi32(sum, parts[r * chains + c]);
        const __m512 scale = _mm512_mul_ps(weight_scales, _mm512_set1_ps(scales[r]));
        sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, sums[r]);
    }
}

/* Adds the products of `count` pairs of inputs to the chains of the rows. */
INLINE void add_pairs(const uint8_t *numbers, const int32_t *pairs, const int count,
                      __m512i *parts, const int chains, const int rows) {
#pragma GCC unroll 16
    for (int p = 0; p < count; p++) {
        const __m512i w = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(numbers + p * 32)));
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            const int i = r * chains + p % chains;
            parts[i] = _mm512_dpwssd_epi32(parts[i], w, _mm512_set1_epi32(pairs[r * (GROUP / 2) + p]));
        }
    }
}

/* Adds the products of a group of 4-bit numbers to the chains of the rows. */
INLINE void add_fours(const uint8_t *numbers, const int32_t *fours, __m512i *parts,
                      const int chains, const int rows) {
    const __m512i low = _mm512_set1_epi8(15);
#pragma GCC unroll 4
    for (int v = 0; v < GROUP / 8; v++) {
        const __m512i both = _mm512_loadu_si512(numbers + v * 64);
        const __m512i first_four = _mm512_and_si512(both, low);
        const __m512i next_four = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            const int32_t *a = fours + r * (GROUP / 4) + 2 * v;
            const int i = r * chains + (2 * v) % chains, j = r * chains + (2 * v + 1) % chains;
            parts[i] = _mm512_dpbusd_epi32(parts[i], first_four, _mm512_set1_epi32(a[0]));
            parts[j] = _mm512_dpbusd_epi32(parts[j], next_four, _mm512_set1_epi32(a[1]));
        }
    }
}

INLINE void int8_rows(const uint8_t *panel, int64_t groups,
                      const struct activations *in, int64_t first, float *out,
                      const int rows) {
    const int chains = CHAINS(rows);
    __m512 sums[MOST_ROWS];
    clear_sums(sums, rows);
    const int32_t *pairs = (const int32_t *)in->numbers + first * (GROUP / 2);
    const float *scales = in->scales + first;
    for (int64_t g = 0; g < groups; g++) {
        __m512i parts[MOST_ROWS * 4];
        clear_parts(parts, rows * chains);
        prefetch_group(panel, INT8);
        add_pairs(panel + PANEL * 2, pairs, GROUP / 2, parts, chains, rows);
        add_group(halves(panel), parts, chains, scales, sums, rows);
        panel += group_bytes(INT8);
        pairs += in->rows * (GROUP / 2);
        scales += in->rows;
    }
    store_sums(sums, out, rows);
}

INLINE void int4_rows(const uint8_t *panel, int64_t groups,
                      const struct activations *in, int64_t first, float *out,
                      const int rows) {
    const int chains = CHAINS(rows);
    __m512 sums[MOST_ROWS];
    clear_sums(sums, rows);
    const int32_t *fours = (const int32_t *)in->numbers + first * (GROUP / 4);
    const float *scales = in->scales + first;
    const int32_t *offsets = (const int32_t *)in->offsets + first;
    for (int64_t g = 0; g < groups; g++) {
        __m512i parts[MOST_ROWS * 4];
        clear_parts(parts, rows * chains);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) parts[r * chains] = _mm512_set1_epi32(offsets[r]);
        prefetch_group(panel, INT4);
        add_fours(panel + PANEL * 2, fours, parts, chains, rows);
        add_group(halves(panel), parts, chains, scales, sums, rows);
        panel += group_bytes(INT4);
        fours += in->rows * (GROUP / 4);
        scales += in->rows;
        offsets += in->rows;
    }
    store_sums(sums, out, rows);
}

INLINE void q4_k_rows(const uint8_t *panel, int64_t groups,
                      const struct activations *in, int64_t first, float *out,
                      const int rows) {
    const int chains = CHAINS(rows);
    __m512 sums[MOST_ROWS];
    clear_sums(sums, rows);
    const int32_t *fours = (const int32_t *)in->numbers + first * (GROUP / 4);
    const float *scales = in->scales + first, *minus = (const float *)in->offsets + first;
    for (int64_t g = 0; g < groups; g++) {
        const uint8_t *block = panel + g / BLOCK_GROUPS * block_bytes(Q4_K);
        const uint8_t *group = block + PANEL * 4 + g % BLOCK_GROUPS * group_bytes(Q4_K);
        __m512i parts[MOST_ROWS * 4];
        clear_parts(parts, rows * chains);
        prefetch_group(group, Q4_K);
        add_fours(group + PANEL * 2, fours, parts, chains, rows);
        const __m512i factors = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)group));
        const __m512i min_factors = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)group + 1));
        const __m512 mins = _mm512_mul_ps(halves(block + PANEL * 2), _mm512_cvtepi32_ps(min_factors));
        add_group(_mm512_mul_ps(halves(block), _mm512_cvtepi32_ps(factors)), parts, chains, scales, sums, rows);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) sums[r] = _mm512_fmadd_ps(mins, _mm512_set1_ps(minus[r]), sums[r]);
        fours += in->rows * (GROUP / 4);
        scales += in->rows;
        minus += in->rows;
    }
    store_sums(sums, out, rows);
}

INLINE void q6_k_rows(const uint8_t *panel, int64_t groups,
                      const struct activations *in, int64_t first, float *out,
                      const int rows) {
    const int chains = CHAINS(rows);
    __m512 sums[MOST_ROWS];
    clear_sums(sums, rows);
    const int32_t *pairs = (const int32_t *)in->numbers + first * (GROUP / 2);
    const float *scales = in->scales + first;
    for (int64_t g = 0; g < groups; g++) {
        const uint8_t *block = panel + g / BLOCK_GROUPS * block_bytes(Q6_K);
        const uint8_t *group = block + PANEL * 2 + g % BLOCK_GROUPS * group_bytes(Q6_K);
        prefetch_group(group, Q6_K);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            __m512i parts[MOST_ROWS * 4];
            clear_parts(parts, rows * chains);
            add_pairs(group + PANEL * 2 + half * (PANEL * GROUP / 2), pairs + half * (GROUP / 4), GROUP / 4, parts,
                      chains, rows);
            const __m512i factors = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)group + half));
            add_group(_mm512_mul_ps(halves(block), _mm512_cvtepi32_ps(factors)), parts, chains, scales, sums, rows);
        }
        pairs += in->rows * (GROUP / 2);
        scales += in->rows;
    }
    store_sums(sums, out, rows);
}

#include "each_count.h"

PANEL_FUNCTION(int8_panel, COUNTS_TO_12, int8_rows)
PANEL_FUNCTION(int4_panel, COUNTS_TO_12, int4_rows)
PANEL_FUNCTION(q4_k_panel, COUNTS_TO_12, q4_k_rows)
PANEL_FUNCTION(q6_k_panel, COUNTS_TO_12, q6_k_rows)

const struct kernel avx512_kernels[FORMATS] = {
    {int8_panel, MOST_ROWS}, {int4_panel, MOST_ROWS}, {q4_k_panel, MOST_ROWS}, {q6_k_panel, MOST_ROWS}};
#endif
