"""The public base of drafts: a third-party draft works through it alone, and settings are checked when they are set."""

import copy
import pickle

import pytest
import torch
from families import prompt, tiny_model, tiny_target
from transformers.generation.streamers import BaseStreamer

from dovetail_plugin import DovetailDraft, Draft, Drafter, DraftTree, PromptLookupDraft, SmallModelDraft, TreeBudget
from dovetail_plugin.policy import DeviceSplitPolicy

# --- a draft of somebody else's, in thirty lines --------------------------------------------------------


class BigramDrafter(Drafter):
    """Proposes the token that followed the last one at its latest earlier occurrence, again and again."""

    def __init__(self, clock):
        self.clock, self.tokens = clock, []

    def begin(self, features, input_ids):
        self.tokens += input_ids.tolist() if not self.tokens else input_ids.tolist()[1:]

    def advance(self, features, tokens):
        self.tokens += tokens.tolist()

    def grow(self, budget, judge=None):
        follows = dict(zip(self.tokens[:-1], self.tokens[1:], strict=True))
        chain = [self.tokens[-1]]
        while len(chain) < min(budget.nodes, budget.depth + 1) and chain[-1] in follows:
            chain.append(follows[chain[-1]])
        nodes = torch.arange(len(chain))
        return DraftTree(torch.tensor(chain), nodes - 1, nodes, -0.5 * nodes.float())


class BigramDraft(Draft):
    def identity(self):
        return ["bigram"]

    def new_drafter(self, engine, *, capacity, clock):
        return BigramDrafter(clock)


OPTIONS = dict(max_new_tokens=40, do_sample=False)


@pytest.mark.parametrize("budget", [TreeBudget(6, 5, 1), None], ids=["fixed", "policy"])
def test_third_party_draft_generates_the_same_text(budget):
    target, draft = tiny_target("llama"), BigramDraft()
    draft.budget = budget
    ids = prompt().repeat(1, 2)
    drafted = target.generate(ids, **OPTIONS, assistant_model=draft)
    assert torch.equal(drafted, target.generate(ids, **OPTIONS))
    assert not draft.report.warnings and draft.report.new_tokens == 40
    if budget is not None:
        assert max(r.nodes for r in draft.report.rounds) > 1


def test_third_party_draft_follows_turns():
    target, draft = tiny_target("llama"), BigramDraft()
    draft.budget = TreeBudget(6, 5, 1)
    first = target.generate(prompt(), **OPTIONS, assistant_model=draft, return_dict_in_generate=True)
    cache = first["cache"] if "cache" in first else first["past_key_values"]
    (turn,) = draft.turns.values()
    more = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], dim=1)
    name = "cache" if "cache" in first else "past_key_values"
    second = target.generate(more, **OPTIONS, assistant_model=draft, **{name: cache})
    assert torch.equal(second, target.generate(more, **OPTIONS))
    assert turn.drafter.tokens == second[0].tolist()


class Scripted(BigramDrafter):
    """Returns one tree, whatever the text is."""

    def grow(self, budget, judge=None):
        return self.tree(self.tokens[-1])


WRONG_TREES = {
    "no tree": lambda root: None,
    "empty": lambda root: DraftTree.chain([]),
    "another root": lambda root: DraftTree.chain([root + 1, 3]),
    "tokens as floats": lambda root: DraftTree.chain([float(root), 3.0]),
    "a token below 0": lambda root: DraftTree.chain([root, -1]),
    "a token beyond the vocabulary": lambda root: DraftTree.chain([root, 97]),
    "more nodes than allowed": lambda root: DraftTree.chain([root, *range(9)]),
    "wrong depths": lambda root: DraftTree(*(torch.tensor(c) for c in ([root, 3], [-1, 0], [0, 0], [0.0, 0.0]))),
    "a parent that comes later": lambda root: DraftTree(
        *(torch.tensor(c) for c in ([root, 3, 4], [-1, 2, 0], [0, 2, 1], [0.0, 0.0, 0.0]))
    ),
    "a second root": lambda root: DraftTree(*(torch.tensor(c) for c in ([root, 3], [-1, -1], [0, 0], [0.0, 0.0]))),
}


@pytest.mark.parametrize("what", WRONG_TREES)
def test_wrong_trees_stop_drafting_and_not_the_text(what):
    class WrongDraft(BigramDraft):
        def new_drafter(self, engine, *, capacity, clock):
            drafter = Scripted(clock)
            drafter.tree = WRONG_TREES[what]
            return drafter

    target, draft = tiny_target("llama"), WrongDraft()
    draft.budget = TreeBudget(6, 5, 1)
    drafted = target.generate(prompt(), **OPTIONS, assistant_model=draft)
    assert torch.equal(drafted, target.generate(prompt(), **OPTIONS))
    assert len(draft.report.warnings) == 1


