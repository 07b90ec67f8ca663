"""Writes drafts in the formats of other projects. `checkpoints/read.py` reads these formats.

`write_draft` turns a `DovetailDraft` into a directory with config.json and model.safetensors, in one of these formats:

    dovetail     the format of this project, for drafts of every kind
    eagle3       EAGLE-3, as SGLang, vLLM and SpecForge read it
    speculators  vllm-project/speculators
    vllm         the format that vLLM serves: eagle3 for EAGLE-3 drafts, dovetail (by our plugin) for all others

Formats of other projects cannot represent every draft; `write_draft` refuses those that do not fit.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..files import refuse_occupied
from .card import CARD, model_card
from .config import DovetailConfig
from .model import DovetailDraft
from .saving import draft_directory

FORMATS = ("dovetail", "eagle3", "speculators", "vllm")

SPECULATORS_VERSION = "0.3.0"
"""Version of the speculators config layout that is written."""


def write_draft(
    draft: DovetailDraft,
    directory: Path,
    to: str,
    *,
    tokenizer: Callable[[Path], Any] | None = None,
    card: str | None = None,
) -> None:
    """Write a draft to a directory, whole or not at all.

    Args:
        draft: the draft to write.
        directory: is created if it does not exist.
        to: one of `FORMATS`.
        tokenizer: is called with a directory, to write the files of the draft's tokenizer there.
        card: the model card; by default one that does not say how the draft was made.

    Raises:
        ValueError: the format is unknown, or cannot represent this draft.
        OccupiedError: the directory is a file or not empty. It is a `FileExistsError`.
        WriteError: the files cannot be written; nothing has changed. It is an `OSError`.
    """
    check_format(draft, to)
    refuse_occupied(directory)
    card = model_card(draft.config) if card is None else card
    with draft_directory(directory, draft.token_order, card) as part:
        (part / CARD).write_text(card, encoding="utf-8")
        if tokenizer is not None:
            tokenizer(part)
        if to == "dovetail" or (to == "vllm" and draft.config.fusion != "eagle3"):
            draft.save_pretrained(part)
            return
        if to == "speculators":
            config, block = _speculators_config(draft.config), "layers.0."
        else:
            config, block = _eagle3_config(draft.config), "midlayer."
        save_file(_eagle3_tensors(draft, block), part / "model.safetensors", metadata={"format": "pt"})
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def check_format(draft: DovetailDraft, to: str) -> None:
    """Refuse a format that cannot represent a draft.

    Raises:
        ValueError: says which formats can.
    """
    if to not in FORMATS:
        raise ValueError(f"unknown format {to!r}. Use one of {', '.join(FORMATS)}.")
    if to in ("eagle3", "speculators") and draft.config.fusion != "eagle3":
        kind = {"dgf": "Dynamic Gating Fusion", "concat": "EAGLE-1 or EAGLE-2"}[draft.config.fusion]
        raise ValueError(
            f"the format {to} is for EAGLE-3 drafts only, and this draft is a {kind} draft. Write it as dovetail."
        )


def _eagle3_tensors(draft: DovetailDraft, block: str) -> dict[str, Tensor]:
    renamed = {
        "head_weight": "lm_head.weight",
        "embed_weight": "embed_tokens.weight",
        "layers.0.output_norm.weight": "norm.weight",
    }
    tensors = {}
    for name, tensor in draft.state_dict().items():
        if name == "token_ids":
            continue
        new = renamed.get(name, name).removeprefix("fusion.")
        new = block + new.removeprefix("layers.0.") if new.startswith("layers.0.") else new
        tensors[new] = tensor.detach().cpu().contiguous()
    if draft.config.draft_vocab_size is not None:
        assert draft.token_ids is not None
        ids = draft.token_ids.cpu()
        tensors["d2t"] = ids - torch.arange(len(ids))
        tensors["t2d"] = torch.zeros(draft.config.vocab_size, dtype=torch.bool).index_fill(0, ids, True)
    return tensors


def _llama_config(config: DovetailConfig) -> dict[str, Any]:
    rope = dict(config.rope_parameters or {})
    theta = rope.pop("rope_theta", 10000.0)
    fields = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "max_position_embeddings",
        "attention_bias",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
    return {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "rope_theta": theta,
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else rope,
        "tie_word_embeddings": False,
    } | {name: getattr(config, name) for name in fields}


def _eagle3_config(config: DovetailConfig) -> dict[str, Any]:
    own = _llama_config(config) | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
        "norm_before_residual": config.norm_before_residual,
        **({"norm_output": True} if config.norm_output else {}),
        "torch_dtype": str(config.dtype).removeprefix("torch."),
    }
    if config.target_hidden_size is not None:
        own["target_hidden_size"] = config.target_hidden_size
    if config.feature_layers is not None:
        own["eagle_config"] = {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": list(config.feature_layers),
        }
    return own


def _speculators_config(config: DovetailConfig) -> dict[str, Any]:
    own = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": SPECULATORS_VERSION,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 5}],
            "verifier": {"name_or_path": config.target_name_or_path, "architectures": []},
        },
        "transformer_layer_config": _llama_config(config),
        "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
        "norm_before_residual": config.norm_before_residual,
        **({"norm_output": True} if config.norm_output else {}),
        "torch_dtype": str(config.dtype).removeprefix("torch."),
    }
    if config.target_hidden_size is not None:
        own["target_hidden_size"] = config.target_hidden_size
    if config.feature_layers is not None:
        own["eagle_aux_hidden_state_layer_ids"] = list(config.feature_layers)
    return own
