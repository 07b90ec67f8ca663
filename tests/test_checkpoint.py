"""Draft checkpoints: their contents, saving and loading, bad files, and configs for a target."""

import json

import pytest
import torch
from families import VOCAB, prompt, tiny_target
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from dovetail_plugin import DovetailConfig, DovetailDraft

pytestmark = pytest.mark.usefixtures("fixed_budget")

WEIGHTS = "model.safetensors"


def saved_draft(directory, target, **options):
    torch.manual_seed(5)
    draft = DovetailDraft.for_target(target, **options)
    draft.save_pretrained(directory)
    return draft


def outputs(draft, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(1, 9, 32, generator=generator).to(dtype)
    with torch.no_grad():
        return draft(features=features, input_ids=prompt(9)).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("fusion", "blocks"), [("dgf", 1), ("dgf", 3), ("concat", 2)])
def test_round_trip(tmp_path, fusion, blocks, kv_heads, dtype):
    target = tiny_target("llama").to(dtype)
    draft = saved_draft(tmp_path, target, fusion=fusion, blocks=blocks, num_key_value_heads=kv_heads)
    loaded = DovetailDraft.from_pretrained(tmp_path)
    assert not loaded.training
    assert not loaded.is_attached
    wanted, got = draft.state_dict(), loaded.state_dict()
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == dtype
        assert torch.equal(got[name], tensor), name
    loaded.attach(target)
    assert torch.equal(outputs(loaded, dtype), outputs(draft, dtype))


def test_casting_keeps_rotary_frequencies(llama):
    """In bf16 they would rotate distant rows by a wrong angle, and differ from those of a loaded draft."""
    draft = DovetailDraft.for_target(llama)
    exact = draft.rotary.inv_freq.clone()
    assert not torch.equal(exact, exact.bfloat16().float())
    assert torch.equal(draft.to(torch.bfloat16).rotary.inv_freq, exact)
    assert draft.dtype == torch.bfloat16


def test_contents(tmp_path, llama):
    """The file contains only the draft's own tensors; the config has the fields that tools look for."""
    draft = saved_draft(tmp_path, llama, blocks=2)
    names = set(load_file(tmp_path / WEIGHTS))
    assert names == {name for name, _ in draft.named_parameters()}
    assert not [name for name in names if "embed" in name or "head" in name]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "dovetail"
    assert config["architectures"] == ["DovetailDraft"]
    assert (config["hidden_size"], config["vocab_size"], config["num_hidden_layers"]) == (32, VOCAB, 2)


def test_config_names_the_target(tmp_path):
    """The name is a hub id, or the last part of a local directory, because paths differ between machines."""
    tiny_target("llama").save_pretrained(tmp_path / "my-target")
    target = AutoModelForCausalLM.from_pretrained(tmp_path / "my-target")
    saved_draft(tmp_path / "draft", target)
    assert AutoConfig.from_pretrained(tmp_path / "draft").target_name_or_path == "my-target"
    target.config._name_or_path = "some-org/some-model"
    assert DovetailConfig.for_target(target.config).target_name_or_path == "some-org/some-model"
    assert DovetailConfig.for_target(tiny_target("llama").config).target_name_or_path is None


@pytest.mark.parametrize("options", [{}, {"device_map": "auto"}, {"device_map": "cpu"}, {"dtype": torch.bfloat16}])
def test_auto_classes(tmp_path, llama, options):
    saved_draft(tmp_path, llama)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), DovetailConfig)
    draft = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    assert isinstance(draft, DovetailDraft)
    assert draft.dtype == options.get("dtype", torch.float32)
    plain = llama.generate(prompt(), max_new_tokens=8, do_sample=False)
    assert torch.equal(plain, llama.generate(prompt(), max_new_tokens=8, do_sample=False, assistant_model=draft))
    assert draft.report.warnings == []


def test_bundled_tables_are_ignored(tmp_path, llama):
    """Reference checkpoints contain embedding and head of the target; those of the attached target are used."""
    draft = saved_draft(tmp_path, llama)
    tables = {"embed_tokens.weight": torch.zeros(VOCAB, 32), "lm_head.weight": torch.zeros(VOCAB, 32)}
    save_file(load_file(tmp_path / WEIGHTS) | tables, tmp_path / WEIGHTS, metadata={"format": "pt"})
    loaded, info = DovetailDraft.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not loaded.is_attached
    loaded.attach(llama)
    assert torch.equal(outputs(loaded), outputs(draft))


