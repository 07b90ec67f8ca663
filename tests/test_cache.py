"""Key/value storage against a plain list, and its layers while they are lent to caches of transformers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dovetail_plugin.cache import KVRows, TreeLayer, TreeSlidingLayer, borrow


def rows_like(values):
    """Keys (1, 2, n, 3) filled with `values`, one for each row, and values (1, 2, n, 3) that are their negatives."""
    keys = torch.tensor(values, dtype=torch.float32).view(1, 1, -1, 1).expand(1, 2, -1, 3)
    return keys.clone(), -keys


def spelled(keys):
    assert bool((keys == keys[:, :1, :, :1]).all())
    return keys[0, 0, :, 0].tolist()


# In each round rows are appended, then those with a flag are kept.
rounds = st.lists(st.lists(st.booleans(), min_size=1, max_size=9), max_size=12)


def path_from(flags):
    path = [i for i, flag in enumerate(flags) if flag]
    moved = next((i for i, node in enumerate(path) if node != i), len(path))
    index = torch.tensor(path[moved:]) - moved if moved < len(path) else None
    return path, moved, index


@settings(deadline=None)
@given(st.integers(0, 12), st.integers(1, 40), rounds)
def test_rows_against_a_list(prompt, capacity, rounds):
    rows, reference, counter = KVRows(capacity), list(range(prompt)), prompt
    if prompt:
        rows.append(*rows_like(reference))
    for flags in rounds:
        new = list(range(counter, counter + len(flags)))
        counter += len(flags)
        rows.append(*rows_like(new))
        path, moved, index = path_from(flags)
        rows.keep(len(reference) + moved, index, len(path) - moved)
        reference += [new[i] for i in path]
        assert spelled(rows.keys) == reference
        assert spelled(-rows.values) == reference


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(2, 9), rounds)
def test_sliding_layer_against_a_list(prompt, window, rounds):
    """Every row that a later token can see is stored, in order, whatever was dropped before."""
    layer = TreeSlidingLayer(window, tree_nodes=9)
    layer.rows.capacity = window - 1 + 9 + 3  # small slack, so that the window is moved often
    reference, counter = list(range(prompt)), prompt
    keys, _ = layer.update(*rows_like(reference))
    assert spelled(keys) == reference
    for flags in rounds:
        new = list(range(counter, counter + len(flags)))
        counter += len(flags)
        width, first = layer.get_mask_sizes(len(new))
        keys, values = layer.update(*rows_like(new))
        assert first == max(len(reference) - window + 1, 0)
        assert spelled(keys) == (reference + new)[first:]
        assert spelled(-values) == (reference + new)[first:]
        assert keys.shape[2] == width
        path, moved, index = path_from(flags)
        layer.keep(len(reference) + moved, index, len(path) - moved)
        reference += [new[i] for i in path]
        assert layer.get_seq_length() == len(reference)
    stock = layer.to_stock()
    assert stock.cumulative_length == len(reference)
    assert spelled(stock.keys) == reference[max(len(reference) - window + 1, 0) :]


def test_rows_stay_where_they_are():
    """Appending and keeping never move the storage; only growing beyond the capacity does."""
    rows = KVRows(64)
    rows.append(*rows_like(range(10)))
    place = rows.keys.data_ptr()
    for _ in range(10):
        rows.append(*rows_like(range(5)))
        rows.keep(rows.length - 5, torch.tensor([1, 3]), 2)
    assert rows.keys.data_ptr() == place
    assert rows.length == 30


def test_loan_and_return():
    """A borrowed cache contains tree layers; afterwards it has stock layers with the same rows, without a copy."""
    cache = DynamicCache(config=MistralConfig(num_hidden_layers=2, sliding_window=4))
    cache.update(*rows_like(range(9)), 0)
    cache.update(*rows_like(range(9)), 1)
    with borrow(cache, [], capacity=40, tree_nodes=4) as layers:
        assert [type(layer) for layer in cache.layers] == [TreeSlidingLayer] * 2
        assert cache.get_seq_length() == 9
        for index in range(2):
            cache.update(*rows_like([9, 10]), index)
        assert layers[0].get_seq_length() == 11
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer] * 2
    assert cache.get_seq_length() == 11
    assert spelled(cache.layers[1].keys) == [8, 9, 10]
    keys, _ = cache.update(*rows_like([11]), 1)
    assert spelled(keys) == [8, 9, 10, 11]


def test_loan_is_returned_after_an_error():
    cache = DynamicCache(config=LlamaConfig(num_hidden_layers=1))
    with pytest.raises(RuntimeError), borrow(cache, [], capacity=8, tree_nodes=4):
        assert type(cache.layers[0]) is TreeLayer
        raise RuntimeError
    assert type(cache.layers[0]) is DynamicLayer
    assert cache.get_seq_length() == 0


def test_lazily_built_caches_get_their_layers():
    cache = DynamicCache()
    kinds = DynamicCache(config=LlamaConfig(num_hidden_layers=3)).layers
    with borrow(cache, kinds, capacity=8, tree_nodes=4):
        cache.update(*rows_like([1, 2]), 2)
        assert len(cache.layers) == 3
    assert spelled(cache.layers[2].keys) == [1, 2]
