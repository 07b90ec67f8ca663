"""A hub cache on disk, as huggingface_hub lays it out, so that tests can load by id and revision without a network."""

import hashlib
from collections.abc import Callable
from pathlib import Path


def add_revision(cache: Path, repo: str, revision: str, write: Callable[[Path], object]) -> str:
    """Add a commit to a repository in a hub cache.

    Args:
        cache: directory of the cache.
        repo: hub id, "org/name".
        revision: branch or tag that names the commit.
        write: writes the files of the commit into a directory.

    Returns:
        The commit hash.
    """
    commit = hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    write(snapshot)
    ref = root / "refs" / revision
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(commit)
    return commit
