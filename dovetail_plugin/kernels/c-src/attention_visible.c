/* Which keys the rows of a pass see. */
#include <stdlib.h>
#include <string.h>

#include "attention.h"

#ifdef HAS_KERNELS
#pragma GCC target("avx2,f16c,fma")
#include "vector_math.h"

/* A number that is added to a score hides its key if it is at most half the lowest number of its type. */
static float hidden_at(enum number_type type) { return type == FLOAT16 ? -32752.0f : -1.7e38f; }

/* Returns which of the keys key..key+7 a row sees, a bit for each. */
static uint32_t seen(const struct attention *call, int64_t row, int64_t key) {
    const int64_t left = call->cached - key;
    const uint32_t existing = left < 8 ? (1u << left) - 1 : 0xff;
    if (call->mask_type == NO_MASK) return existing;
    if (call->mask_type == CAUSAL) {
        const int64_t visible = call->cached - call->rows + row + 1 - key;
        return visible < 1 ? 0 : visible < 8 ? (1u << visible) - 1 : existing;
    }
    const size_t size = call->mask_type == BOOL_MASK ? 1 : call->mask_type == FLOAT32 ? 4 : 2;
    const char *from = (const char *)call->mask + (row * call->mask_row + key) * size;
    char whole[32] = {0};
    if (left < 8) from = memcpy(whole, from, left * size);
    if (call->mask_type == BOOL_MASK) {
        const __m128i bytes = _mm_loadl_epi64((const __m128i *)from);
        return ~(uint32_t)_mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_setzero_si128())) & existing;
    }
    const __m256 added = eight_floats(from, call->mask_type), lowest = _mm256_set1_ps(hidden_at(call->mask_type));
    return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(added, lowest, _CMP_GT_OQ)) & existing;
}

/* Appends the keys of some bits to a list that has room for eight more, and returns its new length. */
static int64_t append(int32_t *list, int64_t length, int64_t key, uint32_t bits) {
    if (bits == 0xff) {
        const __m256i eight = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        _mm256_storeu_si256((__m256i *)(list + length), _mm256_add_epi32(eight, _mm256_set1_epi32((int)key)));
        return length + 8;
    }
    for (; bits; bits &= bits - 1) list[length++] = (int32_t)key + __builtin_ctz(bits);
    return length;
}

int find_visible(const struct attention *call, int64_t first, int64_t rows, struct visible *found) {
    *found = (struct visible){.common_keys = malloc((call->cached + 8) * sizeof(int32_t))};
    if (!found->common_keys) return -1;
    int64_t key = 0;
    for (; key < call->cached; key += 8) {
        uint32_t every = 0xff, some = 0;
        for (int64_t r = 0; r < rows; r++) {
            const uint32_t bits = seen(call, first + r, key);
            every &= bits;
            some |= bits;
        }
        if (every != some) break;
        found->common = append(found->common_keys, found->common, key, every);
    }
    found->room = call->cached - key + 8;
    if (key >= call->cached) return 0;
    found->other_keys = malloc(rows * found->room * sizeof(int32_t));
    if (!found->other_keys) return -1;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t k = key; k < call->cached; k += 8)
            found->others[r] = append(found->other_keys + r * found->room, found->others[r], k,
                                      seen(call, first + r, k));
    return 0;
}

void free_visible(struct visible *found) {
    free(found->common_keys);
    free(found->other_keys);
}
#endif
