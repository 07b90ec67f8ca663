/* Activation functions whose result for a number does not depend on where it stands.
 *
 * torch's own use one formula for whole registers and another one for the rest of a thread's share. So the last bit of
 * a number depends on the rows beside it and on the number of threads.
 */
#include <string.h>

#include "kernels.h"

#ifdef HAS_KERNELS
#pragma GCC target("avx2,f16c,fma")
#include "vector_math.h"

enum activation { SILU = 0, GELU_TANH = 1 };
enum { SHARE = 4096 /* numbers of one task, a multiple of eight */ };

struct activate {
    const char *in;
    char *out;
    enum number_type type;
    enum activation activation;
    int64_t count, next;
};

/* x / (1 + e^-x), by e^-|x| so that nothing overflows. */
static inline __m256 silu(__m256 x) {
    const __m256 one = _mm256_set1_ps(1), e = exp_of(_mm256_or_ps(_mm256_set1_ps(-0.0f), x));
    const __m256 negative = _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_LT_OQ);
    return _mm256_div_ps(_mm256_mul_ps(x, _mm256_blendv_ps(one, e, negative)), _mm256_add_ps(one, e));
}

/* x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) */
static inline __m256 gelu_tanh(__m256 x) {
    const __m256 half = _mm256_mul_ps(x, _mm256_set1_ps(0.5f));
    const __m256 factor = _mm256_fmadd_ps(_mm256_mul_ps(x, x), _mm256_set1_ps(0.044715f), _mm256_set1_ps(1));
    const __m256 inner = _mm256_mul_ps(_mm256_mul_ps(x, _mm256_set1_ps(0.7978845608f)), factor);
    return _mm256_fmadd_ps(half, tanh_of(inner), half);
}

static inline __m256 activated(enum activation activation, __m256 x) {
    return activation == SILU ? silu(x) : gelu_tanh(x);
}

static void activate_share(const struct activate *job, int64_t from, int64_t to) {
    const size_t size = job->type == FLOAT32 ? 4 : 2;
    for (int64_t i = from; i < to; i += 8) {
        const char *in = job->in + i * size;
        char whole[32] = {0}, converted[32];
        if (to - i < 8) in = memcpy(whole, in, (to - i) * size);
        float floats[8];
        _mm256_storeu_ps(floats, activated(job->activation, eight_floats(in, job->type)));
        if (to - i >= 8) {
            from_floats(floats, job->type, 8, job->out + i * size);
        } else {
            from_floats(floats, job->type, 8, converted);
            memcpy(job->out + i * size, converted, (to - i) * size);
        }
    }
}

static void activate_tasks(void *data) {
    struct activate *job = data;
    for (;;) {
        const int64_t from = __atomic_fetch_add(&job->next, SHARE, __ATOMIC_RELAXED);
        if (from >= job->count) return;
        activate_share(job, from, from + SHARE < job->count ? from + SHARE : job->count);
    }
}

/* Writes f(x) for `count` numbers of a type. Returns 0, or -1 if there is no such function or type. */
EXPORT int dovetail_activate(const void *in, void *out, int type, int64_t count, int activation, int threads) {
    if (type < FLOAT32 || type > FLOAT16 || activation < SILU || activation > GELU_TANH) return -1;
    struct activate job = {in, out, type, activation, count, 0};
    in_threads(activate_tasks, &job, worth(8 * count, threads));
    return 0;
}
#endif
