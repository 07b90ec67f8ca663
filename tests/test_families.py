"""Greedy text with a draft equals plain text, token for token, over model families and tree shapes (fp32)."""

import engines
import pytest
import torch
from families import CASE_IDS, CASES, SLIDING_WINDOW, prompt, tiny_model, tiny_target
from support import checkpoints

from dovetail_plugin import DovetailDraft, TreeBudget

SHAPES = [TreeBudget(16, 6, 8), TreeBudget(6, 5, 1), TreeBudget(40, 3, 10), TreeBudget(1, 1, 1)]
SHAPE_IDS = ["tree", "chain", "wide", "off"]


pytestmark = pytest.mark.usefixtures("fixed_budget")


def both(target, draft, ids, **options):
    """Return the text without and with the draft."""
    plain = target.generate(ids, **options)
    return plain, target.generate(ids, **options, assistant_model=draft)


@pytest.mark.parametrize(("model_type", "fields"), CASES, ids=CASE_IDS)
def test_plain_text_equals_torchs(model_type, fields):
    """Other tests compare drafted text with the engine's plain text, so that must equal torch's."""
    if engines.is_current("torch"):
        pytest.skip("plain generate is transformers' own")
    model = tiny_model(model_type, **fields)
    options = dict(max_new_tokens=60, do_sample=False)
    text = engines.current().target(model).generate(prompt(), **options)
    assert torch.equal(text, model.generate(prompt(), **options))


@pytest.mark.parametrize(("model_type", "fields"), CASES, ids=CASE_IDS)
def test_rejecting_draft(model_type, fields):
    """A random draft: almost every node is rejected and rolled back, for every shape of tree."""
    target = tiny_target(model_type, **fields)
    draft = DovetailDraft.for_target(target)
    for budget in SHAPES:
        draft.budget = budget
        plain, drafted = both(target, draft, prompt(), max_new_tokens=40, do_sample=False)
        assert torch.equal(plain, drafted), budget


@pytest.mark.parametrize(
    "attention", ["sdpa", pytest.param("eager", marks=pytest.mark.torch_only("an implementation of transformers"))]
)
@pytest.mark.parametrize(("model_type", "fields"), CASES, ids=CASE_IDS)
def test_accepting_draft(model_type, fields, attention, oracle):
    """A draft that knows parts of the text: paths are accepted, cache rows move, and the window slides over them."""
    target = tiny_target(model_type, **fields)
    if engines.is_current("torch"):
        if attention == "sdpa" and model_type == "gemma2":
            pytest.skip("Gemma 2 has no sdpa attention in transformers")
        target.set_attn_implementation(attention)
    draft = DovetailDraft.for_target(target)
    ids = prompt(30)
    plain = target.generate(ids, max_new_tokens=60, do_sample=False)
    oracle(plain, ids.shape[1])
    for budget in SHAPES[:3]:
        draft.budget = budget
        drafted = target.generate(ids, max_new_tokens=60, do_sample=False, assistant_model=draft)
        assert torch.equal(plain, drafted), budget
        assert draft.report.acceptance_length > 1.2


def test_window_much_shorter_than_the_text(oracle):
    """The text is long enough that sliding layers move their window to the front of the storage several times."""
    target = tiny_target("mistral", sliding_window=SLIDING_WINDOW, max_position_embeddings=2048)
    draft = DovetailDraft.for_target(target)
    ids = prompt(400)
    options = dict(max_new_tokens=700, do_sample=False, eos_token_id=None)
    plain = target.generate(ids, **options)
    oracle(plain, ids.shape[1])
    assert torch.equal(plain, target.generate(ids, **options, assistant_model=draft))


def test_window_smaller_than_the_tree(oracle):
    """A window of 4 tokens and trees of depth 6: deep nodes do not see all of their ancestors."""
    target = tiny_target("mistral", sliding_window=4)
    draft = DovetailDraft.for_target(target)
    plain = target.generate(prompt(), max_new_tokens=60, do_sample=False)
    oracle(plain, 17)
    assert torch.equal(plain, target.generate(prompt(), max_new_tokens=60, do_sample=False, assistant_model=draft))


