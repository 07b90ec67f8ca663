"""Drafts that need no training: small models of the same tokenizer, and lookup in the text."""

import random
from collections import defaultdict

import pytest
import torch
from families import VOCAB, prompt, tiny_model, tiny_target
from hypothesis import given
from hypothesis import strategies as st
from support.trees import assert_scores_are_a_models

from dovetail_plugin import DeviceSplitPolicy, PromptLookupDraft, SmallModelDraft, TreeBudget
from dovetail_plugin.drafts.prompt_lookup import LookupDrafter
from dovetail_plugin.report import PhaseClock
from dovetail_plugin.targets.engine import engine_of

GREEDY = {"max_new_tokens": 30, "do_sample": False}
SHAPES = [TreeBudget(12, 4, 4), TreeBudget(5, 4, 1), TreeBudget(2, 1, 1), TreeBudget(40, 6, 6), None]


def small(model_type="llama", seed=0, **overrides):
    return SmallModelDraft(tiny_model(model_type, seed, **overrides))


@pytest.mark.parametrize("budget", SHAPES, ids=str)
@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "qwen3"])
def test_text_with_a_small_model_is_the_plain_one(model_type, budget, tmp_path):
    target, draft = tiny_target("llama"), small(model_type, seed=3)
    draft.budget, draft.policy = budget, DeviceSplitPolicy(measured_in=tmp_path)
    for _ in range(2):
        assert torch.equal(
            target.generate(prompt(), assistant_model=draft, **GREEDY), target.generate(prompt(), **GREEDY)
        )
    assert not draft.report.warnings


@pytest.mark.torch_only("the target is its own draft")
@pytest.mark.parametrize("length", [1, 17])
@pytest.mark.parametrize("depth", [1, 3, 6])
def test_a_target_as_its_own_draft_is_always_accepted(depth, length):
    """A wrong position, mask or cache row of the small model would show as a rejected token."""
    target = tiny_target("llama")
    draft = SmallModelDraft(tiny_model("llama"))
    draft.budget = TreeBudget(depth + 1, depth, 1)
    out = target.generate(prompt(length), assistant_model=draft, **GREEDY)
    assert torch.equal(out, target.generate(prompt(length), **GREEDY))
    full = [r.emitted for r in draft.report.rounds[:-1]]
    assert full and full == [depth + 1] * len(full)


@torch.no_grad()
@pytest.mark.torch_only("reads the small model's own logits")
def test_scores_are_the_small_models_probabilities():
    model = tiny_model("llama", 5)
    drafter = SmallModelDraft(model).new_drafter(engine_of(model), capacity=64, clock=PhaseClock())
    ids = prompt(9)[0]
    drafter.begin(torch.zeros(8, 32), ids)
    drafter.grow(TreeBudget(9, 2, 3))
    drafter.advance(torch.zeros(2, 32), torch.tensor([11, 12]))
    tree = drafter.grow(TreeBudget(20, 3, 3))
    text = [*ids.tolist(), 11, 12]
    assert_scores_are_a_models(model, text, tree, 1e-4)
    assert len(tree) == 20 and tree.depths.max() == 3


@pytest.mark.torch_only("caches of torch targets")
def test_turns_and_padding():
    target, draft = tiny_target("llama"), SmallModelDraft(tiny_model("llama"))
    draft.budget = TreeBudget(8, 4, 2)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), prompt(9)], dim=1)
    mask = (padded > 0).long()
    options = GREEDY | {"attention_mask": mask, "return_dict_in_generate": True}
    one = target.generate(padded, assistant_model=draft, **options)
    assert torch.equal(one.sequences, target.generate(padded, **options).sequences)
    text = torch.cat([one.sequences, prompt(6, seed=4)], dim=1)
    longer = GREEDY | {"attention_mask": torch.cat([mask, torch.ones(1, text.shape[1] - 14, dtype=torch.long)], dim=1)}
    turn = target.generate(text, assistant_model=draft, past_key_values=one.past_key_values, **longer)
    assert torch.equal(turn, target.generate(text, **longer))
    assert draft.report.acceptance_length > 3  # the target is its own draft, in later turns too


def test_small_model_runs_out_of_positions():
    target = tiny_target("llama")
    draft = SmallModelDraft(tiny_model("gpt2", seed=1, max_position_embeddings=30))  # it has a table of positions
    draft.budget = TreeBudget(8, 4, 3)
    assert torch.equal(target.generate(prompt(), assistant_model=draft, **GREEDY), target.generate(prompt(), **GREEDY))
    assert "outgrown the 30 positions" in draft.report.warnings[0]


def test_padded_vocabularies_may_differ_a_little():
    target, draft = tiny_target("llama"), small(seed=2, vocab_size=VOCAB + 1)
    draft.budget = TreeBudget(30, 2, 20)
    assert torch.equal(target.generate(prompt(), assistant_model=draft, **GREEDY), target.generate(prompt(), **GREEDY))


