"""Conversion between formats, known pairs, and commands with drafts of other kinds."""

import json

import pytest
import torch
from families import prompt, tiny_target
from helpers import byte_target, byte_tokenizer, run_python, save_pair
from support import checkpoints
from support.bundled import DRAFT, TARGET
from transformers import AutoConfig, LlamaConfig

from dovetail_plugin import AutoDraft, DovetailDraft, PromptLookupDraft, SmallModelDraft
from dovetail_plugin.cli import main
from dovetail_plugin.drafts.convert import write_draft
from dovetail_plugin.drafts.known_pairs import CONFIG_FIELD, KNOWN, LOOKUP, draft_name_for

pytestmark = pytest.mark.usefixtures("fixed_budget")

EAGLE3 = [name for name in checkpoints.FORMATS if name.startswith(("eagle3", "speculators"))]


@pytest.fixture(scope="module")
def target():
    return tiny_target("llama", num_hidden_layers=checkpoints.TARGET_LAYERS)


@pytest.mark.parametrize("to", ["eagle3", "speculators", "vllm", "dovetail"])
@pytest.mark.parametrize("name", EAGLE3)
@torch.no_grad()
def test_written_and_read_again(name, to, tmp_path, target):
    """Whatever format a draft went through, it computes the same."""
    torch.manual_seed(0)
    made = checkpoints.FORMATS[name]()
    (tmp_path / "published").mkdir()
    first = DovetailDraft.from_pretrained(made.write(tmp_path / "published"))
    write_draft(first, tmp_path / "written", to)
    again = DovetailDraft.from_pretrained(tmp_path / "written")
    for draft in (first, again):
        draft.attach(target)
    ids, features = checkpoints.text(made.states)
    one, other = (draft(features=features[None], input_ids=ids[None, 1:]) for draft in (first, again))
    assert torch.equal(one.logits, other.logits) and torch.equal(one.features, other.features)
    assert again.config.layers_of(target.config) == made.states
    assert (again.token_ids is None) == (first.token_ids is None)
    if first.token_ids is not None:
        assert torch.equal(first.token_ids, again.token_ids)


def test_an_eagle3_file_has_the_published_names(tmp_path):
    torch.manual_seed(0)
    made = checkpoints.eagle3(own_embedding=True)
    (tmp_path / "published").mkdir()
    draft = DovetailDraft.from_pretrained(made.write(tmp_path / "published"))
    write_draft(draft, tmp_path / "written", "eagle3")
    from safetensors.torch import load_file

    written = load_file(tmp_path / "written" / "model.safetensors")
    assert written.keys() == made.tensors.keys()
    assert all(torch.equal(written[name], made.tensors[name]) for name in written)
    config = json.loads((tmp_path / "written" / "config.json").read_text())
    shared = ("hidden_size", "intermediate_size", "num_attention_heads", "draft_vocab_size", "vocab_size", "rope_theta")
    assert {name: config[name] for name in shared} == {name: made.config[name] for name in shared}


@pytest.mark.parametrize("fusion", ["dgf", "concat"])
def test_what_vllm_takes_by_our_plugin_is_written_as_ours(fusion, tmp_path, target):
    torch.manual_seed(0)
    draft = DovetailDraft.for_target(target, blocks=2, fusion=fusion)
    write_draft(draft, tmp_path, "vllm")
    again = DovetailDraft.from_pretrained(tmp_path)
    assert again.config.architectures == ["DovetailDraft"] and again.config.model_type == "dovetail"
    expected = draft.state_dict()
    assert expected.keys() == again.state_dict().keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


def test_what_a_format_cannot_hold(tmp_path):
    draft = DovetailDraft.from_pretrained(DRAFT)
    with pytest.raises(ValueError, match="for EAGLE-3 drafts only, and this draft is a Dynamic Gating"):
        write_draft(draft, tmp_path / "a", "eagle3")
    with pytest.raises(ValueError, match="unknown format 'gguf'"):
        write_draft(draft, tmp_path / "a", "gguf")
    write_draft(draft, tmp_path / "a", "dovetail")
    with pytest.raises(FileExistsError, match="is not empty"):
        write_draft(draft, tmp_path / "a", "dovetail")


