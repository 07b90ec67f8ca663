"""`load_gguf`: models in GGUF files become targets with the numbers of the file."""

import importlib.util
import logging
from contextlib import suppress

import numpy as np
import pytest
import torch
import transformers
from families import prompt, tiny_model
from support.gguf_files import write_gguf
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from dovetail_plugin import PromptLookupDraft, compat, load_gguf, save_packed
from dovetail_plugin.cli import main
from dovetail_plugin.drafts.target_tokenizer import vocabulary_of_target
from dovetail_plugin.errors import InputError, MissingFileError
from dovetail_plugin.kernels.linear import PackedLinear
from dovetail_plugin.targets.gguf import planned_config
from dovetail_plugin.targets.gguf_file import read_gguf

pytest.importorskip("gguf")
pytestmark = pytest.mark.torch_only("weights are packed in transformers' own models")

READS_TOKENIZERS = pytest.mark.skipif(
    compat.version_of(transformers.__version__) < (5, 24) and importlib.util.find_spec("google") is None,
    reason="this version of transformers reads tokenizers of GGUF files with protobuf",
)
SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64, "vocab_size": 300}
GEMMA = {"tie_word_embeddings": True, "sliding_window": 24}
MODELS = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA | {"layer_types": ["sliding_attention", "full_attention"]},
}
TYPES = {"F32": None, "F16": None, "Q8_0": "int8", "Q4_0": "int4", "Q4_K": "q4_k", "Q6_K": "q6_k"}
"""Type of matrices -> kind of the packed weights."""


def model_of(model_type: str, **fields):
    """A tiny model whose matrices have whole blocks of 256."""
    model = tiny_model(model_type, **(SIZES | MODELS.get(model_type, {}) | fields))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(0.4)
        elif parameter.ndim == 1:  # norms and biases, which a file keeps in another way than transformers
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model


def as_transformers_loads(file):
    """The model with the numbers of the file in float32."""
    return AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)


def logits_of(model, length: int = 40) -> torch.Tensor:
    with torch.no_grad():
        return model(prompt(length)).logits


@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("model_type", MODELS)
def test_families(model_type, type_name, tmp_path):
    file = tmp_path / "model.gguf"
    write_gguf(file, model_of(model_type), type_name)
    model, stock = load_gguf(file), as_transformers_loads(file)
    layers = {name: part for name, part in model.named_modules() if isinstance(part, (nn.Linear, PackedLinear))}
    assert len(layers) == 15 and {getattr(part, "kind", None) for part in layers.values()} == {TYPES[type_name]}
    for name, part in layers.items():
        numbers = part.unpacked() if isinstance(part, PackedLinear) else part.weight
        assert torch.equal(numbers, stock.get_submodule(name).weight), name
    for name, right in stock.named_parameters():
        if name.rpartition(".")[0] not in layers:
            assert torch.equal(model.get_parameter(name), right), name
    logits, right = logits_of(model), logits_of(stock)
    most = {None: 1e-6, "int8": 1e-3, "q6_k": 1e-3, "int4": 0.06, "q4_k": 0.06}[TYPES[type_name]]
    assert (logits - right).std() <= most * right.std(), "more than the quantization of activations"
    options = {"max_new_tokens": 24, "do_sample": False}
    plain = model.generate(prompt(), **options)
    draft = PromptLookupDraft()
    assert torch.equal(model.generate(prompt(), assistant_model=draft, **options), plain)


@pytest.mark.parametrize("type_name", ["Q4_K", "Q6_K"])
def test_tied_heads_are_packed_with_the_numbers_of_the_embedding(type_name, tmp_path):
    file = tmp_path / "model.gguf"
    write_gguf(file, model_of("llama", tie_word_embeddings=True), type_name)
    model = load_gguf(file)
    assert isinstance(model.lm_head, PackedLinear) and model.lm_head.kind == TYPES[type_name]
    assert torch.equal(model.lm_head.unpacked(), model.get_input_embeddings().weight)
    assert logits_of(model).isfinite().all()


