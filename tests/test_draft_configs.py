"""Configs of published drafts without their weights, and plans for such drafts."""

import json

import pytest
import torch
from families import tiny_target
from support import checkpoints

from dovetail_plugin import DovetailDraft
from dovetail_plugin.cli import main
from dovetail_plugin.drafts.checkpoints.read import load_checkpoint
from dovetail_plugin.planning.draft_config import config_alone, load_draft_config
from dovetail_plugin.planning.known_shapes import shape_config
from dovetail_plugin.planning.make_plan import make_plan

GIB = 2**30
UNKNOWN = {"own_embedding", "fusion_bias"}
"""Fields that the config of an EAGLE-3 draft does not give."""
KNOWN = [name for name in checkpoints.FORMATS if not name.startswith("paper")]


@pytest.mark.parametrize("name", KNOWN)
def test_a_config_alone_says_what_the_weights_say(name, tmp_path):
    torch.manual_seed(0)
    made = checkpoints.FORMATS[name]()
    whole = load_checkpoint(str(made.write(tmp_path))).config.to_dict()
    alone = config_alone(name, made.config).to_dict()
    different = {key for key in whole | alone if whole.get(key) != alone.get(key)}
    assert different <= (UNKNOWN if whole["fusion"] == "eagle3" else set())


@pytest.mark.parametrize("name", checkpoints.FORMATS)
def test_weights_are_looked_at_where_they_are(name, tmp_path):
    torch.manual_seed(0)
    made = checkpoints.FORMATS[name]()
    directory = made.write(tmp_path)
    expected = load_checkpoint(str(directory)).config.to_dict()
    assert load_draft_config(str(directory)).to_dict() == expected


@pytest.mark.usefixtures("offline_hub")
def test_files_and_mistakes(tmp_path):
    made = checkpoints.eagle3()
    file = tmp_path / "head.json"
    file.write_text(json.dumps(made.config))
    assert load_draft_config(str(file)).fusion == "eagle3"
    file.write_text("{")
    with pytest.raises(ValueError, match=r"head\.json: the config is not JSON"):
        load_draft_config(str(file))
    file.write_text(json.dumps(checkpoints.LLAMA | {"num_hidden_layers": 4}))
    with pytest.raises(
        ValueError, match=r"llama model, not of a draft\. The config of a draft has model_type dovetail"
    ):
        load_draft_config(str(file))
    with pytest.raises(OSError, match="cannot be reached"):
        load_draft_config("nobody/nothing")


@pytest.mark.parametrize("own_embedding", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_planned_bytes_of_an_eagle3_draft(tied, own_embedding, tmp_path):
    """Its own head and embedding table count once, the target's only if they are borrowed."""
    torch.manual_seed(0)
    target = tiny_target("llama", num_hidden_layers=checkpoints.TARGET_LAYERS, tie_word_embeddings=tied)
    made = checkpoints.eagle3(own_embedding=own_embedding)
    draft = DovetailDraft.from_pretrained(made.write(tmp_path), dtype=torch.float32)
    draft.attach(target)
    tensors = {t.data_ptr(): t.nbytes for t in (*draft.parameters(), *draft.buffers())}
    options = dict(dtype="float32", draft_dtype="float32", context=64)
    plan = make_plan(target.config, draft.config, vram_bytes=8 * GIB, **options)
    assert (plan.draft_device, plan.draft_vocab_size) == ("gpu", None)
    kept = [p for p in plan.parts if p.name in ("draft: blocks", "draft: head", "draft: embedding")]
    assert sum(part.bytes for part in kept) == sum(tensors.values())
    assert all(part.name != "draft: head" for part in kept)
    features = next(part for part in plan.parts if part.name == "target: features")
    assert features.bytes == 64 * 3 * checkpoints.H * 4


def test_less_vram_moves_the_borrowed_table_only():
    target = shape_config("llama-3.1-8b-shape")
    config = config_alone("head", EAGLE3_8B)
    places = []
    for tenths in range(80, 5, -5):
        plan = make_plan(target, config, vram_bytes=tenths * GIB // 10, dtype="int8", context=2048)
        assert plan.draft_vocab_size is None  # its head is cut already
        places.append((plan.draft_device, plan.embedding_device))
    assert list(dict.fromkeys(places)) == [("gpu", "gpu"), ("gpu", "cpu"), ("cpu", "cpu")]


EAGLE3_8B = dict(
    architectures=["LlamaForCausalLMEagle3"],
    vocab_size=128256,
    draft_vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    num_hidden_layers=1,
)


def test_command(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(EAGLE3_8B))
    command = ["plan", "--target", "llama-3.1-8b-shape", "--draft", str(tmp_path), "--vram", "4GiB", "--ram", "64GiB"]
    assert main([*command, "--json"]) == 0
    parts = {part["name"]: part["bytes"] for part in json.loads(capsys.readouterr().out)["parts"]}
    assert parts["draft: blocks"] > 32000 * 4096 * 2  # the head is among them
    assert "draft: head" not in parts and parts["draft: embedding"] == 128256 * 4096 * 2
    other = ["llama-2-7b-shape" if word == "llama-3.1-8b-shape" else word for word in command]
    assert main(other) == 2
    assert "vocabulary is 128256, the target's is 32000" in capsys.readouterr().err
