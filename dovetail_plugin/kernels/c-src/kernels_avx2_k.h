/* Kernels of 256-bit registers for GGUF's K-quants. Included after kernels_avx2.h, whose steps they share. */

INLINE void q4_k_half(const uint8_t *block, const uint8_t *group, int half,
                      const int32_t *fours, const float *scales,
                      const float *minus, float *sums, const int rows) {
    __m256i parts[INT4_ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) parts[r] = FIRST_PART(0);
    add_fours(group + PANEL * 2 + half * 32, fours, parts, rows);
    const __m256i factors = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(group + half * 8)));
    const __m256i min_factors = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(group + PANEL + half * 8)));
    const __m256 weight_scales = _mm256_mul_ps(half_scales(block, half), _mm256_cvtepi32_ps(factors));
    const __m256 mins = _mm256_mul_ps(half_scales(block + PANEL * 2, half), _mm256_cvtepi32_ps(min_factors));
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        float *at = sums + r * PANEL + half * 8;
        add_group(SUM(parts[r], 0), weight_scales, scales[r], at);
        _mm256_storeu_ps(at, _mm256_fmadd_ps(mins, _mm256_set1_ps(minus[r]), _mm256_loadu_ps(at)));
    }
}

INLINE void q4_k_rows(const uint8_t *panel, int64_t groups,
                      const struct activations *in, int64_t first, float *sums,
                      const int rows) {
    clear_sums(sums, rows);
    const int32_t *fours = (const int32_t *)in->numbers + first * (GROUP / 4);
    const float *scales = in->scales + first, *minus = (const float *)in->offsets + first;
    for (int64_t g = 0; g < groups; g++) {
        const uint8_t *block = panel + g / BLOCK_GROUPS * block_bytes(Q4_K);
        const uint8_t *group = block + PANEL * 4 + g % BLOCK_GROUPS * group_bytes(Q4_K);
        prefetch_group(group, Q4_K);
        q4_k_half(block, group, 0, fours, scales, minus, sums, rows);
        q4_k_half(block, group, 1, fours, scales, minus, sums, rows);
        fours += in->rows * (GROUP / 4);
        scales += in->rows;
        minus += in->rows;
    }
}

INLINE void q6_k_half(const uint8_t *block, const uint8_t *group, int half,
                      const int32_t *pairs, const float *scales, float *sums,
                      const int rows) {
    __m256i left[INT8_ROWS], right[INT8_ROWS];
    clear_parts(left, right, rows);
    add_pairs(group + PANEL * 2 + half * (PANEL * GROUP / 2), pairs + half * (GROUP / 4), GROUP / 4, left, right, rows);
    const __m128i factors = _mm_loadu_si128((const __m128i *)group + half);
    const __m256i left_factors = _mm256_cvtepi8_epi32(factors);
    const __m256i right_factors = _mm256_cvtepi8_epi32(_mm_unpackhi_epi64(factors, factors));
    const __m256 left_scales = _mm256_mul_ps(half_scales(block, 0), _mm256_cvtepi32_ps(left_factors));
    const __m256 right_scales = _mm256_mul_ps(half_scales(block, 1), _mm256_cvtepi32_ps(right_factors));
    add_groups(left, right, left_scales, right_scales, scales, sums, rows);
}

INLINE void q6_k_rows(const uint8_t *panel, int64_t groups,
                      const struct activations *in, int64_t first, float *sums,
                      const int rows) {
    clear_sums(sums, rows);
    const int32_t *pairs = (const int32_t *)in->numbers + first * (GROUP / 2);
    const float *scales = in->scales + first;
    for (int64_t g = 0; g < groups; g++) {
        const uint8_t *block = panel + g / BLOCK_GROUPS * block_bytes(Q6_K);
        const uint8_t *group = block + PANEL * 2 + g % BLOCK_GROUPS * group_bytes(Q6_K);
        prefetch_group(group, Q6_K);
        q6_k_half(block, group, 0, pairs, scales, sums, rows);
        q6_k_half(block, group, 1, pairs, scales, sums, rows);
        pairs += in->rows * (GROUP / 2);
        scales += in->rows;
    }
}

PANEL_FUNCTION(q4_k_panel, COUNTS_TO_8, q4_k_rows)
PANEL_FUNCTION(q6_k_panel, COUNTS_TO_4, q6_k_rows)
