"""Pairs of models whose tokenizers differ in a few tokens, or whose tables have different numbers of rows."""

import json
import random

import pytest
import torch
from families import VOCAB, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from dovetail_plugin import DeviceSplitPolicy, SmallModelDraft, TreeBudget
from dovetail_plugin.compat import CACHE
from dovetail_plugin.drafts.shared_tokens import shared_tokens, vocabulary_of
from dovetail_plugin.report import PhaseClock
from dovetail_plugin.targets.engine import engine_of

pytestmark = pytest.mark.torch_only("tokenizers beside checkpoints, small models in torch")

OPTIONS = {
    "greedy": {"max_new_tokens": 40, "do_sample": False},
    "sampled": {"max_new_tokens": 40, "do_sample": True, "top_k": 10},
}
WORDS = [f"word{i}" for i in range(VOCAB)]
PAIRS = {
    # name: (tokens of the target, its rows, tokens of the small model, its rows)
    "rows padded less": (WORDS[:90], 120, WORDS[:90], 96),
    "rows padded more": (WORDS[:90], 96, WORDS[:90], 120),
    "fewer tokens": (WORDS, VOCAB, WORDS[:70], 70),
    "more tokens": (WORDS[:70], 70, WORDS, VOCAB),
    "added behind": ([*WORDS, "<pad>", "<user>"], VOCAB + 2, WORDS, VOCAB),
    "renamed": ([*WORDS[:50], "<think>", *WORDS[51:90], "</think>", *WORDS[91:]], VOCAB, WORDS, VOCAB),
    "added between": ([*WORDS[:60], "<pad>", *WORDS[60:]], VOCAB + 1, WORDS, VOCAB),
    "lacking between": ([*WORDS[:60], *WORDS[63:]], VOCAB - 3, WORDS, VOCAB),
    "swapped": ([*WORDS[:40], WORDS[41], WORDS[40], *WORDS[42:]], VOCAB, WORDS, VOCAB),
    "tokens without rows": ([*WORDS, "<late>"], VOCAB, [*WORDS, "<late>", "<later>"], VOCAB),
}