def test_known_pairs():
    for pair in KNOWN:
        config = LlamaConfig(name_or_path=f"some/place/{pair.target.rsplit('/', 1)[-1]}")
        assert draft_name_for(config)[0] == pair.draft
    assert len({pair.target for pair in KNOWN}) == len(KNOWN)
    name, why = draft_name_for(LlamaConfig(name_or_path="nobody/nothing"))
    assert name == LOOKUP and "no draft is known" in why
    named = LlamaConfig(name_or_path=KNOWN[0].target, **{CONFIG_FIELD: "mine/draft"})
    assert draft_name_for(named)[0] == "mine/draft"  # before the table


def test_whatever_is_named_is_loaded(tmp_path):
    assert isinstance(AutoDraft.from_pretrained(LOOKUP), PromptLookupDraft)
    assert isinstance(AutoDraft.from_pretrained(str(DRAFT)), DovetailDraft)
    assert isinstance(AutoDraft.from_pretrained(str(TARGET)), SmallModelDraft)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    torch.save({"x": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="unknown: its model_type is 'bert'"):
        AutoDraft.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("draft", [LOOKUP, str(TARGET)])
def test_texts_with_loaded_drafts(draft, tmp_path):
    from transformers import AutoModelForCausalLM

    bundled = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32)
    options = {"max_new_tokens": 24, "do_sample": False}
    plain = bundled.generate(prompt(20), **options)
    assistant = AutoDraft.from_pretrained(draft, dtype=torch.float32)
    assert torch.equal(bundled.generate(prompt(20), assistant_model=assistant, **options), plain)


@pytest.mark.parametrize("kind", ["lookup", "small model", "eagle"])
def test_bench_with_drafts_of_every_kind(kind, tmp_path, capsys):
    """By the same command, with the policy; the comparison finds the same text."""
    target, _ = save_pair(tmp_path)
    name = LOOKUP
    if kind == "small model":
        byte_target(num_hidden_layers=1).save_pretrained(tmp_path / "small")
        byte_tokenizer().save_pretrained(tmp_path / "small")
        name = str(tmp_path / "small")
    elif kind == "eagle":
        config = AutoConfig.from_pretrained(target)
        head = checkpoints.eagle()
        head.config["vocab_size"] = config.vocab_size
        assert config.hidden_size == checkpoints.H
        (tmp_path / "head").mkdir()
        name = str(head.write(tmp_path / "head"))
    command = ["bench", "--target", str(target), "--draft", name, "--count", "2", "--max-new-tokens", "12"]
    assert main([*command, "--dtype", "float32", "--out", str(tmp_path / "out.jsonl")]) == 0
    result = json.loads((tmp_path / "out.jsonl").read_text())
    assert result["identical"] == result["prompts"] == 2 and result["acceptance_length"] >= 1.0


def test_generate_without_a_draft(tmp_path):
    """The command takes lookup for a target that nobody knows, and says so."""
    arguments = ["-m", "dovetail_plugin", "generate", "--target", TARGET, "--dtype", "float32", "--compare"]
    result = run_python(*arguments, "--max-new-tokens", "16", "--prompt", "one two one two one", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "taking lookup (no draft is known for this target" in result.stderr
    assert "identical text: yes" in result.stderr


def test_generate_with_a_hub_out_of_reach(tmp_path):
    """A draft that the target's config names and that cannot be loaded: lookup takes its place."""
    import shutil

    copy = tmp_path / "target"
    shutil.copytree(TARGET, copy)
    config = json.loads((copy / "config.json").read_text()) | {CONFIG_FIELD: "nobody/nothing-of-that-name"}
    (copy / "config.json").write_text(json.dumps(config))
    assert getattr(AutoConfig.from_pretrained(copy), CONFIG_FIELD) == "nobody/nothing-of-that-name"
    arguments = ["-m", "dovetail_plugin", "generate", "--target", copy, "--dtype", "float32", "--max-new-tokens", "8"]
    result = run_python(*arguments, "--prompt", "one two", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "cannot be loaded, looking up the text instead" in result.stderr


def test_convert_command(tmp_path):
    torch.manual_seed(0)
    (tmp_path / "published").mkdir()
    checkpoints.eagle3().write(tmp_path / "published")
    command = ["-m", "dovetail_plugin", "convert", "published"]
    result = run_python(*command, "written", "--to", "speculators", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "written to written as speculators" in result.stdout
    assert DovetailDraft.from_pretrained(tmp_path / "written").config.fusion == "eagle3"
    assert run_python(*command, "written", "--to", "eagle3", cwd=tmp_path).returncode == 2
