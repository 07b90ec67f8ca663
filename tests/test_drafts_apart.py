"""Drafts apart from a call: copies, pickles and fingerprints, and what beside a draft is not ignored in silence."""

import copy
import logging
import pickle

import pytest
import torch
from families import prompt, tiny_model, tiny_target

from dovetail_plugin import DovetailDraft, PromptLookupDraft, SmallModelDraft, TreeBudget
from dovetail_plugin.generation import generate
from dovetail_plugin.policy import DeviceSplitPolicy
from dovetail_plugin.report import PhaseClock
from dovetail_plugin.targets.engine import engine_of

OPTIONS = dict(max_new_tokens=20, do_sample=False)
KINDS = ["dovetail", "lookup", "small model"]


@pytest.fixture(scope="module")
def target():
    return tiny_target("llama")


def made(kind, target):
    torch.manual_seed(7)
    if kind == "dovetail":
        return DovetailDraft(DovetailDraft.for_target(target).config)
    return PromptLookupDraft(shortest=1) if kind == "lookup" else SmallModelDraft(tiny_model("llama", seed=3))


def copies(draft):
    return [copy.deepcopy(draft), pickle.loads(pickle.dumps(draft)), copy.copy(draft)]


@pytest.mark.parametrize("policy", [False, True], ids=["no policy", "own policy"])
@pytest.mark.parametrize("kind", KINDS)
def test_calls_do_not_change_a_fingerprint(kind, policy, target):
    draft = made(kind, target)
    draft.policy = DeviceSplitPolicy(vram_budget=0, ram_budget=2**30) if policy else None
    before = pickle.dumps(draft)
    for length in (17, 40):
        target.generate(prompt(length), **OPTIONS, assistant_model=draft)
        assert draft.report.rounds and draft.policy is not None
        assert pickle.dumps(draft) == before


@pytest.mark.parametrize("kind", KINDS)
def test_copies_hold_nothing_of_target_text_or_machine(kind, target):
    draft = made(kind, target)
    draft.budget = TreeBudget(4, 2, 2)
    out = target.generate(prompt(), **OPTIONS, assistant_model=draft, return_dict_in_generate=True)
    assert len(draft.turns) == 1
    for copied in copies(draft):
        assert copied.report is None and copied._attached_to is None and not copied.turns
        assert copied.budget == draft.budget and copied.identity() == draft.identity()
        if kind == "dovetail":
            assert not copied.is_attached and copied.head_weight is None and copied.num_parameters() > 0
            with pytest.raises(ValueError, match="no embedding table yet"):
                copied.embed(prompt())
        text = target.generate(prompt(), **OPTIONS, assistant_model=copied)
        assert torch.equal(text, out.sequences)
        assert copied.report.rounds and not copied.report.warnings
    assert draft.report is out.report and len(draft.turns) == 1  # as it was


def test_an_own_head_and_a_cut_head(target):
    """What the draft brings itself is copied; what a setting takes from the target is taken again."""
    cut = made("dovetail", target)
    cut.draft_vocab_size = 10
    cut.attach(target)
    for copied in copies(cut):
        assert copied.token_ids is None and copied.draft_vocab_size == 10
        copied.attach(target)
        assert torch.equal(copied.token_ids, cut.token_ids)
    own = DovetailDraft.for_target(target, fusion="eagle3", feature_layers=[0, 1, 2])
    for copied in copies(own):
        assert torch.equal(copied.head_weight, own.head_weight) and copied.embed_weight is None


def test_copies_for_each_request_share_the_policy(target, monkeypatch):
    """So none of them measures the machine again; a pickle for another process holds settings alone."""
    draft = made("lookup", target)
    target.generate(prompt(), **OPTIONS, assistant_model=draft)
    assert draft.policy.costs
    copied = copy.deepcopy(draft)
    assert copied.policy is draft.policy
    monkeypatch.setattr("dovetail_plugin.generation.loop.measure", lambda *_, **__: pytest.fail("measured again"))
    target.generate(prompt(), **OPTIONS, assistant_model=copied)
    assert pickle.loads(pickle.dumps(draft)).policy is None
    draft.policy = DeviceSplitPolicy(vram_budget=0, limits=TreeBudget(5, 2, 2))
    loaded = pickle.loads(pickle.dumps(draft)).policy
    assert loaded.limits == TreeBudget(5, 2, 2) and not loaded.costs


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_does_not_generate(kind, target):
    draft = made(kind, target)
    with pytest.raises(ValueError, match=r"does not generate by itself\. Call target\.generate"):
        draft.generate(prompt(), max_new_tokens=3)


# --- options beside a draft -------------------------------------------------------------------------------


@pytest.mark.usefixtures("fixed_budget")
def test_another_way_of_drafting_beside_a_draft_is_refused(target):
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens asks for another way of drafting"):
        target.generate(prompt(), **OPTIONS, prompt_lookup_num_tokens=3, assistant_model=PromptLookupDraft())


@pytest.mark.usefixtures("fixed_budget")
def test_options_without_effect_are_named_once(target, caplog):
    generate._warn_of_ignored.cache_clear()
    options = dict(num_assistant_tokens=3, assistant_confidence_threshold=0.9, assistant_model=PromptLookupDraft())
    plain = target.generate(prompt(), **OPTIONS)
    with caplog.at_level(logging.WARNING, "dovetail_plugin"):
        target.generate(prompt(), **OPTIONS, assistant_model=PromptLookupDraft())
        assert not caplog.records
        for _ in range(2):
            assert torch.equal(target.generate(prompt(), **OPTIONS, **options), plain)
    (record,) = caplog.records
    assert record.message.startswith("num_assistant_tokens, assistant_confidence_threshold have no effect")


# --- one token ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_reads_nothing_for_one_token(kind, target, monkeypatch):
    draft = made(kind, target)
    plain = target.generate(prompt(40), max_new_tokens=1, do_sample=False)
    draft.ensure_attached(target)
    drafter = type(draft.new_drafter(engine_of(target), capacity=8, clock=PhaseClock()))
    for name in ("catch_up", "grow"):
        monkeypatch.setattr(drafter, name, lambda *_, **__: pytest.fail("read the prompt"))
    text = target.generate(prompt(40), max_new_tokens=1, do_sample=False, assistant_model=draft)
    assert torch.equal(text, plain)
    assert draft.report.new_tokens == 1 and not draft.report.warnings and not draft.report.rounds
