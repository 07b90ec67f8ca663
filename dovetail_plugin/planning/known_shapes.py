"""Configs without weights: well-known decoder shapes by name, and configs from files, directories or the hub.

`load_config` takes a name and returns a `PretrainedConfig` as transformers loads it. With a shape, plans and
measurements can be made for a model before it is downloaded. A shape contains sizes only, without a vocabulary or
special tokens. transformers is imported when a config is made, because the command line lists the shapes in its help.
"""

import difflib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _shape(
    model_type: str, vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **more: Any
) -> dict[str, Any]:
    return dict(
        model_type=model_type,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        **({"tie_word_embeddings": False, "dtype": "bfloat16"} | more),
    )


_LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_ROPE_1M = {"rope_type": "default", "rope_theta": 1000000.0}
_TIED_LLAMA_3 = {"rope_parameters": _LLAMA_3_ROPE | {"factor": 32.0}, "tie_word_embeddings": True}

_llama_2 = partial(_shape, "llama", 32000, max_position_embeddings=4096, rms_norm_eps=1e-5, dtype="float16")
_llama_3 = partial(
    _shape, "llama", 128256, max_position_embeddings=131072, rms_norm_eps=1e-5, rope_parameters=_LLAMA_3_ROPE
)
_qwen_2 = partial(_shape, "qwen2", 152064, max_position_embeddings=32768, rms_norm_eps=1e-6, rope_parameters=_ROPE_1M)
_qwen_3 = partial(
    _shape, "qwen3", 151936, max_position_embeddings=40960, rms_norm_eps=1e-6, rope_parameters=_ROPE_1M, head_dim=128
)
_mistral = partial(
    _shape, max_position_embeddings=32768, rms_norm_eps=1e-5, rope_parameters=_ROPE_1M, sliding_window=None
)

_GEMMA_3_27B = {
    "model_type": "gemma3",
    "dtype": "bfloat16",
    "text_config": _shape(
        "gemma3_text",
        *(262208, 5376, 21504, 62, 32, 16),
        head_dim=128,
        max_position_embeddings=131072,
        query_pre_attn_scalar=168,
        sliding_window=1024,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        tie_word_embeddings=True,
        dtype=None,
    ),
    "vision_config": dict(
        model_type="siglip_vision_model",
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=896,
        patch_size=14,
        vision_use_head=False,
    ),
}
"""As in the published file, only the top level has a dtype."""

SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b-shape": _llama_2(4096, 11008, 32, 32, 32),
    "llama-2-13b-shape": _llama_2(5120, 13824, 40, 40, 40),
    "llama-2-70b-shape": _llama_2(8192, 28672, 80, 64, 8),
    "llama-3.1-8b-shape": _llama_3(4096, 14336, 32, 32, 8),
    "llama-3.1-70b-shape": _llama_3(8192, 28672, 80, 64, 8),
    "llama-3.2-1b-shape": _llama_3(2048, 8192, 16, 32, 8, head_dim=64, **_TIED_LLAMA_3),
    "llama-3.2-3b-shape": _llama_3(3072, 8192, 28, 24, 8, head_dim=128, **_TIED_LLAMA_3),
    "qwen2.5-7b-shape": _qwen_2(3584, 18944, 28, 28, 4),
    "qwen2.5-14b-shape": _qwen_2(5120, 13824, 48, 40, 8),
    "qwen2.5-32b-shape": _qwen_2(5120, 27648, 64, 40, 8),
    "qwen3-8b-shape": _qwen_3(4096, 12288, 36, 32, 8),
    "qwen3-14b-shape": _qwen_3(5120, 17408, 40, 40, 8),
    "qwen3-32b-shape": _qwen_3(5120, 25600, 64, 64, 8),
    "mistral-7b-shape": _mistral("mistral", 32768, 4096, 14336, 32, 32, 8),
    "mixtral-8x7b-shape": _mistral(
        "mixtral", 32000, 4096, 14336, 32, 32, 8, num_local_experts=8, num_experts_per_tok=2
    ),
    "gemma-2-9b-shape": _shape(
        "gemma2",
        *(256000, 3584, 14336, 42, 16, 8),
        head_dim=256,
        max_position_embeddings=8192,
        sliding_window=4096,
        query_pre_attn_scalar=256,
        tie_word_embeddings=True,
    ),
    "gemma-3-27b-shape": _GEMMA_3_27B,
    "gpt-oss-20b-shape": _shape(
        "gpt_oss",
        *(201088, 2880, 2880, 24, 64, 8),
        head_dim=64,
        num_local_experts=32,
        num_experts_per_tok=4,
        sliding_window=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        quantization_config={
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "embed_tokens",
                "lm_head",
            ],
        },
    ),
}
"""Name -> fields of a config, with the values of the published config.json files (Mistral: v0.3)."""


def shape_config(name: str) -> "PretrainedConfig":
    """Return the config of a well-known shape; its `name_or_path` is the shape's name.

    Raises:
        ValueError: there is no such shape. The message names shapes with a similar name.
    """
    if name not in SHAPES:
        raise ValueError(_unknown(name))
    from transformers import AutoConfig

    config = AutoConfig.for_model(**SHAPES[name])
    config.name_or_path = name
    return config


def load_config(name: str | Path, **options: Any) -> "PretrainedConfig":
    """Read the config of a shape, a config.json file, a model directory or a hub id.

    Args:
        name: of the shape, file, directory or repository.
        options: `revision`, `token`, `cache_dir`, ...; see `model_config`. Code that comes with a model is not run.

    Raises:
        ValueError: there is no model with that name, transformers does not know its config, or the hub cannot be
            reached. A name that is similar to that of a shape is not looked up on the hub.
    """
    if str(name) in SHAPES:
        return shape_config(str(name))
    from ..targets.gguf import is_gguf, planned_config

    if is_gguf(name):
        return planned_config(name)
    if not Path(name).exists() and "/" not in str(name) and close_shapes(str(name)):
        raise ValueError(_unknown(str(name)))
    from ..drafts.checkpoints.claims import model_config

    try:
        return model_config(name, **options)
    except OSError as error:
        reason = " ".join(str(error).split())
        if Path(name).exists():
            raise ValueError(f"{name} does not contain a config that can be read: {reason}") from error
        raise ValueError(
            f"{name}: no such file or directory, and a hub model of that name cannot be reached. Give the directory or "
            f"config.json of a local copy, or plan for a well-known shape: {', '.join(SHAPES)}."
        ) from error
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{name} comes with Python code, which is not run for a plan. Plan for a model of transformers."
            ) from error
        reason = " ".join(str(error).split())
        raise ValueError(f"{name} does not contain a config that can be read: {reason}") from error


def close_shapes(name: str) -> list[str]:
    """Return the shapes whose names are similar to `name`, the most similar first."""
    return difflib.get_close_matches(name.lower(), SHAPES, cutoff=0.7)


def _unknown(name: str) -> str:
    close = close_shapes(name)
    return f"there is no shape {name!r}. " + (
        f"Did you mean {' or '.join(close)}?" if close else f"Shapes: {', '.join(SHAPES)}."
    )
