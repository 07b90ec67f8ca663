"""Small models as drafts: windows, positions, several texts at once, and tokens that one side lacks."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from families import SLIDING, SLIDING_WINDOW, prompt, tiny_model, tiny_target
from support.trees import assert_scores_are_a_models

from dovetail_plugin import DeviceSplitPolicy, DovetailDraft, PromptLookupDraft, SmallModelDraft, TreeBudget
from dovetail_plugin.compat import CACHE
from dovetail_plugin.drafts import small_model
from dovetail_plugin.drafts.prompt_lookup import LookupDrafter
from dovetail_plugin.drafts.small_model import SHORT_TEXT, SmallModelRows
from dovetail_plugin.policy.records import key_of
from dovetail_plugin.report import PhaseClock
from dovetail_plugin.targets.engine import engine_of
from dovetail_plugin.targets.transformers_model import TorchSession

GREEDY = {"max_new_tokens": 50, "do_sample": False}
SAMPLED = {"max_new_tokens": 50, "do_sample": True, "top_k": 20}
LEARNED_POSITIONS = {"gpt2": {"num_key_value_heads": None}}
GPT_OSS = {
    "gpt_oss": {
        "sliding_window": SLIDING_WINDOW,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "num_hidden_layers": 4,
    }
}
PHI3 = {"phi3": {"sliding_window": SLIDING_WINDOW}}
MODELS = [*SLIDING.items(), *LEARNED_POSITIONS.items(), *GPT_OSS.items(), *PHI3.items()]
IDS = [name for name, _ in MODELS]

pytestmark = pytest.mark.torch_only("small models run in torch")


def text_of(target, ids, draft=None, seed=5, **options):
    torch.manual_seed(seed)
    return target.generate(ids, **({} if draft is None else {"assistant_model": draft}), **options)


@pytest.mark.parametrize("length", [9, 2 * SLIDING_WINDOW])
@pytest.mark.parametrize(("model_type", "fields"), MODELS, ids=IDS)
def test_a_model_drafts_its_own_text_beyond_its_window(model_type, fields, length):
    """A wrong position, mask or row would show as a rejected token."""
    target = tiny_target(model_type, **fields)
    draft = SmallModelDraft(tiny_model(model_type, **fields))
    draft.budget = TreeBudget(4, 3, 1)
    assert torch.equal(text_of(target, prompt(length), draft, **GREEDY), text_of(target, prompt(length), **GREEDY))
    assert {r.emitted for r in draft.report.rounds[:-1]} == {4} and not draft.report.warnings


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("model_type", "fields"), MODELS, ids=IDS)
def test_texts_of_trees_beyond_windows(model_type, fields, options):
    target = tiny_target("llama")
    draft = SmallModelDraft(tiny_model(model_type, seed=3, **fields))
    draft.budget = TreeBudget(24, 4, 5)
    assert torch.equal(text_of(target, prompt(40), draft, **options), text_of(target, prompt(40), **options))
    assert not draft.report.warnings and all(r.nodes > 1 for r in draft.report.rounds[:-2])


@torch.no_grad()
@pytest.mark.parametrize(("model_type", "fields"), MODELS, ids=IDS)
def test_scores_of_trees_behind_a_window_are_the_models_own(model_type, fields):
    """Against passes without a cache; the text grows by less and by more than fits one pass over a tree."""
    model = tiny_model(model_type, seed=5, **fields)
    drafter = SmallModelDraft(model).new_drafter(engine_of(model), capacity=64, clock=PhaseClock())
    text = prompt(30)[0].tolist()
    drafter.begin(torch.zeros(29, 32), torch.tensor(text))
    for gained in (2, SHORT_TEXT + 9, 1):
        new = prompt(gained, seed=gained)[0].tolist()
        drafter.grow(TreeBudget(9, 3, 3))
        drafter.advance(torch.zeros(gained, 32), torch.tensor(new))
        text += new
    tree = drafter.grow(TreeBudget(40, 4, 4))
    assert len(tree) == 40 and tree.depths.max() == 4
    assert_scores_are_a_models(model, text, tree, 1e-3)


@torch.no_grad()
@pytest.mark.parametrize(("model_type", "fields"), MODELS, ids=IDS)
def test_a_level_runs_its_new_nodes_only(model_type, fields, monkeypatch):
    """The rows of earlier levels stay, and the trees are those of levels that are run with all of their ancestors."""
    model, budget = tiny_model(model_type, seed=5, **fields), TreeBudget(40, 4, 4)
    rows = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, ids, __: rows.append(ids[0].numel()))

    def grown():
        drafter = SmallModelDraft(model).new_drafter(engine_of(model), capacity=64, clock=PhaseClock())
        drafter.begin(torch.zeros(29, 32), prompt(30)[0])
        trees, rows_run = [], []
        for gained in (2, 1, 4):
            drafter.catch_up()
            rows.clear()
            trees.append(drafter.grow(budget))
            rows_run.append(sum(rows))
            drafter.grow(budget)  # once more from the same root
            assert sum(rows) == 2 * rows_run[-1]
            drafter.advance(torch.zeros(gained, 32), prompt(gained, seed=gained)[0])
        return trees, rows_run

    trees, rows_run = grown()
    assert rows_run == [4 * 3] * 3  # 4 nodes in each level but the last, which is not run
    monkeypatch.setattr(small_model, "ExtendingSession", type("NoSession", (), {}))
    with_ancestors, more_rows = grown()
    assert min(more_rows) > 1.5 * 4 * 3
    for own, wanted in zip(trees, with_ancestors, strict=True):
        assert own.tokens.tolist() == wanted.tokens.tolist() and own.parents.tolist() == wanted.parents.tolist()
        torch.testing.assert_close(own.scores, wanted.scores)
    hook.remove()


@pytest.mark.parametrize(("model_type", "fields"), MODELS[:3], ids=IDS[:3])
def test_turns_beyond_the_window(model_type, fields):
    """The second turn is longer than a tree, and the target is its own draft."""
    target, draft = tiny_target(model_type, **fields), SmallModelDraft(tiny_model(model_type, **fields))
    draft.budget = TreeBudget(4, 3, 1)
    first = text_of(target, prompt(40), draft, return_dict_in_generate=True, **GREEDY)
    text = torch.cat([first.sequences, prompt(SHORT_TEXT + 20, seed=4)], dim=1)
    again = text_of(target, text, draft, **{CACHE: first[CACHE]}, **GREEDY)
    assert torch.equal(again, text_of(target, text, **GREEDY))
    assert {r.emitted for r in draft.report.rounds[:-1]} == {4}


def test_trees_larger_than_the_session_was_made_for():
    """They need more rows than the buffers of a window have to spare, so the text is read again."""
    model = tiny_model("mistral", sliding_window=SLIDING_WINDOW)
    engine, draft, large = engine_of(model), SmallModelDraft(model), TreeBudget(900, 3, 400)
    trees = []
    for expected in (TreeBudget(4, 2, 1), large):
        draft.budget = expected
        drafter = draft.new_drafter(engine, capacity=8, clock=PhaseClock())
        drafter.begin(torch.zeros(39, 32), prompt(40)[0])
        for gained, budget in enumerate([large, TreeBudget(20, 4, 4), large]):
            trees.append(drafter.grow(budget))
            drafter.advance(torch.zeros(1, 32), torch.tensor([gained]))
    assert len(trees[0]) == 900 and trees[0].depths.max() == 3
    for one, other in zip(trees[:3], trees[3:], strict=True):
        assert torch.equal(one.tokens, other.tokens) and torch.allclose(one.scores, other.scores, atol=1e-4)


def test_one_draft_follows_several_texts_in_turns():
    target, draft = tiny_model("llama", seed=1), SmallModelDraft(tiny_model("gemma2", **SLIDING["gemma2"]))
    engine = engine_of(target)

    def grown(drafter, number):
        if not number:
            return drafter.begin(torch.zeros(20, 32), prompt(21, seed=drafter.seed)[0])
        drafter.advance(torch.zeros(3, 32), prompt(3, seed=drafter.seed + number)[0])
        return drafter.grow(TreeBudget(20, 4, 4)).tokens.tolist()

    def started(seed):
        drafter = draft.new_drafter(engine, capacity=64, clock=PhaseClock())
        drafter.seed = seed
        return drafter

    alone = [[grown(drafter, number) for number in range(4)] for drafter in (started(10), started(20))]
    both = started(10), started(20)
    mixed = [[grown(drafter, number) for drafter in both] for number in range(4)]
    assert [list(trees) for trees in zip(*mixed, strict=True)] == alone


def test_a_text_that_rests_leaves_the_model_alone():
    """It runs no hooks for others, and a draft can be copied and pickled between two turns."""
    target, draft = tiny_target("llama"), SmallModelDraft(tiny_model("gemma2", **SLIDING["gemma2"]))
    draft.budget = TreeBudget(8, 3, 3)
    first = text_of(target, prompt(40), draft, return_dict_in_generate=True, **GREEDY)
    assert not any(module._forward_hooks for module in draft.model.modules())
    for copied in (pickle.loads(pickle.dumps(draft)), copy.deepcopy(draft)):
        assert torch.equal(text_of(target, prompt(40), copied, **GREEDY), first.sequences)
        assert not copied.report.warnings


# --- positions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [20, 60], ids=["until the last position", "not at all"])
def test_drafting_ends_at_the_last_position(tokens):
    """Behind it the text goes on without a draft; trees are cut before it, so that none asks for a later position."""
    target = tiny_target("llama")
    draft = SmallModelDraft(tiny_model("gpt2", num_key_value_heads=None, max_position_embeddings=40))
    draft.budget = TreeBudget(20, 6, 4)
    assert torch.equal(text_of(target, prompt(tokens), draft, **GREEDY), text_of(target, prompt(tokens), **GREEDY))
    assert "outgrown the 40 positions of the small model" in draft.report.warnings[0]
    drafted = [r for r in draft.report.rounds if r.nodes > 1]
    assert drafted[-1].context + drafted[-1].emitted > 40 if tokens < 40 else not drafted


# --- refusals --------------------------------------------------------------------------------------


def test_models_that_cannot_draft_say_why():
    from transformers import AutoConfig, AutoModelForCausalLM

    mamba = AutoConfig.for_model("mamba", vocab_size=97, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(ValueError, match=r"MambaForCausalLM cannot draft: .* keeps a recurrent state"):
        SmallModelDraft(AutoModelForCausalLM.from_config(mamba))


def test_a_model_whose_passes_fail_is_refused_when_the_draft_is_made(monkeypatch):
    def score(_session, _tree):
        raise IndexError("pop from empty list")

    monkeypatch.setattr(TorchSession, "score", score)
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot draft: a short pass fails with IndexError: pop from"):
        SmallModelDraft(tiny_model("llama"))


def test_a_model_without_masks_of_trees_drafts_chains():
    """BLOOM takes no positions, so a target gets chains, and a small model drafts them, for other targets too."""
    fields = {"n_layer": 2, "n_head": 4, "num_key_value_heads": None}
    draft = SmallModelDraft(tiny_model("bloom", **fields))
    draft.budget = TreeBudget(12, 3, 4)
    for target in (tiny_target("bloom", **fields), tiny_target("llama")):
        assert torch.equal(text_of(target, prompt(), draft, **GREEDY), text_of(target, prompt(), **GREEDY))
        assert not draft.report.warnings and {r.nodes for r in draft.report.rounds[:-3]} == {4}
        if target.config.model_type == "bloom":
            assert {r.emitted for r in draft.report.rounds[:-1]} == {4}


# --- what costs nothing before it is needed --------------------------------------------------------


def test_a_prompt_is_read_when_the_first_tree_is_asked_for(monkeypatch):
    model = tiny_model("llama")
    draft = SmallModelDraft(model)
    for name in ("read", "score"):
        monkeypatch.setattr(SmallModelRows, name, lambda *_: pytest.fail("the model ran"))
    drafter = draft.new_drafter(engine_of(model), capacity=64, clock=PhaseClock())
    drafter.begin(torch.zeros(8, 32), prompt(9)[0])
    drafter.advance(torch.zeros(2, 32), torch.tensor([3, 4]))
    lookup = LookupDrafter(4, 2, PhaseClock())
    lookup.begin(torch.zeros(8, 32), prompt(9)[0])
    lookup.advance(torch.zeros(2, 32), torch.tensor([3, 4]))
    assert not lookup.index.tokens
    lookup.catch_up()
    assert lookup.index.tokens == [*prompt(9)[0].tolist(), 3, 4]


@pytest.mark.parametrize("kind", ["lookup", "small model"])
def test_a_turn_that_needed_no_tree_is_read_with_the_next(kind):
    model = tiny_model("mistral", sliding_window=SLIDING_WINDOW)
    draft = PromptLookupDraft(shortest=1) if kind == "lookup" else SmallModelDraft(model)
    text = torch.cat([prompt(30), prompt(30)], dim=1)[0]
    trees = []
    for turns in ([60], [20, 60], [1, 20, 21, 60]):
        drafter, start = draft.new_drafter(engine_of(model), capacity=64, clock=PhaseClock()), 0
        for end in turns:
            first = max(start - 1, 0)  # a later turn starts with the last token of the turn before
            drafter.begin(torch.zeros(end - first - 1, 32), text[first:end])
            start = end
        trees.append(drafter.grow(TreeBudget(12, 4, 3)).tokens.tolist())
    assert len(trees[0]) > 1 and trees[1] == trees[2] == trees[0]


@pytest.mark.parametrize("kind", ["lookup", "small model"])
def test_drafters_name_their_device(kind):
    """Under a default device that is not the draft's, trees are the same and on the CPU."""
    model = tiny_model("llama")
    draft = PromptLookupDraft(shortest=1) if kind == "lookup" else None
    ids, features = torch.cat([prompt(30), prompt(30)], dim=1)[0], torch.zeros(59, 32)
    gained, more = torch.tensor([5, 6]), torch.zeros(2, 32)
    trees = []
    for device in ("cpu", "meta"):
        torch.set_default_device(device)
        try:
            made = draft or SmallModelDraft(model)
            drafter = made.new_drafter(engine_of(model), capacity=64, clock=PhaseClock())
            drafter.begin(features, ids)
            for _ in range(2):
                trees.append(drafter.grow(TreeBudget(12, 4, 3)))
                drafter.advance(more, gained)
        finally:
            torch.set_default_device(None)
    assert trees[2].tokens.device.type == "cpu" and len(trees[2]) > 1
    assert [t.tokens.tolist() for t in trees[2:]] == [t.tokens.tolist() for t in trees[:2]]


