"""Drafts by name: `AutoDraft`, texts as `assistant_model`, and drafts of every kind in pipelines."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from families import prompt, tiny_model, tiny_target
from helpers import byte_model, byte_tokenizer, save_pair
from support import checkpoints
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline
from transformers.pipelines import base as pipelines

from dovetail_plugin import AutoDraft, DovetailDraft, PromptLookupDraft, SmallModelDraft, TreeBudget, attach_draft
from dovetail_plugin.drafts.auto import LAYOUTS
from dovetail_plugin.generation import assistants

pytestmark = pytest.mark.usefixtures("fixed_budget")

OPTIONS = dict(max_new_tokens=12, do_sample=False)
TEXT = "one two one two one"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A target, a draft of ours and a small model as checkpoints."""
    directory = tmp_path_factory.mktemp("assistants")
    save_pair(directory)
    byte_model(num_hidden_layers=1, seed=3).save_pretrained(directory / "small")
    byte_tokenizer().save_pretrained(directory / "small")
    return directory


@pytest.fixture
def target(directory):
    return AutoModelForCausalLM.from_pretrained(directory / "target")


# --- AutoDraft --------------------------------------------------------------------------------------------


def published(name, directory):
    (directory / name).mkdir()
    return checkpoints.FORMATS[name]().write(directory / name)


def test_every_layout_is_read_and_named(directory, tmp_path):
    read = {
        "lookup": AutoDraft.from_pretrained("lookup"),
        "dovetail": AutoDraft.from_pretrained(directory / "draft"),
        "language model": AutoDraft.from_pretrained(str(directory / "small")),
    }
    for name in checkpoints.FORMATS:
        draft = AutoDraft.from_pretrained(published(name, tmp_path))
        read.setdefault(draft.layout, draft)
    assert {layout: draft.layout for layout, draft in read.items()} == {layout: layout for layout in read}
    assert read.keys() == LAYOUTS.keys()
    assert isinstance(read["lookup"], PromptLookupDraft) and isinstance(read["language model"], SmallModelDraft)
    assert all(isinstance(read[name], DovetailDraft) for name in ("dovetail", "paper", "eagle", "eagle3"))
    assert DovetailDraft(read["dovetail"].config).layout is None


@pytest.mark.parametrize("name", ["lookup", "draft", "small"])
def test_settings_and_a_target_are_taken(name, directory, target):
    name = name if name == "lookup" else str(directory / name)
    draft = AutoDraft.from_pretrained(name, target=target, budget=TreeBudget(4, 2, 2))
    assert draft.budget == TreeBudget(4, 2, 2)
    assert draft._attached_to() is target


def test_a_draft_that_does_not_fit_is_refused_when_loaded(directory):
    with pytest.raises(ValueError, match="the draft's vocabulary is 260, the target's is 97"):
        AutoDraft.from_pretrained(directory / "draft", target=tiny_target("llama"))


