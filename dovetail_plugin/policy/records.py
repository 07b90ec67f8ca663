"""Keeps measurements of this machine on disk for later processes.

`store` writes measurements under a key that identifies machine, models and settings; `load` returns them if the key is
the same.
"""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME

from .. import machine
from .measurements import Measurements


def default_directory() -> Path:
    """Return `DOVETAIL_CACHE`, or the directory `dovetail` beside the hub's cache."""
    return Path(os.environ.get("DOVETAIL_CACHE") or Path(HF_HOME) / "dovetail")


def key_of(**parts: Any) -> str:
    """Return a key that is valid on this machine only; `parts` identify what was measured."""
    return json.dumps({"machine": machine.describe(), "cpus": machine.cpus(), **parts}, sort_keys=True, default=str)


def load(key: str, directory: Path) -> Measurements | None:
    """Return the measurements that an earlier process stored under this key, or None if there are none to use."""
    file = _file(key, directory)
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        # The file name is a hash of the key. The key inside shows whether the file comes from another machine.
        return Measurements.from_dict(stored["measurements"]) if stored["key"] == key else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logging.getLogger(__name__).warning(f"{file} cannot be used ({error}). This machine is measured again.")
        return None


def store(key: str, measured: Measurements, directory: Path) -> None:
    """Store measurements for later processes. Nothing happens if the directory cannot be written to."""
    with contextlib.suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
        # Another process may read or write the file at the same time, so it is replaced as a whole.
        with tempfile.NamedTemporaryFile("w", dir=directory, delete=False, encoding="utf-8") as file:
            json.dump({"key": key, "measurements": measured.as_dict()}, file)
        Path(file.name).replace(_file(key, directory))


def _file(key: str, directory: Path) -> Path:
    return directory / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
