"""Measurements of this machine, kept on disk for later processes.

Enters: measurements under a key that names machine, models and settings. Leaves: the same, if the key is the same.
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
    """Return a key that holds for this machine only; `parts` name what was measured on it."""
    return json.dumps({"machine": machine.describe(), "cpus": machine.cpus(), **parts}, sort_keys=True, default=str)


def load(key: str, directory: Path) -> Measurements | None:
    """Read what an earlier process measured under this key; None if there is nothing usable."""
    file = _file(key, directory)
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        # The name is a hash; the key inside says whether the file was copied from another machine.
        return Measurements.from_dict(stored["measurements"]) if stored["key"] == key else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logging.getLogger(__name__).warning(f"{file}: unusable, this machine is measured again ({error}).")
        return None


def store(key: str, measured: Measurements, directory: Path) -> None:
    """Keep measurements for later processes, if the directory can be written to."""
    with contextlib.suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
        # Written to another file first, since another process may read or write this one at the same time.
        with tempfile.NamedTemporaryFile("w", dir=directory, delete=False, encoding="utf-8") as file:
            json.dump({"key": key, "measurements": measured.as_dict()}, file)
        Path(file.name).replace(_file(key, directory))


def _file(key: str, directory: Path) -> Path:
    return directory / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
