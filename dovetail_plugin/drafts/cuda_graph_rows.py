"""What passes of static shapes read and write: one text's keys and values, inputs, outputs, and graphs over them.

Enters: the inputs of a pass of n rows behind `start` live ones. Leaves: tensors whose shapes and addresses stay
what they are from pass to pass, so that a CUDA graph over them can be replayed. A pass of 3 rows behind 5 live
ones, padded to 4 rows; columns are rows of keys and values, and those beyond 9 are hidden from all:

    column          0  1  2  3  4 | 5  6  7 | 8 | 9 ..
    row 0 .. 2      what the mask says      | -   -      written to columns 5, 6, 7
    row 3           -  -  -  -  -   -  -  -   0   -      padding: zeros, sees itself only, overwritten by the next pass

This module runs no model and captures nothing; `graph_runner.py` does both.
"""

from typing import Any

import torch
from torch import Tensor

from .model import DovetailDraft

MAX_STATIC_ROWS = 16
"""Rows of the longest pass that is padded and captured; a power of two."""

MIN_COLUMNS = 256
"""Columns that attention reads at least, beyond that the next power of two; also the smallest capacity."""


def power_of_two(number: int) -> int:
    """The least power of two that is no less than `number`, 1 or more."""
    return 1 << (number - 1).bit_length()


class GraphRows:
    """Key/value rows of one text in all blocks; `length` counts live ones and may be set back.

    Args:
        capacity: rows to make room for at once, at the first pass; more are made by doubling.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.store: Store | None = None


class BlockRows:
    """Stands in for `KVRows` of one block: new rows are written where a tensor on the device says.

    keys, values: (1, kv_heads, m, head_dim), views of all rows that the pass may attend to.
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

    Attributes:
        kv: (blocks, 2, 1, kv_heads, capacity, head_dim).
        written: rows of the text, live or not yet forgotten; beyond them there is padding, from `touched` on zeros.
        features, embeddings, predicted: (16, H) of a pass; `logits` (16, V); `cos`, `sin` (1, 16, head_dim).
        mask: (16, capacity), set over the real rows and live columns only.
        start, count: (1,) int64, the live rows before the pass and its real rows.
        graphs: by rows and columns of the pass; all in `pool`.
    """

    def __init__(self, draft: DovetailDraft, capacity: int) -> None:
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

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"graphs": {}, "pool": None}  # graphs cannot be copied

    def _zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """No inference tensor, for it is written to outside of inference mode, too."""
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
        """Also leaves their pool: torch takes no graph into one that has lost all of its graphs."""
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self.pool: Any = None

    def reserve(self, capacity: int, length: int) -> None:
        """Move the first `length` rows to larger buffers, without the graphs over the old ones."""
        self.drop_graphs()
        old = self.kv
        self._allocate(capacity)
        self.kv[..., :length, :].copy_(old[..., :length, :])

    def forget(self, length: int) -> None:
        """Leave no trace of rows at and beyond `length`: attention over a NaN is a NaN even where a mask hides it."""
        if self.written > length:
            self.kv[..., length : self.touched, :].zero_()
            self.written = self.touched = length

    def expect(self, end: int, padded_end: int) -> None:
        """A pass is going to write rows up to `end`, and padding behind them."""
        self.written, self.touched = end, max(self.touched, padded_end)

    def clear(self) -> None:
        """Make ready for another text."""
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
        """Set the inputs of a static pass. Host numbers reach the device as arguments of kernels: no copy, no wait.

        Args:
            features, embeddings: (n, H), n at most 16.
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
        """Of every block the first `columns` rows, new ones going to `positions` (n,) int64."""
        return [BlockRows(keys[:, :, :columns], values[:, :, :columns], positions) for keys, values in self.kv]

    def whole_mask(self, positions: Tensor, padding: Tensor, columns: int) -> Tensor:
        """(rows, columns) additive: the loaded mask, and around it what the picture above shows.

        Args:
            positions: (rows,) int64, columns that the rows of the pass are written to.
            padding: (rows, 1) bool.
        """
        column = self.indices[:columns]
        hidden = padding | (column >= self.start + self.count)
        mask = self.mask[: positions.shape[0], :columns].masked_fill(hidden, float("-inf"))
        return mask.masked_fill(padding & (column == positions[:, None]), 0.0)
