"""Arguments that select where files come from reach every file: two revisions in a hub cache, and no network."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import byte_model, byte_tokenizer, parse_command, refusal, write_jsonl
from huggingface_hub import constants
from support import checkpoints
from support.hub_cache import add_revision
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM
from transformers import dynamic_module_utils as remote_code

from dovetail_plugin import AutoDraft, DovetailDraft, SmallModelDraft, compat
from dovetail_plugin.cli import generate, loading, main
from dovetail_plugin.drafts.checkpoints.claims import model_config
from dovetail_plugin.drafts.checkpoints.load import TOKEN_ORDER
from dovetail_plugin.drafts.target_tokenizer import vocabulary_of_target
from dovetail_plugin.errors import MissingFileError
from dovetail_plugin.planning.draft_config import load_draft_config
from dovetail_plugin.training import loop
from dovetail_plugin.training.features import fingerprint

pytestmark = pytest.mark.torch_only("about loading, which is the same for every engine")

REVISIONS = {"main": 1, "v2": 2}
SHORT = {"max_new_tokens": 4, "do_sample": False}


def word_of(number: int) -> str:
    return f"<|{number}|>"


def write_model(directory: Path, number: int) -> None:
    """A model whose weights, config and tokenizer all depend on the number."""
    torch.manual_seed(number)
    byte_model(rms_norm_eps=number * 1e-6).save_pretrained(directory)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(word_of(number), special=True)])
    tokenizer.save_pretrained(directory)


def write_draft(directory: Path, number: int, bits: str = "safetensors") -> None:
    torch.manual_seed(number)
    draft = DovetailDraft.for_target(byte_model(), rms_norm_eps=number * 1e-6)
    torch.nn.init.constant_(draft.layers[0].mlp.down_proj.weight, number)
    draft.save_pretrained(directory)
    if bits == "bin":
        torch.save(draft.state_dict(), directory / "pytorch_model.bin")
        (directory / "model.safetensors").unlink()
    np.save(directory / TOKEN_ORDER, np.roll(np.arange(260), number).astype(np.int32))


def write_eagle(directory: Path, number: int) -> None:
    made = checkpoints.eagle3()
    made.config["rms_norm_eps"] = number * 1e-6
    made.write(directory)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A hub cache with two revisions of each repository."""
    cache = tmp_path_factory.mktemp("hub")
    for revision, number in REVISIONS.items():
        add_revision(cache, "org/target", revision, lambda d, n=number: write_model(d, n))
        add_revision(cache, "org/draft", revision, lambda d, n=number: write_draft(d, n))
        add_revision(cache, "org/pickled", revision, lambda d, n=number: write_draft(d, n, "bin"))
        add_revision(cache, "org/eagle", revision, lambda d, n=number: write_eagle(d, n))
        add_revision(
            cache, "org/nested", revision, lambda d, n=number: [write(d / "in", n) for write in (write_draft,)]
        )
    return cache


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path, offline_hub):
    """No network, and an empty default cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))


@pytest.fixture
def source(cache):
    return {"cache_dir": cache, "local_files_only": True}


# --- drafts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("revision", REVISIONS)
@pytest.mark.parametrize(("repo", "more"), [("draft", {}), ("pickled", {}), ("nested", {"subfolder": "in"})])
def test_every_file_of_a_draft(revision, repo, more, source):
    """Config, weights and the order of tokens."""
    number = REVISIONS[revision]
    draft = DovetailDraft.from_pretrained(f"org/{repo}", revision=revision, token="secret", **more, **source)
    assert draft.config.rms_norm_eps == number * 1e-6
    assert bool((draft.layers[0].mlp.down_proj.weight == number).all())
    assert draft.token_order.tolist() == np.roll(np.arange(260), number).tolist()


@pytest.mark.parametrize("revision", REVISIONS)
def test_drafts_of_other_projects(revision, source):
    number = REVISIONS[revision]
    assert AutoDraft.from_pretrained("org/eagle", revision=revision, **source).config.rms_norm_eps == number * 1e-6
    assert load_draft_config("org/eagle", revision=revision, **source).rms_norm_eps == number * 1e-6


def test_a_cache_or_revision_that_is_not_there():
    """Nothing is taken from another place."""
    for more in ({}, {"revision": "v3"}):
        with pytest.raises(MissingFileError, match=r"org/draft has no config\.json"):
            DovetailDraft.from_pretrained("org/draft", **more)


# --- small models and their targets ------------------------------------------------------------------


@pytest.mark.parametrize("revision", REVISIONS)
def test_every_file_of_a_small_model(revision, source):
    draft = SmallModelDraft.from_pretrained("org/target", revision=revision, **source)
    assert draft.config.rms_norm_eps == REVISIONS[revision] * 1e-6
    assert word_of(REVISIONS[revision]) in draft.vocabulary and len(draft.vocabulary) == 261


def load_target(revision, source):
    return AutoModelForCausalLM.from_pretrained("org/target", revision=revision, **source)


@pytest.mark.parametrize("revision", REVISIONS)
def test_the_target_has_the_tokenizer_of_its_revision(revision, source, cache):
    """Its config remembers the commit before transformers 5.24; later, that of main is taken, with a warning."""
    target = load_target(revision, source)
    known = compat.commit_of(target.config) is not None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vocabulary = vocabulary_of_target(target.config, [cache])
    own = REVISIONS[revision if known else "main"]
    assert word_of(own) in vocabulary
    said = [str(w.message) for w in caught]
    assert said == [] if known else len(said) == 1 and "draft.target_vocabulary = tokenizer.get_vocab()" in said[0]


@pytest.mark.parametrize("recorded", [True, False])
def test_one_revision_in_the_cache_needs_no_record(recorded, tmp_path, monkeypatch):
    """Also one that is not main, in a cache that only the draft names."""
    add_revision(tmp_path, "org/pinned", "v7", lambda directory: write_model(directory, 7))
    source = {"cache_dir": tmp_path, "local_files_only": True, "revision": "v7"}
    target = AutoModelForCausalLM.from_pretrained("org/pinned", **source)
    draft = SmallModelDraft.from_pretrained("org/pinned", **source)
    if not recorded:
        monkeypatch.setattr("dovetail_plugin.drafts.target_tokenizer.commit_of", lambda config: None)
    ids = torch.arange(100, 108)[None]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        text = target.generate(ids, assistant_model=draft, **SHORT)
    assert torch.equal(text, target.generate(ids, **SHORT))
    assert len(draft.report.rounds) < SHORT["max_new_tokens"] and not draft.report.warnings


def test_a_target_whose_tokenizer_is_in_no_cache(source):
    with pytest.warns(UserWarning, match="tokenizer of org/target cannot be read"):
        assert vocabulary_of_target(load_target("v2", source).config) is None


def test_a_given_vocabulary_replaces_the_search(source, monkeypatch):
    target, draft = load_target("v2", source), SmallModelDraft.from_pretrained("org/target", **source)
    monkeypatch.setattr(
        "dovetail_plugin.drafts.small_model.vocabulary_of_target", lambda *_: pytest.fail("it was looked for")
    )
    draft.target_vocabulary = {token: i for i, token in enumerate("abcdefghij" * 30)} | {
        f"{i}": i for i in range(100, 260)
    }
    with pytest.raises(ValueError, match="small model's tokenizer is not the target's"):
        draft.check_target(target)
    draft.target_vocabulary = draft.vocabulary
    draft.check_target(target)


# --- the command line --------------------------------------------------------------------------------


@pytest.mark.parametrize("draft", ["org/draft", "org/target"])
@pytest.mark.parametrize("revision", REVISIONS)
def test_pairs_of_the_command_line(draft, revision, cache):
    """Target, tokenizer and draft of the asked revisions, from the asked cache, without warnings."""
    hub = ["--revision", revision, "--cache-dir", str(cache), "--local-files-only", "--draft-revision", "v2"]
    args = parse_command(generate, "-m", "org/target", "-md", draft, "--draft-device", "cpu", *hub)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pair = loading.load_pair(args)
        pair.target.generate(torch.arange(100, 108)[None], assistant_model=pair.draft, **SHORT)
    assert pair.target.config.rms_norm_eps == REVISIONS[revision] * 1e-6
    assert word_of(REVISIONS[revision]) in pair.tokenizer.get_vocab()
    assert pair.draft.config.rms_norm_eps == 2e-6
    if draft == "org/target":
        assert pair.draft.target_vocabulary == pair.tokenizer.get_vocab()


def test_plans(cache, capsys):
    plan = ["plan", "--target", "org/target", "--draft", "org/draft", "--vram", "4GiB", "--ram", "8GiB", "--json"]
    hub = ["--cache-dir", str(cache), "--local-files-only"]
    assert main([*plan, *hub, "--revision", "v2", "--draft-revision", "main"]) == 0
    assert json.loads(capsys.readouterr().out)["parts"]
    assert "org/target: no such file or directory" in refusal(capsys, *plan, *hub, "--revision", "v3")
    assert "org/draft has no config.json" in refusal(capsys, *plan, *hub, "--draft-revision", "v3")


def test_training(cache, tmp_path, monkeypatch):
    """All files are of the asked revisions. The record names that of the target, and no token."""
    seen = []
    real = loop.draft_losses
    monkeypatch.setattr(loop, "draft_losses", lambda draft, *a, **k: seen.append(draft.config) or real(draft, *a, **k))
    write_jsonl(tmp_path / "rows.jsonl", [{"text": f"some text {number}"} for number in range(4)])
    options = dict(data=tmp_path / "rows.jsonl", out=tmp_path / "new", steps=1, batch_size=2, held_out=2, rollout=2)
    command = ["train", "--target", "org/target", "--init-from", "org/draft"]
    command += [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    hub = ["--cache-dir", str(cache), "--local-files-only", "--token", "secret"]
    assert main([*command, *hub, "--revision", "v2", "--draft-revision", "main"]) == 0
    assert {config.rms_norm_eps for config in seen} == {1e-6}
    assert word_of(2) in (tmp_path / "new" / "tokenizer.json").read_text()
    record = (tmp_path / "new" / "training.json").read_text()
    assert json.loads(record)["config"]["revision"] == "v2" and "secret" not in record
    target = AutoModelForCausalLM.from_pretrained("org/target", revision="v2", cache_dir=cache)
    assert json.loads(record)["key"]["target"] == fingerprint(target)


@pytest.mark.parametrize(("option", "model"), [("--revision", "--target"), ("--draft-revision", "--init-from")])
def test_training_with_revisions_that_are_not_there(option, model, cache, tmp_path, capsys):
    files = ["--data", tmp_path / "rows.jsonl", "--out", tmp_path / "new"]
    hub = ["--cache-dir", cache, "--local-files-only", option, "v3"]
    line = refusal(capsys, "train", "--target", "org/target", "--init-from", "org/draft", *files, *hub)
    assert f"{model} org/{'target' if model == '--target' else 'draft'}: no such directory" in line


# --- code of others ----------------------------------------------------------------------------------


@pytest.fixture
def with_code(tmp_path, monkeypatch):
    """A model that only its own code can load. Asking for permission fails the test."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    monkeypatch.setattr(remote_code, "TIME_OUT_REMOTE_CODE", 15)
    write_model(tmp_path, 1)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "custom", "auto_map": {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "custom.py").write_text("raise RuntimeError('the code was run')")
    return tmp_path


def test_nobody_is_asked(with_code):
    for load in (SmallModelDraft.from_pretrained, AutoDraft.from_pretrained, model_config):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            load(str(with_code))
        with pytest.raises((RuntimeError, ValueError), match="the code was run"):
            load(str(with_code), trust_remote_code=True)


@pytest.mark.parametrize(("engine", "file"), [("openvino", "openvino_model.xml"), ("onnxruntime", "model.onnx")])
def test_nobody_is_asked_for_an_exported_model(engine, file, with_code):
    pytest.importorskip(engine)
    from dovetail_plugin.adapters import load_exported

    (with_code / file).write_bytes(b"")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        load_exported(str(with_code))
    with pytest.raises((RuntimeError, ValueError), match="the code was run"):
        load_exported(str(with_code), trust_remote_code=True)
