"""Copies the tokenizer files of a checkpoint to another one. No code is run or copied."""

import os
import shutil
from pathlib import Path
from typing import Any

from ..compat import find_file

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
"""Files of a tokenizer. Those of a checkpoint are copied when it is converted or packed."""


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
        if not is_inside(Path(file)):
            left_out.append(name)
            continue
        shutil.copyfile(file, directory / name)
    return left_out


def is_inside(file: Path) -> bool:
    """Return whether a file is a regular one of its directory, or of the repository in the hub's cache."""
    folder, real = Path(os.path.realpath(file.parent)), Path(os.path.realpath(file))
    roots = [folder]
    for snapshot in (folder, *folder.parents):  # the file may be in a subfolder
        repository = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and repository.name.startswith("models--"):
            roots.append(repository / "blobs")  # to which the hub's cache links
    return real.is_file() and any(real.is_relative_to(root) for root in roots)
