"""Finds the draft that an `assistant_model` is or names. A text is read by `AutoDraft`.

A text is loaded once for each model and kept as long as the model lives, so that callers that can hold only text
(command lines, YAML) pay for it once. Threads that need the same text at once wait for one of them to load it.
"""

import os
import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

from ..drafts.auto import AutoDraft
from ..drafts.base import Draft
from ..targets.engine import engine_of

_lock = threading.Lock()


@dataclass
class _Kept:
    """A text's draft, or None until it is loaded; `lock` is held while it is."""

    draft: Draft | None = None
    lock: Any = field(default_factory=threading.Lock)


_kept: "weakref.WeakKeyDictionary[Any, dict[str, _Kept]]" = weakref.WeakKeyDictionary()


def loaded(model: Any, text: str | os.PathLike[str]) -> Draft:
    """Return the draft that a text names, on a GPU if there is one, without comparing it with the model.

    Args:
        model: the target.
        text: directory, hub id, or "lookup".

    Raises:
        ValueError, OSError: see `AutoDraft.from_pretrained`. The next call tries again.
    """
    with _lock:
        kept = _kept.setdefault(model, {}).setdefault(os.fspath(text), _Kept())
    with kept.lock:
        if kept.draft is None:
            kept.draft = AutoDraft.from_pretrained(text, device_map="auto")
        return kept.draft


def forget(model: Any, text: str | os.PathLike[str]) -> None:
    """Drop what a text has loaded for a model."""
    with _lock:
        _kept.get(model, {}).pop(os.fspath(text), None)


def draft_of(model: Any, assistant: Any) -> Draft | None:
    """Return the draft that an assistant is or names; None for assistants that are not Dovetail's.

    Args:
        model: the target. It is checked before a text is loaded for it.
        assistant: value of `assistant_model`.

    Raises:
        ValueError, OSError: the model cannot be a target, or see `loaded`.
    """
    if isinstance(assistant, Draft):
        return assistant
    if not isinstance(assistant, (str, os.PathLike)):
        return None
    engine_of(model).check()
    return loaded(model, assistant)
