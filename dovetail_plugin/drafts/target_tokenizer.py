"""Finds the vocabulary of a target that the user has loaded, by what its config remembers; nothing is downloaded.

A config remembers a directory or a hub id. The commit is in the config only before transformers 5.24. Later, the
snapshots in the hub cache tell: those of other commits matter only if their tokenizers differ. `vocabulary_of` reads a
tokenizer; this module finds out which.
"""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from transformers import PretrainedConfig

from ..compat import commit_of
from ..targets.gguf import is_gguf
from .shared_tokens import Vocabulary, vocabulary_of

TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
"""Patterns of files, at least one of which is in a snapshot with a tokenizer."""


def vocabulary_of_target(config: PretrainedConfig, cache_dirs: Sequence[str | Path] = ()) -> Vocabulary | None:
    """Return the vocabulary of a target's tokenizer at the target's own revision, or None with a warning.

    If the revision is unknown and the cache has several with different tokenizers, that of main is taken, with a
    warning.

    Args:
        config: config of the target.
        cache_dirs: hub caches to look into besides the default one.
    """
    name, commit = config.name_or_path, commit_of(config)
    if not name:
        return None
    if is_gguf(name):
        return vocabulary_of(str(Path(name).parent), gguf_file=Path(name).name, local_files_only=True)
    if Path(name).is_dir():
        return vocabulary_of(name, local_files_only=True)
    caches = list(dict.fromkeys(Path(cache) for cache in (constants.HF_HUB_CACHE, *cache_dirs)))
    snapshots = [s for cache in caches for s in _snapshots(cache, name) if commit in (None, s.name)]
    if not snapshots:  # whose warning says what is missing
        return vocabulary_of(name, revision=commit, local_files_only=True)
    found: list[Vocabulary] = []
    for snapshot in snapshots:
        vocabulary = vocabulary_of(str(snapshot), local_files_only=True)
        if vocabulary is not None and vocabulary not in found:
            found.append(vocabulary)
    if len(found) > 1:
        warnings.warn(
            f"the hub cache has {len(found)} revisions of {name} with different tokenizers, and the target does not "
            "say from which it was loaded. That of main is taken. The text is not affected, but few drafted tokens may "
            "be accepted. Set draft.target_vocabulary = tokenizer.get_vocab() with the tokenizer of the target.",
            stacklevel=2,
        )
    return found[0] if found else None


def _snapshots(cache: Path, name: str) -> Iterator[Path]:
    """Yield the directories of a repository's revisions that have a tokenizer, that of main first."""
    root = cache / repo_folder_name(repo_id=name, repo_type="model")
    main = root / "refs" / "main"
    current = main.read_text().strip() if main.is_file() else ""
    directories = root / "snapshots"
    if not directories.is_dir():
        return
    for snapshot in sorted(directories.iterdir(), key=lambda directory: (directory.name != current, directory.name)):
        if any(next(snapshot.glob(pattern), None) for pattern in TOKENIZER_FILES):
            yield snapshot