def test_abstract_methods_are_required():
    class Incomplete(Draft):
        def identity(self):
            return []

    with pytest.raises(TypeError, match="new_drafter"):
        Incomplete()


# --- settings -------------------------------------------------------------------------------------------


@pytest.fixture
def lookup():
    return PromptLookupDraft()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("budget", (8, 4, 4), r"budget must be a TreeBudget.*got \(8, 4, 4\)"),
        ("budget", 8, "budget must be a TreeBudget"),
        ("policy", "fast", "policy must be a DeviceSplitPolicy or None, got 'fast'"),
        ("verification", "stok", 'verification must be "tree" or "stock", got \'stok\''),
        ("verification", "stock", "PromptLookupDraft"),
    ],
)
def test_wrong_values_are_refused_when_set(lookup, name, value, message):
    before = getattr(lookup, name)
    with pytest.raises(ValueError, match=message):
        setattr(lookup, name, value)
    assert getattr(lookup, name) == before


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("runner", "troch", 'runner must be "auto" or "torch", got \'troch\''),
        ("embedding_device", "gpuu", "embedding_device must be a device"),
        ("embedding_device", 3, "embedding_device must be a device"),
        ("draft_vocab_size", "many", "between 1 and 97"),
        ("draft_vocab_size", 98, "between 1 and 97, or None for all of them, got 98"),
        ("draft_vocab_size", 0, "between 1 and 97"),
        ("draft_vocab_size", True, "between 1 and 97"),
        ("budget", (8, 4, 4), "TreeBudget"),
    ],
)
def test_wrong_values_of_a_model_are_refused_when_set(draft, name, value, message):
    with pytest.raises(ValueError, match=message):
        setattr(draft, name, value)


def test_valid_values_are_taken(draft):
    draft.budget, draft.policy, draft.verification = TreeBudget(4, 2, 2), DeviceSplitPolicy(vram_budget=0), "stock"
    draft.runner, draft.embedding_device = "torch", torch.device("cpu")
    draft.budget = draft.policy = None
    assert (draft.verification, draft.runner, draft.budget) == ("stock", "torch", None)


def test_settings_belong_to_one_draft(lookup):
    lookup.budget = TreeBudget(4, 2, 2)
    assert PromptLookupDraft().budget is None
    assert copy.deepcopy(lookup).budget == pickle.loads(pickle.dumps(lookup)).budget == TreeBudget(4, 2, 2)


def test_settings_keep_their_value_when_they_cannot_be_applied(llama, draft, monkeypatch):
    monkeypatch.setattr(DovetailDraft, "attach", lambda *_: (_ for _ in ()).throw(OSError("no such file")))
    with pytest.raises(OSError, match="no such file"):
        draft.draft_vocab_size = 9
    assert draft.draft_vocab_size is None
    with pytest.raises(ValueError, match="that torch can use here, got 'cuda:99'"):
        draft.embedding_device = "cuda:99"


def test_other_defaults_of_subclasses_stay_checked():
    class Wide(PromptLookupDraft):
        budget = TreeBudget(8, 4, 4)

    assert Wide().budget == TreeBudget(8, 4, 4) and PromptLookupDraft().budget is None
    with pytest.raises(ValueError, match="budget must be a TreeBudget"):
        Wide().budget = (1, 2, 3)
    with pytest.raises(ValueError, match="budget must be a TreeBudget"):
        type("Wrong", (PromptLookupDraft,), {"budget": 3})


def test_modules_are_no_settings(draft):
    with pytest.raises(ValueError, match="budget must be a TreeBudget"):
        draft.budget = torch.nn.Linear(2, 2)
    assert "budget" not in dict(draft.named_children())


def test_used_drafts_can_be_copied_and_pickled(llama, draft):
    lookup = PromptLookupDraft()
    for each in (draft, lookup):
        each.budget = TreeBudget(4, 2, 2)
        llama.generate(prompt(), **OPTIONS, assistant_model=each)
        for again in (copy.deepcopy(each), pickle.loads(pickle.dumps(each))):
            assert again.budget == each.budget
            text = llama.generate(prompt(), **OPTIONS, assistant_model=again)
            assert torch.equal(text, llama.generate(prompt(), **OPTIONS))


