/* Functions of eight floats. They are the same for each lane, so a number has the same result wherever it stands. */
#ifndef DOVETAIL_VECTOR_MATH_H
#define DOVETAIL_VECTOR_MATH_H

#include <immintrin.h>

#include "kernels.h"

/* Returns eight numbers of a type as floats. */
INLINE __m256 eight_floats(const void *from, enum number_type type) {
    if (type == FLOAT32) return _mm256_loadu_ps(from);
    const __m128i halves = _mm_loadu_si128(from);
    if (type == FLOAT16) return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

/* Returns e^x for x <= 0, within two units in the last place; 0 below the logarithm of the smallest normal float. */
INLINE __m256 exp_of(__m256 x) {
    const __m256 least = _mm256_set1_ps(-87.33654f);
    const __m256 inside = _mm256_max_ps(least, x); /* NaN stays NaN, because it is the second one */
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(inside, _mm256_set1_ps(1.44269504f)),
                                     _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    /* ln 2 in two parts, of which the first has few bits, so that n times it is exact. */
    __m256 r = _mm256_fmadd_ps(n, _mm256_set1_ps(-0.693359375f), inside);
    r = _mm256_fmadd_ps(n, _mm256_set1_ps(2.12194440e-4f), r);
    /* 1/7!, 1/6!, ... : the rest of the series is below 6e-9 for |r| <= ln 2 / 2. */
    __m256 sum = _mm256_set1_ps(1.0f / 5040);
    sum = _mm256_fmadd_ps(sum, r, _mm256_set1_ps(1.0f / 720));
    sum = _mm256_fmadd_ps(sum, r, _mm256_set1_ps(1.0f / 120));
    sum = _mm256_fmadd_ps(sum, r, _mm256_set1_ps(1.0f / 24));
    sum = _mm256_fmadd_ps(sum, r, _mm256_set1_ps(1.0f / 6));
    sum = _mm256_fmadd_ps(sum, r, _mm256_set1_ps(0.5f));
    sum = _mm256_fmadd_ps(sum, r, _mm256_set1_ps(1.0f));
    sum = _mm256_fmadd_ps(sum, r, _mm256_set1_ps(1.0f));
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    const __m256 result = _mm256_mul_ps(sum, _mm256_castsi256_ps(power));
    return _mm256_andnot_ps(_mm256_cmp_ps(x, least, _CMP_LT_OQ), result);
}

INLINE __m256 magnitude_of(__m256 x) {
    return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
}

INLINE __m256 with_sign_of(__m256 magnitude, __m256 x) {
    return _mm256_or_ps(magnitude, _mm256_and_ps(_mm256_set1_ps(-0.0f), x));
}

/* Returns tanh x = (1 - e^(-2|x|)) / (1 + e^(-2|x|)), with the sign of x. */
INLINE __m256 tanh_of(__m256 x) {
    const __m256 one = _mm256_set1_ps(1.0f);
    const __m256 e = exp_of(_mm256_mul_ps(magnitude_of(x), _mm256_set1_ps(-2.0f)));
    return with_sign_of(_mm256_div_ps(_mm256_sub_ps(one, e), _mm256_add_ps(one, e)), x);
}

#endif
