/* Products of attention on CPUs with AVX-512. */
#include "kernels.h"

#ifdef HAS_KERNELS
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c,fma")

#define VECTOR __m512
#define WIDTH 16
#define LOAD _mm512_loadu_ps
#define STORE _mm512_storeu_ps
#define SPREAD _mm512_set1_ps
#define ZERO _mm512_setzero_ps
#define FMA _mm512_fmadd_ps
#define MOST_VECTORS(rows) ((rows) <= 2 ? 8 : 4)

#include "attention_multiply.h"

MULTIPLY_FUNCTION(multiply_avx512)
#endif
