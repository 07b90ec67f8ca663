"""Targets whose floating-point weights oneDNN packs: `CpuWeights("float")`."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from families import CASE_IDS, CASES, prompt, tiny_model
from support.bundled import DRAFT, TARGET
from torch import nn
from transformers import AutoModelForCausalLM

from dovetail_plugin import CpuWeights, DeviceSplitPolicy, DovetailDraft, PromptLookupDraft
from dovetail_plugin.cli import main
from dovetail_plugin.kernels import float_linear
from dovetail_plugin.kernels.float_linear import FloatLinear, packed_dtype
from dovetail_plugin.kernels.linear import PackedLinear
from dovetail_plugin.targets.layers_on_gpu import place_layers

pytestmark = pytest.mark.torch_only("weights are packed in transformers' own models")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NEEDS_ONEDNN = pytest.mark.skipif(packed_dtype(torch.float32) is None, reason="this torch has no oneDNN")


def load(directory, **options):
    options.setdefault("dtype", torch.float32)
    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=CpuWeights("float"), **options)


def layer_of(inputs, outputs, dtype, bias=True):
    linear = nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
    return linear, FloatLinear.of(linear, "float")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(17, 33), (1, 1), (64, 48), (300, 130)])
def test_a_layer_has_the_numbers_of_its_weights(inputs, outputs, dtype):
    torch.manual_seed(0)
    linear, packed = layer_of(inputs, outputs, dtype)
    assert packed.is_packed == (packed_dtype(dtype) is not None)
    assert torch.equal(packed.unpacked(dtype), linear.weight)
    for rows in (1, 2, 3, 8, 33, 64):
        x = torch.randn(rows, inputs).to(dtype)
        exact = x.double() @ linear.weight.double().T + linear.bias.double()
        error = (packed(x).double() - exact).abs().max()
        assert packed(x).dtype == dtype
        assert error <= (4 + inputs**0.5) * torch.finfo(dtype).eps * exact.abs().max()
    assert packed(torch.randn(2, 3, inputs).to(dtype)).shape == (2, 3, outputs)
    assert packed(torch.randn(0, inputs).to(dtype)).shape == (0, outputs)


@NEEDS_ONEDNN
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_small_matrices_do_not_depend_on_others(dtype):
    """For large matrices this does not hold: docs/adapters.md."""
    torch.manual_seed(0)
    _, packed = layer_of(96, 160, dtype)
    x = torch.randn(64, 96).to(dtype)
    alone = torch.cat([packed(row[None]) for row in x])
    for rows in range(1, 65):
        assert torch.equal(packed(x[:rows]), alone[:rows])


@NEEDS_ONEDNN
def test_without_arithmetic_for_half_precision_the_weights_are_float32(monkeypatch):
    torch.manual_seed(0)
    linear = nn.Linear(40, 30, dtype=torch.bfloat16)
    monkeypatch.setattr(float_linear, "vector_extensions", lambda: {"avx2"})
    packed_dtype.cache_clear()
    packed = FloatLinear.of(linear, "float")
    packed_dtype.cache_clear()
    assert packed.packed_weight.dtype == torch.float32 and packed.weight.dtype == torch.bfloat16
    x = torch.randn(5, 40).bfloat16()
    exact = x.float() @ linear.weight.float().T + linear.bias.float()
    assert packed(x).dtype == torch.bfloat16 and (packed(x).float() - exact).abs().max() < 0.01


def test_without_onednn_the_weights_stay_ordinary(monkeypatch, caplog, tmp_path):
    def missing(*_):
        raise RuntimeError("no such operator")

    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    monkeypatch.setattr(float_linear, "_reordered", missing)
    packed_dtype.cache_clear()
    model = load(tmp_path)
    packed_dtype.cache_clear()
    assert caplog.text.count("oneDNN cannot pack weights here") == 1
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(model(prompt()).logits, stock(prompt()).logits)


def test_gradients_copies_and_casts():
    torch.manual_seed(0)
    linear, packed = layer_of(32, 48, torch.float32)
    x = torch.randn(4, 32, requires_grad=True)
    packed(x).sum().backward()
    assert torch.allclose(x.grad, linear.weight.sum(0).expand(4, -1), atol=1e-5)
    x = x.detach()
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), packed.to("cpu")):
        assert torch.equal(other(x), packed(x))
        assert other.is_packed == packed.is_packed
    assert torch.equal(packed.state_dict()["weight"], linear.weight) and len(packed.state_dict()) == 2
    cast = copy.deepcopy(packed).to(torch.bfloat16)
    assert cast.weight.dtype == torch.bfloat16
    assert torch.equal(cast.unpacked(torch.bfloat16), linear.weight.bfloat16())
    assert torch.equal(copy.deepcopy(packed).double()(x.double()), linear.double()(x.double()))
    away = packed.to("meta")
    assert away.weight.device.type == "meta" and not away.is_packed


@pytest.mark.parametrize(("model_type", "fields"), CASES, ids=CASE_IDS)
def test_families(model_type, fields, tmp_path):
    model = tiny_model(model_type, **fields)
    model.save_pretrained(tmp_path)
    packed = load(tmp_path)
    assert not [name for name, module in packed.named_modules() if type(module) is nn.Linear]
    assert all(isinstance(m, FloatLinear) for m in packed.modules() if isinstance(m, PackedLinear))
    ids = prompt(40)
    with torch.no_grad():
        assert (packed(ids).logits - model(ids).logits).abs().max() < 1e-4
    options = {"max_new_tokens": 30, "do_sample": False}
    plain = packed.generate(ids, **options)
    assert torch.equal(packed.generate(ids, assistant_model=PromptLookupDraft(), **options), plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tied_heads_threads_and_drafts(dtype, tmp_path):
    tiny_model("llama", tie_word_embeddings=True).to(dtype).save_pretrained(tmp_path)
    model, stock = load(tmp_path, dtype=dtype), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert isinstance(model.lm_head, FloatLinear) and model.dtype == dtype
    inputs = [prompt(12, seed) for seed in range(4)]
    with torch.no_grad():
        expected = [model(ids).logits for ids in inputs]
        for ids, logits in zip(inputs, expected, strict=True):
            assert (logits - stock(ids).logits).abs().max() < 40 * torch.finfo(dtype).eps * logits.abs().max()

    def run(ids):
        with torch.no_grad():
            return [model(ids).logits for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        for results, logits in zip(pool.map(run, inputs), expected, strict=True):
            assert all(torch.equal(each, logits) for each in results)


def test_plans_and_layers_on_a_gpu(monkeypatch):
    draft = DovetailDraft.from_pretrained(DRAFT)
    model = load(TARGET, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="packed for the CPU"):
        place_layers(model, [model.config.num_hidden_layers - 1], "cpu")
    sizes = {}
    for dtype in (torch.bfloat16, torch.float32):
        monkeypatch.setattr("dovetail_plugin.planning.storage.packed_dtype", lambda _, dtype=dtype: dtype)
        plan = DeviceSplitPolicy(vram_budget="4GiB").plan(model.config, draft.config)
        assert not plan.gpu_layers
        sizes[dtype] = {part.name: part.bytes for part in plan.parts if part.name.startswith("target")}
    assert sizes[torch.bfloat16].keys() == sizes[torch.float32].keys()
    ratios = {name: sizes[torch.float32][name] / sizes[torch.bfloat16][name] for name in sizes[torch.float32]}
    assert 1.9 < next(ratio for name, ratio in ratios.items() if "layers" in name) <= 2, ratios
    assert 1.9 < next(ratio for name, ratio in ratios.items() if "head" in name) <= 2, ratios


def test_the_command_line(capsys):
    pair = ["--target", str(TARGET), "--draft", str(DRAFT), "--draft-device", "cpu", "--dtype", "float32"]
    more = ["--weights", "float", "--prompt", "Two plus two is", "--max-new-tokens", "12", "--compare"]
    assert main(["generate", *pair, *more]) == 0
    assert "identical" in capsys.readouterr().err.lower()
