"""Preallocated key/value storage: rows are appended, a path of them is kept, the rest is dropped, in place.

Enters: keys and values of new rows. Leaves: views over all rows so far, never copies. `KVRows` is the
storage of one attention layer; `borrow` puts it under the layers of a transformers cache for the length
of one generation and gives stock layers back afterwards, so users only ever see transformers' own classes.
This module knows nothing of trees beyond "a path of the rows appended last".
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from .compat import Cache, DynamicLayer, DynamicSlidingWindowLayer, stock_layer, stock_sliding_layer

SLIDING_SLACK_ROWS = 256
"""Rows a sliding layer may hold beyond its window and tree before the window is moved to the front."""


class AttentionRows(Protocol):
    """Where an attention layer puts new rows, and what it attends to."""

    @property
    def keys(self) -> Tensor:
        """(1, kv_heads, m, head_dim) of all rows that may be attended to."""

    @property
    def values(self) -> Tensor:
        """(1, kv_heads, m, head_dim), likewise."""

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add n rows: keys and values (1, kv_heads, n, head_dim)."""


class KVRows:
    """Keys and values of one attention layer, batch 1, in buffers of fixed capacity.

    Args:
        capacity: rows the buffers hold; they are allocated at the first `append`. On a CPU the pages of
            unused rows are never touched, so a generous capacity costs address space, not memory.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    @property
    def keys(self) -> Tensor:
        """(1, heads, length, head_dim), a view."""
        assert self._keys is not None
        return self._keys[:, :, : self.length]

    @property
    def values(self) -> Tensor:
        """(1, heads, length, head_dim), a view."""
        assert self._values is not None
        return self._values[:, :, : self.length]

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add n rows: keys (1, heads, n, head_dim), values likewise. Grows by doubling when full."""
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
        """Make room for `capacity` rows; copies the rows in use if the buffers are smaller."""
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
        """Of the rows from `start` on, keep `count`: those of `path` in order, or the first ones if None.

        Args:
            start: first row that may move.
            path: (count,) int64, ascending, counted from `start`.
        """
        if self._keys is None or self._values is None:  # a layer that shares another layer's rows
            return
        if path is not None:
            end = start + count
            path = path.to(self._keys.device)  # layers of one target may lie on two devices
            self._keys[:, :, start:end] = self._keys.index_select(2, path + start)
            self._values[:, :, start:end] = self._values.index_select(2, path + start)
        self.length = start + count

    def drop_first(self, rows: int) -> None:
        """Forget the first `rows` rows and move the others to the front."""
        if rows and self._keys is not None and self._values is not None:
            self._keys[:, :, : self.length - rows] = self.keys[:, :, rows:].clone()
            self._values[:, :, : self.length - rows] = self.values[:, :, rows:].clone()
        self.length -= rows


def _rows_like(rows: Tensor, capacity: int) -> Tensor:
    """Uninitialised (1, heads, capacity, head_dim); no inference tensor, for it outlives the inference mode."""
    with torch.inference_mode(False):
        return rows.new_empty(1, rows.shape[1], capacity, rows.shape[3])


class TreeLayer(DynamicLayer):
    """A full-attention cache layer over `KVRows`, with the interface that transformers' models call."""

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
        """As `KVRows.keep`, with `start` counted in tokens of the sequence."""
        self.rows.keep(start, path, count)

    def to_stock(self) -> DynamicLayer:
        """transformers' own layer with the same rows (views, not copies)."""
        return stock_layer(self.rows.keys, self.rows.values) if self.rows.length else stock_layer(None, None)


class TreeSlidingLayer(TreeLayer):
    """A sliding-window layer: rows that no later token can see are dropped now and then, not at once.

    Rows stay in place between two moves, so a tree can be appended and rolled back; a move copies one
    window and happens once in `SLIDING_SLACK_ROWS` tokens.
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
        # A prompt longer than the buffers: attend over all of it once, store what stays visible.
        if rows.length:
            key_states = torch.cat([rows.keys, key_states], dim=2)
            value_states = torch.cat([rows.values, value_states], dim=2)
        surplus = max(key_states.shape[2] - (self.sliding_window - 1), 0)
        rows.length = 0
        rows.append(key_states[:, :, surplus:], value_states[:, :, surplus:])
        self.dropped += surplus
        return key_states, value_states

    def first_visible(self) -> int:
        """First token of the sequence that the next one can see."""
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
    """Put preallocated layers under `cache`, and stock layers with the final rows when the block ends.

    Args:
        cache: a transformers cache of dynamic layers, empty or filled by earlier turns (one copy of
            those rows is made, into the new buffers).
        template: the model's own kinds of layers, for caches that create theirs lazily.
        capacity: tokens to make room for: prompt, new tokens and one tree.
        tree_nodes: rows of the largest tree (N).
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