def test_unknown_layouts_say_what_was_found_and_what_is_known(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    torch.save({"x": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"model_type is 'bert'.*EAGLE-3.*Found: config\.json, pytorch_model\.bin\."
    ) as e:
        AutoDraft.from_pretrained(tmp_path)
    assert "causal language model" in str(e.value) and '"lookup"' in str(e.value)
    (tmp_path / "config.json").rename(tmp_path / "adapter_config.json")
    with pytest.raises(OSError, match=r"no config\.json.*Found: adapter_config\.json, pytorch") as e:
        AutoDraft.from_pretrained(tmp_path)
    assert all(what in str(e.value) for what in LAYOUTS.values())
    with pytest.raises(ValueError, match=r"adapter_config\.json is a file\. Give the directory"):
        AutoDraft.from_pretrained(tmp_path / "adapter_config.json")
    with pytest.raises(TypeError, match=r"AutoDraft\.from_pretrained"):
        AutoDraft()


def test_code_of_a_repository_is_neither_run_nor_asked_for(directory, tmp_path, monkeypatch):
    copy = shutil.copytree(directory / "small", tmp_path / "remote")
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "unheard_of", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "own.py").write_text("raise SystemExit('run')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoDraft.from_pretrained(copy)


# --- texts as assistant_model -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lookup", "draft", "small"])
@pytest.mark.parametrize("kind", [str, Path])
def test_a_name_is_loaded_once_for_each_model(name, kind, directory, target, monkeypatch):
    name = name if name == "lookup" else str(directory / name)
    loads, load = [], AutoDraft.from_pretrained
    monkeypatch.setattr(assistants.AutoDraft, "from_pretrained", lambda *a, **k: loads.append(a) or load(*a, **k))
    plain = target.generate(prompt(), **OPTIONS)
    for _ in range(2):
        out = target.generate(prompt(), **OPTIONS, assistant_model=kind(name), return_dict_in_generate=True)
        assert torch.equal(out.sequences, plain)
        assert out.report.rounds and not out.report.warnings
    assert len(loads) == 1
    AutoModelForCausalLM.from_pretrained(directory / "target").generate(prompt(), **OPTIONS, assistant_model=kind(name))
    assert len(loads) == 2


def test_a_name_that_could_not_be_loaded_is_tried_again(directory, target, tmp_path):
    with pytest.raises(OSError, match="AutoDraft reads"):
        target.generate(prompt(), **OPTIONS, assistant_model=str(tmp_path / "later"))
    shutil.copytree(directory / "draft", tmp_path / "later")
    target.generate(prompt(), **OPTIONS, assistant_model=str(tmp_path / "later"))


def test_a_name_for_a_model_that_cannot_be_a_target(directory, monkeypatch):
    monkeypatch.setattr(assistants.AutoDraft, "from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="keeps a recurrent state"):
        tiny_target("mamba").generate(prompt(), **OPTIONS, assistant_model=str(directory / "draft"))


# --- pipelines --------------------------------------------------------------------------------------------


def assistants_of_every_kind(directory):
    own, small = (
        DovetailDraft.from_pretrained(directory / "draft"),
        SmallModelDraft.from_pretrained(directory / "small"),
    )
    return ["lookup", str(directory / "draft"), str(directory / "small"), own, small, PromptLookupDraft()]


@pytest.mark.parametrize("number", range(6))
def test_pipelines_take_every_kind_of_assistant(number, directory, target):
    assistant = assistants_of_every_kind(directory)[number]
    tokenizer = byte_tokenizer()
    plain = pipeline("text-generation", model=target, tokenizer=tokenizer)(TEXT, **OPTIONS)
    pipe = pipeline("text-generation", model=target, tokenizer=tokenizer, assistant_model=assistant)
    assert pipe(TEXT, **OPTIONS) == plain
    assert pipe.assistant_model.report.rounds and pipe.assistant_tokenizer is None
    called = pipeline("text-generation", model=target, tokenizer=tokenizer)
    assert called(TEXT, assistant_model=assistant, **OPTIONS) == plain


def test_a_pipeline_neither_moves_nor_compares_a_draft(directory, target):
    """As a language model: with the end tokens of its config beside those of the target's."""
    target.config.eos_token_id = target.generation_config.eos_token_id = [3, 4]
    draft = DovetailDraft.from_pretrained(directory / "draft", dtype=torch.bfloat16)
    draft.config.eos_token_id = 3
    pipe = pipeline("text-generation", model=target, tokenizer=byte_tokenizer(), assistant_model=draft)
    assert pipe.assistant_model is draft and draft.dtype == torch.bfloat16
    pipe(TEXT, **OPTIONS)
    assert draft.report.rounds


def test_pipelines_draft_for_batches(directory, target):
    pipe = pipeline("text-generation", model=target, tokenizer=byte_tokenizer(), batch_size=2)
    options = OPTIONS | dict(eos_token_id=3, num_return_sequences=1)
    drafted = pipe([TEXT, "two"], assistant_model="lookup", **options)
    assert drafted == pipe([TEXT, "two"], **options)


def test_what_only_transformers_can_use_goes_on_as_before(directory, target, tmp_path, caplog):
    """A small model with another tokenizer, which transformers translates; an assistant of an encoder-decoder model."""
    byte_model(vocab_size=300, num_hidden_layers=1).save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(300)}, unk_token="<0>"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    model, assistant_tokenizer = pipelines.load_assistant_model(target, str(tmp_path), None)
    assert type(model).__name__ == "LlamaForCausalLM" and assistant_tokenizer is not None
    assert "is left to transformers' own assisted generation" in caplog.text
    target.config.is_encoder_decoder = True
    assert type(pipelines.load_assistant_model(target, str(directory / "small"), None)[0]) is type(target)


def test_stock_assistants_of_pipelines_are_untouched(target):
    small = byte_model(num_hidden_layers=1)
    assert pipelines.load_assistant_model(target, small, None) == (small, None)
    assert pipelines.load_assistant_model(target, None, None) == (None, None)


def test_a_name_can_be_attached(directory, target):
    draft = attach_draft(target, directory / "draft")
    assert draft.layout == "dovetail" and draft.is_attached


def test_a_small_model_whose_class_has_another_name(target, tmp_path):
    """As GPT2LMHeadModel."""
    tiny_model("gpt2", num_key_value_heads=None, vocab_size=260).save_pretrained(tmp_path)
    draft = AutoDraft.from_pretrained(tmp_path)
    assert draft.layout == "language model"
    assert torch.equal(
        target.generate(prompt(), assistant_model=draft, max_new_tokens=8, do_sample=False),
        target.generate(prompt(), max_new_tokens=8, do_sample=False),
    )
