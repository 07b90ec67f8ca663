/* Kernels for CPUs with AVX-VNNI and without AVX-512: products are added in one instruction. */
#include "kernels.h"

#ifdef HAS_KERNELS
#pragma GCC target("avx2,avxvnni,f16c,fma")

#define ADD_PAIRS(left, right, a, b, pair)                       \
    do {                                                         \
        const __m256i x = _mm256_set1_epi32(pair);               \
        left = _mm256_dpwssd_avx_epi32(left, a, x);              \
        right = _mm256_dpwssd_avx_epi32(right, b, x);            \
    } while (0)
#define ADD_FOURS(part, w, fours) part = _mm256_dpbusd_avx_epi32(part, w, _mm256_set1_epi32(fours))
#define FIRST_PART(offset) _mm256_set1_epi32(offset)
#define SUM(part, offset) (part)

#include "kernels_avx2.h"
#include "kernels_avx2_k.h"

const struct kernel avx_vnni_kernels[FORMATS] = {
    {int8_panel, INT8_ROWS}, {int4_panel, INT4_ROWS}, {q4_k_panel, INT4_ROWS}, {q6_k_panel, INT8_ROWS}};
#endif
