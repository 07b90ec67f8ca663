/* Runs attention and activations on shapes of all kinds, in buffers without a byte to spare. Built with the sanitizers
 * by test_attention.py, which reads the number of calls that this prints. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../dovetail_plugin/kernels/c-src/attention.h"

int dovetail_attention(const struct attention *);
int dovetail_activate(const void *, void *, int, int64_t, int, int);

/* Two functions of library.c, whose other sources take long to build: here the threads come one after another. */
int worth(int64_t bytes, int threads) { return bytes > 1000 ? threads : 1; }

void in_threads(void (*work)(void *), void *data, int threads) {
    for (int thread = 0; thread < threads; thread++) work(data);
}

static uint32_t state = 1;

static uint32_t random_number(void) { return (state = state * 1664525 + 1013904223) >> 8; }

/* Numbers of a type, all finite. */
static void *numbers(int64_t count, int type) {
    uint8_t *made = malloc(count * (type ? 2 : 4));
    for (int64_t i = 0; i < count; i++) {
        const float x = (float)(random_number() % 2001) / 1000 - 1;
        uint32_t bits;
        memcpy(&bits, &x, 4);
        const uint16_t half = type == BFLOAT16 ? bits >> 16 : 0x3000 | (random_number() & 0x8fff);
        memcpy(made + i * (type ? 2 : 4), type ? (void *)&half : (void *)&bits, type ? 2 : 4);
    }
    return made;
}

/* A mask: what rows see is random, all, nothing, or a window behind a common beginning. */
static uint8_t *mask(int64_t rows, int64_t cached, int kind) {
    uint8_t *made = malloc(rows * cached);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t k = 0; k < cached; k++)
            made[r * cached + k] = kind == 0   ? random_number() % 2
                                   : kind == 1 ? 1
                                   : kind == 2 ? 0
                                               : k < cached / 2 || (k >= cached / 2 + r && k < cached / 2 + r + 40);
    return made;
}

static long attention_calls(const int64_t *shape) {
    const int64_t rows = shape[0], cached = shape[1], heads = shape[2], key_heads = shape[3], size = shape[4];
    const int64_t value_size = shape[5];
    long calls = 0;
    for (int type = 0; type < 3; type++)
        for (int kind = -2; kind < 4; kind++)
            for (int set = 0; set < 3; set++) {
                if (set && !__builtin_cpu_supports("avx512dq")) continue;
                void *queries = numbers(heads * rows * size, type), *keys = numbers(key_heads * cached * size, type);
                void *values = numbers(key_heads * cached * value_size, type);
                void *out = malloc(rows * heads * value_size * (type ? 2 : 4));
                const int added = kind == 3 && type;
                void *hidden = added ? numbers(rows * cached, type) : kind < 0 ? NULL : mask(rows, cached, kind);
                float *sinks = kind == 1 ? numbers(heads, FLOAT32) : NULL;
                const struct attention call = {
                    queries, keys, values, hidden, sinks, out, rows, cached, heads, key_heads, size, value_size,
                    rows * size, size, cached * size, size, cached * value_size, value_size, cached,
                    0.3f, kind == 2 ? 0 : 5, type, kind < 0 ? kind - 1 : added ? type : BOOL_MASK, set, 3};
                if (dovetail_attention(&call)) exit(1);
                calls++;
                free(queries), free(keys), free(values), free(out), free(hidden), free(sinks);
            }
    return calls;
}

int main(void) {
    const int64_t shapes[][6] = {{1, 1, 1, 1, 1, 1},     {1, 700, 6, 2, 24, 17}, {3, 5, 7, 7, 8, 8},
                                 {7, 300, 4, 2, 16, 16}, {65, 66, 3, 1, 5, 33},  {70, 600, 2, 1, 3, 16}};
    long calls = 0;
    for (size_t shape = 0; shape < sizeof shapes / sizeof *shapes; shape++) calls += attention_calls(shapes[shape]);
    for (int type = 0; type < 3; type++)
        for (int64_t count = 1; count < 30; count++) {
            void *in = numbers(count, type), *out = malloc(count * (type ? 2 : 4));
            if (dovetail_activate(in, out, type, count, count % 2, 2)) return 1;
            free(in), free(out);
            calls++;
        }
    printf("%ld\n", calls);
    return 0;
}