def test_a_mixture_as_files_have_it(tmp_path):
    """Q4_K_M: some matrices are in Q6_K."""
    file = tmp_path / "model.gguf"
    write_gguf(file, model_of("qwen2"), "Q4_K", types={"ffn_down": "Q6_K", "output.": "Q6_K", "token_embd": "Q6_K"})
    model = load_gguf(file, dtype=torch.bfloat16)
    assert {type(p) for p in model.modules() if hasattr(p, "kind")} == {PackedLinear}
    assert [model.model.layers[0].mlp.down_proj.kind, model.lm_head.kind] == ["q6_k", "q6_k"]
    assert model.model.layers[1].mlp.up_proj.kind == "q4_k"
    assert model.dtype == torch.bfloat16 == model.get_input_embeddings().weight.dtype
    assert logits_of(model).isfinite().all()


@READS_TOKENIZERS
def test_small_models_find_the_tokenizer_of_their_target_in_the_file(tmp_path):
    file = tmp_path / "model.gguf"
    write_gguf(file, model_of("qwen2"))
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path), gguf_file=file.name)
    assert vocabulary_of_target(load_gguf(file).config) == tokenizer.get_vocab()


def test_experts_are_floats(tmp_path):
    fields = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True}
    original = model_of("qwen3_moe", **fields)
    file = tmp_path / "model.gguf"
    write_gguf(file, original, "F32")
    assert (logits_of(load_gguf(file)) - logits_of(original)).abs().max() < 1e-4
    write_gguf(file, original, "Q8_0")
    model = load_gguf(file)
    experts = model.model.layers[1].mlp.experts
    assert experts.gate_up_proj.dtype == torch.float32
    assert (experts.gate_up_proj - original.model.layers[1].mlp.experts.gate_up_proj).abs().max() < 0.01
    assert isinstance(model.model.layers[1].self_attn.q_proj, PackedLinear)


def test_other_quantizations_become_int8(tmp_path, caplog):
    original = model_of("llama")
    file = tmp_path / "model.gguf"
    write_gguf(file, original, "Q5_0", types={"ffn_down": "Q4_1", "attn_q": "Q8_0"})
    with caplog.at_level(logging.WARNING):
        model = load_gguf(file)
    said = [record.message for record in caplog.records if "quantized again" in record.message]
    assert len(said) == 1 and "Q4_1 (2), Q5_0 (11)" in said[0]
    stock = as_transformers_loads(file)
    for name, part in model.named_modules():
        if isinstance(part, PackedLinear):
            right = stock.get_submodule(name).weight
            assert part.kind == "int8" and (part.unpacked() - right).abs().max() < 0.005 * right.abs().max() + 1e-6


def test_a_matrix_whose_numbers_transformers_changes_is_quantized_again(tmp_path, monkeypatch):
    """Never the numbers of the file where transformers wants others."""
    file = tmp_path / "model.gguf"
    write_gguf(file, model_of("qwen2"), "Q8_0")
    stock = as_transformers_loads(file)
    for change in (lambda w: 2 * w, lambda w: w[:, ::-1], lambda w: w * (np.arange(w.shape[1]) % 2), lambda w: -w):
        names = compat.gguf_names

        def changed(model, architecture, change=change, names=names):
            found = names(model, architecture)

            def process(weights, name, **more):
                out = found.process(weights=weights, name=name, **more)
                return out._replace(weights=change(out.weights)) if "ffn_up.weight" in name else out

            return compat.GgufNames(found.parameters, process)

        with monkeypatch.context() as patch:
            patch.setattr(compat, "gguf_names", changed)
            model = load_gguf(file)
        part, right = model.model.layers[1].mlp.up_proj, stock.model.layers[1].mlp.up_proj.weight
        right = torch.from_numpy(np.array(change(right.detach().numpy())))
        assert (part.unpacked() - right).abs().max() < 0.01 * right.abs().max()
        assert torch.equal(model.model.layers[1].mlp.gate_proj.unpacked(), stock.model.layers[1].mlp.gate_proj.weight)


def test_positions_that_are_stretched(tmp_path):
    """transformers does not read this tensor of Llama 3.1's files."""
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 32, "rope_theta": 10000.0}
    original = model_of("llama", rope_parameters=rope)
    plain = 10000.0 ** (-torch.arange(0, 64, 2) / 64)
    file = tmp_path / "model.gguf"
    factors = plain / original.model.rotary_emb.inv_freq
    assert factors.max() > 4
    write_gguf(file, original, "F32", more={"rope_freqs.weight": factors})
    assert (logits_of(load_gguf(file)) - logits_of(original)).abs().max() < 1e-4
    assert (logits_of(as_transformers_loads(file)) - logits_of(original)).abs().max() > 1e-2
    write_gguf(file, original, "F32", more={"rope_freqs.weight": torch.ones(7)})
    with pytest.raises(InputError, match="no place for them"):
        load_gguf(file)


