"""Configs without weights: well-known decoder shapes by name, and configs from files, directories or the hub.

Enters: a name. Leaves: a `PretrainedConfig` as transformers would load it. The shapes are there so that plans and
measurements can be made for a model before a byte of it is downloaded; they hold sizes only, no vocabulary and no
special tokens. This module knows nothing of drafts, devices or bytes.
"""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

_LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _sizes(vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    return dict(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )


def _llama_2(*sizes: int) -> dict[str, Any]:
    return _sizes(32000, *sizes) | dict(
        model_type="llama", max_position_embeddings=4096, rms_norm_eps=1e-5, dtype="float16"
    )


def _llama_3(*sizes: int, factor: float = 8.0, **extra: Any) -> dict[str, Any]:
    own = dict(
        model_type="llama",
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        dtype="bfloat16",
        rope_parameters=_LLAMA_3_ROPE | {"factor": factor},
    )
    return _sizes(128256, *sizes) | own | extra


def _qwen(model_type: str, *sizes: int, **extra: Any) -> dict[str, Any]:
    own = dict(
        model_type=model_type,
        max_position_embeddings=32768 if model_type == "qwen2" else 40960,
        rms_norm_eps=1e-6,
        dtype="bfloat16",
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    )
    return _sizes(*sizes) | own | extra


SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b-shape": _llama_2(4096, 11008, 32, 32, 32),
    "llama-2-13b-shape": _llama_2(5120, 13824, 40, 40, 40),
    "llama-2-70b-shape": _llama_2(8192, 28672, 80, 64, 8),
    "llama-3.1-8b-shape": _llama_3(4096, 14336, 32, 32, 8),
    "llama-3.1-70b-shape": _llama_3(8192, 28672, 80, 64, 8),
    "llama-3.2-1b-shape": _llama_3(2048, 8192, 16, 32, 8, factor=32.0, head_dim=64, tie_word_embeddings=True),
    "llama-3.2-3b-shape": _llama_3(3072, 8192, 28, 24, 8, factor=32.0, head_dim=128, tie_word_embeddings=True),
    "qwen2.5-7b-shape": _qwen("qwen2", 152064, 3584, 18944, 28, 28, 4),
    "qwen2.5-14b-shape": _qwen("qwen2", 152064, 5120, 13824, 48, 40, 8),
    "qwen2.5-32b-shape": _qwen("qwen2", 152064, 5120, 27648, 64, 40, 8),
    "qwen3-8b-shape": _qwen("qwen3", 151936, 4096, 12288, 36, 32, 8, head_dim=128),
    "qwen3-14b-shape": _qwen("qwen3", 151936, 5120, 17408, 40, 40, 8, head_dim=128),
    "mistral-7b-shape": _sizes(32768, 4096, 14336, 32, 32, 8)
    | dict(
        model_type="mistral",
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        sliding_window=None,
        dtype="bfloat16",
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ),
    "gemma-2-9b-shape": _sizes(256000, 3584, 14336, 42, 16, 8)
    | dict(
        model_type="gemma2",
        head_dim=256,
        max_position_embeddings=8192,
        sliding_window=4096,
        query_pre_attn_scalar=256,
        tie_word_embeddings=True,
        dtype="bfloat16",
    ),
}
"""Name -> model type and sizes, as the published config.json files have them (Mistral: v0.3)."""


def shape_config(name: str) -> PretrainedConfig:
    """The config of a well-known shape, whose `name_or_path` is the shape's name.

    Raises:
        ValueError: no such shape; lists those there are.
    """
    if name not in SHAPES:
        raise ValueError(f"unknown shape {name!r}; there are {', '.join(SHAPES)}.")
    fields = {"tie_word_embeddings": False} | SHAPES[name]
    config = AutoConfig.for_model(**fields)
    config.name_or_path = name
    return config


def load_config(name: str | Path) -> PretrainedConfig:
    """The config of a shape, a config.json file, a model directory or a hub id.

    Raises:
        ValueError: there is no such thing, it holds no config that transformers knows, or the hub is out of reach.
    """
    if str(name) in SHAPES:
        return shape_config(str(name))
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        if Path(name).exists():
            raise ValueError(f"{name} holds no config that can be read: {reason}") from error
        raise ValueError(
            f"{name}: no such file or directory, and no hub model of that name within reach. Give the directory or "
            f"config.json of a local copy, or plan for a well-known shape: {', '.join(SHAPES)}."
        ) from error
