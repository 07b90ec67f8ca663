"""Drafts with broken configs are refused at load, with the file, the field and what to do, and without memory."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file
from support import checkpoints
from support.checkpoints import H, Published, block, eagle, eagle3, paper, weight
from support.faults import MIB, WEIGHTS, at_most, refused
from transformers import AutoModelForCausalLM

import dovetail_plugin
from dovetail_plugin import DovetailConfig, DovetailDraft, DovetailError
from dovetail_plugin.drafts.checkpoints.read import UnknownFormat
from dovetail_plugin.errors import InputError, MissingFileError
from dovetail_plugin.planning.draft_config import load_draft_config

pytestmark = pytest.mark.torch_only("about loading, which is the same for every engine")


def change(directory, **fields):
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_errors_are_the_built_in_ones_as_well():
    assert dovetail_plugin.DovetailError is DovetailError
    assert issubclass(InputError, DovetailError) and issubclass(InputError, ValueError)
    assert issubclass(MissingFileError, DovetailError) and issubclass(MissingFileError, OSError)
    assert issubclass(UnknownFormat, InputError)


# --- config.json ------------------------------------------------------------------------------------------

NESTED: list = []
for _ in range(100):
    NESTED = [NESTED]

FIELDS = {
    "text for a size": ("hidden_size", "32", "whole number from 1 to"),
    "fraction": ("vocab_size", 97.0, "whole number"),
    "true": ("num_hidden_layers", True, "whole number"),
    "list": ("intermediate_size", [48, 48], "whole number"),
    "null": ("num_attention_heads", None, "whole number"),
    "huge": ("vocab_size", 10**9, "whole number from 1 to 4194304"),
    "endless": ("max_position_embeddings", 10**400, "whole number"),
    "not a number": ("rms_norm_eps", float("nan"), "number from 0 to 1"),
    "infinite": ("logit_scale", float("inf"), "number other than 0"),
    "division by zero": ("logit_softcap", 0, "number above 0"),
    "text for a flag": ("fusion_bias", "false", "true or false"),
    "list for a fusion": ("fusion", ["dgf"], "one of"),
    "rope text": ("rope_parameters", "default", "an object"),
    "rope list": ("rope_parameters", [1], "an object"),
    "rope of unknown type": ("rope_parameters", {"rope_type": "zzz"}, "rope_type must be one of"),
    "rope type list": ("rope_parameters", {"rope_type": ["yarn"]}, "rope_type must be a text"),
    "rope theta text": ("rope_parameters", {"rope_theta": "10000"}, "rope_theta must be a number"),
    "yarn without factor": ("rope_parameters", {"rope_type": "yarn"}, "needs factor"),
    "llama3 without parts": ("rope_parameters", {"rope_type": "llama3", "factor": 8.0}, "needs low_freq_factor, high"),
    "longrope of another width": (
        "rope_parameters",
        {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0], "factor": 2.0},
        "must have 4 numbers",
    ),
    "rope of each kind of layer": (
        "rope_parameters",
        {"full_attention": {"rope_type": "default"}},
        "full_attention must be",
    ),
    "half heads": (
        "rope_parameters",
        {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
        "finite frequencies",
    ),
    "dynamic with heads of two": ("head_dim", 2, None),
    "calibration text": ("calibration", "greedy", "an object"),
    "calibration of text": ("calibration", {"greedy": "high"}, "a list of"),
    "calibration in part": ("calibration", {"greedy": [0.5] * 17}, "18 rates"),
    "calibration beyond": ("calibration", {"greedy": [1.5] * 18}, "number from 0 to 1"),
    "calibration of beams": ("calibration", {"beam": [0.5] * 18}, "beam"),
    "labels number": ("id2label", 3, "object from numbers to labels"),
    "labels words": ("id2label", {"a": "b"}, "object from numbers to labels"),
    "labels list": ("label2id", [1], "an object"),
    "bitsandbytes": ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}, "not supported"),
    "gptq": ("quantization_config", {"quant_method": "gptq", "bits": 4}, "not supported"),
    "no dtype": ("dtype", "zzz", "dtype must be"),
    "dtype of eight bits": ("dtype", "float8_e4m3fn", "dtype must be"),
    "dtype of another thing": ("dtype", "Tensor", "dtype must be"),
    "old dtype": ("torch_dtype", "Tensor", "torch_dtype must be"),
    "architectures": ("architectures", "DovetailDraft", "a list of"),
    "encoder-decoder": ("is_encoder_decoder", True, "must be false"),
    "deep": ("target_name_or_path", NESTED, "nested more than 32 levels"),
    "half a character": ("target_name_or_path", "\ud800", "a text of at most"),
}


@pytest.mark.parametrize("what", FIELDS)
def test_field(what, copied_draft):
    field, value, match = FIELDS[what]
    if what == "dynamic with heads of two":
        change(copied_draft, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
        field, match = "rope_parameters", "rope_parameters cannot be used"
        value = 2
        change(copied_draft, head_dim=value)
    else:
        change(copied_draft, **{field: value})
    message = refused(copied_draft, match)
    assert "config" in message
    assert field in message or what == "deep"


@pytest.mark.parametrize("what", [what for what in FIELDS if what not in ("deep", "dynamic with heads of two")])
def test_field_through_the_auto_class(what, copied_draft):
    """transformers reads the file itself there."""
    field, value, match = FIELDS[what]
    change(copied_draft, **{field: value})
    with pytest.raises(InputError, match=match) as raised:
        AutoModelForCausalLM.from_pretrained(copied_draft)
    assert str(copied_draft) in str(raised.value)


def test_fields_that_no_draft_has(copied_draft, valid_draft, llama, caplog):
    """They cannot replace methods of the config or lead to other files; one line names them."""
    extra = {"to_dict": 3, "feature_size": 9, "attribute_map": "x", "transformers_weights": "../x.safetensors"}
    change(copied_draft, **extra, per_layer_config={"0": {"hidden_size": 3}}, note="mine", layer_types=7)
    draft = DovetailDraft.from_pretrained(copied_draft)
    assert draft.config.to_dict()["hidden_size"] == 32 and draft.config.feature_size == 32
    assert [r.getMessage() for r in caplog.records if "no draft has" in r.getMessage() and "to_dict" in r.getMessage()]
    wanted = DovetailDraft.from_pretrained(valid_draft).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in draft.state_dict().items())


def test_arguments_replace_fields(valid_draft):
    draft = DovetailDraft.from_pretrained(valid_draft, logit_scale=0.5, attn_implementation="eager")
    assert (draft.config.logit_scale, draft.config._attn_implementation) == (0.5, "eager")
    assert draft.name_or_path == str(valid_draft)
    refused(valid_draft, "logit_scale must be", logit_scale="x")
    refused(valid_draft, "num_hidden_layers=9, and its weights have 2 blocks", num_hidden_layers=9)


@pytest.mark.parametrize(("field", "value"), [("hidden_size", "32"), ("calibration", "x"), ("dtype", "zzz")])
def test_config_made_by_hand(field, value):
    with pytest.raises(InputError, match=f"{field} must be"):
        DovetailConfig(**{field: value})


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"model_type": "dovetail"', "not JSON"),
        (b"\xff\xfe{\x00}\x00", "not JSON"),
        (b"null", "JSON NoneType, not an object"),
        (b"[1]", "JSON list, not an object"),
        (b"[" * 200_000, "not JSON"),
        (b'{"a":' * 200_000, "not JSON"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"a": "' + b"x" * (17 * MIB) + b'"}', "at most 16777216 are read"),
    ],
    ids=["empty", "start", "cut", "utf-16", "null", "list", "deep list", "deep object", "digits", "large"],
)
def test_config_that_is_not_json(content, match, copied_draft):
    (copied_draft / "config.json").write_bytes(content)
    assert "config" in refused(copied_draft, match)


def test_config_missing_or_no_file(copied_draft):
    (copied_draft / "config.json").unlink()
    refused(copied_draft, "has no config.json", MissingFileError)
    os.mkfifo(copied_draft / "config.json")  # reading it would wait for ever
    refused(copied_draft, "has no config.json", MissingFileError)


# --- configs of other projects ----------------------------------------------------------------------------

PUBLISHED = {
    "eagle_config text": ({"eagle_config": "x"}, "eagle_config must be"),
    "layers text": ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": "123"}}, "feature_layers must be"),
    "layers": ({"eagle_aux_hidden_state_layer_ids": [1, 2, -3]}, "eagle_aux_hidden_state_layer_ids must be"),
    "vocabulary": ({"draft_vocab_size": 10**8}, "draft_vocab_size must be"),
    "size text": ({"hidden_size": "32"}, "hidden_size must be"),
    "size null": ({"vocab_size": None}, "vocab_size must be"),
    "rope text": ({"rope_scaling": "yarn"}, "rope_scaling must be"),
    "rope type": ({"rope_scaling": {"type": "mrope"}}, "rope_type must be one of"),
    "part of heads": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act must be"),
    "quantized": ({"quantization_config": {"quant_method": "gptq"}}, "quantized drafts are not supported"),
    "token": ({"eos_token_id": "</s>"}, "eos_token_id must be"),
    "flag": ({"norm_before_residual": "yes"}, "norm_before_residual must be"),
    "norms before fc": ({"norm_before_fc": True}, "norm_before_fc"),
    "one norm for each state": ({"eagle_config": {"fc_norm": True}}, "fc_norm"),
    "norm of the output": ({"eagle_config": {"norm_output": "yes"}}, "norm_output must be null or true or false"),
    "P-EAGLE": ({"pard_token": 5}, "P-EAGLE"),
}


@pytest.mark.parametrize("what", PUBLISHED)
def test_published_config(what, tmp_path):
    fields, match = PUBLISHED[what]
    made = eagle3()
    made.config |= fields
    refused(made.write(tmp_path), match)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"speculators_config": 5}, "speculators_config must be"),
        ({"speculators_config": {"algorithm": "eagle3", "verifier": [1]}}, "verifier must be an object"),
        ({"speculators_config": {"verifier": {"name_or_path": 3}}}, "verifier.name_or_path must be"),
        ({"transformer_layer_config": "llama"}, "transformer_layer_config must be"),
        ({"transformer_layer_config": None}, "lacks 'vocab_size'"),
        ({"speculators_model_type": "dflash"}, "type 'dflash' are not supported"),
    ],
)
def test_speculators_config(fields, match, tmp_path):
    made = checkpoints.speculators()
    made.config |= fields
    refused(made.write(tmp_path), match)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"draft_vocab_size": 10**8}, "draft_vocab_size must be"),
        ({"draft_vocab_size": None, "vocab_size": 10**10}, "vocab_size must be"),
        ({"vocab_size": "97"}, "vocab_size must be"),
        ({"transformer_layer_config": {"vocab_size": 10**10}}, "vocab_size must be"),
    ],
)
def test_plans_do_not_believe_sizes_either(fields, match, tmp_path):
    config = eagle3().config | {"architectures": ["LlamaForCausalLMEagle3"]} | fields
    (tmp_path / "config.json").write_text(json.dumps(config))
    with at_most(tensor_bytes=MIB, python_bytes=MIB), pytest.raises(InputError, match=match) as raised:
        load_draft_config(str(tmp_path))
    assert str(tmp_path) in str(raised.value)


def test_dspark_of_gemma_4(tmp_path):
    """It has the tensor names of an EAGLE draft, rotary parameters for each kind of layer, and other equations."""
    rope = {"full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}}
    config = checkpoints.LLAMA | {
        "architectures": ["Gemma4DSparkModel"],
        "model_type": "gemma4_text",
        "rope_parameters": rope,
        "markov_rank": 8,
        "block_size": 7,
        "layer_types": ["full_attention"],
    }
    tensors = {"fc.weight": weight(H, 3 * H), "hidden_norm.weight": weight(H)} | block("layers.0.", input_norm=True)
    refused(Published("dspark", config, tensors).write(tmp_path), "kind DFlash, DFlash2 or DSpark .* not supported")


# --- sizes ----------------------------------------------------------------------------------------------


def test_sizes_are_not_believed(tmp_path):
    """212 bytes that ask for gigabytes, without weights and with weights of a few bytes."""
    sizes = dict(vocab_size=4_000_000, hidden_size=2**20, intermediate_size=2**22, num_attention_heads=64)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dovetail", "num_hidden_layers": 64} | sizes))
    refused(tmp_path, "has no weights", MissingFileError)
    save_file({"fusion.W_1": torch.zeros(2, 2)}, tmp_path / WEIGHTS)
    refused(tmp_path, "num_hidden_layers=64, and its weights have 0 blocks")
    save_file({f"layers.{i}.q": torch.zeros(1) for i in range(64)}, tmp_path / WEIGHTS)
    message = refused(tmp_path, "missing: fusion.W_1.*and 5.. more; unexpected: layers.0.q")
    assert len(message) < 6000


@pytest.mark.parametrize("name", ["layers.100000.q", "layers.x.q", "layers..q", "layers.-1.q", "layers.00.q"])
def test_a_name_does_not_ask_for_blocks(name, tmp_path):
    made = eagle()
    made.tensors[name] = torch.zeros(1)
    refused(made.write(tmp_path), "is not one of 2 blocks")


@pytest.mark.parametrize("make", [eagle, eagle3, paper])
def test_sizes_of_published_drafts_are_not_believed(make, tmp_path):
    made = make()
    made.config |= {"hidden_size": 2**20, "intermediate_size": 2**22, "head_dim": 64}
    refused(made.write(tmp_path), "wrong shape")
