/* Attention of the rows of a pass over cached keys and values.
 *
 * A row sees a list of keys, in the order of the cache. Only the place of a key in this list matters, its slot in
 * the cache does not: masked keys are left out, and not counted with a weight of zero. So a node of a tree, a row of a
 * chain and a lone row have the same bits if they see the same keys.
 *
 *   score of a key   the products of its numbers with the query's, added up one after another
 *   block            256 keys of a list. It has a maximum, a sum of weights e^(score - maximum), added up in eight
 *                    lanes by place, and a sum of weighted values, added up one after another
 *   result           the sums of the blocks, added up one after another with their weights to the largest maximum
 *
 * Rows, keys and columns are computed together in any grouping: no sum above depends on it. Products are added by fused
 * multiply-adds, so all sets of instructions give the same bits.
 */
#ifndef DOVETAIL_ATTENTION_H
#define DOVETAIL_ATTENTION_H

#include "kernels.h"

enum {
    BLOCK = 256,       /* keys of a row that are summed up together */
    MOST_KEYS = 512,   /* keys that the rows of a block may see together */
    MOST_SIZE = 512,   /* numbers of a head */
    TILE = 6,          /* queries of one call of a multiply_function */
    STRIDE = 528,      /* floats between the rows of a tile */
    ROWS_AT_ONCE = 64, /* rows whose lists of keys exist at the same time */
};
enum mask_type { NO_MASK = -3, CAUSAL = -2, BOOL_MASK = -1 /* or a number_type: a number that is added to a score */ };

/* One sequence. Strides count numbers; the numbers of one head lie together. */
struct attention {
    const void *queries, *keys, *values;                   /* [heads][rows], [key_heads][cached], [key_heads][cached] */
    const void *mask;                                      /* [rows][cached], or NULL */
    const float *sinks;                                    /* [heads]: a score without a value, or NULL */
    void *out;                                             /* [rows][heads][value_size] */
    int64_t rows, cached, heads, key_heads;                /* heads is a multiple of key_heads */
    int64_t size, value_size;                              /* at most MOST_SIZE */
    int64_t query_head, query_row, key_head, key_row;      /* strides */
    int64_t value_head, value_row, mask_row;
    float scale, softcap;                                  /* softcap: scores are c * tanh(score / c); 0 for none */
    int32_t type, mask_type, instructions, threads;
};

/* The keys that some rows see. The first `common` places are the same for all of them. */
struct visible {
    int64_t common, room;
    int32_t *common_keys;         /* [common] */
    int32_t *other_keys;          /* [rows][room] */
    int64_t others[ROWS_AT_ONCE]; /* keys of each row behind the common ones */
};

/* Fills `found` for rows first..first+rows-1. Returns 0, or -1 without memory. */
int find_visible(const struct attention *call, int64_t first, int64_t rows, struct visible *found);
void free_visible(struct visible *found);

/* Row r of `left` and of `out` begins at r * STRIDE. Sets, or adds with `add`, for r < rows and c < columns:
 * out[r][c] = sum over k < depth of left[r][k] * right[k][c]. `rows` is 1 to TILE, `columns` a multiple of 16. */
typedef void multiply_function(const float *left, const float *const *right, float *out, int64_t rows, int64_t columns,
                               int64_t depth, int add);

extern multiply_function multiply_avx2, multiply_avx512;

/* Some rows of a pass, and their sums by key head, block and query. Queries are numbered row by row. */
struct job {
    const struct attention *call;
    multiply_function *multiply;
    struct visible visible;
    int64_t first_row, rows, group;       /* group: heads that share a key head */
    int64_t blocks, parts;                /* parts: of the rows, so that there is work for all threads */
    int64_t width;                        /* value_size, filled up to a multiple of 16 */
    float *sums;                          /* [key_heads][blocks][rows * group][width + 8], see `sums_of` */
    char *workspaces;
    size_t workspace_bytes;
    int64_t next_workspace, next_task;
    int64_t *left;                        /* tasks of each key head that are not done */
};

/* What one thread needs. */
struct workspace {
    float queries[TILE * STRIDE], scores[TILE * STRIDE], sums[TILE * STRIDE];
    float added[BLOCK + 8];               /* the mask's numbers for the keys of one row */
    int32_t keys[MOST_KEYS], merged[MOST_KEYS];
    int16_t places[BLOCK];                /* of one row's keys, among `keys` */
    const float *columns[MOST_SIZE];      /* rows of the transposed keys */
    const float *values[MOST_KEYS];
    const float *own_values[TILE][BLOCK]; /* those of a row, behind the shared ones */
    float numbers[];                      /* transposed keys, then values */
};

static inline size_t bytes_of(int32_t type) { return type == FLOAT32 ? 4 : 2; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t filled_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

/* Where a query's sum of weighted values in a block is kept, and behind it the maximum and the sum of weights. */
static inline float *sums_of(const struct job *job, int64_t head, int64_t block, int64_t query) {
    const int64_t queries = job->rows * job->group;
    return job->sums + ((head * job->blocks + block) * queries + query) * (job->width + 8);
}

/* Computes one block of one key head for the rows row..end-1, as many at a time as have room for their keys. */
void compute_block(const struct job *job, struct workspace *space, int64_t head, int64_t block, int64_t row,
                   int64_t end);

#endif
