"""Language models whose config describes more than their files hold are refused at once, within little memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import VOCAB, tiny_model
from helpers import byte_tokenizer, command_environment, refusal, write_jsonl
from safetensors.torch import save_file
from support.faults import at_most
from transformers import AutoConfig, AutoModelForCausalLM

from dovetail_plugin import AutoDraft, SmallModelDraft
from dovetail_plugin.drafts.checkpoints.claims import check_claims, model_config
from dovetail_plugin.errors import InputError

pytestmark = pytest.mark.torch_only("about loading, which is the same for every engine")

MIB = 2**20
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB}
CLAIMS = {
    "an ordinary 7B": ({}, "describes 6[0-9]{9} weights"),
    "layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000, and its files have room for 40"),
    "a few layers more": ({"num_hidden_layers": 41}, "room for 40 at most"),
    "layers of another name": ({"n_layers": 10**9}, "n_layers=1000000000"),
    "layers inside": ({"vision_config": {"num_hidden_layers": 10**9}}, "vision_config.num_hidden_layers=1000000000"),
    "vocabulary": ({"vocab_size": 4 * 10**9}, "describes [0-9]{14} weights"),
    "width": ({"hidden_size": 2**40}, "describes no model that can be built"),
    "inner width": ({"intermediate_size": 10**10}, "describes [0-9]+ weights"),
    "heads": ({"num_attention_heads": 10**9}, "room for 16384"),
    "width of heads": ({"head_dim": 10**8}, "describes [0-9]+ weights"),
    "text for a number": ({"hidden_size": "wide"}, "config.json cannot be used"),
    "rope": ({"rope_parameters": 5}, "config.json cannot be used"),
}


def write(directory: Path, **fields) -> Path:
    """A config, and weights of 40 numbers."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(LLAMA | fields))
    save_file({f"model.layers.{i}.x": torch.zeros(1) for i in range(40)}, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize("load", [SmallModelDraft.from_pretrained, AutoDraft.from_pretrained])
@pytest.mark.parametrize("what", CLAIMS)
def test_claims(what, load, tmp_path):
    fields, match = CLAIMS[what]
    directory = write(tmp_path, **({"hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 32000} | fields))
    with at_most(tensor_bytes=MIB, python_bytes=32 * MIB), pytest.raises(InputError, match=match) as raised:
        load(str(directory))
    assert str(directory) in str(raised.value)


LIMITED = """
import resource, sys, tempfile
from pathlib import Path
import dovetail_plugin
from dovetail_plugin import DovetailDraft, SmallModelDraft
from dovetail_plugin.cli import main
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 400 * 2**20, used + 400 * 2**20))
for load in (SmallModelDraft.from_pretrained, DovetailDraft.from_pretrained):
    try:
        load(sys.argv[1])
    except (dovetail_plugin.DovetailError, ValueError) as error:
        print(type(error).__name__)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads the size of the process from /proc")
def test_within_an_address_space_of_little_more(tmp_path):
    """The claimed weights are 27 GB."""
    write(tmp_path, hidden_size=4096, num_hidden_layers=32, vocab_size=32000, intermediate_size=11008)
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    done = subprocess.run(command, env=command_environment(), capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["InputError", "UnknownFormat"], done.stderr


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pickled", [False, True])
def test_what_models_really_hold_is_accepted(model_type, dtype, pickled, tmp_path):
    """Tied tables count once, and masks of GPT-2 in no file."""
    model = tiny_model(model_type).to(dtype)
    model.save_pretrained(tmp_path)
    if pickled:
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    check_claims(str(tmp_path), {})
    check_claims(str(tmp_path), {"dtype": "auto", "num_hidden_layers": 1})


def test_arguments_count(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    for more in ({"num_hidden_layers": 10**6}, {"vocab_size": 10**9}):
        with pytest.raises(InputError, match="Download it again"):
            check_claims(str(tmp_path), more)
    large = AutoConfig.for_model("llama", vocab_size=10**9)
    with pytest.raises(InputError, match="weight files have"):
        check_claims(str(tmp_path), {"config": large})
    check_claims(str(tmp_path), {"config": model.config})


def test_a_damaged_header_names_its_file(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    for load in (SmallModelDraft.from_pretrained, AutoDraft.from_pretrained):
        with pytest.raises(InputError, match=r"model\.safetensors is truncated or not safetensors"):
            load(str(tmp_path))


def test_configs_alone(tmp_path):
    for fields, match in (({"num_hidden_layers": 10**9}, "room for 1024"), ({"hidden_size": "x"}, "cannot be used")):
        directory = write(tmp_path, **fields)
        for name in (directory, directory / "config.json"):
            with at_most(tensor_bytes=0, python_bytes=16 * MIB), pytest.raises(InputError, match=match):
                model_config(name)


COMMANDS = {"generate": ["-p", "x"], "plan": [], "bench": [], "train": ["--data", "rows.jsonl", "--out", "new"]}


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text"])
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_refuse_such_targets(model_type, command, tmp_path, capsys, monkeypatch):
    directory = write(tmp_path / "target", model_type=model_type, num_hidden_layers=10**9)
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}')
    monkeypatch.chdir(tmp_path)
    with at_most(tensor_bytes=MIB, python_bytes=32 * MIB):
        line = refusal(capsys, command, "--target", directory, *COMMANDS[command])
    assert "num_hidden_layers=1000000000" in line


def test_commands_compare_weights_too(tmp_path, capsys, monkeypatch):
    write(tmp_path, hidden_size=4096, num_hidden_layers=32, vocab_size=32000)
    byte_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    write_jsonl(tmp_path / "rows.jsonl", [{"text": "some text"}] * 60)
    training = ["--data", tmp_path / "rows.jsonl", "--out", tmp_path / "new"]
    for command, *options in (["generate", "--draft", "lookup", "-p", "x"], ["train", *training]):
        assert "weight files have" in refusal(capsys, command, "--target", tmp_path, *options)
