"""Tiny random targets of the families that the tests run over. fp32, a few layers, vocabulary 97."""

from typing import Any

import engines
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 97

COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    tie_word_embeddings=False,
)

FULL_ATTENTION = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "phi3": {},
    "gpt_neox": {"num_key_value_heads": None, "rotary_pct": 0.5},
    "olmo": {},
    "olmo2": {},
    "gpt2": {"num_key_value_heads": None},
}
"""Model type -> fields of its config beside COMMON."""

SLIDING_WINDOW = 24

SLIDING = {
    "mistral": {"sliding_window": SLIDING_WINDOW},
    "gemma2": {"head_dim": 8, "sliding_window": SLIDING_WINDOW, "num_hidden_layers": 4},
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": SLIDING_WINDOW,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    },
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": SLIDING_WINDOW,
        "max_window_layers": 1,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
}

CASES = [(name, fields) for family in (FULL_ATTENTION, SLIDING) for name, fields in family.items()]
"""(model type, fields of its config) of every family."""

CASE_IDS = [f"{name}-window" if fields.get("sliding_window") else name for name, fields in CASES]


def tiny_target(model_type: str, seed: int = 0, **overrides) -> Any:
    """The model of `tiny_model` as a target of the engine under test."""
    return engines.current().target(tiny_model(model_type, seed, **overrides))


def tiny_model(model_type: str, seed: int = 0, **overrides) -> PreTrainedModel:
    """A random model whose logits vary enough that greedy text is not one repeated token."""
    torch.manual_seed(seed)
    fields = {k: v for k, v in (COMMON | FULL_ATTENTION.get(model_type, {}) | overrides).items() if v is not None}
    if "sliding_window" in overrides or (model_type == "mistral" and "sliding_window" not in fields):
        fields["sliding_window"] = overrides.get("sliding_window")
    config = AutoConfig.for_model(model_type, **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(std=0.2)
    return model


def prompt(length: int = 17, seed: int = 1) -> torch.Tensor:
    """(1, length) random tokens without special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (1, length), generator=generator)
