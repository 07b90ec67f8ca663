"""Around `DovetailDraft.from_pretrained`: checkpoints of other formats, completeness, the type to run in, cut heads.

Enters: names and files. Leaves: arguments for transformers' own loading, and complaints. It builds no models.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import machine
from ...compat import find_file
from .read import Checkpoint

HUB_KWARGS = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "force_download")
"""Arguments of `from_pretrained` that tell where files come from."""


def dtype_for(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The type to run in where the user leaves it open: fp16 for bf16 weights on a GPU that computes no bf16."""
    if device.type == "cuda" and stored == torch.bfloat16 and not machine.gpu_supports_bf16():
        return torch.float16
    return stored


def foreign_arguments(checkpoint: Checkpoint) -> dict[str, Any]:
    """Arguments that make transformers load tensors which are read already."""
    dtypes = {tensor.dtype for tensor in checkpoint.tensors.values() if tensor.is_floating_point()}
    checkpoint.config.dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return {"config": checkpoint.config, "state_dict": checkpoint.tensors}


TOKEN_ORDER = "token_order.npy"
"""Beside a checkpoint: (V,) int32 token ids, the most frequent of the training text first."""


def frequent_tokens(name: str, count: int, vocab_size: int) -> Tensor:
    """(count,) int64 ids, ascending, of the most frequent tokens by the checkpoint's own file.

    Without one the lowest ids are taken, which are the most frequent ones in byte-pair vocabularies.

    Raises:
        ValueError: `count` is no part of the vocabulary.
    """
    if not 1 <= count <= vocab_size:
        raise ValueError(f"draft_vocab_size must be between 1 and the target's {vocab_size} tokens, got {count}.")
    file = find_file(name, TOKEN_ORDER) if name else None
    if file is None:
        return torch.arange(count)
    order = torch.from_numpy(np.load(file, allow_pickle=False).astype(np.int64))
    return order[:count].sort().values


def check_loaded(name: object, info: dict[str, Any]) -> None:
    """Complain of what a checkpoint lacks or has too much, by transformers' `output_loading_info`.

    Raises:
        ValueError: tensors are missing, unexpected or misshapen; all are named.
    """
    problems = []
    for kind in ("missing_keys", "unexpected_keys"):
        if info[kind]:
            problems.append(f"{kind.split('_')[0]}: " + ", ".join(sorted(info[kind])))
    for key, found, wanted in info["mismatched_keys"]:
        problems.append(f"wrong shape: {key} is {tuple(found)}, expected {tuple(wanted)}")
    if problems:
        raise ValueError(f"{name} is not a complete Dovetail draft. " + "; ".join(problems) + ".")
