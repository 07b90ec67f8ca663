"""Packed models in files: `save_packed`, and loading what it wrote."""

import json
import os
import struct
import subprocess
import sys

import pytest
import torch
from families import CASE_IDS, CASES, prompt, tiny_model
from safetensors.torch import load_file, save_file
from support.bundled import DRAFT, TARGET
from transformers import AutoModelForCausalLM, AutoTokenizer

from dovetail_plugin import CpuWeights, save_packed
from dovetail_plugin.cli import main
from dovetail_plugin.errors import InputError, OccupiedError, WriteError
from dovetail_plugin.kernels import KINDS
from dovetail_plugin.kernels.linear import PackedLinear

pytestmark = pytest.mark.torch_only("weights are packed in transformers' own models")


def load(directory, kind=None, **options):
    options.setdefault("dtype", torch.float32)
    if kind is not None:
        options["quantization_config"] = CpuWeights(kind)
    return AutoModelForCausalLM.from_pretrained(directory, **options)


def packed_llama(directory, kind="int8", **fields):
    """A saved packed model; the directory of its files."""
    tiny_model("llama", **fields).save_pretrained(directory / "original")
    save_packed(load(directory / "original", kind), directory / "packed")
    return directory / "packed"


def same(one, other):
    ids = prompt()
    with torch.no_grad():
        return torch.equal(one(ids).logits, other(ids).logits)


@pytest.mark.parametrize(("model_type", "fields"), CASES, ids=CASE_IDS)
def test_families(model_type, fields, tmp_path, caplog):
    tiny_model(model_type, **fields).save_pretrained(tmp_path / "original")
    packed = load(tmp_path / "original", "int4")
    save_packed(packed, tmp_path / "packed")
    loaded = load(tmp_path / "packed")
    assert "newly initialized" not in caplog.text and "MISSING" not in caplog.text
    assert same(loaded, packed)
    names = [name for name, module in packed.named_modules() if isinstance(module, PackedLinear)]
    assert [name for name, module in loaded.named_modules() if isinstance(module, PackedLinear)] == names


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_heads_and_several_files(kind, dtype, tmp_path):
    tiny_model("llama", tie_word_embeddings=True).to(dtype).save_pretrained(tmp_path / "original")
    packed = load(tmp_path / "original", kind, dtype="auto")
    save_packed(packed, tmp_path / "packed", max_shard_size="20KB")
    assert (tmp_path / "packed" / "model.safetensors.index.json").exists()
    loaded = load(tmp_path / "packed", dtype="auto")
    assert loaded.dtype == dtype and loaded.lm_head.weight.dtype == dtype
    assert loaded.lm_head.weight.isnan().all() and loaded.lm_head.weight.untyped_storage().nbytes() <= 8
    assert same(loaded, packed)
    save_packed(loaded, tmp_path / "again")
    assert same(load(tmp_path / "again", dtype="auto"), packed)


def test_layers_that_were_left_alone(tmp_path):
    tiny_model("qwen2").save_pretrained(tmp_path / "original")
    config = CpuWeights("int8", modules_to_not_convert=["lm_head", "layers.1"])
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "original", quantization_config=config)
    save_packed(packed, tmp_path / "packed")
    assert same(load(tmp_path / "packed"), packed)


def test_a_process_that_only_imports_the_package(tmp_path):
    directory = packed_llama(tmp_path)
    code = (
        "import sys, dovetail_plugin\nfrom transformers import AutoModelForCausalLM\n"
        "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1]).lm_head).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(directory)], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["PackedLinear"], done.stderr


def test_the_command_line(tmp_path, capsys):
    packed = load(TARGET, "int8", dtype="auto")
    packed.generation_config.max_new_tokens = 7
    save_packed(packed, tmp_path / "packed")
    assert load(tmp_path / "packed").generation_config.max_new_tokens == 7
    assert AutoTokenizer.from_pretrained(tmp_path / "packed")("Two plus two")["input_ids"]
    pair = ["--target", str(tmp_path / "packed"), "--draft", str(DRAFT), "--draft-device", "cpu"]
    more = ["--prompt", "Two plus two is", "--max-new-tokens", "12"]
    assert main(["generate", *pair, *more]) == 0
    assert main(["generate", *pair, *more, "--weights", "int4"]) == 2
    assert "quantized already (int8). Leave out --weights" in capsys.readouterr().err


# --- what is refused -------------------------------------------------------------------------------


def test_what_cannot_be_saved(tmp_path, monkeypatch):
    model = tiny_model("llama")
    with pytest.raises(InputError, match="save_pretrained"):
        save_packed(model, tmp_path / "out")
    model.save_pretrained(tmp_path / "original")
    with pytest.raises(InputError, match="depends on the CPU"):
        save_packed(load(tmp_path / "original", "float"), tmp_path / "out")
    packed = load(tmp_path / "original", "int8")
    with pytest.raises(OccupiedError):
        save_packed(packed, tmp_path / "original")

    def full(*_, **__):
        raise OSError(28, "No space left on device", str(tmp_path / "out"))

    monkeypatch.setattr("dovetail_plugin.targets.save_packed.copy_tokenizer", full)
    with pytest.raises(WriteError):
        save_packed(packed, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["original"]


def rewrite(directory, change):
    file = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


PACKED_NAME = "model.layers.0.mlp.up_proj.packed_weight"
CHANGES = {
    "no model.norm.weight": lambda tensors: tensors.pop("model.norm.weight"),
    r"shape \(10,\)": lambda tensors: tensors.update({PACKED_NAME: torch.zeros(10, dtype=torch.uint8)}),
    "numbers of type I8": lambda tensors: tensors.update({PACKED_NAME: tensors[PACKED_NAME].view(torch.int8)}),
    "no linear layer for": lambda tensors: tensors.update({"model.a.packed_weight": torch.zeros(3, dtype=torch.uint8)}),
    "have no model.layers.0.mlp.up_proj.weight": lambda tensors: tensors.pop(PACKED_NAME),
}


@pytest.mark.parametrize("message", CHANGES)
def test_damaged_tensors(message, tmp_path):
    directory = packed_llama(tmp_path)
    rewrite(directory, CHANGES[message])
    with pytest.raises(InputError, match=message):
        load(directory)


def test_damaged_files(tmp_path):
    directory = packed_llama(tmp_path)
    file = directory / "model.safetensors"
    content = file.read_bytes()
    for damaged in (content[:-1], content[: len(content) // 2], b"", struct.pack("<Q", 2**60) + content[8:]):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match="cannot be read"):
            load(directory)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": 2}, "format 2.*newer version"),
        ({"format": "x"}, "format 'x'"),
        ({"format": 2, "bits": 3}, "format 2"),
        ({"bits": 3}, "bits"),
        ({"weights": "int3"}, "int8, int4"),
        ({"weights": "int4"}, "shape"),
    ],
)
def test_other_configs(fields, message, tmp_path):
    directory = packed_llama(tmp_path)
    file = directory / "config.json"
    config = json.loads(file.read_text())
    assert config["quantization_config"]["format"] == 1
    config["quantization_config"] |= fields
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        load(directory)


def test_a_config_that_describes_a_huge_model(tmp_path):
    directory = packed_llama(tmp_path)
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 2**40}))
    with pytest.raises(InputError, match="the config says"):
        load(directory)
