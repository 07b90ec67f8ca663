"""Key/value storage of a text that grows by trees: rows are appended, accepted ones are kept, the others are dropped.

`TextRows` stores a text: one layer for each layer of a transformers cache, and one list of lengths that says which rows
belong to the text. A pass of the model writes behind these rows, so it can stop anywhere and nothing is lost: the
lengths change in one assignment, in `TextRows.keep`. The caller's own cache is not touched before `TextRows.hand_back`.
This module does not know trees, only the rows to keep.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .compat import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    SharedLayer,
    stock_layer,
    stock_sliding_layer,
)

SLACK_ROWS = 256
"""Fewest rows that are reserved beyond what a pass needs. When they are full, buffers grow or the window moves."""


def rows_like(rows: Tensor, capacity: int) -> Tensor:
    """Return an uninitialized tensor (1, kv_heads, capacity, head_dim) that can be used outside of inference mode."""
    with torch.inference_mode(False):
        return rows.new_empty(1, rows.shape[1], capacity, rows.shape[3])


@dataclass(frozen=True)
class _Stored:
    """Buffers (1, kv_heads, capacity, head_dim) of a layer, whose first row is that of the token `dropped`."""

    keys: Tensor
    values: Tensor
    dropped: int = 0

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def rows(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of the tokens from `start` to `end`, as views."""
        rows = slice(start - self.dropped, end - self.dropped)
        return self.keys[:, :, rows], self.values[:, :, rows]

    def write(self, start: int, keys: Tensor, values: Tensor) -> None:
        """Write the rows of the tokens from `start` on."""
        for own, given in zip(self.rows(start, start + keys.shape[2]), (keys, values), strict=True):
            own.copy_(given)

    def moved(self, start: int, end: int, capacity: int) -> "_Stored":
        """Return other buffers, with the rows of the tokens from `start` to `end`."""
        new = _Stored(rows_like(self.keys, capacity), rows_like(self.values, capacity), start)
        new.write(start, *self.rows(start, end))
        return new


