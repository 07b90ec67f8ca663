"""Caches of transformers for batches: that of one sequence out of them, and one for all out of those of sequences."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..compat import (
    Cache,
    DynamicLayer,
    IndexedLayer,
    records_past,
    stock_indexed_layer,
    stock_layer,
    stock_sliding_layer,
)


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
    into.layers = [_joined(layers) for layers in zip(*(cache.layers for cache in caches), strict=True)]


def _joined(layers: Sequence[Any]) -> DynamicLayer:
    """Return one layer with the rows of a layer of several sequences."""
    first, length = layers[0], max(layer.get_seq_length() for layer in layers)
    if not length:  # the layer reads the rows of another one
        return first

    def together(name: str, dimension: int, batch: int = 0, last: int | None = None) -> Any:
        rows = [getattr(layer, name) for layer in layers]
        if rows[0] is None:
            return None
        behind = [length - layer.get_seq_length() for layer in layers]
        padded = [_behind(one, count, dimension) for one, count in zip(rows, behind, strict=True)]
        most = min(length, max(one.shape[dimension] for one in padded))
        return torch.cat([_last(one, most if last is None else min(most, last), dimension) for one in padded], batch)

    if IndexedLayer is not None and isinstance(first, IndexedLayer):
        of_index = together("indexer_keys", 1), together("indexer_position_ids", 2, batch=1)
        return stock_indexed_layer(together("keys", 2), together("values", 2), *of_index)
    window, recording = getattr(first, "sliding_window", None), records_past(first)
    if window is None:
        return stock_layer(together("keys", 2), together("values", 2))
    keys, values = (together(name, 2, last=None if recording else window - 1) for name in ("keys", "values"))
    return stock_sliding_layer(window, keys, values, length, recording=recording)


def _behind(rows: Tensor, count: int, dimension: int) -> Tensor:
    """Return rows with `count` zeros behind them in a dimension."""
    return torch.nn.functional.pad(rows, (0, 0) * (rows.dim() - 1 - dimension) + (0, count))


def _last(rows: Tensor, count: int, dimension: int) -> Tensor:
    """Return the last `count` rows in a dimension, with zeros in front where there are fewer."""
    missing = count - rows.shape[dimension]
    if missing > 0:
        return torch.nn.functional.pad(rows, (0, 0) * (rows.dim() - 1 - dimension) + (missing, 0))
    return rows.narrow(dimension, -missing, count)