@pytest.mark.parametrize("loader", [DovetailDraft, AutoModelForCausalLM])
def test_every_wrong_tensor_is_named(tmp_path, llama, loader):
    saved_draft(tmp_path, llama, blocks=2)
    tensors = load_file(tmp_path / WEIGHTS)
    missing = ["fusion.W_1", "layers.1.mlp.up_proj.weight"]
    for name in missing:
        del tensors[name]
    extra = {"layers.2.mlp.up_proj.weight": torch.zeros(3), "surprise": torch.zeros(2)}
    misshapen = {"fusion.W_2": torch.zeros(16, 32), "layers.0.self_attn.k_proj.weight": torch.zeros(4, 32)}
    save_file(tensors | extra | misshapen, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="not a complete Dovetail draft") as error:
        loader.from_pretrained(tmp_path)
    for name in (*missing, *extra, *misshapen, "(16, 32)", "(32, 32)", "(4, 32)"):
        assert name in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("kind", ["half", "header", "empty", "garbage"])
def test_broken_file(tmp_path, llama, kind):
    saved_draft(tmp_path, llama)
    file = tmp_path / WEIGHTS
    whole = file.read_bytes()
    broken = {"half": whole[: len(whole) // 2], "header": whole[:5], "empty": b"", "garbage": b"<html>no</html>" * 99}
    file.write_bytes(broken[kind])
    with pytest.raises(ValueError, match="truncated or not safetensors") as error:
        DovetailDraft.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_no_weights_and_no_directory(tmp_path, llama):
    saved_draft(tmp_path, llama)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(OSError, match=WEIGHTS):
        DovetailDraft.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="nowhere"):
        DovetailDraft.from_pretrained(tmp_path / "nowhere")


def test_unattached_draft_does_not_run(llama):
    draft = DovetailDraft(DovetailConfig.for_target(llama.config))
    assert not draft.is_attached
    for run in (lambda: draft.embed(prompt()), lambda: outputs(draft)):
        with pytest.raises(ValueError, match=r"no embedding table.*attach"):
            run()
    with pytest.raises(ValueError, match=r"no head.*attach"):
        draft.head(torch.zeros(1, 32))
    with pytest.raises(ValueError, match="features"):
        draft(input_ids=prompt())
    draft.attach(llama)
    with pytest.raises(ValueError, match=r"\(1, 3, 32\)"):
        draft(features=torch.zeros(1, 3, 32), input_ids=prompt(9))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("hidden_size", -1),
        ("intermediate_size", 0),
        ("num_hidden_layers", 0),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 3),
        ("num_key_value_heads", 0),
        ("head_dim", 0),
        ("head_dim", 7),
        ("fusion", "sum"),
        ("calibration", {"greedy": [0.5]}),
        ("calibration", {"beam": [0.5] * 18}),
    ],
)
def test_config_validation(field, value):
    good = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_attention_heads=4)
    DovetailConfig(**good)
    shown = next(iter(value)) if isinstance(value, dict) else str(value)
    with pytest.raises(ValueError, match=field) as error:
        DovetailConfig(**(good | {field: value}))
    assert shown in str(error.value)


FAMILIES = {
    "llama": {"rms_norm_eps": 3e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "qwen2": {"rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "gemma2": {"head_dim": 16, "final_logit_softcapping": 30.0},
    "gpt_neox": {"num_key_value_heads": None, "layer_norm_eps": 2e-5},
    "phi3": {"rms_norm_eps": 1e-5},
    "cohere": {
        "layer_norm_eps": 1e-4,
        "logit_scale": 0.25,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
    "granite": {"rms_norm_eps": 1e-5, "logits_scaling": 4.0},
    "gemma3_text": {
        "head_dim": 8,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        },
    },
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_for_target(model_type):
    """The draft's config has the target's sizes, rotary base, norm epsilon and logit cap, and fits the model."""
    target = tiny_target(model_type, **FAMILIES[model_type])
    config = DovetailConfig.for_target(target.config, blocks=2)
    fields = FAMILIES[model_type]
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (VOCAB, 32, 2)
    assert (config.num_attention_heads, config.max_position_embeddings) == (4, 512)
    assert config.num_key_value_heads == (4 if model_type == "gpt_neox" else 2)
    assert config.head_dim == fields.get("head_dim", 8)
    assert config.logit_softcap == fields.get("final_logit_softcapping")
    assert config.logit_scale == (0.25 if model_type in ("cohere", "granite") else 1.0)
    eps = fields.get("rms_norm_eps", fields.get("layer_norm_eps"))
    assert config.rms_norm_eps == (target.config.rms_norm_eps if eps is None else eps)
    rope = fields.get("rope_parameters", {})
    theta = rope.get("full_attention", rope).get("rope_theta", 1e4)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": theta}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_head_gives_the_logits_of_the_target(model_type):
    """For true features, the draft's head with its cap and scale gives the target's logits."""
    target = tiny_target(model_type, **FAMILIES[model_type])
    draft = DovetailDraft.for_target(target)
    with torch.no_grad():
        features = target.base_model(input_ids=prompt()).last_hidden_state
        wanted = target(input_ids=prompt()).logits
        torch.testing.assert_close(draft.head(features), wanted, atol=1e-5, rtol=1e-5)


def test_for_target_refuses_models_without_a_language_head():
    config = AutoConfig.for_model("vit")
    with pytest.raises(ValueError, match="vocab_size"):
        DovetailConfig.for_target(config)
