"""Texts of models with other caches than full and windowed rows: over turns, in batches, and after an error.

`tests/model_table` compares single texts of all families.
"""

import pytest
import torch
from families import prompt, tiny_model
from model_table.build import build
from model_table.discovery import CLASSES, family_of
from model_table.oracle import OracleDraft
from transformers import DynamicCache

from dovetail_plugin import PromptLookupDraft, compat
from dovetail_plugin.planning.memory import target_sizes
from dovetail_plugin.planning.storage import storage_of

pytestmark = [pytest.mark.torch_only("caches of transformers"), pytest.mark.usefixtures("fixed_budget")]

GREEDY = dict(max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
KINDS = {"dory": "layers that are run twice", "glm_moe_dsa": "an index", "hy_v4": "an index that layers share"}


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    if request.param not in CLASSES or compat.IndexedLayer is None:
        pytest.skip("not in this transformers")
    return build(family_of(request.param), seed=1)


def oracle_of(text):
    return OracleDraft(text[0].tolist(), 200)


def test_turns(model):
    """Drafted and plain calls go on with each other's caches."""
    first = model.generate(prompt(30), **GREEDY)
    second = model.generate(torch.cat([first, prompt(6, seed=3)], dim=1), **GREEDY)
    for drafted in ((True, True), (False, True), (True, False)):
        cache, text = DynamicCache(config=model.config), prompt(30)
        for wanted, draft in zip((first, second), drafted, strict=True):
            how = {"assistant_model": oracle_of(wanted)} if draft else {}
            text = model.generate(text, past_key_values=cache, **GREEDY, **how)
            assert torch.equal(text, wanted)
            assert {layer.get_seq_length() for layer in cache.layers} == {text.shape[1] - 1}
            text = torch.cat([text, prompt(6, seed=3)], dim=1)


def test_batches_go_on_with_their_cache(model):
    ids = torch.cat([prompt(30), prompt(30, seed=5)])
    plain, drafted = DynamicCache(config=model.config), DynamicCache(config=model.config)
    first = model.generate(ids, past_key_values=plain, **GREEDY)
    assert torch.equal(
        model.generate(ids, past_key_values=drafted, assistant_model=PromptLookupDraft(), **GREEDY), first
    )
    longer = torch.cat([first, torch.cat([prompt(5), prompt(5, seed=6)])], dim=1)
    second = model.generate(longer, past_key_values=plain, **GREEDY)
    assert torch.equal(model.generate(longer, past_key_values=drafted, **GREEDY), second)


def test_an_error_in_the_prompts_pass_leaves_an_empty_cache(model, monkeypatch):
    cache, norm = DynamicCache(config=model.config), model.get_decoder().norm
    wanted = model.generate(prompt(30), **GREEDY)

    model.generate(prompt(30), assistant_model=PromptLookupDraft(), **GREEDY)  # finds out what the model supports
    handle = norm.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        model.generate(prompt(30), past_key_values=cache, assistant_model=PromptLookupDraft(), **GREEDY)
    handle.remove()
    assert cache.get_seq_length() == 0
    assert torch.equal(model.generate(prompt(30), past_key_values=cache, **GREEDY), wanted)


def test_plans_count_all_that_the_cache_holds(model):
    cache = model(prompt(1), use_cache=True)[compat.CACHE]
    rows = [(layer.keys, layer.values, getattr(layer, "indexer_keys", None)) for layer in cache.layers]
    counted = target_sizes(model.config, storage_of(model.config, "float32")).layers
    assert sum(layer.kv_row_bytes for layer in counted) == sum(r.nbytes for each in rows for r in each if r is not None)


def test_a_model_that_reads_its_cache_before_it_adds_rows_gets_one_row_a_pass():
    """What its rows see depends on which tokens are in the same pass."""
    model = tiny_model("llama")

    def read(_module, _args, inputs):
        assert inputs[compat.CACHE].layers[0].get_seq_length() == 0 or inputs[compat.CACHE].layers[0].values is not None

    model.model.layers[0].register_forward_pre_hook(read, with_kwargs=True)
    draft = PromptLookupDraft(shortest=1)
    wanted = model.generate(prompt(21), **GREEDY)
    assert torch.equal(model.generate(prompt(21), assistant_model=draft, **GREEDY), wanted)
    assert draft.report.nodes_per_round == 1
    assert any("read earlier rows of the cache" in warning for warning in draft.report.warnings)


@pytest.mark.skipif(not hasattr(DynamicCache, "activate_past_recording"), reason="transformers records no past yet")
@pytest.mark.parametrize("batch", [1, 2])
def test_a_cache_that_records_its_past_goes_on_to(batch):
    model = tiny_model("mistral", sliding_window=8)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    text = None
    for cache, how in zip(caches, ({}, {"assistant_model": PromptLookupDraft(shortest=1)}), strict=True):
        model.generate(prompt(5).repeat(batch, 1), past_key_values=cache, **GREEDY)
        cache.activate_past_recording()
        whole = model.generate(
            torch.cat([prompt(5), prompt(30, seed=1)], dim=1).repeat(batch, 1), past_key_values=cache, **GREEDY, **how
        )
        assert text is None or torch.equal(whole, text)
        text = whole
    plain, drafted = caches
    for own, other in zip(drafted.layers, plain.layers, strict=True):
        assert own.record_past and own.get_seq_length() == other.get_seq_length()
        torch.testing.assert_close(own.keys, other.keys)
