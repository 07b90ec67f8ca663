"""Helpers of `DovetailDraft.from_pretrained` and `attach`.

They prepare the loading of checkpoints in other formats, check that a loaded draft is complete, choose its dtype, and
read which tokens a reduced head proposes. This module builds no models.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import machine
from ...compat import find_file
from .read import Checkpoint

HUB_KWARGS = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "force_download")
"""Arguments of `from_pretrained` that select where files come from."""


def hub_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that select where files come from, if they are given."""
    return {name: arguments[name] for name in HUB_KWARGS if arguments.get(name) is not None}


def dtype_for(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype for `dtype="auto"`: that of the weights, or fp16 for bf16 weights on a GPU without bf16.

    Args:
        stored: dtype of the weights in the checkpoint.
        device: where the draft will run.
    """
    if device.type == "cuda" and stored == torch.bfloat16 and not machine.gpu_supports_bf16():
        return torch.float16
    return stored


def foreign_arguments(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return arguments of transformers' `from_pretrained` that make it load the tensors of `checkpoint`."""
    dtypes = {tensor.dtype for tensor in checkpoint.tensors.values() if tensor.is_floating_point()}
    checkpoint.config.dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return {"config": checkpoint.config, "state_dict": checkpoint.tensors}


TOKEN_ORDER = "token_order.npy"
"""File of a checkpoint with all token ids, (V,) int32, sorted by their frequency in the training text."""


def frequent_tokens(name: str, count: int, vocab_size: int) -> Tensor:
    """Return the most frequent tokens according to the checkpoint's `TOKEN_ORDER`.

    Without this file the lowest ids are used, which are the most frequent ones in byte-pair vocabularies.

    Args:
        name: directory or hub id of the checkpoint; empty if the draft has none.
        count: number of tokens, between 1 and `vocab_size`.
        vocab_size: number of tokens of the target (V).

    Returns:
        (count,) int64 ids, ascending.

    Raises:
        ValueError: `count` is out of range.
    """
    if not 1 <= count <= vocab_size:
        raise ValueError(f"draft_vocab_size must be between 1 and the target's {vocab_size} tokens, got {count}.")
    file = find_file(name, TOKEN_ORDER) if name else None
    if file is None:
        return torch.arange(count)
    order = torch.from_numpy(np.load(file, allow_pickle=False).astype(np.int64))
    return order[:count].sort().values


def check_loaded(name: object, info: dict[str, Any]) -> None:
    """Refuse a checkpoint whose tensors are not exactly those of the draft.

    Args:
        name: of the checkpoint, for the message.
        info: loading info from transformers' `from_pretrained(..., output_loading_info=True)`.

    Raises:
        ValueError: names all tensors that are missing, unexpected or of the wrong shape.
    """
    problems = []
    for kind in ("missing_keys", "unexpected_keys"):
        if info[kind]:
            problems.append(f"{kind.split('_')[0]}: " + ", ".join(sorted(info[kind])))
    for key, found, wanted in info["mismatched_keys"]:
        problems.append(f"wrong shape: {key} is {tuple(found)}, expected {tuple(wanted)}")
    if problems:
        raise ValueError(f"{name} is not a complete Dovetail draft. " + "; ".join(problems) + ".")
