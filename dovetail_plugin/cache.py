"""Key/value storage of a text that grows by trees: rows are appended, accepted ones are kept, the others are dropped.

There is one layer for each layer of a transformers cache. The layers of a text share its `TextState`, whose lengths say
which rows belong to the text; a pass of the model writes behind these. `targets.text_rows` puts the layers together.
This module does not know trees, only the rows to keep.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .compat import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    IndexedLayer,
    SharedLayer,
    stock_indexed_layer,
    stock_layer,
    stock_sliding_layer,
)

SLACK_ROWS = 256
"""Fewest rows that are reserved beyond what a pass needs. When they are full, buffers grow or the window moves."""


def rows_like(rows: Tensor, capacity: int) -> Tensor:
    """Return an uninitialized tensor (1, kv_heads, capacity, head_dim) that can be used outside of inference mode."""
    with torch.inference_mode(False):
        return rows.new_empty(1, rows.shape[1], capacity, rows.shape[3])


@dataclass
class TextState:
    """Shared by all layers of a text.

    Attributes:
        lengths: rows of each layer that belong to the text. All rows behind them are dropped by the next pass.
        keeps_all: whether all rows of the pass in progress will be kept, as those of a prompt.
        reads_past: whether the model has read rows itself, apart from `update`, in a pass that added rows after that.
            Such a model mixes rows of before the pass with rows of it, so a pass over several tokens is another one
            than passes over each.
        extends: whether the pass in progress goes on with the rows of the pass before it, of one tree.
    """

    lengths: list[int]
    keeps_all: bool = False
    reads_past: bool = False
    extends: bool = False


@dataclass(frozen=True)
class _Stored:
    """Buffers (1, heads, capacity, dim) of a layer, such as keys and values. The first row is the token `dropped`'s."""

    buffers: tuple[Tensor, ...]
    dropped: int = 0

    @classmethod
    def like(cls, rows: Sequence[Tensor], capacity: int, dropped: int = 0) -> "_Stored":
        """Return empty buffers for rows of this form."""
        return cls(tuple(rows_like(one, capacity) for one in rows), dropped)

    @property
    def capacity(self) -> int:
        return self.buffers[0].shape[2]

    def rows(self, start: int, end: int) -> tuple[Tensor, ...]:
        """Return the rows of the tokens from `start` to `end` in each buffer, as views."""
        rows = slice(start - self.dropped, end - self.dropped)
        return tuple(buffer[:, :, rows] for buffer in self.buffers)

    def write(self, start: int, rows: Sequence[Tensor]) -> None:
        """Write the rows of the tokens from `start` on."""
        for own, given in zip(self.rows(start, start + rows[0].shape[2]), rows, strict=True):
            own.copy_(given)

    def move(self, index: Tensor, start: int, end: int, to: int) -> None:
        """Write rows `index` of those of the tokens from `start` to `end` behind each other, up to the token `to`."""
        for own, rows in zip(self.rows(to - len(index), to), self.rows(start, end), strict=True):
            own.copy_(rows.index_select(2, index.to(rows.device)))  # layers may lie on two devices

    def with_room(self, first: int, end: int, new: int) -> "_Stored":
        """Return buffers with the rows of the tokens from `first` to `end`, and with room for `new` more rows."""
        if end + new - self.dropped <= self.capacity:
            return self
        moved = _Stored.like(self.buffers, reserved(end + new - first), first)
        moved.write(first, self.rows(first, end))
        return moved

    def copies(self, start: int, end: int) -> tuple[Tensor, ...]:
        """Return copies of the rows of the tokens from `start` to `end`."""
        return tuple(rows.clone(memory_format=torch.contiguous_format) for rows in self.rows(start, end))


