/* Kernels for CPUs with AVX2.
 *
 * The inner steps are assembly, because gcc holds broadcast numbers in registers and then has none left for sums.
 * Four bits: eight products of two numbers, each at most 15 * 127, fit into 16 bits together.
 */
#include "kernels.h"

#ifdef HAS_KERNELS
#pragma GCC target("avx2,f16c,fma")

#define ADD_PAIRS(left, right, a, b, pair)                                                          \
    do {                                                                                            \
        __m256i x, y;                                                                               \
        __asm__("vpbroadcastd %4, %2\n\t"                                                           \
                "vpmaddwd %2, %5, %3\n\t"                                                           \
                "vpmaddwd %2, %6, %2\n\t"                                                           \
                "vpaddd %3, %0, %0\n\t"                                                             \
                "vpaddd %2, %1, %1"                                                                 \
                : "+x"(left), "+x"(right), "=&x"(x), "=&x"(y)                                       \
                : "m"(pair), "x"(a), "x"(b));                                                       \
    } while (0)
#define ADD_FOURS(part, w, fours)                                                                   \
    do {                                                                                            \
        __m256i x;                                                                                  \
        __asm__("vpbroadcastd %2, %1\n\t"                                                           \
                "vpmaddubsw %1, %3, %1\n\t"                                                         \
                "vpaddw %1, %0, %0"                                                                 \
                : "+x"(part), "=&x"(x)                                                              \
                : "m"(fours), "x"(w));                                                              \
    } while (0)
#define FIRST_PART(offset) _mm256_setzero_si256()
#define SUM(part, offset) \
    _mm256_add_epi32(_mm256_madd_epi16(part, _mm256_set1_epi16(1)), _mm256_set1_epi32(offset))

#include "kernels_avx2.h"
#include "kernels_avx2_k.h"

const struct kernel avx2_kernels[FORMATS] = {
    {int8_panel, INT8_ROWS}, {int4_panel, INT4_ROWS}, {q4_k_panel, INT4_ROWS}, {q6_k_panel, INT8_ROWS}};
#endif
