"""Bytes of the parts of a target and its draft as functions of a generation's rows: plain numbers and formulas.

Enters: widths and counted weights (`counting.py` makes both from configs), the rows of a generation. Leaves: bytes of
caches and temporaries. Keys and values are what `cache.py` and `graph_rows.py` allocate; temporaries of a pass are a
formula (`Widths.pass_bytes`) that benchmarks/plan_accuracy.py measures. This module decides nothing and runs nothing.
"""

import math
from dataclasses import dataclass

from ..cache import SLIDING_SLACK_ROWS
from ..drafts.cuda_graph_rows import MAX_STATIC_ROWS, MIN_COLUMNS, power_of_two

DRAFT_ROWS = 1024
"""Rows that the draft's cache makes room for beyond the prompt (`generation.DRAFT_ROWS`)."""

CUBLAS_BYTES = 2 * 8_519_680
"""cuBLAS's workspaces, 8.1 MiB for each stream: torch's own, and the one that captures graphs. (Hopper: 32 MiB.)"""


@dataclass(frozen=True)
class Rows:
    """Of a generation. context: tokens of prompt and answer. nodes: of the largest tree (N).

    prefill: prompt rows that the target runs in one pass; at most `context`.
    """

    context: int
    nodes: int
    prefill: int


@dataclass(frozen=True)
class LayerSizes:
    """One decoder layer. kv_row_bytes: keys and values of a row; 0 if it reads another layer's. window: in rows."""

    weights_bytes: int
    kv_row_bytes: int
    window: int | None

    def kv_bytes(self, rows: Rows, *, allocated: bool) -> int:
        """Of its cache: buffers as `cache.borrow` allocates them, or what of them is ever touched.

        On a CPU only touched pages take memory; on a GPU all of a buffer does.
        """
        full = rows.context + rows.nodes
        if self.window is None:
            return full * self.kv_row_bytes
        capacity = self.window - 1 + rows.nodes + SLIDING_SLACK_ROWS
        return self.kv_row_bytes * (capacity if allocated else min(capacity, full))


@dataclass(frozen=True)
class Widths:
    """Numbers of a row inside a decoder layer: the stream, the MLP, all query heads, all key and value heads."""

    hidden: int
    inner: int
    query: int
    key_value: int

    def pass_bytes(self, rows: int, number_bytes: int) -> int:
        """Peak of temporaries while a decoder layer runs `rows` rows, numbers of `number_bytes`.

        Four tensors of the stream's width live around the layer (embeddings or features, the layer's input, the
        residual, the normed input). Within it either the MLP holds three of its own (gate, up, their product), or
        attention holds queries and their rotation (six of the queries' width) beside keys and values.
        """
        inside = max(3 * self.inner, 6 * self.query + self.key_value)
        return rows * number_bytes * (4 * self.hidden + inside)

    def masked_pass_bytes(self, rows: int, keys: int, number_bytes: int, *, additive: bool) -> int:
        """The same with a mask over `keys` rows of the cache, additive or of truth values, which attention converts.

        With a mask, transformers' attention repeats grouped keys and values to all query heads, layer by layer.
        """
        mask = rows * keys * (number_bytes if additive else 1)
        converted = 0 if additive else rows * keys * number_bytes
        repeated = 2 * self.query * keys * number_bytes if 2 * self.query > self.key_value else 0
        attention = rows * number_bytes * (4 * self.hidden + 2 * self.query) + repeated + converted
        return mask + max(self.pass_bytes(rows, number_bytes), attention)


