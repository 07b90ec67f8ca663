/* The inner steps of the AVX2 kernels, which roofline.c times, too.
 *
 * They are assembly, because gcc holds broadcast numbers in registers and then has none left for sums.
 */
#ifndef DOVETAIL_STEPS_AVX2_H
#define DOVETAIL_STEPS_AVX2_H

#include <immintrin.h>

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

#endif
