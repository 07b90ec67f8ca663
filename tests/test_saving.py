"""Drafts are saved and converted whole or not at all, with their token order, and nothing of others is replaced."""

import errno
import json
import os

import numpy as np
import pytest
import torch
from families import VOCAB
from helpers import byte_tokenizer, refusal
from safetensors.torch import save_file
from support import checkpoints
from support.files import digests

from dovetail_plugin import DovetailDraft, files
from dovetail_plugin.cli import main
from dovetail_plugin.drafts import convert
from dovetail_plugin.drafts.checkpoints.load import TOKEN_ORDER
from dovetail_plugin.errors import OccupiedError, WriteError

pytestmark = pytest.mark.torch_only("about checkpoints, which are the same for every engine")


@pytest.fixture
def source(draft, tmp_path):
    """A draft with a token order and a tokenizer, as training writes it."""
    draft.token_order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0)).int()
    draft.save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def eagle3(tmp_path):
    """An EAGLE-3 draft with a file of a tokenizer."""
    (tmp_path / "eagle3").mkdir()
    (tmp_path / "eagle3" / "tokenizer.json").write_text("{}")
    return checkpoints.eagle3().write(tmp_path / "eagle3")


def order_of(directory):
    return np.load(directory / TOKEN_ORDER).tolist()


# --- token order and tokenizer -----------------------------------------------------------------------


def test_the_token_order_goes_along(source, draft, llama, tmp_path):
    """So a reduced head has the most frequent tokens in the copy, too."""
    assert order_of(source) == draft.token_order.tolist()
    DovetailDraft.from_pretrained(source).save_pretrained(tmp_path / "saved")
    assert main(["convert", str(source), str(tmp_path / "converted"), "--to", "dovetail"]) == 0
    expected = sorted(draft.token_order[:30].tolist())
    assert expected != list(range(30))
    for copy in (tmp_path / "saved", tmp_path / "converted"):
        loaded = DovetailDraft.from_pretrained(copy, draft_vocab_size=30)
        loaded.attach(llama)
        assert order_of(copy) == draft.token_order.tolist() and loaded.token_ids.tolist() == expected


@pytest.mark.parametrize("to", ["dovetail", "vllm"])
def test_the_tokenizer_goes_along(source, tmp_path, to):
    assert main(["convert", str(source), str(tmp_path / "new"), "--to", to]) == 0
    found, kept = digests(tmp_path / "new"), digests(source)
    assert {"tokenizer.json", "tokenizer_config.json", TOKEN_ORDER} <= found.keys()
    assert all(found[name] == kept[name] for name in found if name.startswith("tokenizer"))


@pytest.mark.parametrize("to", ["eagle3", "speculators", "vllm", "dovetail"])
def test_formats_of_other_projects_keep_the_tokenizer(eagle3, tmp_path, to):
    assert main(["convert", str(eagle3), str(tmp_path / "new"), "--to", to]) == 0
    assert (tmp_path / "new" / "tokenizer.json").read_text() == "{}"
    assert DovetailDraft.from_pretrained(tmp_path / "new").config.fusion == "eagle3"


def test_links_out_of_the_checkpoint_are_not_copied(source, tmp_path, capsys):
    """A directory that was cloned from somewhere may lead to any file of this computer."""
    (tmp_path / "secret").write_text("secret")
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to(tmp_path / "secret")
    (source / "merges.txt").symlink_to("config.json")
    assert main(["convert", str(source), str(tmp_path / "new"), "--to", "dovetail"]) == 0
    assert "not copied: tokenizer.json, which lead out of" in capsys.readouterr().err
    assert not (tmp_path / "new" / "tokenizer.json").exists() and (tmp_path / "new" / "merges.txt").is_file()


def test_files_of_the_hubs_cache_are_copied(source, tmp_path):
    """There every file is a link to one of `blobs`."""
    repository = tmp_path / "models--a--b"
    source.rename(tmp_path / "plain")
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for file in (tmp_path / "plain").iterdir():
        file.rename(repository / "blobs" / f"x{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/x{file.name}")
    assert main(["convert", str(snapshot), str(tmp_path / "new"), "--to", "dovetail"]) == 0
    assert {"tokenizer.json", TOKEN_ORDER} <= digests(tmp_path / "new").keys()


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/secret.safetensors", "a/../../secret.safetensors"])
def test_an_index_does_not_lead_out_of_the_checkpoint(eagle3, tmp_path, capsys, shard):
    """What it names elsewhere is not read, and so not written into the result."""
    save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "secret.safetensors")
    for file in (*eagle3.glob("*.bin"), *eagle3.glob("*.safetensors*")):
        file.unlink()
    (eagle3 / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"fc.weight": shard}}))
    line = refusal(capsys, "convert", eagle3, tmp_path / "new", "--to", "dovetail")
    assert "names the file" in line and "only .safetensors files of the checkpoint itself are read" in line
    assert not (tmp_path / "new").exists()


# --- what is there already ---------------------------------------------------------------------------