def tokenizer_of(tokens):
    backend = Tokenizer(models.WordLevel(vocab={token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def model_of(tokens, rows, live=WORDS):
    """A Llama in which the rows of a token depend on its text alone, so two of them differ in their vocabularies only.

    Tokens of `live` have rows that vary as those of `tiny_model`. Others and padding have rows of zeros, whose logits
    are 0 and not the best ones.
    """
    model, full = tiny_model("llama", vocab_size=rows), tiny_model("llama")
    model.model.layers.load_state_dict(full.model.layers.state_dict())
    for part in ("get_input_embeddings", "get_output_embeddings"):
        own, table = getattr(model, part)().weight.data, getattr(full, part)().weight.data
        own.zero_()
        for i, token in enumerate(tokens[:rows]):
            if token in live:
                own[i] = table[WORDS.index(token)]
    for config in (model.config, model.generation_config):
        config.eos_token_id = None
    return model


def made_pair(name, directory, live=WORDS):
    """(target, draft) of `PAIRS`, loaded from checkpoints with their tokenizers."""
    tokens, rows, own_tokens, own_rows = PAIRS[name]
    for side, arguments in (("target", (tokens, rows)), ("small", (own_tokens, own_rows))):
        model_of(*arguments, live).save_pretrained(directory / side)
        tokenizer_of(arguments[0]).save_pretrained(directory / side)
    target = AutoModelForCausalLM.from_pretrained(directory / "target", dtype=torch.float32)
    return target, SmallModelDraft.from_pretrained(str(directory / "small"), dtype=torch.float32)


@pytest.fixture
def pair(request, tmp_path):
    return made_pair(request.param, tmp_path)


def any_text(target, length=20, seed=0):
    """(1, length) of all tokens of the target, with the first and the last ones and padding among them."""
    rows = target.config.vocab_size
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, rows, (1, length), generator=generator)
    ids[0, 3:8] = torch.tensor([rows - 1, 0, rows - 2, 60, 50])
    return ids


def text_of(target, ids, draft=None, **options):
    torch.manual_seed(5)
    mask = torch.ones_like(ids)  # the padding token is a word here
    return target.generate(ids, attention_mask=mask, **({} if draft is None else {"assistant_model": draft}), **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("pair", PAIRS, indirect=True)
def test_texts_of_pairs_that_differ_a_little(pair, options):
    target, draft = pair
    draft.budget = TreeBudget(16, 4, 4)
    for seed in range(3):
        ids = any_text(target, seed=seed)
        assert torch.equal(text_of(target, ids, draft, **options), text_of(target, ids, **options))
        assert not draft.report.warnings


@pytest.mark.parametrize("name", PAIRS)
def test_tokens_in_common_are_accepted(name, tmp_path):
    """The small model is the target in its own numbering, so it is always right about the tokens that both have."""
    tokens, rows, own_tokens, own_rows = PAIRS[name]
    common = set(tokens[:rows]) & set(own_tokens[:own_rows])
    target, draft = made_pair(name, tmp_path, live=common)
    draft.budget = TreeBudget(4, 3, 1)
    known = [i for i, token in enumerate(tokens[:rows]) if token in common]
    ids, options = torch.tensor([random.Random(0).choices(known, k=20)]), OPTIONS["greedy"]
    plain = text_of(target, ids, **options)
    assert set(plain[0].tolist()) <= set(known)
    assert torch.equal(text_of(target, ids, draft, **options), plain)
    assert {r.emitted for r in draft.report.rounds[:-1]} == {4}


@pytest.mark.parametrize("pair", ["fewer tokens", "added between"], indirect=True)
def test_two_turns_with_missing_tokens(pair, tmp_path):
    """With the policy, and a first prompt that ends in a token that the small model lacks."""
    target, draft = pair
    draft.policy = DeviceSplitPolicy(measured_in=tmp_path)
    missing = target.config.vocab_size - 1 if draft.config.vocab_size < VOCAB else 60
    options = OPTIONS["greedy"]
    ids = torch.cat([any_text(target), torch.tensor([[missing]])], dim=1)
    first = text_of(target, ids, draft, return_dict_in_generate=True, **options)
    assert torch.equal(first.sequences, text_of(target, ids, **options))
    turn = torch.cat([first.sequences, any_text(target, 90, seed=3)], dim=1)
    again = text_of(target, turn, draft, **{CACHE: first[CACHE]}, **options)
    assert torch.equal(again, text_of(target, turn, **options))
    assert not draft.report.warnings


@pytest.mark.parametrize("pair", PAIRS, indirect=True)
def test_only_tokens_of_both_are_drafted(pair):
    target, draft = pair
    drafter = draft.new_drafter(engine_of(target), capacity=64, clock=PhaseClock())
    ids = any_text(target)[0]
    drafter.begin(torch.zeros(len(ids) - 1, 32), ids)
    tree = drafter.grow(TreeBudget(1000, 1, VOCAB))
    drafted = set(tree.tokens[1:].tolist())
    words = {i: token for token, i in vocabulary_of(target.config.name_or_path).items()}
    common = {i for i, token in words.items() if token in draft.vocabulary}
    rows, own_rows = target.config.vocab_size, draft.config.vocab_size
    assert drafted == {i for i in common if i < rows and draft.vocabulary[words[i]] < own_rows}


# --- the tables ------------------------------------------------------------------------------------


@given(st.data())
def test_the_tables_lead_from_token_to_token(data):
    """Against a slow reading of both vocabularies."""
    size = data.draw(st.integers(20, 40))
    own = {f"t{i}": i for i in range(size)}
    target = dict(own)
    for _ in range(data.draw(st.integers(0, 4))):
        a, b = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, size - 1))
        target[f"t{a}"], target[f"t{b}"] = target.get(f"t{b}", b), target.get(f"t{a}", a)
    for token in data.draw(st.lists(st.sampled_from(sorted(own)), max_size=4)):
        if token in target:
            target[f"renamed {token}"] = target.pop(token)
    own_rows, target_rows = data.draw(st.integers(size - 5, size + 9)), data.draw(st.integers(size - 5, size + 9))
    shared = shared_tokens(own, target, own_rows=own_rows, target_rows=target_rows, substitute=7)
    own_words, words = ({i: token for token, i in side.items()} for side in (own, target))
    for i in range(target_rows):
        read = int(shared.read(torch.tensor([i])))
        assert 0 <= read < own_rows
        if words.get(i) in own and own[words[i]] < own_rows:
            assert own_words[read] == words[i]
        elif i >= own_rows:
            assert read == 7
    logits = torch.arange(own_rows)[None].float()
    kept = [int(i) for i in shared.drafted(logits)[0]]
    tokens = kept if shared.token_ids is None else shared.token_ids.tolist()
    assert len(set(tokens)) == len(tokens) == len(kept)
    for i, token in zip(kept, tokens, strict=True):
        assert token < target_rows and own_words.get(i) == words.get(token)
    expected = {token for token, i in target.items() if i < target_rows and own.get(token, own_rows) < own_rows}
    assert {words[token] for token in tokens if token in words} == expected
    full = shared.over_vocabulary(shared.drafted(logits))
    assert full.shape == (1, target_rows) and full[0, tokens].tolist() == kept
    assert int(full.isfinite().sum()) == len(tokens)


def test_equal_vocabularies_need_no_tables():
    shared = shared_tokens({"a": 0, "b": 1}, {"b": 1, "a": 0}, own_rows=3, target_rows=2, substitute=0)
    assert shared.token_ids is None and shared.read_as is None and shared.columns == slice(2)


# --- pairs that do not fit, and tokenizers that cannot be read -------------------------------------


def test_another_tokenizer_is_refused(tmp_path):
    """Before any work, with the numbers and an example."""
    model_of(WORDS, VOCAB).save_pretrained(tmp_path)
    tokenizer_of(WORDS).save_pretrained(tmp_path)
    target = AutoModelForCausalLM.from_pretrained(tmp_path)
    other = {f"other{i}" if i > 30 else f"word{i}": i for i in range(95)}
    draft = SmallModelDraft(tiny_model("llama", vocab_size=95), other)
    with pytest.raises(
        ValueError,
        match=r"only 31 of 95 token ids stand for the same token. For example, 31 is 'word31' for the target \(97 "
        r"tokens\) and 'other31' for the small model \(95 tokens\)",
    ):
        target.generate(any_text(target), assistant_model=draft, max_new_tokens=2)


BROKEN = {
    "another version": json.dumps({"version": "9.0", "model": {"type": "Unheard of", "vocab": []}}),
    "cut": '{"version": "1.0", "mod',
    "empty": "",
}


def met(directory, target):
    """A small model that has met its target."""
    draft = SmallModelDraft.from_pretrained(str(directory))
    draft.check_target(target)
    return draft


@pytest.mark.parametrize("side", ["target", "small"])
@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_tokenizer_files_that_cannot_be_read(text, side, tmp_path):
    for name in ("target", "small"):
        model_of(WORDS, VOCAB).save_pretrained(tmp_path / name)
        tokenizer_of(WORDS).save_pretrained(tmp_path / name)
    (tmp_path / side / "tokenizer.json").write_text(text)
    target = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    ids = any_text(target)
    with pytest.warns(UserWarning, match=rf"the tokenizer of \S*{side} cannot be read, so small model and target are"):
        draft = met(tmp_path / "small", target)
    draft.budget = TreeBudget(8, 3, 3)
    drafted = text_of(target, ids, draft, **OPTIONS["greedy"])
    assert torch.equal(drafted, text_of(target, ids, **OPTIONS["greedy"])) and not draft.report.warnings


@pytest.mark.parametrize("model_type", ["gpt2", "qwen2"])
def test_a_tokenizer_that_transformers_makes_without_files_is_not_compared(model_type, tmp_path):
    """It has one token, and its target would seem to have another tokenizer than the small model."""
    fields = {"num_key_value_heads": None} if model_type == "gpt2" else {}
    tiny_model(model_type, **fields).save_pretrained(tmp_path)
    target = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(vocabulary_of(str(tmp_path))) < 5
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    SmallModelDraft(tiny_model("llama"), vocabulary).check_target(target)
    shorter = SmallModelDraft(tiny_model("llama", vocab_size=60), vocabulary)
    with pytest.raises(ValueError, match=r"small model has 60 tokens and the target 97.*without the tokenizers of"):
        shorter.check_target(target)


def test_code_of_a_tokenizer_is_not_run(tmp_path, monkeypatch):
    """transformers would ask on standard input whether to run it."""
    model_of(WORDS, VOCAB).save_pretrained(tmp_path)
    tokenizer_of(WORDS).save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    fields = {"auto_map": {"AutoTokenizer": ["code.Own", None]}, "tokenizer_class": "Own"}
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    (tmp_path / "code.py").write_text("raise SystemExit('the code was run')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    target = AutoModelForCausalLM.from_pretrained(tmp_path)
    draft = SmallModelDraft(model_of(WORDS, VOCAB), {word: i for i, word in enumerate(WORDS)})
    with pytest.warns(UserWarning, match="cannot be read"):
        draft.check_target(target)
