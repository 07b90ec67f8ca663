"""`AutoDraft`: loads a draft of any layout that this package knows, by directory, hub id or the word "lookup".

A name goes in, a `Draft` comes out, whose `layout` says what the name stood for. What decides are the files: config
fields and tensor names of drafts, then whether the config is that of a causal language model. The command line, texts
as `assistant_model` and `attach_draft` all load through this module. It does not know how a target generates.
"""

import logging
import os
from pathlib import Path
from typing import Any

from ..errors import InputError, MissingFileError
from ..targets.base import TargetModel
from ..targets.engine import engine_of
from .base import Draft
from .checkpoints.read import UnknownFormat
from .known_pairs import LOOKUP
from .model import DovetailDraft
from .prompt_lookup import PromptLookupDraft
from .small_model import SmallModelDraft

logger = logging.getLogger(__name__)

LAYOUTS = {
    "dovetail": "a draft of this project (model_type dovetail)",
    "paper": "a draft of the Dovetail paper (tensors W_1 and W_z)",
    "eagle": "an EAGLE-1 or EAGLE-2 head (tensors fc.weight and layers.0.*)",
    "eagle3": "an EAGLE-3 head (tensors midlayer.*)",
    "speculators": "an EAGLE-3 head of speculators (speculators_config)",
    "language model": "a small causal language model (by its architecture, for example LlamaForCausalLM)",
    LOOKUP: f'prompt lookup without a model (the word "{LOOKUP}")',
}
"""Layout -> what it is and how it is recognized."""

MOST_NAMES = 12
"""File names that an error lists."""


class AutoDraft:
    """Loads a draft without saying what kind of draft it is.

    ```python
    draft = AutoDraft.from_pretrained("RedHatAI/Qwen3-8B-speculator.eagle3", device_map="auto")
    print(draft.layout)  # speculators
    ```
    """

    def __init__(self) -> None:
        raise TypeError('AutoDraft has no instances. Use AutoDraft.from_pretrained("path-or-hub-id").')

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], *, target: TargetModel | None = None, **kwargs: Any
    ) -> Draft:
        """Load a draft of any layout in `LAYOUTS`; the draft's `layout` says which it was.

        Args:
            name: directory, hub id, or the word "lookup" for prompt lookup. A directory of that name is "./lookup".
            target: the model that the draft is for. If it is given, the draft is attached to it, so that a draft that
                does not fit is refused here and not when text is generated.
            kwargs: arguments of `from_pretrained` (`dtype`, `device_map`, `revision`, `token`, ...) and settings of the
                draft (`budget`, ...). Code of the repository runs only with `trust_remote_code=True`; nobody is asked.

        Returns:
            A `DovetailDraft`, `SmallModelDraft` or `PromptLookupDraft`.

        Raises:
            InputError: no known layout, a file cannot be used, or the draft does not fit `target`. It is a
                `ValueError`. The message lists what was found and which layouts are known.
            MissingFileError: there is no such directory or hub repository, or it lacks files. It is an `OSError`.
            ValueError: see `DovetailDraft.from_pretrained` and `SmallModelDraft.from_pretrained`.
        """
        name = os.fspath(name)
        if target is not None:
            engine_of(target).check()
        draft = _load(name, {"trust_remote_code": False} | kwargs)
        logger.info("%s was read as %s", name, LAYOUTS.get(str(draft.layout), draft.layout))
        if target is not None:
            draft.check_target(target)
            draft.ensure_attached(target)
        return draft


def _load(name: str, arguments: dict[str, Any]) -> Draft:
    if name == LOOKUP:
        return _with_settings(PromptLookupDraft(), _settings_of(PromptLookupDraft, arguments))
    if Path(name).is_file():
        raise InputError(f"{name} is a file. Give the directory that holds the draft.")
    try:
        return DovetailDraft.from_pretrained(name, **arguments)
    except UnknownFormat as error:
        if not error.is_language_model:
            others = f"{LAYOUTS['language model']} and {LAYOUTS[LOOKUP]}"
            raise InputError(f"{error} {_found(name)}AutoDraft also reads {others}.") from error
    except MissingFileError as error:
        known = "; ".join(LAYOUTS.values())
        raise MissingFileError(f"{error} {_found(name)}AutoDraft reads {known}.") from error
    settings = _settings_of(SmallModelDraft, arguments)
    rest = {argument: value for argument, value in arguments.items() if argument not in settings}
    return _with_settings(SmallModelDraft.from_pretrained(name, **rest), settings)


def _settings_of(kind: type[Draft], arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if kind._is_setting(name)}


def _with_settings(draft: Draft, settings: dict[str, Any]) -> Draft:
    for name, value in settings.items():
        setattr(draft, name, value)
    return draft


def _found(name: str) -> str:
    """Say which files a directory holds; nothing about hub repositories."""
    try:
        files = sorted(os.listdir(name))
    except OSError:
        return ""
    more = f" and {len(files) - MOST_NAMES} more" if len(files) > MOST_NAMES else ""
    return f"Found: {', '.join(files[:MOST_NAMES]) or 'no files'}{more}. "