def test_texts_end_where_the_file_says(tmp_path, caplog):
    file = tmp_path / "model.gguf"
    write_gguf(
        file,
        model_of("llama"),
        metadata={"tokenizer.ggml.eot_token_id": 9, "llama.rope.scaling.type": "yarn"},
    )
    model = load_gguf(file)
    assert model.generation_config.eos_token_id == [2, 9] and model.config.eos_token_id == 2
    assert "RoPE scaling 'yarn'" in caplog.text
    assert model.config.name_or_path == str(file) and not model.training


# --- several files -----------------------------------------------------------------------------------


def test_split_files(tmp_path):
    original = model_of("llama")
    write_gguf(tmp_path / "whole.gguf", original, "Q4_K")
    write_gguf(tmp_path / "model.gguf", original, "Q4_K", parts=3)
    files = sorted(tmp_path.glob("model-*.gguf"))
    assert [file.name for file in files] == [f"model-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    model = load_gguf(files[0])
    assert not model.config.tie_word_embeddings
    assert torch.equal(logits_of(model), logits_of(load_gguf(tmp_path / "whole.gguf")))
    with pytest.raises(InputError, match="Give model-00001-of-00003"):
        load_gguf(files[1])
    files[0].rename(tmp_path / "other.gguf")
    with pytest.raises(InputError, match="Give them the names"):
        load_gguf(tmp_path / "other.gguf")
    (tmp_path / "other.gguf").rename(files[0])
    files[2].rename(files[2].with_name("away"))
    with pytest.raises(MissingFileError, match="there is no model-00003-of-00003"):
        load_gguf(files[0])
    write_gguf(tmp_path / "away.gguf", original, "F32", parts=3)
    (tmp_path / "away-00002-of-00003.gguf").rename(files[2])
    with pytest.raises(InputError, match=r"another file of the model|do not have as many tensors"):
        load_gguf(files[0])


# --- what is refused ---------------------------------------------------------------------------------


def test_unknown_architectures_are_refused_by_name(tmp_path):
    from gguf import GGUFWriter

    file = tmp_path / "model.gguf"
    writer = GGUFWriter(file, "rwkv6")
    writer.add_tensor("a", np.zeros((2, 2), np.float32))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match=r"architecture 'rwkv6'.*gemma2.*llama.*qwen3_moe"):
        load_gguf(file)


def test_files_that_do_not_fit_their_config(tmp_path):
    file = tmp_path / "model.gguf"
    original = model_of("llama")
    for field, value, message in (
        ("intermediate_size", 512, "mlp.gate_proj.weight of shape"),
        ("num_hidden_layers", 1_000_000, "block_count is 1000000"),
        ("num_hidden_layers", 3, r"layers\.2\..*no tensor"),
    ):
        before = getattr(original.config, field)
        write_gguf(file, original, "Q8_0", overrides={field: value})
        assert getattr(original.config, field) == before
        with pytest.raises(InputError, match=message):
            load_gguf(file)


def test_what_is_no_file_of_this_format(tmp_path):
    with pytest.raises(MissingFileError, match="no file"):
        load_gguf(tmp_path / "missing.gguf")
    file = tmp_path / "model.gguf"
    for content in (b"", b"GGU", b"safetensors"):
        file.write_bytes(content)
        with pytest.raises(InputError, match="not a GGUF file"):
            load_gguf(file)


def test_a_file_without_embedding_and_head_is_refused(tmp_path):
    model = model_of("llama", num_hidden_layers=1, tie_word_embeddings=True)
    file = tmp_path / "model.gguf"
    write_gguf(file, model, "Q8_0")
    file.write_bytes(file.read_bytes().replace(b"token_embd.weight", b"token_embx.weight"))
    with pytest.raises(InputError, match=r"model\.gguf"):
        load_gguf(file)


