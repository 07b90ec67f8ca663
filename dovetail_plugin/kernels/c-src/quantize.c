/* Activations to integers, and conversions of floats. Needs AVX2. */
#include "kernels.h"

#ifdef HAS_KERNELS
#pragma GCC target("avx2,f16c,fma")
#include "vector_math.h"

/* Below this a group counts as zeros, because the inverse of its scale would be too large for a float. */
static const float SMALLEST = 1e-30f;

/* Returns the largest magnitude of 32 floats, or NaN if one of them is infinite or not a number. */
static float largest_of(const float *values) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256 most = _mm256_setzero_ps(), check = _mm256_setzero_ps();
    for (int i = 0; i < GROUP; i += 8) {
        const __m256 x = _mm256_loadu_ps(values + i);
        most = _mm256_max_ps(most, _mm256_and_ps(x, magnitude));
        check = _mm256_fmadd_ps(x, _mm256_setzero_ps(), check); /* NaN where x is infinite or NaN */
    }
    float all[8], wrong[8], found = 0, sum = 0;
    _mm256_storeu_ps(all, most);
    _mm256_storeu_ps(wrong, check);
    for (int i = 0; i < 8; i++) {
        found = all[i] > found ? all[i] : found;
        sum += wrong[i];
    }
    return sum == 0 ? found : sum;
}

/* Returns eight of the numbers: values / scale, rounded to the nearest, ties to even. */
static inline __m256i eight(const float *values, __m256 inverse) {
    return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(values), inverse));
}

void quantize_16_bits(const float *values, int16_t *numbers, float *scale) {
    const float largest = largest_of(values);
    const int usable = largest > SMALLEST; /* false for NaN, too */
    const __m256 inverse = _mm256_set1_ps(usable ? 32767.0f / largest : 0.0f);
    *scale = usable || largest != largest ? largest / 32767.0f : 0.0f;
    for (int i = 0; i < GROUP; i += 16) {
        const __m256i both = _mm256_packs_epi32(eight(values + i, inverse), eight(values + i + 8, inverse));
        _mm256_storeu_si256((__m256i *)(numbers + i), _mm256_permute4x64_epi64(both, 0xd8));
    }
}

void quantize_8_bits(const float *values, int8_t *numbers, float *scale, int32_t *offset) {
    const float largest = largest_of(values);
    const int usable = largest > SMALLEST;
    const __m256 inverse = _mm256_set1_ps(usable ? 127.0f / largest : 0.0f);
    *scale = usable || largest != largest ? largest / 127.0f : 0.0f;
    const __m256i a = _mm256_packs_epi32(eight(values, inverse), eight(values + 8, inverse));
    const __m256i b = _mm256_packs_epi32(eight(values + 16, inverse), eight(values + 24, inverse));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i all = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(a, b), order);
    _mm256_storeu_si256((__m256i *)numbers, all);
    int32_t sum = 0;
    for (int i = 0; i < GROUP; i++) sum += numbers[i];
    *offset = usable ? -8 * sum : 0;
}

void to_floats(const void *from, enum number_type type, int64_t count, float *to) {
    const size_t size = type == FLOAT32 ? 4 : 2;
    for (int64_t i = 0; i < count; i += 8) _mm256_storeu_ps(to + i, eight_floats((const char *)from + i * size, type));
}

/* Rounds to the nearest bfloat16, ties to even; NaN stays NaN. */
static inline __m128i to_bfloat16(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i chosen = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
    const __m256i packed = _mm256_packus_epi32(_mm256_srli_epi32(chosen, 16), _mm256_setzero_si256());
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0xd8));
}

void from_floats(const float *from, enum number_type type, int64_t count, void *to) {
    __m128i *eights = to;
    for (int64_t i = 0; i < count / 8; i++) {
        const __m256 x = _mm256_loadu_ps(from + 8 * i);
        if (type == FLOAT32) {
            _mm256_storeu_ps((float *)to + 8 * i, x);
        } else if (type == BFLOAT16) {
            _mm_storeu_si128(eights + i, to_bfloat16(x));
        } else {
            _mm_storeu_si128(eights + i, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
        }
    }
}
#endif
