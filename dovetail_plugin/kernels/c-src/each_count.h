/* A function with a constant number of rows is made for each number of rows. */
#define ONE_COUNT(function, n) \
    case n: function(panel, groups, in, first, sums, n); break;
#define EACH_COUNT_TO_4(function) \
    switch (count) { ONE_COUNT(function, 1) ONE_COUNT(function, 2) ONE_COUNT(function, 3) ONE_COUNT(function, 4) }
#define EACH_COUNT_TO_8(function)                                                                          \
    switch (count) {                                                                                       \
        ONE_COUNT(function, 1) ONE_COUNT(function, 2) ONE_COUNT(function, 3) ONE_COUNT(function, 4)        \
        ONE_COUNT(function, 5) ONE_COUNT(function, 6) ONE_COUNT(function, 7) ONE_COUNT(function, 8)        \
    }
#define EACH_COUNT_TO_12(function)                                                                         \
    switch (count) {                                                                                       \
        ONE_COUNT(function, 1) ONE_COUNT(function, 2) ONE_COUNT(function, 3) ONE_COUNT(function, 4)        \
        ONE_COUNT(function, 5) ONE_COUNT(function, 6) ONE_COUNT(function, 7) ONE_COUNT(function, 8)        \
        ONE_COUNT(function, 9) ONE_COUNT(function, 10) ONE_COUNT(function, 11) ONE_COUNT(function, 12)     \
    }