def test_models_from_gguf_files_are_not_saved_again(tmp_path):
    file = tmp_path / "model.gguf"
    write_gguf(file, model_of("llama", num_hidden_layers=1), "Q8_0")
    with pytest.raises(InputError, match="from a GGUF file"):
        save_packed(load_gguf(file), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_damaged_files_are_refused(tmp_path):
    """Cut at any place of its header, or with any number in it replaced, a file ends in an error that names it."""
    file = tmp_path / "model.gguf"
    write_gguf(file, model_of("llama", num_hidden_layers=1), "Q8_0")
    whole = file.read_bytes()
    header = min(tensor.start for tensor in read_gguf(file).tensors.values())
    for end in (*range(4, 60), *range(60, header, 97), len(whole) - 33):
        file.write_bytes(whole[:end])
        with pytest.raises(InputError, match=r"model\.gguf"):
            read_gguf(file)
    random = np.random.default_rng(0)
    for at in random.integers(4, header - 8, 300):
        for value in (b"\xff" * 8, b"\xff\xff\xff\x7f" + bytes(4)):
            file.write_bytes(whole[:at] + value + whole[at + 8 :])
            with suppress(InputError):  # or the number may be another one
                assert all(tensor.bytes_of_rows().nbytes <= len(whole) for tensor in read_gguf(file).tensors.values())


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (4, 4, "version 4"),
        (8, 2**40, "1099511627776 tensors"),
        (16, 2**40, "1099511627776 entries"),
        (24, 2**40, "text of 1099511627776 bytes"),
    ],
)
def test_counts_are_compared_with_the_file(tmp_path, at, value, message):
    file = tmp_path / "model.gguf"
    write_gguf(file, model_of("llama", num_hidden_layers=1), "Q8_0")
    content = bytearray(file.read_bytes())
    size = 4 if at == 4 else 8
    content[at : at + size] = value.to_bytes(size, "little")
    file.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_gguf(file)


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    file = tmp_path / "model.gguf"
    write_gguf(file, model_of("llama"), "Q8_0")
    tensor = read_gguf(file).tensors["blk.1.ffn_up.weight"]
    with file.open("r+b") as opened:
        opened.seek(tensor.start)
        opened.write(np.float16(np.nan).tobytes())
    with pytest.raises(InputError, match=r"blk\.1\.ffn_up\.weight: a scale is infinite or NaN"):
        load_gguf(file)


def test_without_the_package_the_remedy_is_named(tmp_path, monkeypatch):
    file = tmp_path / "model.gguf"
    write_gguf(file, model_of("llama"))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ImportError, match=r"\.\[gguf\]"):
        load_gguf(file)


# --- plans and the command line ----------------------------------------------------------------------


def test_plans_know_the_bits(tmp_path):
    file = tmp_path / "model.gguf"
    write_gguf(file, model_of("llama"), "Q4_K")
    assert planned_config(file).quantization_config["bits"] == 4.625
    assert load_gguf(file).config.quantization_config.bits == 4.625
    write_gguf(file, model_of("llama"), "F32")
    assert not hasattr(planned_config(file), "quantization_config")


@READS_TOKENIZERS
def test_the_command_line(tmp_path, capsys):
    file = tmp_path / "model.gguf"
    write_gguf(file, model_of("qwen2"), "Q4_K")
    pair = ["--target", str(file), "--draft", "lookup", "--max-new-tokens", "8"]
    assert main(["generate", *pair, "--prompt", "one two one two", "--compare"]) == 0
    assert "identical text: yes" in capsys.readouterr().err
    assert main(["bench", *pair, "--count", "1"]) == 0
    assert "1 of 1 identical" in capsys.readouterr().out
    assert main(["bench", *pair[:2], *pair[4:], "--count", "1", "--synthetic-acceptance", "0.5"]) == 0
    assert main(["plan", "--target", str(file), "--vram", "2GiB", "--ram", "4GiB"]) == 0
    assert "(4.625 bits)" in capsys.readouterr().out
    for arguments, message in (
        (["generate", *pair, "--prompt", "x", "--weights", "int8"], "--weights quantizes a target"),
        (["generate", *pair[2:], "--prompt", "x", "--target", str(tmp_path / "no.gguf")], "no file"),
        (["train", "--target", str(file), "--data", str(file), "--out", str(tmp_path / "out")], "has floats"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
