/* A multiply_function. The file that includes this one defines
 *   VECTOR, WIDTH                      the type of a register, and its floats
 *   LOAD, STORE, SPREAD, ZERO, FMA     what is done with it
 *   MOST_VECTORS(rows)                 registers of a row of sums: 8, 4 or 2
 */
#include <immintrin.h>

#include "attention.h"

INLINE void some_columns(const float *left, const float *const *right, int64_t column, float *out, int64_t depth,
                         int add, const int rows, const int vectors) {
    VECTOR sums[TILE][8];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++)
            sums[r][v] = add ? LOAD(out + r * STRIDE + column + v * WIDTH) : ZERO();
    for (int64_t k = 0; k < depth; k++) {
        const float *from = right[k] + column;
        VECTOR row[8];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) row[v] = LOAD(from + v * WIDTH);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            const VECTOR one = SPREAD(left[r * STRIDE + k]);
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++) sums[r][v] = FMA(one, row[v], sums[r][v]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) STORE(out + r * STRIDE + column + v * WIDTH, sums[r][v]);
}

INLINE void all_columns(const float *left, const float *const *right, float *out, int64_t columns, int64_t depth,
                        int add, const int rows) {
    int64_t c = 0;
    if (MOST_VECTORS(rows) >= 8)
        for (; c + 8 * WIDTH <= columns; c += 8 * WIDTH) some_columns(left, right, c, out, depth, add, rows, 8);
    if (MOST_VECTORS(rows) >= 4)
        for (; c + 4 * WIDTH <= columns; c += 4 * WIDTH) some_columns(left, right, c, out, depth, add, rows, 4);
    for (; c + 2 * WIDTH <= columns; c += 2 * WIDTH) some_columns(left, right, c, out, depth, add, rows, 2);
    for (; c < columns; c += WIDTH) some_columns(left, right, c, out, depth, add, rows, 1);
}

#define ROWS(n) \
    case n: all_columns(left, right, out, columns, depth, add, n); break;
#define MULTIPLY_FUNCTION(name)                                                                                   \
    void name(const float *left, const float *const *right, float *out, int64_t rows, int64_t columns,            \
              int64_t depth, int add) {                                                                           \
        switch (rows) { ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) }                                         \
    }
