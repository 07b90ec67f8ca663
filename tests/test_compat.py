"""The seam to transformers. This file imports nothing else of the package, so a new release fails here first."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM

from dovetail_plugin import compat


@pytest.mark.parametrize("name", compat.NAMES)
def test_names_and_signatures_exist(name):
    assert not [missing for missing in compat.missing_names() if missing.split("(")[0] == name]


def test_missing_names_are_found(monkeypatch):
    monkeypatch.setitem(compat.NAMES, "GenerationMixin._no_such_method", ())
    monkeypatch.setitem(compat.NAMES, "GenerationMixin._sample", ("no_such_parameter",))
    assert set(compat.missing_names()) == {
        "GenerationMixin._no_such_method",
        "GenerationMixin._sample(no_such_parameter)",
    }


def test_functions_for_gguf_files_exist(monkeypatch):
    pytest.importorskip("gguf")
    assert not compat.missing_gguf_functions()
    monkeypatch.setitem(compat.GGUF_FUNCTIONS, "no_such_function", ())
    monkeypatch.setitem(compat.GGUF_FUNCTIONS, "TensorProcessor.process", ("no_such_parameter",))
    assert compat.missing_gguf_functions() == ["TensorProcessor.process(no_such_parameter)", "no_such_function"]


def test_architectures_of_gguf_files_are_known_by_both_names():
    assert {"llama", "qwen3", "qwen3_moe", "gemma3", "phi3"} <= set(compat.gguf_architectures())
    assert compat.is_known_gguf("qwen3moe") and compat.is_known_gguf("qwen3_moe") and compat.is_known_gguf("minimax-m2")
    assert not compat.is_known_gguf("tokenizer") and not compat.is_known_gguf("rwkv6")


@pytest.mark.parametrize(
    ("version", "pair"), [("5.5.0", (5, 5)), ("5.24.0.dev0", (5, 24)), ("5.24rc1", (5, 241)), ("6.0.1", (6, 0))]
)
def test_versions_are_read(version, pair):
    assert compat.version_of(version) == pair


def test_installed_version_is_tested():
    assert compat.is_tested()


@pytest.mark.parametrize(
    ("version", "tested"), [("5.4.9", False), ("5.5.0", True), ("5.24.3", True), ("5.25.0", False)]
)
def test_range_of_tested_versions(version, tested):
    assert compat.is_tested(version) is tested


def test_old_version_is_refused_with_both_numbers(monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "5.4.0")
    monkeypatch.delitem(sys.modules, "dovetail_plugin.compat")
    with pytest.raises(ImportError, match=r"needs transformers 5\.5 or later, and 5\.4\.0 is installed"):
        importlib.import_module("dovetail_plugin.compat")


def test_old_torch_is_refused_at_import(monkeypatch):
    """Before 2.10, reading pickled weights could run code of theirs."""
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    monkeypatch.delitem(sys.modules, "dovetail_plugin.compat")
    with pytest.raises(ImportError, match=r"needs torch 2\.10 or later, and 2\.9\.1\+cpu is installed.*pip install -U"):
        importlib.import_module("dovetail_plugin.compat")


def test_untested_version_gets_one_warning(monkeypatch, caplog):
    compat.warn_untested()
    assert not caplog.records
    monkeypatch.setattr(compat, "is_tested", lambda: False)
    compat.warn_untested()
    assert len(caplog.records) == 1
    assert transformers.__version__ in caplog.text and "5.5 to 5.24" in caplog.text


def test_cache_has_the_name_that_models_use():
    model = tiny_model()
    assert compat.cache_argument(model) == compat.CACHE
    cache = DynamicCache(config=model.config)
    out = model(torch.tensor([[1, 2, 3]]), use_cache=True, **{compat.CACHE: cache})
    assert cache.get_seq_length() == 3
    assert getattr(out, compat.CACHE) is cache


def test_cache_name_of_a_model_with_an_older_signature():
    class Remote:
        def forward(self, input_ids, past_key_values=None):
            """A remote-code model keeps the name it was written with."""

    assert compat.cache_argument(Remote()) == "past_key_values"


@pytest.mark.parametrize("name", compat.CACHE_NAMES)
def test_cache_is_taken_under_both_names(name):
    cache = DynamicCache()
    kwargs = {name: cache, "attention_mask": None}
    assert compat.take_cache(kwargs) is cache
    assert kwargs == {"attention_mask": None}
    assert compat.take_cache(kwargs) is None


def test_output_of_generate_holds_the_cache():
    cache = DynamicCache()
    output = compat.output_of_generate(torch.tensor([[1]]), None, None, cache, "report")
    assert output[compat.CACHE] is cache


def test_mask_length_is_what_generate_remembers():
    seen = []

    def look(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        seen.append((kwargs.get("attention_mask"), compat.mask_length(generation_config, -1)))
        return input_ids

    ids = torch.tensor([[1, 2, 3]])
    tiny_model().generate(ids, attention_mask=torch.ones_like(ids), custom_generate=look)
    mask, length = seen[0]
    assert mask is not None or length in (3, -1)  # dropped masks are remembered from 5.6 on
    assert compat.mask_length(GenerationConfig(), 7) == 7


def test_stock_layers_are_what_transformers_makes():
    keys, values = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    layer = compat.stock_layer(keys, values)
    assert layer.get_seq_length() == 5 and layer.keys is keys and layer.values is values
    grown = layer.update(keys[:, :, :1], values[:, :, :1])
    assert grown[0].shape == (1, 2, 6, 4)
    assert not compat.stock_layer(None, None).is_initialized
    sliding = compat.stock_sliding_layer(4, keys[:, :, 2:], values[:, :, 2:], 5)
    assert sliding.get_seq_length() == 5
    grown = sliding.update(keys[:, :, :1], values[:, :, :1])
    assert grown[0].shape[2] == 4 and sliding.get_seq_length() == 6


def test_models_with_a_recurrent_state_are_found():
    assert not compat.keeps_recurrent_state(tiny_model())
    assert compat.keeps_recurrent_state(SimpleNamespace(_is_stateful=True))


def test_call_is_bound_by_name():
    def function(self, one, two=2, **model_kwargs):
        """A method with extra keywords."""

    arguments = compat.bound_arguments(function, ("me", 1), {"mask": 3})
    assert arguments == {"self": "me", "one": 1, "mask": 3}
    with pytest.raises(TypeError):
        compat.bound_arguments(function, (), {})


def test_files_are_found_or_missing(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert compat.find_file(str(tmp_path), "config.json") == str(tmp_path / "config.json")
    assert compat.find_file(str(tmp_path), "model.safetensors") is None
    with pytest.raises(OSError, match=r"model\.safetensors"):
        compat.require_file(str(tmp_path), "model.safetensors")


def tiny_model():
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=None, eos_token_id=None, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()
