"""Writes a directory with a draft, whole or not at all, and knows what such a directory holds.

A draft brings the order of its tokens (`token_order.npy`) and a model card with it. Its tokenizer is the target's;
`copy_tokenizer` copies the files that a checkpoint has. No code comes with a draft, and none is run or copied.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..compat import find_file
from ..errors import InputError, OccupiedError
from ..files import whole_directory
from .card import CARD, license_in
from .checkpoints.files import WEIGHT_FILES, read_json
from .checkpoints.load import TOKEN_ORDER
from .config import DovetailConfig
from .fields import shown

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
"""Files of a tokenizer. Those of a checkpoint are copied when it is converted."""

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


def copy_tokenizer(source: str, directory: Path, **hub_kwargs: Any) -> list[str]:
    """Copy the tokenizer files of a checkpoint.

    Args:
        source: directory or hub id.
        directory: of the copies.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder`.

    Returns:
        Names of files that were left out because they are links to something outside of the checkpoint.
    """
    left_out = []
    for name in TOKENIZER_FILES:
        try:
            file = find_file(source, name, **hub_kwargs)
        except OSError:  # the hub cannot be reached, and whether it has this optional file is unknown
            file = None
        if file is None:
            continue
        if not _is_inside(Path(file)):
            left_out.append(name)
            continue
        shutil.copyfile(file, directory / name)
    return left_out


def license_of(source: str, **hub_kwargs: Any) -> str | None:
    """Return the license that the card of a checkpoint names; None if it has no card, or that names none.

    Args:
        source: directory or hub id.
        hub_kwargs: see `copy_tokenizer`.
    """
    try:
        file = find_file(source, CARD, **hub_kwargs)
        if file is None or not _is_inside(Path(file)):
            return None
        with open(file, "rb") as card:
            return license_in(card.read(MOST_HEAD_BYTES).decode("utf-8", "replace"))
    except OSError:
        return None


def _is_inside(file: Path) -> bool:
    """Return whether a file is a regular one of its directory, or of the repository in the hub's cache."""
    folder, real = Path(os.path.realpath(file.parent)), Path(os.path.realpath(file))
    roots = [folder]
    for snapshot in (folder, *folder.parents):  # the file may be in a subfolder
        repository = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and repository.name.startswith("models--"):
            roots.append(repository / "blobs")  # to which the hub's cache links
    return real.is_file() and any(real.is_relative_to(root) for root in roots)