def test_convert_replaces_nothing(source, tmp_path, capsys):
    """Neither a file nor a directory with content, of whatever kind."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    for name, message in (("file", "is a file"), ("folder", "is not empty (thesis.txt)")):
        assert message in refusal(capsys, "convert", source, tmp_path / name, "--to", "dovetail")
    assert (tmp_path / "file").read_text() == "mine" and list(digests(tmp_path / "folder")) == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    assert main(["convert", str(source), str(tmp_path / "empty"), "--to", "dovetail"]) == 0


def test_a_draft_replaces_a_draft_and_nothing_else(source, draft, llama, tmp_path):
    (source / "notes.txt").write_text("mine")
    (source / "model-00001-of-00002.safetensors").write_text("a shard of an older one")
    draft.token_order = None
    draft.save_pretrained(source)
    assert {"config.json", "model.safetensors", "notes.txt", "tokenizer.json"} <= digests(source).keys()
    assert not {TOKEN_ORDER, "model-00001-of-00002.safetensors"} & digests(source).keys()
    draft.save_pretrained(source, max_shard_size="20KB")
    assert "model.safetensors" not in digests(source) and "model.safetensors.index.json" in digests(source)
    DovetailDraft.from_pretrained(source)
    llama.config.save_pretrained(tmp_path / "target")
    before = digests(tmp_path / "target")
    with pytest.raises(OccupiedError, match=r"contains a checkpoint that is not a Dovetail draft .model_type 'llama'"):
        draft.save_pretrained(tmp_path / "target")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OccupiedError, match="is a file"):
        draft.save_pretrained(tmp_path / "file")
    assert digests(tmp_path / "target") == before and (tmp_path / "file").read_text() == "mine"


def test_uploading_sends_all_files(draft, monkeypatch, tmp_path):
    """`push_to_hub` uploads what `save_pretrained` writes; the name is that of the directory."""
    sent = []
    draft.token_order = torch.arange(VOCAB).int()
    monkeypatch.setattr(DovetailDraft, "push_to_hub", lambda self, repo_id, **options: sent.append((repo_id, options)))
    draft.save_pretrained(tmp_path / "my-draft", push_to_hub=True, private=True, token="secret")
    draft.save_pretrained(tmp_path / "my-draft", push_to_hub=True, repo_id="me/other")
    assert sent == [("my-draft", {"private": True, "token": "secret"}), ("me/other", {})]


# --- full disks --------------------------------------------------------------------------------------


def full(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("to", ["dovetail", "eagle3"])
@pytest.mark.parametrize("step", ["weights", "config", "flush"])
def test_a_full_disk_leaves_nothing_of_a_conversion(eagle3, tmp_path, capsys, monkeypatch, to, step):
    """One line with the name of the result; the next try works."""
    with monkeypatch.context() as patch:
        if step == "flush":
            patch.setattr(os, "fsync", full)
        elif to == "eagle3":
            patch.setattr(convert, "save_file" if step == "weights" else "_eagle3_config", full)
        elif step == "weights":
            patch.setattr("transformers.modeling_utils.safe_save_file", full)
        else:
            patch.setattr("transformers.PretrainedConfig.to_json_file", full)
        line = refusal(capsys, "convert", eagle3, tmp_path / "new", "--to", to)
    assert f"{tmp_path / 'new'} cannot be written: the disk is full. Free some space" in line
    assert sorted(file.name for file in tmp_path.iterdir()) == ["eagle3"]
    assert main(["convert", str(eagle3), str(tmp_path / "new"), "--to", to]) == 0


def test_a_full_disk_leaves_the_older_draft(source, draft, monkeypatch):
    before = digests(source)
    with monkeypatch.context() as patch:
        patch.setattr("dovetail_plugin.drafts.saving.np.save", full)
        with pytest.raises(WriteError, match="source cannot be written: the disk is full"):
            draft.save_pretrained(source)
    assert digests(source) == before
    assert not [name for name in before if name.startswith(files.PART)]


def test_a_process_that_saves_no_weights_deletes_none(source, draft):
    """As accelerate has all processes but the main one do."""
    before = digests(source)
    draft.save_pretrained(source, is_main_process=False)
    assert digests(source).keys() == before.keys()
    draft.save_pretrained(source, variant="fp16")
    assert digests(source).keys() == before.keys() | {"model.fp16.safetensors"}
    DovetailDraft.from_pretrained(source)


def test_weights_without_a_config_are_not_replaced(draft, tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"of somebody else")
    with pytest.raises(OccupiedError, match=r"has pytorch_model\.bin without a config\.json"):
        draft.save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == ["pytorch_model.bin"]


@pytest.mark.parametrize("step", [0, 1, 2])
def test_an_error_between_two_renamings_leaves_the_older_draft(step, source, draft, monkeypatch):
    """The new draft has a file more and, without a token order, one less."""
    before = digests(source)
    draft.token_order = None
    replace, calls = os.replace, []

    def interrupted(old, new):
        calls.append(new)
        if len(calls) == step + 1:
            raise KeyboardInterrupt
        replace(old, new)

    monkeypatch.setattr(files.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draft.save_pretrained(source, max_shard_size="2KB")
    assert digests(source) == before