def reserved(rows: int) -> int:
    """Return the rows of buffers that are made for `rows` rows."""
    return rows + max(SLACK_ROWS, rows // 8)


class TreeLayer(DynamicLayer):
    """One layer of `TextRows`, under a transformers cache.

    Args:
        text: the text that it belongs to.
        index: its place in the cache.

    Attributes:
        index: its place in the cache.
        pending: rows that the pass in progress, or the latest one, has written behind the text's.
    """

    is_sliding = False

    def __init__(self, text: "TextRows", index: int) -> None:
        self._text, self.index = text, index
        self._stored: _Stored | None = None
        self.pending = 0
        super().__init__()

    @property
    def length(self) -> int:
        """Rows of the text."""
        return self._text.lengths[self.index]

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """Keys (1, kv_heads, m, head_dim) that the next token can see; None before the first pass."""
        return self._visible(0)

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._refuse(keys)

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """Values (1, kv_heads, m, head_dim) of the same rows; None before the first pass."""
        return self._visible(1)

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._refuse(values)

    def _visible(self, which: int) -> Tensor | None:
        return None if self._stored is None else self._stored.rows(self.first_visible(), self.get_seq_length())[which]

    def _refuse(self, rows: Tensor | None) -> None:
        if rows is not None:  # transformers' own classes set None when they are made
            raise AttributeError("the cache of a running generation cannot be replaced")

    def first_visible(self) -> int:
        """Return the position of the first row that the next row can see."""
        return 0

    def get_seq_length(self) -> int:
        return self.length + self.pending

    def get_mask_sizes(self, query_length: int, *_args) -> tuple[int, int]:
        first = self.first_visible()
        return self.get_seq_length() - first + query_length, first

    def update(self, key_states: Tensor, value_states: Tensor, *_args, **_kwargs) -> tuple[Tensor, Tensor]:
        start, first = self.get_seq_length(), self.first_visible()
        end = start + key_states.shape[2]
        stored = self._room(key_states, value_states, end)
        stored.write(start, key_states, value_states)
        self._stored = stored
        self.pending += end - start
        self.is_initialized = True
        return stored.rows(first, end)

    def _room(self, keys: Tensor, values: Tensor, end: int) -> _Stored:
        """Return buffers with the rows that can be seen so far, and with room up to the token `end`."""
        first, stored = self.first_visible(), self._stored
        if stored is None:
            capacity = reserved(end - first)
            return _Stored(rows_like(keys, capacity), rows_like(values, capacity), first)
        if end - stored.dropped <= stored.capacity:
            return stored
        return stored.moved(first, self.get_seq_length(), reserved(end - first))

    def begin_pass(self) -> None:
        """Drop the rows of the pass before."""
        self.pending = 0

    def move(self, path: Sequence[int], index: Tensor | None) -> None:
        """Move the rows of a pass that are to be kept to the front of its rows.

        Args:
            path: rows to keep, ascending, relative to the text's end.
            index: the same from the first row on that moves, int64; None if none does.
        """
        if self._stored is None or index is None:
            return
        end = self.length + len(path)
        for own, rows in zip(
            self._stored.rows(end - len(index), end), self._stored.rows(self.length, self.get_seq_length()), strict=True
        ):
            own.copy_(rows.index_select(2, index.to(rows.device)))  # layers may lie on two devices

    def kept(self) -> None:
        """Learn that the lengths of the text count the rows of the latest pass now."""
        self.pending = 0

    def fill(self, stock: DynamicLayer) -> None:
        """Take copies of the rows of an earlier turn."""
        seen, keys, values = stock.get_seq_length(), stock.keys, stock.values
        self._text.lengths[self.index] = seen
        first = seen - keys.shape[2]
        capacity = reserved(keys.shape[2])
        stored = _Stored(rows_like(keys, capacity), rows_like(values, capacity), first)
        stored.write(first, keys, values)
        self._stored, self.is_initialized = stored, True

    def to_stock(self) -> DynamicLayer:
        """Return transformers' own layer with copies of the text's rows."""
        return stock_layer(*self._copies())

    def _copies(self) -> tuple[Tensor | None, Tensor | None]:
        self.begin_pass()
        if self._stored is None or not self.length:
            return None, None
        keys, values = self._stored.rows(self.first_visible(), self.length)
        return keys.clone(memory_format=torch.contiguous_format), values.clone(memory_format=torch.contiguous_format)


class TreeSlidingLayer(TreeLayer):
    """A layer whose tokens see a window. Rows before the window stay until the buffers are full.

    Args:
        text: see `TreeLayer`.
        index: see `TreeLayer`.
        window: tokens that a token can see, including itself.
    """

    is_sliding = True

    def __init__(self, text: "TextRows", index: int, window: int) -> None:
        self.sliding_window = window
        self._before: _Stored | None = None  # where the rows were before a pass that needed other buffers
        super().__init__(text, index)

    def first_visible(self) -> int:
        """See `TreeLayer.first_visible`."""
        return max(self.get_seq_length() - self.sliding_window + 1, 0)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        stored, end = self._stored, self.get_seq_length() + key_states.shape[2]
        fits = stored is not None and end - stored.dropped <= stored.capacity
        if not fits and self._before is None:
            self._before = stored
        if fits or not self._text.keeps_all or key_states.shape[2] <= self.sliding_window:
            return super().update(key_states, value_states, *args, **kwargs)
        # A long prompt: attend to all of it once, and store what the next token sees.
        if stored is not None:
            old = stored.rows(self.first_visible(), self.get_seq_length())
            key_states = torch.cat([old[0], key_states], dim=2)
            value_states = torch.cat([old[1], value_states], dim=2)
        first, capacity = end - self.sliding_window + 1, reserved(self.sliding_window - 1)
        new = _Stored(rows_like(key_states, capacity), rows_like(value_states, capacity), first)
        rows = slice(1 - self.sliding_window, None) if self.sliding_window > 1 else slice(0, 0)
        new.write(first, key_states[:, :, rows], value_states[:, :, rows])
        self._stored = new
        self.pending, self.is_initialized = end - self.length, True
        return key_states, value_states

    def begin_pass(self) -> None:
        """See `TreeLayer.begin_pass`."""
        if self.pending and self._stored is not None and self._stored.dropped > self._first_of_text():
            self._stored = self._before
        self._before = None
        super().begin_pass()

    def _first_of_text(self) -> int:
        return max(self.length - self.sliding_window + 1, 0)

    def kept(self) -> None:
        """See `TreeLayer.kept`."""
        self._before = None
        super().kept()

    def to_stock(self) -> DynamicLayer:
        """See `TreeLayer.to_stock`."""
        keys, values = self._copies()
        return stock_sliding_layer(self.sliding_window, keys, values, self.length)


class TextRows:
    """The rows of one text, in a cache for the model.

    Args:
        given: the caller's cache. It keeps its own layers until `hand_back`.
        template: empty layers of the kinds that the model uses, for caches that create their layers lazily.

    Attributes:
        cache: a copy of `given` over this storage, for the model.
        layers: the layers of `cache` that hold rows.
        lengths: rows of each layer that belong to the text. All rows behind them are dropped by the next pass.
        keeps_all: whether all rows of the pass in progress will be kept, as those of a prompt.
    """

    def __init__(self, given: Cache, template: list[DynamicLayer]) -> None:
        stock = list(given.layers) + template[len(given.layers) :]
        self.lengths = [0] * len(stock)
        self.keeps_all = False
        mixed = [self._layer(index, layer) for index, layer in enumerate(stock)]
        self.layers = [layer for layer in mixed if isinstance(layer, TreeLayer)]
        for own, layer in zip(mixed, stock, strict=True):
            if isinstance(own, TreeLayer) and layer.is_initialized and layer.keys is not None and layer.keys.numel():
                own.fill(layer)
        self.cache = copy.copy(given)
        self.cache.layers = mixed

    def _layer(self, index: int, stock: DynamicLayer) -> DynamicLayer:
        if SharedLayer is not None and isinstance(stock, SharedLayer):
            return stock
        if isinstance(stock, DynamicSlidingWindowLayer):
            return TreeSlidingLayer(self, index, stock.sliding_window)
        return TreeLayer(self, index)

    @property
    def length(self) -> int:
        """Rows of the text in the layer that has most; layers that share the rows of another one have none."""
        return max(self.lengths)

    def begin_pass(self, *, keeps_all: bool = False) -> None:
        """Drop the rows of the pass before, unless they were kept.

        Args:
            keeps_all: see the attribute.
        """
        self.keeps_all = keeps_all
        for layer in self.layers:
            layer.begin_pass()

    def keep(self, path: Sequence[int], rows: int) -> None:
        """Make rows of the latest pass a part of the text, and drop the others.

        Args:
            path: rows to keep, ascending.
            rows: rows that the pass had (N). A layer that wrote another number keeps all of its rows: they are not of
                the tree but, for example, of an image.
        """
        moved = next((i for i, node in enumerate(path) if node != i), len(path))  # earlier rows do not move
        index = torch.tensor(path[moved:], device="cpu") if moved < len(path) else None
        lengths = list(self.lengths)
        for layer in self.layers:
            if layer.pending == rows:
                layer.move(path, index)
                lengths[layer.index] += len(path)
            else:
                lengths[layer.index] += layer.pending
        self.lengths = lengths
        for layer in self.layers:
            layer.kept()

    def hand_back(self, given: Cache) -> None:
        """Give the caller's cache transformers' own layers with copies of the rows, in one assignment."""
        given.layers = [layer.to_stock() if isinstance(layer, TreeLayer) else layer for layer in self.cache.layers]


def refuse_reason(layers: Iterable[object]) -> str | None:
    """Return why a cache of these layers cannot roll back rejected rows in place, or None if it can."""
    kinds = {type(layer) for layer in layers} - {DynamicLayer, DynamicSlidingWindowLayer, SharedLayer}
    if kinds:
        return "its cache has layers of type " + ", ".join(sorted(kind.__name__ for kind in kinds))
    return None


def cache_of_sequence(cache: Cache, index: int) -> Cache:
    """Return a cache with the rows of one sequence of a batch. The layers are new, and `cache` stays as it is."""
    own = copy.copy(cache)
    own.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in own.layers:
        layer.batch_select_indices(torch.tensor([index], device="cpu"))
    return own


def join_caches(into: Cache, caches: Sequence[Cache]) -> None:
    """Put the rows of several sequences into one cache, one length for all: rows behind the end of a text are zeros.

    Args:
        into: gets new layers, in one assignment.
        caches: one for each sequence.
    """
    layers = []
    for each in zip(*(cache.layers for cache in caches), strict=True):
        if not each[0].get_seq_length():  # the layer reads the rows of another one
            layers.append(each[0])
            continue
        length = max(layer.get_seq_length() for layer in each)
        padded = []
        for layer in each:
            behind = length - layer.get_seq_length()
            padded.append([torch.nn.functional.pad(rows, (0, 0, 0, behind)) for rows in (layer.keys, layer.values)])
        rows = min(length, max(keys.shape[2] for keys, _ in padded))
        window = getattr(each[0], "sliding_window", None)
        if window is not None:
            rows = min(rows, window - 1)
        keys, values = (torch.cat([_last(own[i], rows) for own in padded]) for i in range(2))
        layers.append(
            stock_layer(keys, values) if window is None else stock_sliding_layer(window, keys, values, length)
        )
    into.layers = layers


def _last(rows: Tensor, count: int) -> Tensor:
    """Return the last `count` rows (1, heads, count, dim), with zeros in front where there are fewer."""
    missing = count - rows.shape[2]
    return torch.nn.functional.pad(rows, (0, 0, missing, 0)) if missing > 0 else rows[:, :, -missing:]
