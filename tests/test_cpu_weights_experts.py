"""MoE targets with packed weights: every expert's matrices are packed layers."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from families import prompt, tiny_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from dovetail_plugin import CpuWeights, PromptLookupDraft, save_packed
from dovetail_plugin.errors import InputError
from dovetail_plugin.kernels import KINDS, WEIGHTS
from dovetail_plugin.kernels.linear import PackedLinear
from dovetail_plugin.targets.packed_experts import matrices_of, pack_matrices

pytestmark = pytest.mark.torch_only("weights are packed in transformers' own models")

COMMON = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "intermediate_size": 64}
"""Widths of whole vectors: at the end of a tensor, torch computes activation functions with other instructions."""
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
MODELS = {
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "qwen3_moe": {"num_experts": 4, "head_dim": 8, "decoder_sparse_step": 1, "mlp_only_layers": [1]},
    "olmoe": {"num_experts": 4},
    "deepseek_v3": {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, **LATENT},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8, "sliding_window": 16},
}


def tiny_moe(model_type):
    model = tiny_model(model_type, **COMMON | MODELS[model_type])
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3 or "bias" in name:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def load(directory, kind=None, **options):
    config = {} if kind is None else {"quantization_config": CpuWeights(kind, **options)}
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **config)


def experts_in(model):
    return [module for module in model.modules() if hasattr(module, "has_gate")]


def unpacked_twin(model, directory):
    """The original model with the numbers that the packed weights stand for."""
    twin = load(directory)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and isinstance(module[0], PackedLinear):
            owner, matrix = name.rpartition(".")[::2]
            experts = twin.get_submodule(owner)
            weights = torch.stack([layer.unpacked() for layer in module])
            getattr(experts, matrix).data.copy_(weights.mT if experts.is_transposed else weights)
        elif isinstance(module, PackedLinear) and not name.rpartition(".")[2].isdigit():
            twin.get_submodule(name).weight.data.copy_(module.unpacked())
    return twin


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("model_type", MODELS)
def test_models(model_type, kind, tmp_path, caplog):
    tiny_moe(model_type).save_pretrained(tmp_path)
    model = load(tmp_path, kind)
    assert "newly initialized" not in caplog.text and "stay as they are" not in caplog.text
    assert experts_in(model) and not [n for n, p in model.named_parameters() if p.ndim == 3]
    ids = prompt(20)
    with torch.no_grad():
        logits, other = model(ids).logits, unpacked_twin(model, tmp_path)(ids).logits
    # Where activations are rounded, a router may choose another expert for a row.
    error = (logits - other).std(-1).median() / other.std()
    assert error < {"float": 1e-5, "int8": 1e-3, "int4": 0.1}[kind]
    options = {"max_new_tokens": 8, "do_sample": False}
    plain = model.generate(ids, **options)
    drafted = model.generate(ids, assistant_model=PromptLookupDraft(), **options)
    assert torch.equal(plain, drafted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_a_row_depends_on_no_other(model_type, kind, tmp_path):
    tiny_moe(model_type).save_pretrained(tmp_path)
    experts = experts_in(load(tmp_path, kind))[0]
    torch.manual_seed(0)
    rows = torch.randn(64, 32)
    weights, index = torch.randn(64, 4).softmax(-1).topk(3)
    with torch.no_grad():
        together = experts(rows, index, weights)
        for count in (1, 2, 7, 33):
            assert torch.equal(experts(rows[:count], index[:count], weights[:count]), together[:count])
        alone = torch.cat([experts(rows[i : i + 1], index[i : i + 1], weights[i : i + 1]) for i in range(64)])
        assert torch.equal(alone, together)
        assert torch.equal(experts(rows, index.flip(1), weights.flip(1)), together)
        beyond = torch.where(index == 3, experts.num_experts, index)
        silent = torch.where(index == 3, 0.0, weights)
        assert torch.equal(experts(rows, beyond, weights), experts(rows, index, silent))
    run = torch.no_grad()(lambda _: experts(rows, index, weights))  # each thread has its own mode
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(each, together) for each in pool.map(run, range(8)))


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_saved(model_type, tmp_path):
    tiny_moe(model_type).save_pretrained(tmp_path / "original")
    model = load(tmp_path / "original", "int8")
    save_packed(model, tmp_path / "packed")
    loaded = load(tmp_path / "packed")
    with torch.no_grad():
        logits = model(prompt()).logits
        assert torch.equal(loaded(prompt()).logits, logits)
        assert torch.equal(copy.deepcopy(loaded)(prompt()).logits, logits)
    assert not [name for name, parameter in loaded.named_parameters() if parameter.ndim == 3]


def test_experts_that_a_checkpoint_lacks_or_that_are_left_alone(tmp_path):
    tiny_moe("gpt_oss").save_pretrained(tmp_path)
    model = load(tmp_path, "int8", modules_to_not_convert=["layers.1"])
    assert {name for name, p in model.named_parameters() if p.ndim == 3} == {
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
    }
    with torch.no_grad():
        assert model(prompt()).logits.isfinite().all()
    file, name = tmp_path / "model.safetensors", "model.layers.0.mlp.experts.down_proj"
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    made = load(tmp_path, "int8").get_submodule(name)
    assert 0.5 < made[1].unpacked().std() / model.config.initializer_range < 2


def test_experts_with_their_own_forward_stay(tmp_path, monkeypatch, caplog):
    tiny_moe("olmoe").save_pretrained(tmp_path)
    monkeypatch.setattr("dovetail_plugin.targets.packed_experts.NEEDED", ("not there",))
    model = load(tmp_path, "int8")
    assert caplog.text.count("OlmoeExperts") == 1 and "stay as they are" in caplog.text
    assert len([name for name, p in model.named_parameters() if p.ndim == 3]) == 6
    assert isinstance(model.model.layers[0].self_attn.q_proj, PackedLinear)


def test_matrices_of_another_shape():
    experts = experts_in(tiny_moe("gpt_oss"))[0]
    assert matrices_of(experts) == ("gate_up_proj", "down_proj") and matrices_of(nn.Linear(2, 2)) == ()
    with pytest.raises(InputError, match="the config says"):
        pack_matrices(experts, "down_proj", torch.zeros(4, 32, 48), "int8")
