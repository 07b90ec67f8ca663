"""Targets that are quantized while they are loaded: `from_pretrained(..., quantization_config=CpuWeights(...))`."""

import copy
import json

import pytest
import torch
from families import CASES, prompt, tiny_model
from safetensors.torch import load_file, save_file
from support.bundled import DRAFT, TARGET
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from dovetail_plugin import CpuWeights, DeviceSplitPolicy, DovetailDraft, PromptLookupDraft, TreeBudget
from dovetail_plugin.cli import main
from dovetail_plugin.errors import InputError
from dovetail_plugin.kernels import KINDS
from dovetail_plugin.kernels.library import library
from dovetail_plugin.kernels.linear import PackedLinear
from dovetail_plugin.kernels.packing import pack, unpack
from dovetail_plugin.targets.cpu_weights import Pack
from dovetail_plugin.targets.layers_on_gpu import place_layers

pytestmark = pytest.mark.torch_only("weights are packed in transformers' own models")


def load(directory, kind, **options):
    options.setdefault("dtype", torch.float32)
    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=CpuWeights(kind), **options)


def with_rounded_weights(directory, kind):
    """The same model in torch, with the numbers that packed weights stand for."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            rounded = unpack(pack(module.weight, kind), module.out_features, module.in_features, kind)
            module.weight = nn.Parameter(rounded, requires_grad=False)
    return model


def assert_same_but_for_ties(model, plain, drafted):
    """A layer in torch rounds by the number of rows, and quantized activations turn that into a step of a number."""
    length = min(plain.shape[1], drafted.shape[1])
    different = (plain[0, :length] != drafted[0, :length]).nonzero()
    if len(different):
        at = int(different[0])
        with torch.no_grad():
            logits = model(plain[:, :at]).logits[0, -1].float()
        gap = logits[plain[0, at]] - logits[drafted[0, at]]
        assert gap.abs() < 0.1 * logits.std()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("model_type", "fields"), CASES)
def test_families(model_type, fields, kind, tmp_path):
    tiny_model(model_type, **fields).save_pretrained(tmp_path)
    model = load(tmp_path, kind)
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    assert not [name for name, module in model.named_modules() if type(module) is nn.Linear]
    if model_type != "gpt2":  # whose layers are no linear layers of torch
        assert len(packed) > model.config.num_hidden_layers
    ids = prompt(40)
    with torch.no_grad():
        logits, other = model(ids).logits, with_rounded_weights(tmp_path, kind)(ids).logits
    # Activations are quantized, too.
    assert (logits - other).std() < (1e-3 if kind == "int8" else 0.06) * other.std()
    options = {"max_new_tokens": 30, "do_sample": False}
    plain = model.generate(ids, **options)
    drafted = model.generate(ids, assistant_model=PromptLookupDraft(), **options)
    if model_type == "gpt2" or library() is None:
        assert_same_but_for_ties(model, plain, drafted)
    else:
        assert torch.equal(plain, drafted)


@pytest.mark.parametrize("kind", KINDS)
def test_tied_heads(kind, tmp_path):
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    model = load(tmp_path, kind)
    assert isinstance(model.lm_head, PackedLinear) and model.lm_head.is_packed
    assert model.get_input_embeddings().weight.dtype == torch.float32
    ids = prompt()
    with torch.no_grad():
        assert (model(ids).logits - with_rounded_weights(tmp_path, kind)(ids).logits).std() < 0.03
    copied = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(copied(ids).logits, model(ids).logits)
    assert model.num_parameters() == tiny_model("llama", tie_word_embeddings=False).num_parameters()


def test_weights_that_a_checkpoint_lacks(tmp_path, caplog):
    """They are made at random, as without packing, and packed too."""
    tiny_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}  # they lie in the file
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    model = load(tmp_path, "int8")
    assert all(module.is_packed for module in model.modules() if isinstance(module, PackedLinear))
    assert model(prompt()).logits.isfinite().all()
    made = model.model.layers[0].mlp.up_proj.unpacked()
    assert 0.8 < made.std() / model.config.initializer_range < 1.2
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.randn(48, 16)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises((InputError, RuntimeError)):
        load(tmp_path, "int8")


def test_biases_that_a_checkpoint_lacks_are_zero(tmp_path):
    tiny_model("qwen2").save_pretrained(tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.1.self_attn.k_proj.bias"
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items() if key != name}
    save_file(tensors, file, metadata={"format": "pt"})
    model = load(tmp_path, "int8")
    assert not model.model.layers[1].self_attn.k_proj.bias.any()
    assert torch.equal(model.model.layers[1].self_attn.q_proj.bias, tensors[name.replace("k_proj", "q_proj")])


def test_matrices_that_a_converter_makes_of_one():
    layer = lambda: PackedLinear(8, 4, bias=False, kind="int8")  # noqa: E731
    model = nn.ModuleDict({"a": layer(), "b": layer(), "norm": nn.LayerNorm(4)})
    tensors = {"a.weight": torch.randn(4, 8), "b.weight": [torch.randn(4, 8)], "norm.weight": torch.ones(4)}
    missing = set(tensors)
    rest = Pack("int8").convert(tensors, model=model, full_layer_name="a.weight", missing_keys=missing)
    assert rest.keys() == missing == {"norm.weight"}
    assert (model["a"].unpacked() - tensors["a.weight"]).abs().max() < 0.05
    assert (model["b"].unpacked() - tensors["b.weight"][0]).abs().max() < 0.05


def test_layers_that_a_model_keeps_in_float32_are_not_packed(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.LlamaForCausalLM._keep_in_fp32_modules", ["o_proj"])
    tiny_model("llama").save_pretrained(tmp_path)
    model = load(tmp_path, "int8")
    left = {name.rpartition(".")[2] for name, module in model.named_modules() if type(module) is nn.Linear}
    assert left == {"o_proj"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bundled_pair(kind, dtype):
    target = load(TARGET, kind, dtype=dtype)
    draft = DovetailDraft.from_pretrained(DRAFT, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    ids = tokenizer("Natalia sold clips to 48 of her friends in April, and then", return_tensors="pt").input_ids
    options = {"max_new_tokens": 48, "do_sample": False}
    plain = target.generate(ids, **options)
    draft.budget = TreeBudget(nodes=8, depth=4, top_k=4)  # the policy may find that plain passes are faster
    drafted = target.generate(ids, assistant_model=draft, **options)
    assert draft.report.acceptance_length > 1.5
    if library() is None:
        assert_same_but_for_ties(target, plain, drafted)
        return
    assert torch.equal(plain, drafted)
    torch.manual_seed(3)
    sampled = target.generate(ids, do_sample=True, max_new_tokens=30)
    torch.manual_seed(3)
    assert torch.equal(target.generate(ids, do_sample=True, max_new_tokens=30, assistant_model=draft), sampled)


def test_layers_may_be_left_alone(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    config = CpuWeights("int8", modules_to_not_convert=["lm_head", "model.layers.1"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    left = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert "lm_head" in left and len(left) == 8
    assert all(name == "lm_head" or name.startswith("model.layers.1.") for name in left)


def test_several_files_with_a_progress_bar_and_a_device_map(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    for device_map in ("cpu", {"": "cpu"}):
        model = load(tmp_path, "int4", device_map=device_map)
        assert not [name for name, module in model.named_modules() if type(module) is nn.Linear]


# --- what is refused -------------------------------------------------------------------------------


def test_mistakes(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="int8, int4, float"):
        CpuWeights("int3")
    with pytest.raises(TypeError, match="modules_to_convert"):
        CpuWeights("int8", modules_to_convert=[])
    with pytest.raises(InputError, match="device_map"):
        load(tmp_path, "int8", device_map={"": "cuda:0"})
    model = load(tmp_path, "int8")
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="packed for the CPU"):
        place_layers(model, [2], "cpu")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = CpuWeights("int8").to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="its files have none"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_plans_know_the_size_and_put_no_packed_layer_on_a_gpu():
    draft = DovetailDraft.from_pretrained(DRAFT)
    policy = DeviceSplitPolicy(vram_budget="4GiB")
    layers = {}
    for kind in (*KINDS, None):
        config = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).config if kind is None else None
        plan = policy.plan(config or load(TARGET, kind).config, draft.config)
        layers[kind] = sum(part.bytes for part in plan.parts if "target" in part.name and "layers" in part.name)
        assert bool(plan.gpu_layers) == (kind is None)
    assert 0 < layers["int4"] < 0.6 * layers["int8"] < 0.3 * layers[None]


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_line(kind, capsys):
    pair = ["--target", str(TARGET), "--draft", str(DRAFT), "--draft-device", "cpu", "--dtype", "float32"]
    prompt_and_more = ["--prompt", "Two plus two is", "--max-new-tokens", "12", "--compare"]
    assert main(["generate", *pair, "--weights", kind, *prompt_and_more]) == 0
    assert "identical" in capsys.readouterr().err.lower()
    assert main(["generate", "--target-ir", str(TARGET), "--weights", kind, "--prompt", "x"]) == 2
    assert "--weights packs the weights of --target" in capsys.readouterr().err