def test_targets_without_tree_masks_get_chains():
    """BLOOM computes positions from a 2-D mask, so chains are drafted for it, whatever the budget is."""
    target = tiny_target("bloom", n_layer=3, n_head=4, num_key_value_heads=None)
    draft = DovetailDraft.for_target(target)
    draft.budget = TreeBudget(16, 6, 8)
    for mask in (torch.ones(1, 17, dtype=torch.long), torch.tensor([[0] * 5 + [1] * 12])):
        options = dict(max_new_tokens=40, do_sample=False, attention_mask=mask)
        plain, drafted = both(target, draft, prompt(), **options)
        assert torch.equal(plain, drafted)
        assert draft.report.nodes_per_round <= 7


@pytest.mark.parametrize("length", [1, 2, 3, 400])
def test_prompt_lengths(llama, draft, length):
    plain, drafted = both(llama, draft, prompt(length), max_new_tokens=20, do_sample=False)
    assert torch.equal(plain, drafted)


def test_prompt_of_thousands_in_chunks(oracle):
    target = tiny_target("llama", max_position_embeddings=4096)
    draft = DovetailDraft.for_target(target)
    ids = prompt(3000)
    options = dict(max_new_tokens=24, do_sample=False)
    plain = target.generate(ids, **options)
    oracle(plain, 3000)
    assert torch.equal(plain, target.generate(ids, **options, assistant_model=draft))
    assert torch.equal(plain, target.generate(ids, **options, prefill_chunk_size=700, assistant_model=draft))


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 5])
def test_few_new_tokens(llama, draft, oracle, new_tokens):
    """The text ends exactly at max_new_tokens although the tree could be deeper."""
    full = llama.generate(prompt(), max_new_tokens=20, do_sample=False)
    oracle(full, 17)
    drafted = llama.generate(prompt(), max_new_tokens=new_tokens, do_sample=False, assistant_model=draft)
    assert torch.equal(drafted, full[:, : 17 + new_tokens])
    assert draft.report.new_tokens == new_tokens


def test_text_up_to_the_last_position(oracle):
    """GPT-2 has a table of positions: no drafted node may have a position beyond it."""
    target = tiny_target("gpt2", num_key_value_heads=None, max_position_embeddings=40)
    draft = DovetailDraft.for_target(target)
    options = dict(max_length=40, do_sample=False, eos_token_id=None)
    plain = target.generate(prompt(), **options)
    assert plain.shape[1] == 40
    oracle(plain, 17)
    assert torch.equal(plain, target.generate(prompt(), **options, assistant_model=draft))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma", "phi3", "mistral"])
def test_eagle3_drafts_read_hidden_states_of_every_engine(model_type, tmp_path):
    """The features that the drafter receives equal transformers' `hidden_states`, and the text is the plain one."""
    model = tiny_model(model_type, num_hidden_layers=checkpoints.TARGET_LAYERS)
    target = engines.current().target(model)
    torch.manual_seed(0)
    made = checkpoints.eagle3(states=(1, 3, 7), own_embedding=True)
    draft = DovetailDraft.from_pretrained(made.write(tmp_path))
    seen, project = [], draft.project
    draft.project = lambda features: (seen.append(features.clone()), project(features))[1]
    draft.budget = TreeBudget(6, 3, 3)
    plain, text = both(target, draft, prompt(), max_new_tokens=12, do_sample=False)
    assert torch.equal(text, plain) and not draft.report.warnings
    with torch.no_grad():
        states = model(text, output_hidden_states=True).hidden_states
    wanted = torch.cat([states[i][0] for i in (1, 3, 7)], dim=-1)
    found = torch.cat(seen)
    torch.testing.assert_close(found, wanted[: len(found)], atol=1e-4, rtol=1e-3)
    last_only = DovetailDraft.for_target(target)  # the same target, with a draft that reads the last state
    assert torch.equal(both(target, last_only, prompt(), max_new_tokens=12, do_sample=False)[1], plain)
