"""Provenance of benchmark results: command, code revision, package versions and machine."""

import contextlib
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import machine

PACKAGES = (
    "dovetail-plugin",
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "openvino",
    "nncf",
    "onnxruntime",
    "gguf",
    "xllamacpp",
)
"""Packages whose versions are stored with results, if they are installed."""


DIRECTORIES = re.compile(r"(?<![\w.:/])/(?:[^/,=]+/)+")
"""The directories of an absolute path, which say nothing to others."""


def provenance() -> dict[str, Any]:
    """Command line (without the directories of absolute paths), git revision, package versions and machine."""
    program = Path(sys.argv[0]).name.replace("__main__.py", "python -m dovetail_plugin")
    return {
        "command": " ".join([program, *(DIRECTORIES.sub("", one) for one in _without_token(sys.argv[1:]))]),
        "git": _git_revision(),
        "versions": versions(),
        "machine": machine.describe(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of each of `PACKAGES` that is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _without_token(arguments: list[str]) -> list[str]:
    """The arguments with the access token of --token replaced, so that results can be shared."""
    shown: list[str] = []
    for argument in arguments:
        if argument.startswith("--token="):
            argument = "--token=..."
        shown.append("..." if shown and shown[-1] == "--token" else argument)
    return shown


def _git_revision() -> str | None:
    """Short hash of the checkout, with "+changes" if tracked files of the package differ; None outside git."""
    git = ["git", "-C", str(Path(__file__).parent.parent)]
    try:
        revision = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno", "--", "."], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision.stdout.strip() + ("+changes" if changed.stdout.strip() else "")