@dataclass(frozen=True)
class TargetSizes:
    """A target stored as `dtype`.

    head_bytes: without a weight that is tied to the embedding. rest_bytes: all else (position tables, rotary
    frequencies). number_bytes: of an activation and of a number in the cache.
    head_bias: whether the head has one. modules: name -> "rest" or the number of a decoder layer, "norm" for the
    final one; the names cover the model and none lies within another.
    """

    dtype: str
    embedding_bytes: int
    layers: tuple[LayerSizes, ...]
    norm_bytes: int
    head_bytes: int
    rest_bytes: int
    tied: bool
    head_bias: bool
    vocab_size: int
    number_bytes: int
    widths: Widths
    modules: dict[str, int | str]

    @property
    def weights_bytes(self) -> int:
        """Of all weights and buffers."""
        layers = sum(layer.weights_bytes for layer in self.layers)
        return self.embedding_bytes + layers + self.norm_bytes + self.head_bytes + self.rest_bytes

    def features_bytes(self, rows: Rows, width: int) -> int:
        """Of the prompt's features of `width` numbers, which live as long as the generation."""
        return rows.context * width * self.number_bytes

    def prefill_bytes(self, rows: Rows) -> int:
        """Temporaries of one pass over prompt rows, features aside. Only a whole prompt in full view needs no mask."""
        if rows.prefill == rows.context and all((layer.window or math.inf) >= rows.context for layer in self.layers):
            return self.widths.pass_bytes(rows.prefill, self.number_bytes)
        seen = (rows.context if layer.window is None else layer.window - 1 + rows.prefill for layer in self.layers)
        keys = min(max(seen), rows.context)
        return self.widths.masked_pass_bytes(rows.prefill, keys, self.number_bytes, additive=False)

    def score_bytes(self, rows: Rows) -> int:
        """Temporaries of one pass over a tree, its logits in float32 included."""
        keys, logits = rows.context + rows.nodes, rows.nodes * self.vocab_size * 4
        return self.widths.masked_pass_bytes(rows.nodes, keys, self.number_bytes, additive=True) + logits


@dataclass(frozen=True)
class DraftSizes:
    """A draft whose numbers take `number_bytes`.

    blocks_bytes: all of its own weights. kv_row_bytes: of all blocks. vocab_size: rows of its target's tables.
    own_head: rows of a head of its own, or None. own_embedding: whether it has a table of its own. features: width of
    the target's features that it reads.
    """

    blocks_bytes: int
    kv_row_bytes: int
    number_bytes: int
    vocab_size: int
    own_head: int | None
    own_embedding: bool
    features: int
    widths: Widths

    @property
    def row_bytes(self) -> int:
        """Of a row of a table in the draft's type."""
        return self.widths.hidden * self.number_bytes

    def kv_bytes(self, rows: Rows, *, on_gpu: bool) -> int:
        """Of its cache: on a GPU a power of two of rows (`graph_rows.Store`), on a CPU the touched ones."""
        if on_gpu:
            return self.kv_row_bytes * self._capacity(rows)
        return self.kv_row_bytes * (rows.context + rows.nodes)

    @property
    def _logits(self) -> int:
        return self.own_head or self.vocab_size

    def _capacity(self, rows: Rows) -> int:
        return power_of_two(max(rows.context + DRAFT_ROWS, MIN_COLUMNS))

    def pass_bytes(self, rows: Rows) -> int:
        """Temporaries over the whole prompt, which the draft reads at once; or of logits over one level of a tree."""
        fusion = (6 * self.widths.hidden + self.features) * rows.context * self.number_bytes
        logits = MAX_STATIC_ROWS * self._logits * (self.number_bytes + 8)  # and log-probabilities in fp32, twice
        return max(self.widths.pass_bytes(rows.context, self.number_bytes), fusion) + logits

    def graph_bytes(self, rows: Rows) -> int:
        """What CUDA graphs read, write and hold, as `graph_runner.py` says, with cuBLAS's workspaces."""
        numbers = self._logits + 3 * self.widths.hidden + self._capacity(rows)
        numbers += self._logits + 3 * self.widths.inner
        return MAX_STATIC_ROWS * numbers * self.number_bytes + 8 * self._capacity(rows) + CUBLAS_BYTES
