/* Products of attention on CPUs with AVX2. */
#include "kernels.h"

#ifdef HAS_KERNELS
#pragma GCC target("avx2,f16c,fma")

#define VECTOR __m256
#define WIDTH 8
#define LOAD _mm256_loadu_ps
#define STORE _mm256_storeu_ps
#define SPREAD _mm256_set1_ps
#define ZERO _mm256_setzero_ps
#define FMA _mm256_fmadd_ps
#define MOST_VECTORS(rows) ((rows) == 1 ? 8 : (rows) == 2 ? 4 : 2)

#include "attention_multiply.h"

MULTIPLY_FUNCTION(multiply_avx2)
#endif
