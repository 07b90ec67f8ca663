"""Key/value storage against a plain list, and what the caller's cache holds when a text ends or is interrupted."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dovetail_plugin import cache, compat
from dovetail_plugin.drafts.kv_rows import KVRows
from dovetail_plugin.targets.text_rows import TextRows


def rows_like(values):
    """Keys (1, 2, n, 3) filled with `values`, one for each row, and values (1, 2, n, 3) that are their negatives."""
    keys = torch.tensor(values, dtype=torch.float32).view(1, 1, -1, 1).expand(1, 2, -1, 3)
    return keys.clone(), -keys


def spelled(keys):
    assert bool((keys == keys[:, :1, :, :1]).all())
    return keys[0, 0, :, 0].tolist()


# In each round rows are appended, then those with a flag are kept.
rounds = st.lists(st.lists(st.booleans(), min_size=1, max_size=9), max_size=12)

KINDS = {
    "full": DynamicCache(config=LlamaConfig(num_hidden_layers=2)).layers,
    "sliding": DynamicCache(config=MistralConfig(num_hidden_layers=2, sliding_window=4)).layers,
}


def text_rows(cache, kind="full"):
    return TextRows(cache, KINDS[kind])


def append(text, rows, keeps_all=False):
    """One pass over all layers. Returns what the last layer may attend to."""
    text.begin_pass(keeps_all=keeps_all)
    for index in range(len(text.layers)):
        seen = text.cache.update(*rows_like(rows), index)
    return seen


def test_rows_of_a_draft_against_a_list():
    rows = KVRows(3)
    for start in range(0, 40, 5):
        rows.append(*rows_like(range(start, start + 5)))
        assert spelled(rows.keys) == spelled(-rows.values) == list(range(start + 5))
    rows.length = 7
    rows.append(*rows_like([90]))
    assert spelled(rows.keys) == [*range(7), 90]


def test_storage_of_a_draft_only_moves_to_grow():
    rows = KVRows(64)
    rows.append(*rows_like(range(10)))
    place = rows.keys.data_ptr()
    for _ in range(10):
        rows.append(*rows_like(range(5)))
        rows.length -= 2
    assert rows.keys.data_ptr() == place and rows.length == 40


@settings(deadline=None)
@given(st.integers(1, 40), st.one_of(st.none(), st.integers(1, 9)), st.integers(0, 5), rounds)
def test_layers_against_a_list(prompt, window, slack, rounds):
    """Every row that a later token can see is stored, in order, whatever was dropped before."""
    config = LlamaConfig(num_hidden_layers=2)
    if window is not None:
        config = MistralConfig(num_hidden_layers=2, sliding_window=window)
    given_cache = DynamicCache(config=config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "SLACK_ROWS", slack)  # few, so that buffers grow and windows move often
        text = TextRows(given_cache, [])
        reference, counter = list(range(prompt)), prompt
        keys, _ = append(text, reference, keeps_all=True)
        assert spelled(keys) == reference
        text.keep(range(prompt), prompt)
        for flags in rounds:
            new = list(range(counter, counter + len(flags)))
            counter += len(flags)
            text.begin_pass()
            width, first = text.layers[1].get_mask_sizes(len(new))
            keys, values = append(text, new)
            assert first == (0 if window is None else max(len(reference) - window + 1, 0))
            assert spelled(keys) == spelled(-values) == (reference + new)[first:]
            assert keys.shape[2] == width
            path = [i for i, flag in enumerate(flags) if flag]
            text.keep(path, len(new))
            reference += [new[i] for i in path]
            assert text.length == text.layers[0].get_seq_length() == len(reference)
    assert given_cache.get_seq_length() == 0  # the caller's cache is not touched so far
    text.hand_back(given_cache)
    seen = 0 if window is None else max(len(reference) - window + 1, 0)
    for layer in given_cache.layers:
        assert type(layer) is (DynamicLayer if window is None else DynamicSlidingWindowLayer)
        assert layer.get_seq_length() == len(reference)
        assert spelled(layer.keys) == reference[seen:]
        assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes  # a copy or a file holds the rows alone


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("turn", [3, 400])
@pytest.mark.parametrize("layers_run", [1, 2])
def test_an_interrupted_pass_leaves_the_text(kind, turn, layers_run):
    """The rows of the text are there again, in all layers, whether the pass was a tree or a prompt."""
    given_cache = DynamicCache(config=None)
    text = text_rows(given_cache, kind)
    append(text, range(10), keeps_all=True)
    text.keep(range(10), 10)
    for keeps_all in (False, True):
        text.begin_pass(keeps_all=keeps_all)
        for index in range(layers_run):
            text.cache.update(*rows_like(range(100, 100 + turn)), index)
        text.hand_back(given_cache)
        for layer in given_cache.layers:
            assert layer.get_seq_length() == 10
            assert spelled(layer.keys) == list(range(10))[-3 if kind == "sliding" else 0 :]
    keys, _ = append(text, [10, 11])
    assert spelled(keys) == [*range(7 if kind == "sliding" else 0, 12)]


@pytest.mark.parametrize("chunks", [[3, 3, 3], [2, 600, 1], [600, 600]])
def test_a_prompt_in_several_passes(chunks):
    """Its rows are kept at once, when the last pass has ended; until then the text has none of them."""
    text = text_rows(DynamicCache(), "sliding")
    text.begin_pass(keeps_all=True)
    total = 0
    for rows in chunks:
        width, first = text.layers[0].get_mask_sizes(rows)
        for index in range(2):
            keys, _ = text.cache.update(*rows_like(range(total, total + rows)), index)
        total += rows
        assert spelled(keys) == list(range(first, total)) and len(spelled(keys)) == width
    assert text.length == 0
    text.keep(range(total), total)
    keys, _ = append(text, [total])
    assert spelled(keys) == list(range(total - 3, total + 1))


def test_rows_of_an_earlier_turn():
    given_cache = DynamicCache(config=MistralConfig(num_hidden_layers=2, sliding_window=4))
    for index in range(2):
        given_cache.update(*rows_like(range(9)), index)
    text = TextRows(given_cache, [])
    append(text, [9, 10])
    assert text.length == 9 and given_cache.get_seq_length() == 9
    text.keep([0, 1], 2)
    text.hand_back(given_cache)
    assert given_cache.get_seq_length() == 11
    assert spelled(given_cache.layers[1].keys) == [8, 9, 10]
    keys, _ = given_cache.update(*rows_like([11]), 1)
    assert spelled(keys) == [8, 9, 10, 11]


def test_rows_can_be_read_while_a_text_grows():
    """Hooks read them, and layers that attend to an image."""
    text = text_rows(DynamicCache())
    assert text.layers[0].keys is None
    append(text, range(5), keeps_all=True)
    assert spelled(text.layers[0].keys) == spelled(-text.layers[0].values) == [0, 1, 2, 3, 4]
    with pytest.raises(AttributeError, match="cannot be replaced"):
        text.layers[0].keys = torch.zeros(1)


def test_rows_that_are_not_of_the_tree_stay():
    """A layer that attends to an image writes the image's rows once, in the prompt's pass."""
    text = text_rows(DynamicCache())
    text.begin_pass(keeps_all=True)
    text.cache.update(*rows_like(range(5)), 0)
    text.cache.update(*rows_like(range(50, 90)), 1)
    text.keep(range(5), 5)
    text.begin_pass()
    text.cache.update(*rows_like([5, 6, 7]), 0)
    text.keep([0, 2], 3)
    assert spelled(text.layers[0].keys) == [0, 1, 2, 3, 4, 5, 7]
    assert spelled(text.layers[1].keys) == list(range(50, 90))


def test_caches_without_layers_get_those_of_the_model():
    given_cache = DynamicCache()
    text = text_rows(given_cache)
    append(text, [1, 2], keeps_all=True)
    text.keep(range(2), 2)
    text.hand_back(given_cache)
    assert spelled(given_cache.layers[1].keys) == [1, 2]


# --- layers that a model adds in a pass -----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_a_model_adds_in_a_pass(kind):
    """A model that runs its layers twice makes copies of them in its first pass. Their rows are the text's too."""
    given_cache = DynamicCache()
    text = text_rows(given_cache, kind)
    text.begin_pass(keeps_all=True)
    text.cache.layers += [copy.deepcopy(layer) for layer in text.cache.layers]
    for index in range(4):
        text.cache.update(*rows_like(range(10)), index)
    text.hand_back(given_cache)  # as after an error in the prompt's pass
    assert [layer.get_seq_length() for layer in given_cache.layers] == [0, 0]
    text.begin_pass(keeps_all=True)
    text.cache.layers = text.cache.layers[:2] + [copy.deepcopy(layer) for layer in text.cache.layers[:2]]
    for index in range(4):
        text.cache.update(*rows_like(range(10)), index)
    text.keep(range(10), 10)
    for new in ([10, 11, 12], [12, 13, 14]):
        keys, _ = append(text, new)
        assert len(text.layers) == 4 and spelled(keys)[-3:] == new
        text.keep([0, 2], 3)
    text.hand_back(given_cache)
    for layer in given_cache.layers:
        assert type(layer) is type(KINDS[kind][0]) and layer.get_seq_length() == 14
        assert spelled(layer.keys)[-3:] == [12, 12, 14]
    again = TextRows(given_cache, KINDS[kind])
    assert again.lengths == [14] * 4


