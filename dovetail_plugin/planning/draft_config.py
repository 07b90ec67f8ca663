"""Reads the config of a draft of any format from its config.json, for plans that are made before a download.

`load_draft_config` takes a name and returns a `DovetailConfig`. Formats are usually detected by tensor names (see
`drafts/checkpoints/read.py`). The config.json alone is enough except in two cases: drafts of the Dovetail paper look
like those of EAGLE, whose fusion is smaller by two matrices of the hidden size, and an EAGLE-3 config does not say
whether the draft has its own embedding table. If the weights are in the same directory, they are read as well.
"""

from pathlib import Path
from typing import Any

import torch

from ..compat import find_file
from ..drafts.checkpoints.read import WEIGHT_FILES, UnknownFormat, load_checkpoint, read_config, translate
from ..drafts.config import DovetailConfig
from .known_shapes import SHAPES


def load_draft_config(name: str) -> DovetailConfig:
    """Read the config of a draft of any known format from a directory, a config.json or a hub id.

    Raises:
        OSError: there is no draft with that name.
        ValueError: it is not the config of a draft.
    """
    if name in SHAPES:
        return config_alone(name, SHAPES[name])
    stored = read_config(name)
    if stored.get("model_type") == DovetailConfig.model_type:
        return DovetailConfig.from_pretrained(name)
    if not Path(name).is_file() and any(find_file(name, file, local_files_only=True) for file in WEIGHT_FILES):
        return load_checkpoint(name, stored, local_files_only=True).config
    return config_alone(name, stored)


def config_alone(name: str, config: dict[str, Any]) -> DovetailConfig:
    """Translate the config of a published draft. It is assumed to have the usual tensors of its format.

    Args:
        name: name of the draft, for messages.
        config: content of its config.json.

    Raises:
        ValueError: it is not the config of a draft.
    """
    layout = config.get("transformer_layer_config") or config
    size = config.get("draft_vocab_size") or layout.get("draft_vocab_size")
    eagle3 = any("Eagle3" in architecture for architecture in config.get("architectures") or [])
    one = torch.empty(1, device="meta")
    if layout is not config or size or eagle3:
        size = size or layout.get("vocab_size", 1)
        head = torch.empty(size, 1, device="meta")
        tensors = {"midlayer.input_layernorm.weight": one, "lm_head.weight": head, "d2t": torch.zeros(size)}
        return translate(name, config, tensors).config
    if layout.get("num_hidden_layers") == 1:
        bias = {"fc.bias": one} if config.get("bias", True) else {}
        return translate(name, config, {"fc.weight": one, "layers.0.mlp.down_proj.weight": one} | bias).config
    raise UnknownFormat(
        config,
        f"{name} is the config of a {config.get('model_type')} model, not of a draft. The config of a "
        "draft has model_type dovetail, transformer_layer_config (speculators), draft_vocab_size (EAGLE-3), or "
        "num_hidden_layers 1 (EAGLE-1, EAGLE-2, the Dovetail paper).",
    )
