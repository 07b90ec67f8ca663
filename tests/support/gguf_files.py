"""GGUF files for tests: quantized matrices, and whole files of tiny models. Whole files need the package `gguf`."""

import numpy as np
import torch
from torch import Tensor

from dovetail_plugin.kernels.gguf_blocks import BLOCK_TYPES

SCALES_AT = {"Q8_0": [0], "Q4_0": [0], "Q4_K": [0, 2], "Q6_K": [208]}
"""Type -> where the half-precision numbers of a block begin."""

KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
"""Key of metadata -> field of a config."""


def random_blocks(type_name: str, outputs: int, inputs: int, scale: float = 0.01) -> Tensor:
    """A matrix (outputs, bytes of a row) uint8 whose numbers and factors are any that the type has."""
    found = BLOCK_TYPES[type_name]
    blocks = torch.randint(0, 256, (outputs, inputs // found.weights, found.bytes), dtype=torch.uint8)
    for at in SCALES_AT[type_name]:
        halves = (scale * torch.randn(outputs, inputs // found.weights, 1)).half()
        blocks[..., at : at + 2] = halves.view(torch.uint8)
    return blocks.flatten(1)


def quantized(weights: Tensor, type_name: str) -> np.ndarray:
    """Weights (..., inputs) in blocks (..., bytes of a row) uint8."""
    if type_name in ("Q4_K", "Q6_K"):
        blocks = weights.unflatten(-1, (-1, 256))
        return (_q4_k(blocks) if type_name == "Q4_K" else _q6_k(blocks)).flatten(-2).numpy()
    from gguf import GGMLQuantizationType, quantize

    return quantize(weights.numpy(), GGMLQuantizationType[type_name])


def _q4_k(blocks: Tensor) -> Tensor:
    """(..., 144) uint8 of (..., 256)."""
    groups = blocks.unflatten(-1, (8, 32))
    minimum = (-groups.amin(-1)).clamp_min(0)
    step = (groups.amax(-1) + minimum) / 15
    d, dmin = ((part.amax(-1, keepdim=True) / 63).half() for part in (step, minimum))
    sc, m = ((part / scale.float()).round().to(torch.uint8) for part, scale in ((step, d), (minimum, dmin)))
    scaled, lowest = (d.float() * sc)[..., None], (dmin.float() * m)[..., None]
    numbers = ((groups + lowest) / scaled).round().clamp(0, 15).to(torch.uint8).unflatten(-2, (4, 2))
    high, low = slice(4, 8), slice(0, 4)
    packed = [
        sc[..., low] | sc[..., high] >> 4 << 6,
        m[..., low] | m[..., high] >> 4 << 6,
        sc[..., high] & 15 | (m[..., high] & 15) << 4,
    ]
    body = (numbers[..., 0, :] | numbers[..., 1, :] << 4).flatten(-2)
    return torch.cat([d.view(torch.uint8), dmin.view(torch.uint8), *packed, body], dim=-1)


def _q6_k(blocks: Tensor) -> Tensor:
    """(..., 210) uint8 of (..., 256)."""
    groups = blocks.unflatten(-1, (16, 16))
    step = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1) / -32
    d = (step.abs().amax(-1, keepdim=True) / 127).half()
    sc = (step / d.float()).round().clamp(-128, 127).to(torch.int8)
    numbers = (groups / (d.float() * sc)[..., None]).round().clamp(-32, 31).add(32).to(torch.uint8)
    numbers = numbers.flatten(-2).unflatten(-1, (2, 4, 32))  # 128 weights in four runs
    low, high = numbers & 15, numbers >> 4
    low = (low[..., :2, :] | low[..., 2:, :] << 4).flatten(-3)
    high = sum(high[..., i, :] << 2 * i for i in range(4)).flatten(-2)
    return torch.cat([low, high, sc.view(torch.uint8), d.view(torch.uint8)], dim=-1)


def write_gguf(
    file, model, type_name: str = "Q8_0", *, types=None, parts: int = 1, metadata=None, more=None, overrides=None
) -> None:
    """Write a model of transformers as programs for GGUF do: with their names, and with their changes of numbers.

    Args:
        file: to be written; of several, the first.
        model: Llama, Qwen 2, 3 or 3 MoE, Gemma 2 or 3, in float32.
        type_name: type of the matrices.
        types: part of a tensor's name -> another type.
        parts: number of files.
        metadata: further integers and texts.
        more: further tensors, in float32.
        overrides: values that the file gives for fields of the config.
    """
    import gguf

    config, arch = model.config, model.config.model_type.removesuffix("_text").replace("_", "")
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[arch], config.num_hidden_layers)
    writer = gguf.GGUFWriter(file, arch, split_max_tensors=0 if parts == 1 else -(-tensor_count(model) // parts))
    for key, field in KEYS.items():
        value = (overrides or {}).get(field, getattr(config, field, None))
        if value is not None:
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.rope.freq_base", config.rope_parameters.get("rope_theta", 10000.0) or 10000.0)
    for key, value in (metadata or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    write_tokenizer(writer, config.vocab_size)
    for name, weights in tensors_of(model):
        place, _, suffix = name.rpartition(".")
        known_name = f"{names.get_name(place)}.{suffix}"
        kind = next((other for part, other in (types or {}).items() if part in known_name), type_name)
        if weights.ndim < 2 or kind in ("F32", "F16"):
            writer.add_tensor(known_name, weights.numpy().astype(np.float16 if kind == "F16" else np.float32))
        else:
            number = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(known_name, quantized(weights, kind), raw_dtype=number)
    for name, numbers in (more or {}).items():
        writer.add_tensor(name, numbers.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensor_count(model) -> int:
    return len(list(tensors_of(model)))


def tensors_of(model):
    """Names as in transformers, of modules that `gguf` knows, and weights as in a file."""
    config = model.config
    for name, weights in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if config.model_type == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            weights = weights.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        if config.model_type.startswith("gemma") and "norm" in name:
            weights = weights + 1
        if name.endswith("experts.gate_up_proj"):
            for part, half in zip(("gate_proj", "up_proj"), weights.chunk(2, dim=1), strict=True):
                yield f"{name.removesuffix('.gate_up_proj')}.{part}.weight", half.contiguous()
        else:
            yield f"{name}.weight" if name.endswith("experts.down_proj") else name, weights.contiguous()


def write_tokenizer(writer, size: int) -> None:
    """A tokenizer of bytes, with special tokens behind them, or what fits of it."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = ["<pad>", "<s>", "</s>", *bytes_to_unicode().values(), "ab"]
    tokens = (tokens + [f"<{number}>" for number in range(size)])[:size]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_token_types([3, 3, 3] + [1] * (size - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
