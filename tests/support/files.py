"""Comparing directories before and after a test."""

import hashlib
from pathlib import Path


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of each file, by its name."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()}


def content(directory: Path) -> dict[str, bytes]:
    """Relative path -> bytes of all files, also of unfinished ones."""
    return {str(f.relative_to(directory)): f.read_bytes() for f in sorted(directory.rglob("*")) if f.is_file()}
