/* Runs every kernel on shapes of all kinds, in buffers without a byte to spare. Built with the sanitizers by
 * test_kernels.py, which reads the number of calls that this prints. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int dovetail_instructions(void);
int dovetail_quantize(const void *, int, int64_t, int64_t, int, void *, float *, void *, int);
int dovetail_linear(const void *, int64_t, int64_t, int, const void *, const float *, const void *, int64_t,
                    const void *, void *, int, int, int);

int64_t dovetail_multiply(int, int, int64_t, int);
int dovetail_read(const void *, int64_t, int);

static uint32_t state = 1;

static uint8_t *random_bytes(size_t count) {
    uint8_t *made = malloc(count);
    for (size_t i = 0; i < count; i++) {
        state = state * 1664525 + 1013904223;
        made[i] = (uint8_t)(state >> 24);
    }
    return made;
}

int main(void) {
    const int64_t shapes[][2] = {{1, 1}, {15, 31}, {16, 32}, {17, 33}, {40, 96}, {100, 257}, {33, 512}};
    long calls = 0;
    for (size_t shape = 0; shape < sizeof shapes / sizeof *shapes; shape++) {
        const int64_t outputs = shapes[shape][0], inputs = shapes[shape][1];
        const int64_t panels = (outputs + 15) / 16, groups = (inputs + 31) / 32;
        for (int format = 0; format < 4; format++) {
            const int wide = format == 0 || format == 3, blocks = format > 1 ? groups / 8 : 0;
            if (format > 1 && groups % 8) { /* blocks of 256 inputs are whole */
                if (dovetail_linear("", outputs, groups, format, "", NULL, NULL, 1, NULL, NULL, 0, 0, 1) != -1) return 1;
                continue;
            }
            const size_t size = wide ? 2 : 1;
            const size_t packed = panels * (groups * (32 + (wide ? 512 : 256)) + blocks * (format == 2 ? 64 : 32));
            for (int64_t rows = 1; rows <= 64; rows += 1 + rows / 14)
                for (int type = 0; type < 3; type++) {
                    const size_t width = type ? 2 : 4, count = groups * rows;
                    uint8_t *weights = random_bytes(packed), *in = random_bytes(rows * inputs * width);
                    uint8_t *bias = random_bytes(outputs * width), *out = random_bytes(rows * outputs * width);
                    void *numbers = malloc(count * 32 * size);
                    float *scales = malloc(count * 4);
                    void *offsets = malloc(count * 4);
                    if (dovetail_quantize(in, type, rows, inputs, format, numbers, scales, offsets, 1)) return 1;
                    for (int set = 0; set < 3; set++) {
                        if (!(dovetail_instructions() >> set & 1)) continue;
                        if (dovetail_linear(weights, outputs, groups, format, numbers, scales, offsets, rows,
                                            rows % 2 ? bias : NULL, out, type, set, 1))
                            return 1;
                        calls++;
                    }
                    free(weights), free(in), free(bias), free(out), free(numbers), free(scales), free(offsets);
                }
        }
    }
    for (int set = 0; set < 3; set++)
        for (int mix = 0; mix < 3; mix++)
            if (dovetail_instructions() >> set & 1 && dovetail_multiply(mix, set, 2, 1) < 1) return 1;
    for (int64_t count = 1; count < 2 << 20; count += 99991) {
        uint8_t *bytes = random_bytes(count);
        if (dovetail_read(bytes, count, 1)) return 1;
        free(bytes);
    }
    printf("%ld\n", calls);
    return 0;
}
