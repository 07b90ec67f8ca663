"""Writes a directory with a draft, whole or not at all, and knows what such a directory holds.

A draft brings the order of its tokens (`token_order.npy`) and a model card with it. Its tokenizer is the target's.
No code comes with a draft, and none is run or copied.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..compat import find_file
from ..errors import InputError, OccupiedError
from ..files import whole_directory
from ..targets.tokenizer_files import is_inside
from .card import CARD, license_in
from .checkpoints.files import WEIGHT_FILES, read_json
from .checkpoints.load import TOKEN_ORDER
from .config import DovetailConfig
from .fields import shown

MOST_HEAD_BYTES = 2**16
"""Bytes at the start of a model card in which its license is looked for."""

_SHARD = re.compile(r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)")


def is_part_of_draft(name: str) -> bool:
    """Return whether a file of this name in a draft's directory belongs to the draft, so that a new one replaces it."""
    return name in (*WEIGHT_FILES, TOKEN_ORDER) or _SHARD.fullmatch(name) is not None


def refuse_other_checkpoint(directory: Path) -> None:
    """Refuse a directory with the checkpoint of something that is not a draft of this project.

    Raises:
        OccupiedError: it has one; saving a draft there would destroy it.
    """
    file = directory / "config.json"
    if not os.path.lexists(file):
        weights = sorted(n for n in (os.listdir(directory) if directory.is_dir() else ()) if is_part_of_draft(n))
        if weights:
            raise OccupiedError(f"{directory} has {weights[0]} without a config.json. Choose another directory.")
        return
    try:
        kind = read_json(str(file), str(file)).get("model_type")
    except (InputError, OSError):
        kind = None
    if kind != DovetailConfig.model_type:
        raise OccupiedError(
            f"{directory} contains a checkpoint that is not a Dovetail draft (model_type {shown(kind)}). Choose "
            "another directory."
        )


@contextmanager
def draft_directory(directory: Path, order: Tensor | None, card: str) -> Iterator[Path]:
    """Yield an empty directory for the files of a draft, which take their place in `directory` at the end.

    Args:
        directory: may hold an older draft, which is replaced.
        order: (V,) ids of all tokens, the most frequent first; None if the draft has no such order.
        card: the model card, for a draft without one; see `model_card`.

    Raises:
        OccupiedError: see `refuse_other_checkpoint`.
        WriteError: the files cannot be written; nothing has changed.
    """
    refuse_other_checkpoint(directory)
    replaced: set[str] = set()
    with whole_directory(directory, replaces=replaced.__contains__, keeps=[CARD]) as part:
        yield part
        if any(is_part_of_draft(name) for name in os.listdir(part)):  # only the main process writes weights
            if not (part / CARD).exists():
                (part / CARD).write_text(card, encoding="utf-8")
            if order is not None:
                np.save(part / TOKEN_ORDER, order.to("cpu").int().numpy(), allow_pickle=False)
            if directory.is_dir():
                replaced.update(name for name in os.listdir(directory) if is_part_of_draft(name))


def license_of(source: str, **hub_kwargs: Any) -> str | None:
    """Return the license that the card of a checkpoint names; None if it has no card, or that names none.

    Args:
        source: directory or hub id.
        hub_kwargs: see `targets.tokenizer_files.copy_tokenizer`.
    """
    try:
        file = find_file(source, CARD, **hub_kwargs)
        if file is None or not is_inside(Path(file)):
            return None
        with open(file, "rb") as card:
            return license_in(card.read(MOST_HEAD_BYTES).decode("utf-8", "replace"))
    except OSError:
        return None
