"""Keeps measurements of this machine on disk for later processes.

`store` writes measurements under a key that identifies machine, models and settings; `load` returns them if the key is
the same. The directory may be shared by processes and users, so its files are replaced as a whole and never trusted.
"""

import contextlib
import hashlib
import json
import logging
import os
import stat
import threading
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME

from .. import machine
from ..files import write_text
from .measurements import Measurements

logger = logging.getLogger(__name__)

LARGEST_BYTES = 4 << 20
"""Size of the largest file that is read. A file has some kilobytes, most of them the key with two configs."""

_lock = threading.Lock()
_unsaved: dict[tuple[Path, str], Measurements] = {}  # (directory, key) -> what could not be stored there


def default_directory() -> Path:
    """Return `DOVETAIL_CACHE`, or the directory `dovetail` beside the hub's cache."""
    return Path(os.environ.get("DOVETAIL_CACHE") or Path(HF_HOME) / "dovetail")


def key_of(**parts: Any) -> str:
    """Return a key that is valid on this machine only; `parts` identify what was measured."""
    return json.dumps({"machine": machine.describe(), "cpus": machine.cpus(), **parts}, sort_keys=True, default=str)


def load(key: str, directory: Path) -> Measurements | None:
    """Return the measurements that an earlier process stored under this key, or None if there are none to use.

    A file that is not a regular one of this user, that is too large, or whose values are out of bounds is ignored, with
    a warning.
    """
    with _lock:
        if (directory, key) in _unsaved:
            return _unsaved[directory, key]
    file = _file(key, directory)
    try:
        stored = json.loads(_read(file))
        # The file name is a hash of the key. The key inside shows whether the file comes from another machine.
        return _checked(Measurements.from_dict(stored["measurements"])) if stored["key"] == key else None
    except (FileNotFoundError, NotADirectoryError):
        if (common := directory / _name(key)) != file:
            logger.warning(f"{common} belongs to another user and is not used. This machine is measured again.")
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        logger.warning(f"{file} cannot be used ({error}). This machine is measured again.")
        return None


def store(key: str, measured: Measurements, directory: Path) -> None:
    """Store measurements for later processes, or for this one if the directory cannot be written to.

    The second case logs a warning, once for each directory.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Another process may read or write the file at the same time, so it is replaced as a whole.
        write_text(_file(key, directory), json.dumps({"key": key, "measurements": measured.as_dict()}))
    except OSError as error:
        with _lock:
            known = any(place == directory for place, _ in _unsaved)
            _unsaved[directory, key] = measured
        if not known:
            logger.warning(
                f"measurements of this machine cannot be stored in {directory} ({error}). They are kept until this "
                "process ends. Set DOVETAIL_CACHE to a directory that can be written to."
            )


def _file(key: str, directory: Path) -> Path:
    """Return the file of a key: the common one, or one for this user where that belongs to another user."""
    file = directory / _name(key)
    with contextlib.suppress(OSError):
        if not _is_own(file.lstat()):
            return file.with_stem(f"{file.stem}-{os.geteuid()}")
    return file


def _name(key: str) -> str:
    return f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


def _is_own(found: os.stat_result) -> bool:
    return not hasattr(os, "geteuid") or found.st_uid == os.geteuid()


def _read(file: Path) -> bytes:
    """Read a regular file of this user, up to `LARGEST_BYTES`. Nothing else is waited for or read.

    Raises:
        ValueError: it is not such a file.
        OSError: it cannot be read.
    """
    if not stat.S_ISREG(file.lstat().st_mode):  # a link is none either
        raise ValueError("it is not a regular file")
    # The file may have been replaced since. Opening a pipe would wait for somebody who writes to it.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(file, flags), "rb") as opened:
        found = os.fstat(opened.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is not a regular file")
        if not _is_own(found):
            raise ValueError("it belongs to another user")
        content = opened.read(LARGEST_BYTES + 1)
    if len(content) > LARGEST_BYTES:
        raise ValueError(f"it is larger than {LARGEST_BYTES} bytes")
    return content


def _checked(measured: Measurements) -> Measurements:
    """Return measurements whose threads and processors this machine has.

    Raises:
        ValueError: it does not have them.
    """
    usable = machine.cpus()
    most = max(len(usable), torch.get_num_threads())
    if measured.threads is not None and measured.threads > most:
        raise ValueError(f"it says {measured.threads} threads, and this process may use {most}")
    if measured.processors is not None and not set(measured.processors) <= set(usable):
        raise ValueError(f"it says processors {measured.processors}, and this process may use {usable}")
    return measured
