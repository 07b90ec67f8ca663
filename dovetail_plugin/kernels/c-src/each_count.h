/* A panel_function made of one with a constant number of rows for each number of rows. */
#define ONE_COUNT(function, n) \
    case n: function(panel, groups, in, first, sums, n); break;
#define COUNTS_TO_4(function) \
    ONE_COUNT(function, 1) ONE_COUNT(function, 2) ONE_COUNT(function, 3) ONE_COUNT(function, 4)
#define COUNTS_TO_8(function) \
    COUNTS_TO_4(function)     \
    ONE_COUNT(function, 5) ONE_COUNT(function, 6) ONE_COUNT(function, 7) ONE_COUNT(function, 8)
#define COUNTS_TO_12(function) \
    COUNTS_TO_8(function)      \
    ONE_COUNT(function, 9) ONE_COUNT(function, 10) ONE_COUNT(function, 11) ONE_COUNT(function, 12)
#define PANEL_FUNCTION(name, counts, function)                                                                       \
    static void name(const uint8_t *panel, int64_t groups, const struct activations *in, int64_t first, int64_t count, \
                     float *sums) {                                                                                  \
        switch (count) { counts(function) }                                                                          \
    }
