"""Reads the config of a draft of any format from its config.json, for plans that are made before a download.

`load_draft_config` takes a name and returns a `DovetailConfig`. Formats are usually detected by tensor names (see
`drafts/checkpoints/read.py`). The config.json alone is enough except in two cases: drafts of the Dovetail paper look
like those of EAGLE, whose fusion is smaller by two matrices of the hidden size, and an EAGLE-3 config does not say
whether the draft has its own embedding table. If the weights are there too, their names and shapes are read as well.
"""

from pathlib import Path
from typing import Any

import torch

from ..drafts.checkpoints.files import Weights
from ..drafts.checkpoints.read import UnknownFormat, own_names, read_config, translate
from ..drafts.config import DovetailConfig
from ..errors import MissingFileError
from .known_shapes import SHAPES


def load_draft_config(name: str, **hub: Any) -> DovetailConfig:
    """Read the config of a draft of any known format from a directory, a config.json or a hub id.

    Args:
        name: of the directory, file or repository.
        hub: `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder`.

    Raises:
        OSError: there is no draft with that name.
        ValueError: it is not the config of a draft.
    """
    if name in SHAPES:
        return config_alone(name, SHAPES[name])
    stored = read_config(name, **hub)
    if stored.get("model_type") == DovetailConfig.model_type:
        return DovetailConfig.from_dict(stored, name_or_path=name)
    if not Path(name).is_file():
        try:
            weights = Weights(name, **hub | {"local_files_only": True})
            return translate(name, stored, own_names(weights.stand_ins)).config
        except MissingFileError:  # a plan before the download
            pass
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
        tensors = {
            "midlayer.input_layernorm.weight": one,
            "lm_head.weight": head,
            "d2t": torch.empty(size, device="meta"),
        }
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
