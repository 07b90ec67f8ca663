/* Kernels for CPUs with AVX2.
 *
 * Four bits: eight products of two numbers, each at most 15 * 127, fit into 16 bits together.
 */
#include "kernels.h"

#ifdef HAS_KERNELS
#pragma GCC target("avx2,f16c,fma")

#include "steps_avx2.h"

#define FIRST_PART(offset) _mm256_setzero_si256()
#define SUM(part, offset) \
    _mm256_add_epi32(_mm256_madd_epi16(part, _mm256_set1_epi16(1)), _mm256_set1_epi32(offset))

#include "kernels_avx2.h"
#include "kernels_avx2_k.h"

const struct kernel avx2_kernels[FORMATS] = {
    {int8_panel, INT8_ROWS}, {int4_panel, INT4_ROWS}, {q4_k_panel, INT4_ROWS}, {q6_k_panel, INT8_ROWS}};
#endif