def test_added_layers_that_cannot_take_back_rows_are_refused():
    text = text_rows(DynamicCache())
    append(text, [1], keeps_all=True)
    text.cache.layers.append(type("StateLayer", (DynamicLayer,), {})())
    with pytest.raises(TypeError, match=r"added layers to its cache.*StateLayer"):
        text.keep([0], 1)


def test_a_model_that_reads_its_cache_apart_from_adding_to_it():
    text = text_rows(DynamicCache())
    append(text, [1, 2], keeps_all=True)
    text.keep([0, 1], 2)
    append(text, [3])
    assert spelled(-text.layers[0].values) == [1, 2, 3]  # after the layer has added its rows
    append(text, [3])
    assert not text.reads_past
    text.begin_pass()
    assert text.layers[0].keys.shape[2] == 2  # keys alone tell the shape
    text.cache.update(*rows_like([3]), 0)
    assert not text.reads_past
    text.begin_pass()
    assert spelled(text.layers[0].keys) == spelled(-text.layers[0].values) == [1, 2]
    text.cache.update(*rows_like([3]), 0)
    assert text.reads_past


# --- keys of an index -----------------------------------------------------------------------------------

indexed = pytest.mark.skipif(compat.IndexedLayer is None, reason="transformers has no such layers yet")


