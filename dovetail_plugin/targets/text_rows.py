"""The rows of one text, in a cache for the model.

`TextRows` stores a text: one layer for each layer of a transformers cache, and one list of lengths that says which rows
belong to the text. A pass of the model writes behind these rows, so it can stop anywhere and nothing is lost: the
lengths change in one assignment, in `TextRows.keep`. The caller's own cache is not touched before `TextRows.hand_back`.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ..cache import TextState, TreeIndexedLayer, TreeLayer, TreeSlidingLayer, refuse_reason
from ..compat import Cache, DynamicLayer, DynamicSlidingWindowLayer, IndexedLayer, SharedLayer, records_past


class TextRows(TextState):
    """The rows of one text, in a cache for the model.

    Args:
        given: the caller's cache. It keeps its own layers until `hand_back`.
        template: empty layers of the kinds that the model uses, for caches that create their layers lazily.

    Attributes:
        cache: a copy of `given` over this storage, for the model.
        layers: the layers of `cache` that hold rows.
    """

    def __init__(self, given: Cache, template: list[DynamicLayer]) -> None:
        stock = list(given.layers) + template[len(given.layers) :]
        super().__init__([0] * len(stock))
        mixed = [self._layer(index, layer) for index, layer in enumerate(stock)]
        self.layers = [layer for layer in mixed if isinstance(layer, TreeLayer)]
        for own, layer in zip(mixed, stock, strict=True):
            if isinstance(own, TreeLayer) and layer.is_initialized:
                self.lengths[own.index] = own.fill(layer)
        self.cache = copy.copy(given)
        self.cache.layers = mixed

    def _layer(self, index: int, stock: DynamicLayer) -> DynamicLayer:
        if SharedLayer is not None and isinstance(stock, SharedLayer):
            return stock
        if isinstance(stock, DynamicSlidingWindowLayer):
            return TreeSlidingLayer(self, index, stock.sliding_window, records_past(stock))
        if IndexedLayer is not None and isinstance(stock, IndexedLayer):
            return TreeIndexedLayer(self, index)
        return TreeLayer(self, index)

    @property
    def length(self) -> int:
        """Rows of the text in the layer that has most; layers that share the rows of another one have none."""
        return max(self.lengths)

    def begin_pass(self, *, keeps_all: bool = False, extended: int = 0) -> None:
        """Drop the rows of the pass before, unless they were kept.

        Args:
            keeps_all: see `TextState`.
            extended: first rows of the pass before that stay, because the new pass goes on with their tree.
        """
        self.keeps_all, self.extends = keeps_all, extended > 0
        for layer in self.layers:
            layer.begin_pass(extended)

    @contextmanager
    def without_pass(self) -> Iterator[None]:
        """Let the layers report the rows of the text alone while the block runs."""
        pending = [layer.pending for layer in self.layers]
        try:
            for layer in self.layers:
                layer.pending = 0
            yield
        finally:
            for layer, rows in zip(self.layers, pending, strict=True):
                layer.pending = rows

    def keep(self, path: Sequence[int], rows: int) -> None:
        """Make rows of the latest pass a part of the text, and drop the others.

        Args:
            path: rows to keep, ascending.
            rows: rows that the pass had (N). A layer that wrote another number keeps all of its rows: they are not of
                the tree but, for example, of an image.
        """
        moved = next((i for i, node in enumerate(path) if node != i), len(path))  # earlier rows do not move
        index = torch.tensor(path[moved:], device="cpu") if moved < len(path) else None
        self._adopt()
        lengths = self.lengths + [0] * (len(self.cache.layers) - len(self.lengths))
        for layer in self.layers:
            if layer.pending == rows:
                layer.move(path, index)
                lengths[layer.index] += len(path)
            else:
                lengths[layer.index] += layer.pending
        self.lengths = lengths
        for layer in self.layers:
            layer.kept()

    def _adopt(self) -> None:
        """Store the rows of layers that the model has added to its cache in the latest pass.

        A model may run its layers several times, and have separate rows for each time.

        Raises:
            TypeError: their rows cannot be taken back.
        """
        layers: list[DynamicLayer] = self.cache.layers
        added = layers[len(self.lengths) :]
        if reason := refuse_reason(added):
            raise TypeError(f"the model added layers to its cache, and {reason}")
        for index, stock in enumerate(added, len(self.lengths)):
            own = self._layer(index, stock)
            if isinstance(own, TreeLayer):
                own.pending = own.fill(stock)
            layers[index] = own
        self.layers = [layer for layer in layers if isinstance(layer, TreeLayer)]

    def hand_back(self, given: Cache) -> None:
        """Give the caller's cache transformers' own layers with copies of the rows, in one assignment.

        Layers that the model has added in a pass whose rows were not kept are left out.
        """
        self.begin_pass()
        own = self.cache.layers[: len(self.lengths)]
        given.layers = [layer.to_stock() if isinstance(layer, TreeLayer) else layer for layer in own]