def reserved(rows: int) -> int:
    """Return the rows of buffers that are made for `rows` rows."""
    return rows + max(SLACK_ROWS, rows // 8)


class TreeLayer(DynamicLayer):
    """One layer of a text, under a transformers cache.

    Args:
        text: the text that it belongs to.
        index: its place in the cache.

    Attributes:
        index: its place in the cache.
        pending: rows that the pass in progress, or the latest one, has written behind the text's.
    """

    is_sliding = False

    def __init__(self, text: TextState, index: int) -> None:
        self._text, self.index = text, index
        self._stored: _Stored | None = None
        self._was_read = False  # in this pass
        self.pending = 0
        super().__init__()

    @property
    def length(self) -> int:
        """Rows of the text; 0 in a layer that the model has added in the latest pass."""
        lengths = self._text.lengths
        return lengths[self.index] if self.index < len(lengths) else 0

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
        self._was_read = True  # keys alone are also read for their shape
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

    def first_kept(self) -> int:
        """Return the position of the first row that is stored on."""
        return self.first_visible()

    def get_seq_length(self) -> int:
        return self.length + self.pending

    def get_mask_sizes(self, query_length: int, *_args) -> tuple[int, int]:
        first = self.first_visible()
        return self.get_seq_length() - first + query_length, first

    def update(self, key_states: Tensor, value_states: Tensor, *_args, **_kwargs) -> tuple[Tensor, ...]:  # type: ignore[override]
        start, first, new = self.get_seq_length(), self.first_visible(), (key_states, value_states)
        self._text.reads_past |= self._was_read
        stored = self._room(new)
        stored.write(start, new)
        self._stored = stored
        self.pending += key_states.shape[2]
        self.is_initialized = True
        return stored.rows(first, self.get_seq_length())

    def _room(self, new: tuple[Tensor, Tensor]) -> _Stored:
        """Return buffers with the rows so far that are needed, and with room for new ones."""
        first, end, count = self.first_kept(), self.get_seq_length(), new[0].shape[2]
        if self._stored is None:
            return _Stored.like(new, reserved(end + count - first), first)
        return self._stored.with_room(first, end, count)

    def begin_pass(self, rows: int = 0) -> None:
        """Drop the rows of the pass before, or all but the first ones.

        Args:
            rows: how many stay.
        """
        self.pending, self._was_read = min(self.pending, rows), False

    def move(self, path: Sequence[int], index: Tensor | None) -> None:
        """Move the rows of a pass that are to be kept to the front of its rows.

        Args:
            path: rows to keep, ascending, relative to the text's end.
            index: the same from the first row on that moves, int64; None if none does.
        """
        if self._stored is not None and index is not None:
            self._stored.move(index, self.length, self.get_seq_length(), self.length + len(path))

    def kept(self) -> None:
        """Learn that the lengths of the text count the rows of the latest pass now."""
        self.pending = 0

    def fill(self, stock: DynamicLayer) -> int:
        """Take copies of the rows of a layer of transformers, and return how many tokens it has seen."""
        seen, rows = stock.get_seq_length(), (stock.keys, stock.values)
        if rows[0] is None or not rows[0].numel():
            return 0
        first = seen - rows[0].shape[2]
        stored = _Stored.like(rows, reserved(rows[0].shape[2]), first)
        stored.write(first, rows)
        self._stored, self.is_initialized = stored, True
        return seen

    def to_stock(self) -> DynamicLayer:
        """Return transformers' own layer with copies of the rows, those of a pass in progress included."""
        return stock_layer(*self._copies())

    def __deepcopy__(self, _memo: dict[int, Any]) -> DynamicLayer:
        """Return transformers' own layer. Models that add layers to their cache in a pass make them in this way."""
        return self.to_stock()

    def _copies(self) -> tuple[Tensor | None, Tensor | None]:
        if self._stored is None or not self.get_seq_length():
            return None, None
        keys, values = self._stored.copies(self.first_kept(), self.get_seq_length())
        return keys, values


class TreeIndexedLayer(TreeLayer):
    """A layer that also keeps the keys of an index, by which the model chooses the rows that a token attends to.

    Args:
        text: see `TreeLayer`.
        index: see `TreeLayer`.

    Attributes:
        indexer_position_ids: (p, 1, m) int64 that some models keep beside the keys of the index, or None.
    """

    def __init__(self, text: TextState, index: int) -> None:
        self._stored_index: _Stored | None = None
        self._pending_index = 0
        self.indexer_position_ids: Tensor | None = None
        super().__init__(text, index)

    @property
    def indexer_keys(self) -> Tensor | None:
        """Keys (1, m, dim) of the index; None before the first pass, and in layers that use the index of another."""
        stored = self._stored_index
        return None if stored is None else stored.rows(0, self.length + self._pending_index)[0][0]

    @property
    def is_indexer_initialized(self) -> bool:
        """Whether the layer has keys of an index."""
        return self._stored_index is not None

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Append keys (1, n, dim) of the index and return all of them (1, m, dim)."""
        new, end = (indexer_key_states[None],), self.length + self._pending_index
        stored, count = self._stored_index, indexer_key_states.shape[1]
        stored = _Stored.like(new, reserved(count)) if stored is None else stored.with_room(0, end, count)
        stored.write(end, new)
        self._stored_index = stored
        self._pending_index += count
        return stored.rows(0, end + count)[0][0]

    def begin_pass(self, rows: int = 0) -> None:
        """See `TreeLayer.begin_pass`."""
        super().begin_pass(rows)
        self._pending_index = min(self._pending_index, rows)
        if self.indexer_position_ids is not None:
            self.indexer_position_ids = self.indexer_position_ids[..., : self.length + rows]

    def move(self, path: Sequence[int], index: Tensor | None) -> None:
        """See `TreeLayer.move`."""
        super().move(path, index)
        start, end = self.length, self.length + len(path)
        if index is None:
            return
        if self._stored_index is not None:
            self._stored_index.move(index, start, start + self._pending_index, end)
        if self.indexer_position_ids is not None:
            moved = self.indexer_position_ids[..., start:].index_select(-1, index.to(self.indexer_position_ids.device))
            before = self.indexer_position_ids[..., : end - len(index)]
            self.indexer_position_ids = torch.cat([before, moved], dim=-1)

    def kept(self) -> None:
        """See `TreeLayer.kept`."""
        super().kept()
        self.begin_pass()

    def fill(self, stock: Any) -> int:
        """See `TreeLayer.fill`."""
        seen = super().fill(stock)
        if seen and stock.is_indexer_initialized:
            keys = (stock.indexer_keys[None],)
            self._stored_index = _Stored.like(keys, reserved(seen))
            self._stored_index.write(0, keys)
        self.indexer_position_ids = stock.indexer_position_ids
        return seen

    def to_stock(self) -> DynamicLayer:
        """See `TreeLayer.to_stock`."""
        end = self.get_seq_length()
        keys = None if self._stored_index is None or not end else self._stored_index.copies(0, end)[0][0]
        positions = None if self.indexer_position_ids is None else self.indexer_position_ids[..., :end].clone()
        return stock_indexed_layer(*self._copies(), keys, positions)


class TreeSlidingLayer(TreeLayer):
    """A layer whose tokens see a window. Rows before the window stay until the buffers are full.

    Args:
        text: see `TreeLayer`.
        index: see `TreeLayer`.
        window: tokens that a token can see, including itself.
        recording: whether rows before the window stay, as the caller has asked for (`activate_past_recording`).
    """

    is_sliding = True

    def __init__(self, text: TextState, index: int, window: int, recording: bool = False) -> None:
        self.sliding_window, self._recording = window, recording
        self._before: _Stored | None = None  # where the rows were before a pass that needed other buffers
        super().__init__(text, index)

    def first_visible(self) -> int:
        """See `TreeLayer.first_visible`."""
        length = self.length if self._text.extends else self.get_seq_length()
        return max(length - self.sliding_window + 1, 0)

    def first_kept(self) -> int:
        """See `TreeLayer.first_kept`."""
        if self._recording:
            return 0 if self._stored is None else self._stored.dropped
        return self.first_visible()

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, ...]:  # type: ignore[override]
        stored, new, end = self._stored, (key_states, value_states), self.get_seq_length() + key_states.shape[2]
        fits = stored is not None and end - stored.dropped <= stored.capacity
        if not fits and self._before is None:
            self._before = stored
        short = key_states.shape[2] <= self.sliding_window
        if fits or short or self._recording or not self._text.keeps_all:
            return super().update(*new, *args, **kwargs)
        # A long prompt: attend to all of it once, and store what the next token sees.
        if stored is not None:
            old = stored.rows(self.first_visible(), self.get_seq_length())
            new = torch.cat([old[0], key_states], dim=2), torch.cat([old[1], value_states], dim=2)
        first, capacity = end - self.sliding_window + 1, reserved(self.sliding_window - 1)
        stored = _Stored.like(new, capacity, first)
        rows = slice(1 - self.sliding_window, None) if self.sliding_window > 1 else slice(0, 0)
        stored.write(first, [one[:, :, rows] for one in new])
        self._stored = stored
        self.pending, self.is_initialized = end - self.length, True
        return new

    def begin_pass(self, rows: int = 0) -> None:
        """See `TreeLayer.begin_pass`."""
        if self.pending and self._stored is not None and self._stored.dropped > self._first_of_text():
            self._stored = self._before
        self._before = None
        super().begin_pass(rows)

    def _first_of_text(self) -> int:
        return max(self.length - self.sliding_window + 1, 0)

    def kept(self) -> None:
        """See `TreeLayer.kept`."""
        self._before = None
        super().kept()

    def to_stock(self) -> DynamicLayer:
        """See `TreeLayer.to_stock`."""
        seen = self.get_seq_length()
        return stock_sliding_layer(self.sliding_window, *self._copies(), seen, recording=self._recording)


def refuse_reason(layers: Iterable[object]) -> str | None:
    """Return why a cache of these layers cannot roll back rejected rows in place, or None if it can."""
    kinds = {type(layer) for layer in layers} - {DynamicLayer, DynamicSlidingWindowLayer, IndexedLayer, SharedLayer}
    if kinds:
        return "its cache has layers of type " + ", ".join(sorted(kind.__name__ for kind in kinds))
    return None
