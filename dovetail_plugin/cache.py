"""Preallocated key/value storage. Rows are appended, accepted rows are kept and the others are dropped, in place.

`KVRows` stores the rows of one attention layer. It takes keys and values of new rows and returns views over all rows,
without copies. `borrow` puts such storage under a transformers cache for one generation and restores transformers' own
layers afterwards, so users see transformers' classes only. This module does not know trees, only the path of rows to
keep.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from .compat import Cache, DynamicLayer, DynamicSlidingWindowLayer, stock_layer, stock_sliding_layer

SLIDING_SLACK_ROWS = 256
"""Rows of a sliding layer beyond its window and one tree. When they are used up, the window moves to the front."""


class AttentionRows(Protocol):
    """Storage that an attention layer appends new rows to and reads all rows from."""

    @property
    def keys(self) -> Tensor:
        """Keys (1, kv_heads, m, head_dim) of all rows that may be attended to."""

    @property
    def values(self) -> Tensor:
        """Values (1, kv_heads, m, head_dim) of the same rows."""

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Append n rows.

        Args:
            keys: (1, kv_heads, n, head_dim).
            values: (1, kv_heads, n, head_dim).
        """


class KVRows:
    """Keys and values of one attention layer for one sequence, in preallocated buffers.

    Args:
        capacity: rows that the buffers have room for. They are allocated by the first `append`. On a CPU, the pages of
            unused rows are never touched, so a large capacity costs address space and not memory.

    Attributes:
        capacity: rows that the buffers have room for.
        length: rows in use.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    @property
    def keys(self) -> Tensor:
        """Keys (1, kv_heads, length, head_dim), a view."""
        assert self._keys is not None
        return self._keys[:, :, : self.length]

    @property
    def values(self) -> Tensor:
        """Values (1, kv_heads, length, head_dim), a view."""
        assert self._values is not None
        return self._values[:, :, : self.length]

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Append n rows. The buffers double when they are full. See `AttentionRows.append`."""
        end = self.length + keys.shape[2]
        if self._keys is None or self._values is None:
            self.capacity = max(self.capacity, end)
            self._keys, self._values = _rows_like(keys, self.capacity), _rows_like(values, self.capacity)
        elif end > self.capacity:
            self.reserve(max(end, 2 * self.capacity))
        self._keys[:, :, self.length : end] = keys
        self._values[:, :, self.length : end] = values
        self.length = end

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` rows. Copies the rows in use if the buffers are smaller."""
        if capacity <= self.capacity:
            return
        self.capacity = capacity
        if self._keys is None or self._values is None:
            return
        for name in ("_keys", "_values"):
            old = getattr(self, name)
            new = _rows_like(old, capacity)
            new[:, :, : self.length] = old[:, :, : self.length]
            setattr(self, name, new)

    def keep(self, start: int, path: Tensor | None, count: int) -> None:
        """Keep the rows before `start` and `count` of the rows from `start` on; drop the others.

        Args:
            start: first row that may be dropped or moved.
            path: (count,) int64 rows to keep, ascending and relative to `start`; None keeps the first `count` rows.
            count: number of rows to keep from `start` on.
        """
        if self._keys is None or self._values is None:  # the layer shares the rows of another layer
            return
        if path is not None:
            end = start + count
            path = path.to(self._keys.device)  # layers of one target may lie on two devices
            self._keys[:, :, start:end] = self._keys.index_select(2, path + start)
            self._values[:, :, start:end] = self._values.index_select(2, path + start)
        self.length = start + count

    def drop_first(self, rows: int) -> None:
        """Drop the first `rows` rows and move the others to the front."""
        if rows and self._keys is not None and self._values is not None:
            self._keys[:, :, : self.length - rows] = self.keys[:, :, rows:].clone()
            self._values[:, :, : self.length - rows] = self.values[:, :, rows:].clone()
        self.length -= rows


def _rows_like(rows: Tensor, capacity: int) -> Tensor:
    """Return an uninitialized tensor (1, kv_heads, capacity, head_dim) that can be used outside of inference mode."""
    with torch.inference_mode(False):
        return rows.new_empty(1, rows.shape[1], capacity, rows.shape[3])


class TreeLayer(DynamicLayer):
    """A full-attention layer of a transformers cache that stores its rows in a `KVRows`.

    Args:
        capacity: rows to make room for.

    Attributes:
        rows: the storage.
    """

    is_sliding = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.rows = KVRows(capacity)

    def update(self, key_states: Tensor, value_states: Tensor, *_args, **_kwargs) -> tuple[Tensor, Tensor]:
        self.rows.append(key_states, value_states)
        self.is_initialized = True
        return self.rows.keys, self.rows.values

    def get_seq_length(self) -> int:
        return self.rows.length

    def get_mask_sizes(self, query_length: int, *_args) -> tuple[int, int]:
        return self.rows.length + query_length, 0

    def keep(self, start: int, path: Tensor | None, count: int) -> None:
        """Keep rows as `KVRows.keep` does. `start` is a position in the sequence."""
        self.rows.keep(start, path, count)

    def to_stock(self) -> DynamicLayer:
        """Return transformers' own layer over the same rows, without a copy."""
        return stock_layer(self.rows.keys, self.rows.values) if self.rows.length else stock_layer(None, None)


class TreeSlidingLayer(TreeLayer):
    """A sliding-window layer that drops rows outside of the window from time to time.

    Rows stay in place until the buffers are full, so a tree can be appended and rolled back. Then the window moves to
    the front. Such a move copies one window and happens once in `SLIDING_SLACK_ROWS` tokens.

    Args:
        window: tokens that a token can see, including itself.
        tree_nodes: rows of the largest tree (N).

    Attributes:
        dropped: rows at the start of the sequence that are no longer stored.
    """

    is_sliding = True

    def __init__(self, window: int, tree_nodes: int) -> None:
        super().__init__(window - 1 + tree_nodes + SLIDING_SLACK_ROWS)
        self.sliding_window = window
        self.dropped = 0

    def update(self, key_states: Tensor, value_states: Tensor, *_args, **_kwargs) -> tuple[Tensor, Tensor]:
        rows, new = self.rows, key_states.shape[2]
        first = self.first_visible() - self.dropped
        self.is_initialized = True
        if rows.length + new > rows.capacity:
            rows.drop_first(first)
            self.dropped += first
            first = 0
        if rows.length + new <= rows.capacity:
            rows.append(key_states, value_states)
            return rows.keys[:, :, first:], rows.values[:, :, first:]
        # The prompt is longer than the buffers: attend to all of it once, and store what stays visible.
        if rows.length:
            key_states = torch.cat([rows.keys, key_states], dim=2)
            value_states = torch.cat([rows.values, value_states], dim=2)
        surplus = max(key_states.shape[2] - (self.sliding_window - 1), 0)
        rows.length = 0
        rows.append(key_states[:, :, surplus:], value_states[:, :, surplus:])
        self.dropped += surplus
        return key_states, value_states

    def first_visible(self) -> int:
        """Return the position of the first token that the next token can see."""
        return max(self.get_seq_length() - self.sliding_window + 1, 0)

    def get_seq_length(self) -> int:
        return self.dropped + self.rows.length

    def get_mask_sizes(self, query_length: int, *_args) -> tuple[int, int]:
        first = self.first_visible()
        return self.get_seq_length() - first + query_length, first

    def keep(self, start: int, path: Tensor | None, count: int) -> None:
        super().keep(start - self.dropped, path, count)

    def to_stock(self) -> DynamicLayer:
        seen = self.get_seq_length()
        if not self.rows.length:
            return stock_sliding_layer(self.sliding_window, None, None, seen)
        first = self.first_visible() - self.dropped
        keys, values = self.rows.keys[:, :, first:], self.rows.values[:, :, first:]
        return stock_sliding_layer(self.sliding_window, keys, values, seen)


def refuse_reason(layers: Iterable[object]) -> str | None:
    """Return why a cache of these layers cannot roll back rejected rows in place, or None if it can."""
    kinds = {type(layer) for layer in layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    if kinds:
        return "its cache has layers of type " + ", ".join(sorted(kind.__name__ for kind in kinds))
    return None


@contextmanager
def borrow(cache: Cache, template: list[DynamicLayer], capacity: int, tree_nodes: int) -> Iterator[list[TreeLayer]]:
    """Put preallocated layers under `cache`. When the block ends, transformers' own layers with the final rows return.

    Args:
        cache: a transformers cache of dynamic layers, empty or filled by earlier turns. Existing rows are copied once.
        template: empty layers of the kinds that the model uses, for caches that create their layers lazily.
        capacity: tokens to make room for: prompt, new tokens and one tree.
        tree_nodes: rows of the largest tree (N).

    Yields:
        The preallocated layers.
    """
    stock = list(cache.layers) + template[len(cache.layers) :]
    own: list[TreeLayer] = []
    for layer in stock:
        if isinstance(layer, DynamicSlidingWindowLayer):
            tree_layer: TreeLayer = TreeSlidingLayer(layer.sliding_window, tree_nodes)
        else:
            tree_layer = TreeLayer(capacity)
        if layer.is_initialized and layer.keys is not None and layer.keys.numel():
            tree_layer.update(layer.keys, layer.values)
            if isinstance(tree_layer, TreeSlidingLayer):
                tree_layer.dropped = layer.cumulative_length - tree_layer.rows.length
        own.append(tree_layer)
    cache.layers = own
    try:
        yield own
    finally:
        cache.layers = [layer.to_stock() for layer in own]