def test_identity_of_configs_that_json_cannot_hold():
    """As configs of remote code have them; the key of measurements is the same in every process."""
    draft = SmallModelDraft(tiny_model("llama"))
    plain = draft.identity()
    fields = {"kinds": {"b", "a"}, "place": Path("somewhere"), "compute": torch.bfloat16, "parts": {3: {"x"}, "y": 1}}
    for name, value in (fields | {"thing": object()}).items():
        setattr(draft.config, name, value)
    identity = draft.identity()
    written = json.loads(json.dumps(identity))[1]
    assert identity != plain and key_of(draft=identity)
    assert written["kinds"] == ["a", "b"] and written["place"] == "somewhere" and written["thing"] == "builtins.object"
    assert written["compute"].endswith("bfloat16") and written["parts"] == {"3": ["x"], "y": 1}


@pytest.mark.parametrize("kind", ["dovetail", "small"])
def test_targets_with_such_a_config(kind, tmp_path):
    """With the policy, whose key it goes into."""
    target = tiny_model("llama")
    draft = DovetailDraft.for_target(target) if kind == "dovetail" else SmallModelDraft(tiny_model("llama", seed=3))
    plain = target.generate(prompt(), max_new_tokens=6, do_sample=False)
    for name, value in {"kinds": {"b", "a"}, "place": Path("x"), "compute": torch.bfloat16, "thing": object()}.items():
        setattr(target.config, name, value)
    draft.policy = DeviceSplitPolicy(vram_budget=0, measured_in=tmp_path)
    assert torch.equal(target.generate(prompt(), max_new_tokens=6, do_sample=False, assistant_model=draft), plain)
    assert draft.report.rounds and not draft.report.warnings and list(tmp_path.iterdir())
