"""Drafts with broken files of weights and tokens are refused at load, with the file and the reason, without memory."""

import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
from families import VOCAB, prompt, tiny_target
from safetensors.torch import load_file, save_file
from support.checkpoints import KEPT, H, eagle, eagle3, paper
from support.faults import MIB, WEIGHTS, at_most, refused

from dovetail_plugin import AutoDraft, DovetailDraft
from dovetail_plugin.drafts.checkpoints.load import TOKEN_ORDER
from dovetail_plugin.drafts.checkpoints.read import UnknownFormat
from dovetail_plugin.errors import InputError, MissingFileError

pytestmark = pytest.mark.torch_only("about loading, which is the same for every engine")


# --- tokens ---------------------------------------------------------------------------------------------


def header(shape, kind="<i4", version=b"\x01\x00"):
    words = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY" + version + len(words).to_bytes(2, "little") + words


ORDERS = {
    "empty": (lambda: b"", "not a NumPy array"),
    "text": (lambda: b"0 1 2 3\n", "not a NumPy array"),
    "cut header": (lambda: header((VOCAB,))[:20], "not a NumPy array"),
    "no values": (lambda: header((VOCAB,)), "cut off"),
    "cut": (lambda: header((VOCAB,)) + bytes(4 * VOCAB - 1), "cut off"),
    "longer": (lambda: header((VOCAB,)) + bytes(4 * VOCAB + 1), "cut off, or longer"),
    "huge": (lambda: header((10**11,)) + bytes(8), "the ids of all 97 tokens are needed"),
    "huge header": (lambda: header("(" * 20_000), "not a NumPy array"),
    "many values of no bytes": (lambda: header((VOCAB,), "|V0"), "the ids of all 97 tokens"),
    "one value": (lambda: header(()) + bytes(4), "the ids of all 97 tokens"),
    "matrix": (lambda: header((VOCAB, 1)) + bytes(4 * VOCAB), "the ids of all 97 tokens"),
    "fractions": (lambda: header((VOCAB,), "<f4") + bytes(4 * VOCAB), "the ids of all 97 tokens"),
    "objects": (lambda: header((VOCAB,), "|O") + pickle.dumps([print] * VOCAB), "the ids of all 97 tokens"),
    "pickle": (lambda: pickle.dumps(list(range(VOCAB))), "not a NumPy array"),
    "twice": (lambda: header((VOCAB,)) + bytes(4 * VOCAB), "a token twice"),
    "out of range": (
        lambda: header((VOCAB,)) + np.arange(1, VOCAB + 1, dtype="<i4").tobytes(),
        "the token 97, outside",
    ),
    "negative": (lambda: header((VOCAB,)) + np.arange(-1, VOCAB - 1, dtype="<i4").tobytes(), "the token -1, outside"),
}


@pytest.mark.parametrize("what", ORDERS)
def test_token_order(what, copied_draft):
    content, match = ORDERS[what]
    (copied_draft / TOKEN_ORDER).write_bytes(content())
    assert TOKEN_ORDER in refused(copied_draft, match)


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint16, ">i4"])
def test_token_order_of_other_types(kind, copied_draft, llama):
    order = np.random.default_rng(1).permutation(VOCAB)
    np.save(copied_draft / TOKEN_ORDER, order.astype(kind))
    draft = DovetailDraft.from_pretrained(copied_draft, draft_vocab_size=20)
    (copied_draft / TOKEN_ORDER).unlink()  # it was read at load
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(llama.generate(prompt(), assistant_model=draft, **options), llama.generate(prompt(), **options))
    assert draft.token_ids.tolist() == sorted(order[:20].tolist())
    assert draft.report.warnings == []


def test_token_order_of_a_draft_with_its_own_head(tmp_path):
    (eagle3().write(tmp_path) / TOKEN_ORDER).write_bytes(b"unused")
    assert DovetailDraft.from_pretrained(tmp_path).token_order is None


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        (torch.arange(KEPT) + VOCAB - KEPT + 1, "token_ids has the token 97, outside the vocabulary of 97"),
        (torch.arange(KEPT) - 1, "token_ids has the token -1, outside"),
        (torch.zeros(KEPT, dtype=torch.long), "token_ids has a token twice"),
        (torch.arange(KEPT).float(), "token_ids is stored as torch.float32"),
        (torch.arange(KEPT)[:, None], "wrong shape: token_ids"),
    ],
)
def test_token_ids(ids, match, tmp_path):
    directory = tmp_path / "draft"
    DovetailDraft.from_pretrained(eagle3().write(tmp_path)).save_pretrained(directory)
    save_file(load_file(directory / WEIGHTS) | {"token_ids": ids}, directory / WEIGHTS)
    refused(directory, match)


# --- weight files -----------------------------------------------------------------------------------------


def test_dtypes(copied_draft):
    tensors = load_file(copied_draft / WEIGHTS)
    save_file(tensors | {"fusion.W_1": tensors["fusion.W_1"].to(torch.int8)}, copied_draft / WEIGHTS)
    refused(copied_draft, r"fusion.W_1 is stored as torch.int8.*Quantized drafts are not supported")