def index_pass(cache, rows):
    """One pass over a layer with an index whose keys are ten times the rows, and positions a hundred times."""
    cache.update(*rows_like(rows), 0)
    keys = cache.update_indexer(10.0 * torch.tensor(rows).view(1, -1, 1).expand(1, -1, 3), 0)
    layer, positions = cache.layers[0], 100 * torch.tensor(rows).view(1, 1, -1)
    before = layer.indexer_position_ids
    layer.indexer_position_ids = positions if before is None else torch.cat([before, positions], dim=-1)
    return keys[0, :, 0].tolist(), layer.indexer_position_ids.flatten().tolist()


@indexed
@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), rounds)
def test_keys_of_an_index_against_a_list(prompt, rounds):
    given_cache = DynamicCache()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "SLACK_ROWS", 2)
        text = TextRows(given_cache, [compat.IndexedLayer()])
        reference, counter = list(range(prompt)), prompt
        text.begin_pass(keeps_all=True)
        index_pass(text.cache, reference)
        text.keep(range(prompt), prompt)
        for flags in rounds:
            new = list(range(counter, counter + len(flags)))
            counter += len(flags)
            text.begin_pass()
            seen = reference + new
            assert index_pass(text.cache, new) == ([10 * row for row in seen], [100 * row for row in seen])
            path = [i for i, flag in enumerate(flags) if flag]
            text.keep(path, len(new))
            reference += [new[i] for i in path]
        text.begin_pass()
        index_pass(text.cache, [7, 8])  # a pass that is interrupted
    text.hand_back(given_cache)
    layer = given_cache.layers[0]
    assert type(layer) is compat.IndexedLayer and spelled(layer.keys) == reference
    assert layer.indexer_keys[0, :, 0].tolist() == [10 * row for row in reference]
    assert layer.indexer_position_ids.flatten().tolist() == [100 * row for row in reference]
    again = TextRows(given_cache, [])
    again.begin_pass()
    keys, positions = index_pass(again.cache, [7])
    assert keys == [10 * row for row in [*reference, 7]] and positions == [100 * row for row in [*reference, 7]]


@indexed
def test_layers_that_use_the_index_of_another():
    given_cache = DynamicCache()
    text = TextRows(given_cache, [compat.IndexedLayer()])
    append(text, [1, 2, 3], keeps_all=True)
    text.keep(range(3), 3)
    append(text, [4, 5])
    text.keep([1], 2)
    text.hand_back(given_cache)
    assert spelled(given_cache.layers[0].keys) == [1, 2, 3, 5]
    assert not given_cache.layers[0].is_indexer_initialized and given_cache.layers[0].indexer_keys is None


# --- a past that is recorded ----------------------------------------------------------------------------


@pytest.mark.skipif(
    not hasattr(DynamicSlidingWindowLayer, "activate_past_recording"), reason="transformers records no past yet"
)
@pytest.mark.parametrize("turn", [6, 700])
def test_a_recorded_past_stays_recorded(turn):
    """Rows before the window stay in the caller's cache, so `crop` works as after plain generation."""
    given_cache, plain = (DynamicCache(config=MistralConfig(num_hidden_layers=2, sliding_window=4)) for _ in range(2))
    for one in (given_cache, plain):
        for index in range(2):
            one.update(*rows_like(range(9)), index)
        one.activate_past_recording()
    text = TextRows(given_cache, [])
    append(text, range(9, 9 + turn), keeps_all=True)
    text.keep(range(turn), turn)
    keys, _ = append(text, [8000, 9 + turn])
    assert spelled(keys) == [*range(6 + turn, 9 + turn), 8000, 9 + turn]
    text.keep([1], 2)
    text.hand_back(given_cache)
    for index in range(2):
        plain.update(*rows_like(range(9, 10 + turn)), index)
    for own, layer in zip(given_cache.layers, plain.layers, strict=True):
        assert own.record_past and spelled(own.keys) == spelled(layer.keys) == list(range(6, 10 + turn))
    given_cache.crop(-5)
    assert spelled(given_cache.layers[0].keys) == list(range(2 + turn, 5 + turn))
    assert not TextRows(DynamicCache(config=MistralConfig(num_hidden_layers=1)), []).layers[0].to_stock().record_past