def test_models_with_other_numbers_of_tokens():
    with pytest.raises(ValueError, match="small model has 60 tokens and the target 97"):
        tiny_target("llama").generate(prompt(), assistant_model=small(vocab_size=60), **GREEDY)


@pytest.mark.torch_only("tokenizers beside checkpoints")
def test_the_tokenizer_comes_from_where_the_model_comes_from(tmp_path, monkeypatch):
    """With `subfolder` there is a tokenizer only in that folder; the other arguments reach its loader as they are."""
    from support.bundled import TARGET
    from transformers import AutoTokenizer

    (tmp_path / "inner").symlink_to(TARGET)
    draft = SmallModelDraft.from_pretrained(str(tmp_path), subfolder="inner", local_files_only=True)
    assert draft.vocabulary == AutoTokenizer.from_pretrained(TARGET).get_vocab()

    asked = {"revision": "main", "token": "secret", "cache_dir": str(tmp_path), "trust_remote_code": False}
    seen, load = {}, AutoTokenizer.from_pretrained
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name, **given: (seen.update(given), load(name))[1])
    SmallModelDraft.from_pretrained(TARGET, **asked)
    assert seen == asked


# --- lookup ----------------------------------------------------------------------------------------


def lookup_ref(text: list[int], longest: int, shortest: int) -> dict[int, float]:
    """Slow reference: probability of each next token, from what followed the longest earlier match."""
    for length in range(min(longest, len(text)), shortest - 1, -1):
        run = text[-length:]
        followers = [text[i + length] for i in range(len(text) - length) if text[i : i + length] == run]
        if followers:
            counts = defaultdict(int)
            for token in followers:
                counts[token] += 1
            return {token: count / (len(followers) + 0.5) for token, count in counts.items()}
    return {}


@given(st.lists(st.integers(0, 3), min_size=2, max_size=60), st.integers(1, 4), st.data())
def test_lookup_proposes_what_followed(text, longest, data):
    shortest = data.draw(st.integers(1, longest))
    drafter = LookupDrafter(longest, shortest, PhaseClock())
    cut = data.draw(st.integers(1, len(text)))
    drafter.begin(torch.zeros(cut - 1, 4), torch.tensor(text[:cut]))
    for start in range(cut, len(text), 3):
        drafter.advance(torch.zeros(3, 4), torch.tensor(text[start : start + 3]))
    tree = drafter.grow(TreeBudget(30, 4, 8))
    first = {int(t): float(s.exp()) for t, p, s in zip(tree.tokens, tree.parents, tree.scores, strict=True) if p == 0}
    wanted = lookup_ref(text, longest, shortest)
    assert first == pytest.approx(wanted, abs=1e-5)
    assert bool((tree.scores[1:] <= tree.scores[tree.parents[1:]]).all())
    assert bool((tree.parents[1:] < torch.arange(1, len(tree))).all())
    small_tree = LookupDrafter(longest, shortest, PhaseClock())
    small_tree.begin(torch.zeros(len(text) - 1, 4), torch.tensor(text))
    part = small_tree.grow(TreeBudget(5, 4, 8))
    assert torch.equal(part.tokens, tree.tokens[: len(part)])  # the best nodes first


@pytest.mark.parametrize("budget", SHAPES, ids=str)
def test_lookup_gives_the_plain_text(budget, tmp_path):
    target, draft = tiny_target("llama"), PromptLookupDraft(shortest=1)
    draft.budget, draft.policy = budget, DeviceSplitPolicy(measured_in=tmp_path)
    ids = torch.tensor([random.Random(0).choices(range(3, 9), k=40)])
    for options in (GREEDY, {"max_new_tokens": 30, "do_sample": True, "top_k": 5}):
        torch.manual_seed(0)
        plain = target.generate(ids, **options)
        torch.manual_seed(0)
        assert torch.equal(target.generate(ids, assistant_model=draft, **options), plain)


def test_lookup_finds_a_repeated_text():
    target, draft = tiny_target("llama"), PromptLookupDraft()
    draft.budget = TreeBudget(8, 7, 1)
    plain = target.generate(prompt(), max_new_tokens=40, min_new_tokens=40, do_sample=False)
    again = torch.cat([plain, plain[:, :17]], dim=1)  # lookup proposes the same continuation again
    drafter = draft.new_drafter(engine_of(target), capacity=64, clock=PhaseClock())
    drafter.begin(torch.zeros(again.shape[1] - 1, 4), again[0])
    assert drafter.grow(draft.budget).tokens[1:].tolist() == plain[0, 17:24].tolist()


def test_bad_lookups():
    with pytest.raises(ValueError, match=r"between 1 and longest \(3\), got 0"):
        PromptLookupDraft(longest=3, shortest=0)
    with pytest.raises(ValueError, match='must be "tree" for a PromptLookupDraft'):
        PromptLookupDraft().verification = "stock"