def test_interrupted_downloads(tmp_path):
    made = paper()
    file = made.write(tmp_path) / made.file
    whole = file.read_bytes()
    file.write_bytes(b"")
    refused(tmp_path, "empty: its download was interrupted")
    file.write_bytes(whole[: len(whole) // 2])
    refused(tmp_path, "damaged, or was saved by torch before 1.6")


def test_pickles_that_unpack_to_more(tmp_path):
    """Compressed files, one row that is repeated, and one storage for all tensors."""
    made = paper()
    file = made.write(tmp_path) / made.file
    with zipfile.ZipFile(file) as plain:
        entries = {name: plain.read(name) for name in plain.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in entries.items():
            packed.writestr(name, content)
    refused(tmp_path, "unpacks to more bytes than it has")
    torch.save(made.tensors | {"W_1": torch.zeros(1, 1).expand(H, H)}, file)
    refused(tmp_path, "W_1' has fewer bytes than its shape needs")
    torch.save({name: torch.empty(tensor.shape, device="meta") for name, tensor in made.tensors.items()}, file)
    refused(tmp_path, "has fewer bytes than its shape needs")
    one = torch.zeros(max(tensor.numel() for tensor in made.tensors.values()))
    torch.save({name: one[: tensor.numel()].view(tensor.shape) for name, tensor in made.tensors.items()}, file)
    refused(tmp_path, "more bytes than the weight files")


def test_pickles_need_a_torch_that_reads_them_safely(tmp_path, monkeypatch):
    made = paper()
    made.write(tmp_path)
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("the pickle was read"))
    assert "torch 2.10 or later only" in refused(tmp_path, r"is a pickle.*CVE-2026-24747.*safetensors")


@pytest.mark.parametrize("content", [[1], {"W_1": 3}, {3: torch.zeros(1)}, torch.zeros(3)])
def test_pickles_of_other_things(content, tmp_path):
    made = paper()
    torch.save(content, made.write(tmp_path) / made.file)
    refused(tmp_path, "other things than named tensors")


def test_pickled_drafts_of_this_project(copied_draft):
    file = copied_draft / "pytorch_model.bin"
    wanted = load_file(copied_draft / WEIGHTS)
    torch.save(wanted, file)
    (copied_draft / WEIGHTS).unlink()
    assert all(torch.equal(t, wanted[n]) for n, t in DovetailDraft.from_pretrained(copied_draft).state_dict().items())
    torch.save(wanted | {"fusion.W_1": torch.zeros(1, 1).expand(32, 32)}, file)
    refused(copied_draft, "fewer bytes than its shape needs")


@pytest.mark.parametrize(
    ("shard", "match"),
    [
        ("../two.safetensors", "only .safetensors files of the checkpoint itself"),
        ("x/../../two.safetensors", "only .safetensors files of the checkpoint itself"),
        ("/etc/two.safetensors", "only .safetensors files of the checkpoint itself"),
        ("C:\\two.safetensors", "only .safetensors files of the checkpoint itself"),
        ("two.bin", "only .safetensors files of the checkpoint itself"),
        (7, "has no weight_map"),
        ([], "has no weight_map"),
    ],
)
@pytest.mark.parametrize("ours", [True, False])
def test_index_that_leads_elsewhere(shard, match, ours, tmp_path, copied_draft):
    directory = tmp_path / "draft"
    directory.mkdir()
    if ours:
        (directory / "config.json").write_bytes((copied_draft / "config.json").read_bytes())
        tensors = load_file(copied_draft / WEIGHTS)
    else:
        made = eagle()
        (directory / "config.json").write_text(json.dumps(made.config))
        tensors = made.tensors
    names = sorted(tensors)
    files = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, own in files.items():
        save_file({name: tensors[name] for name in own}, directory / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, own in files.items() for name in own}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    DovetailDraft.from_pretrained(directory)
    (directory / "two.safetensors").rename(tmp_path / "two.safetensors")
    index["weight_map"] = {
        name: shard if file == "two.safetensors" else file for name, file in index["weight_map"].items()
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(directory, match)
    (directory / "model.safetensors.index.json").write_text("[")
    refused(directory, "model.safetensors.index.json is not JSON")


def test_a_tensor_in_two_files(tmp_path):
    made = eagle()
    (tmp_path / "config.json").write_text(json.dumps(made.config))
    for file in ("one.safetensors", "two.safetensors"):
        save_file(made.tensors, tmp_path / file)
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path, "is in two weight files")


@pytest.mark.parametrize("ours", [True, False])
def test_variants(ours, tmp_path, copied_draft):
    if ours:
        directory, file = copied_draft, WEIGHTS
    else:
        directory, file = eagle().write(tmp_path), "model.safetensors"
    (directory / file).rename(directory / "model.fp16.safetensors")
    DovetailDraft.from_pretrained(directory, variant="fp16")
    refused(directory, "has no weights", MissingFileError)


def test_a_small_language_model_is_not_read_as_a_draft(tmp_path, monkeypatch):
    """Its names say what it is: its tensors are read once, by transformers."""
    tiny_target("llama").save_pretrained(tmp_path)
    with at_most(tensor_bytes=0, python_bytes=16 * MIB), pytest.raises(UnknownFormat) as raised:
        DovetailDraft.from_pretrained(tmp_path)
    assert raised.value.is_language_model
    (tmp_path / WEIGHTS).rename(tmp_path / "weights")
    with pytest.raises(OSError, match="has no weights"):
        AutoDraft.from_pretrained(str(tmp_path))


def test_a_target_of_another_size_is_an_input_error(valid_draft):
    draft = DovetailDraft.from_pretrained(valid_draft)
    with pytest.raises(InputError, match="vocabulary is 97, the target's is 50"):
        draft.attach(tiny_target("llama", vocab_size=50))