def test_settings_can_be_given_when_a_draft_is_loaded(draft, tmp_path):
    draft.save_pretrained(tmp_path)
    loaded = DovetailDraft.from_pretrained(tmp_path, draft_vocab_size=10, budget=TreeBudget(4, 2, 2), runner="torch")
    assert (loaded.draft_vocab_size, loaded.budget, loaded.runner) == (10, TreeBudget(4, 2, 2), "torch")
    assert loaded.identity() != draft.identity()
    with pytest.raises(ValueError, match="runner must be"):
        DovetailDraft.from_pretrained(tmp_path, runner="troch")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("budjet", "budget"),
        ("budgets", "budget"),
        ("polcy", "policy"),
        ("verfication", "verification"),
        ("runer", "runner"),
        ("embed_device", "embedding_device"),
        ("draft_vocab", "draft_vocab_size"),
    ],
)
def test_misspelled_setting_names_the_right_one(draft, name, meant):
    with pytest.raises(AttributeError, match=f"no setting '{name}'. Did you mean '{meant}'"):
        setattr(draft, name, 3)
    assert not hasattr(draft, name)


@pytest.mark.parametrize(
    "name",
    [
        "hf_device_map", "is_quantized", "quantization_method", "peft_config", "active_adapter", "vocab_size",
        "is_parallelizable", "model_parallel", "device_map", "generation_config", "_hf_hook", "_old_forward",
        "_is_compiled", "_budget", "__my_note", "tokenizer", "notes",
    ],
)  # fmt: skip
def test_other_names_pass(draft, name):
    setattr(draft, name, "value")
    assert getattr(draft, name) == "value"


def test_modules_and_tensors_can_be_replaced(draft):
    draft.norm = torch.nn.Identity()
    draft.head_weight = draft.head_weight.clone()
    draft.train()
    draft.eval()
    assert not draft.training


# --- settings that concern the borrowed tables count at once -----------------------------------------


def test_cut_head_counts_on_an_attached_draft(llama, draft):
    draft.draft_vocab_size = 10
    assert draft.head_weight.shape[0] == len(draft.token_ids) == 10
    draft.draft_vocab_size = None
    assert draft.head_weight.shape[0] == 97 and draft.token_ids is None


def test_embedding_device_counts_on_an_attached_draft(llama, draft):
    draft.to(torch.bfloat16)
    draft.attach(llama)
    assert draft.embed_weight.dtype == torch.bfloat16
    draft.embedding_device = "cpu"
    assert draft.embed_weight.data_ptr() == llama.get_input_embeddings().weight.data_ptr()


def test_settings_before_the_first_target_count_when_it_comes(llama):
    draft = DovetailDraft(DovetailDraft.for_target(llama).config)
    draft.draft_vocab_size = 10
    assert not draft.is_attached
    draft.budget = TreeBudget(6, 3, 2)
    plain = llama.generate(prompt(), **OPTIONS)
    assert torch.equal(plain, llama.generate(prompt(), **OPTIONS, assistant_model=draft))
    assert draft.head_weight.shape[0] == 10


# --- what generation asks of every draft ----------------------------------------------------------------


def test_stock_loop_is_for_drafts_that_support_it(llama, draft):
    small = SmallModelDraft(tiny_target("llama", seed=3))
    assert DovetailDraft.supports_stock_loop and not small.supports_stock_loop
    with pytest.raises(ValueError, match='"tree" for a SmallModelDraft'):
        small.verification = "stock"


def test_stock_loop_is_refused_behind_a_filled_cache(llama, draft):
    first = llama.generate(prompt(), **OPTIONS, return_dict_in_generate=True)
    name = "cache" if "cache" in first else "past_key_values"
    draft.verification = "stock"
    more = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], dim=1)
    with pytest.raises(ValueError, match="assisted loop gives wrong text behind a cache"):
        llama.generate(more, **OPTIONS, assistant_model=draft, **{name: first[name]})


@pytest.mark.torch_only("hooks of torch")
@pytest.mark.parametrize("kind", ["lookup", "small model", "dovetail"])
def test_drafts_that_read_tokens_only_leave_hidden_states_alone(kind, llama, draft):
    """Their target keeps no features: no hook is added to it while it generates."""
    before = {module: len(module._forward_hooks) for module in llama.modules()}  # transformers has some, too
    hooks = []

    class Streamer(BaseStreamer):
        def put(self, value):
            hooks.extend(module for module in llama.modules() if len(module._forward_hooks) > before[module])

        def end(self):
            pass

    chosen = {"lookup": PromptLookupDraft(), "small model": SmallModelDraft(tiny_model("llama")), "dovetail": draft}[
        kind
    ]
    wanted = llama.generate(prompt(), **OPTIONS)
    assert torch.equal(llama.generate(prompt(), **OPTIONS, assistant_model=chosen, streamer=Streamer()), wanted)
    assert not chosen.report.warnings
    assert bool(hooks) == (kind == "dovetail")


def test_drafts_say_how_they_compute(llama, draft):
    assert draft.feature_layers(llama.config) is None
    assert draft.calibration is None and PromptLookupDraft().calibration is None
    assert draft.device == torch.device("cpu") and draft.num_parameters() > 0
    assert PromptLookupDraft().num_parameters() == 0
