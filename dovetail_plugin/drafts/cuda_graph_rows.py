"""Storage for passes of static shapes: keys and values of one text, inputs, outputs, and CUDA graphs over them.

Shapes and addresses of these tensors stay the same from pass to pass, so that a graph over them can be replayed. The
picture shows a pass of 3 rows behind 5 live ones, padded to 4 rows. Columns are rows of keys and values; those from 9
on are hidden from all rows:

    column          0  1  2  3  4 | 5  6  7 | 8 | 9 ..
    row 0 .. 2      what the mask says      | -   -      written to columns 5, 6, 7
    row 3           -  -  -  -  -   -  -  -   0   -      padding: zeros, sees itself only, overwritten by the next pass

This module runs no model and captures nothing; `cuda_graphs.py` does both.
"""

from typing import Any

import torch
from torch import Tensor

from .network import DraftNetwork

MAX_STATIC_ROWS = 16
"""Rows of the longest pass that is padded and captured; a power of two."""

MIN_COLUMNS = 256
"""Least number of columns that attention reads, and the smallest capacity. Beyond it, the next power of two is used."""


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least `number` (1 or more)."""
    return 1 << (number - 1).bit_length()


class GraphRows:
    """Key/value rows of one text in all blocks; implements `RowStorage`.

    Args:
        capacity: rows to make room for at the first pass; it doubles when they are used up.

    Attributes:
        length: rows in use; may be set back.
        store: the tensors, from the first pass on.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.store: Store | None = None


class BlockRows:
    """Rows of one block in a static pass; implements `AttentionRows`. A tensor on the device says where to write.

    Args:
        keys: (1, kv_heads, m, head_dim), a view of all rows that the pass may attend to.
        values: (1, kv_heads, m, head_dim), likewise.
        positions: (n,) int64, of the new rows among them.
    """

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        self.keys, self.values, self._positions = keys, values, positions

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Write keys and values (1, kv_heads, n, head_dim)."""
        self.keys.index_copy_(2, self._positions, keys)
        self.values.index_copy_(2, self._positions, values)


class Store:
    """Keys and values of one text in all blocks, the tensors that static passes read and write, and their graphs.

    Args:
        draft: attached to its target.
        capacity: rows that the text may have.

    Attributes:
        kv: (blocks, 2, 1, kv_heads, capacity, head_dim) keys and values.
        written: rows of the text, live or not yet cleared. Behind them there is padding.
        touched: rows that were ever written. Behind them there are zeros.
        features: (16, H) input of a pass.
        embeddings: (16, H) input of a pass.
        predicted: (16, H) output of a pass.
        logits: (16, V) output of a pass.
        cos: (1, 16, head_dim) rotary cosines.
        sin: (1, 16, head_dim) rotary sines.
        mask: (16, capacity) additive, set over the real rows and live columns only.
        start: (1,) int64, live rows before the pass.
        count: (1,) int64, real rows of the pass.
        graphs: (rows, columns) of the pass -> graph.
        pool: memory pool of all graphs.
    """

    def __init__(self, draft: DraftNetwork, capacity: int) -> None:
        config, weight = draft.config, next(draft.parameters())
        self._config, self._device, self._dtype = config, weight.device, weight.dtype
        self.written = self.touched = 0
        self._weights: tuple[int, ...] = ()
        self.drop_graphs()
        rows, width, head_dim = MAX_STATIC_ROWS, config.hidden_size, config.head_dim
        assert head_dim is not None and draft.head_weight is not None  # `embed` has raised if there is no target
        self.features, self.embeddings, self.predicted = (self._zeros(rows, width) for _ in range(3))
        self.cos, self.sin = (self._zeros(1, rows, head_dim) for _ in range(2))
        self.logits = self._zeros(rows, draft.head_weight.shape[0])
        self.start, self.count = (self._zeros(1, dtype=torch.int64) for _ in range(2))
        self._allocate(capacity)

    def _zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Make zeros outside of inference mode, because they are written to outside of it too."""
        with torch.inference_mode(False):
            return torch.zeros(shape, dtype=dtype or self._dtype, device=self._device)

    def _allocate(self, capacity: int) -> None:
        config, self.capacity = self._config, capacity
        heads, head_dim = config.num_key_value_heads, config.head_dim
        assert heads is not None and head_dim is not None  # the config fills them in
        self.kv = self._zeros(config.num_hidden_layers, 2, 1, heads, capacity, head_dim)
        self.mask = self._zeros(MAX_STATIC_ROWS, capacity)
        with torch.inference_mode(False):
            self.indices = torch.arange(capacity, device=self._device)

    def drop_graphs(self) -> None:
        """Drop the graphs and their pool: torch does not capture into a pool that has lost all of its graphs."""
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self.pool: Any = None

    def reserve(self, capacity: int, length: int) -> None:
        """Move the first `length` rows to larger buffers, without the graphs over the old ones."""
        self.drop_graphs()
        old = self.kv
        self._allocate(capacity)
        self.kv[..., :length, :].copy_(old[..., :length, :])

    def forget(self, length: int) -> None:
        """Clear the rows from `length` on: attention over a NaN is a NaN even where a mask hides it."""
        if self.written > length:
            self.kv[..., length : self.touched, :].zero_()
            self.written = self.touched = length

    def expect(self, end: int, padded_end: int) -> None:
        """Note that a pass will write rows up to `end`, and padding after them up to `padded_end`."""
        self.written, self.touched = end, max(self.touched, padded_end)

    def clear(self) -> None:
        """Clear everything for another text."""
        self.kv.zero_()
        self.written = self.touched = 0

    def fit(self, vocabulary: int, weights: tuple[int, ...]) -> None:
        """Drop graphs that read other weights (by address) or write logits of another size."""
        if vocabulary != self.logits.shape[1]:
            self.drop_graphs()
            self.logits = self._zeros(MAX_STATIC_ROWS, vocabulary)
        if weights != self._weights:
            self.drop_graphs()
            self._weights = weights

    def load(self, features: Tensor, embeddings: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, start: int) -> None:
        """Set the inputs of a static pass. Numbers on the host reach the device as kernel arguments, without a wait.

        Args:
            features: (n, H), n at most 16.
            embeddings: (n, H).
            rope: cosines and sines, (1, n, head_dim) or (1, 1, head_dim) for all rows.
            mask: (n, start + n) additive.
            start: live rows.
        """
        count = features.shape[0]
        assert mask.shape == (count, start + count)
        self.start.fill_(start)
        self.count.fill_(count)
        self.features[:count].copy_(features, non_blocking=True)
        self.embeddings[:count].copy_(embeddings, non_blocking=True)
        self.cos[:, :count].copy_(rope[0])
        self.sin[:, :count].copy_(rope[1])
        self.mask[:count, : start + count].copy_(mask)

    def blocks(self, positions: Tensor, columns: int) -> list[BlockRows]:
        """Return the first `columns` rows of every block, where new rows go to `positions` (n,) int64."""
        return [BlockRows(keys[:, :, :columns], values[:, :, :columns], positions) for keys, values in self.kv]

    def whole_mask(self, positions: Tensor, padding: Tensor, columns: int) -> Tensor:
        """Return an additive mask (rows, columns): the loaded one, and around it what the picture above shows.

        Args:
            positions: (rows,) int64, columns that the rows of the pass are written to.
            padding: (rows, 1) bool.
        """
        column = self.indices[:columns]
        hidden = padding | (column >= self.start + self.count)
        mask = self.mask[: positions.shape[0], :columns].masked_fill(hidden, float("-inf"))
        return mask.masked_fill(padding & (column == positions[:, None]), 0.0)
