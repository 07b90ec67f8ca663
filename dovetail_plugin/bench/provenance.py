"""What a result needs beside its numbers: command, versions, revision and machine."""

import contextlib
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import machine

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "openvino", "nncf", "onnxruntime")
"""Whose versions are kept with results, where they are installed."""


def provenance() -> dict[str, Any]:
    """Command, code version, package versions and machine, for results that are kept."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    program = Path(sys.argv[0]).name.replace("__main__.py", "python -m dovetail_plugin")
    return {
        "command": " ".join([program, *_without_token(sys.argv[1:])]),
        "git": _git_revision(),
        "versions": versions,
        "machine": machine.describe(),
    }


def _without_token(arguments: list[str]) -> list[str]:
    """The arguments with the access token of --token replaced, so that results can be shared."""
    shown: list[str] = []
    for argument in arguments:
        if argument.startswith("--token="):
            argument = "--token=..."
        shown.append("..." if shown and shown[-1] == "--token" else argument)
    return shown


def _git_revision() -> str | None:
    git = ["git", "-C", str(Path(__file__).parent.parent)]
    try:
        revision = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno", "--", "."], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision.stdout.strip() + ("+changes" if changed.stdout.strip() else "")
