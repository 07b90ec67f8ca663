"""`attach_draft` and `detach_draft`: a model whose every `generate` drafts, for callers that pass no assistant.

What is attached is kept here, weakly by model, and not in the model: its attributes, copies and pickles stay as they
are. `generate` chooses its loop as without a draft, and at the door of its greedy and sampling loop the draft takes
over. What was decided before that, like beams, runs as without a draft; so does a call that cannot be combined with
drafting. Each kind of reason is logged once for a model and stands in the draft's report each time.
"""

import logging
import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationMixin

from ..drafts.base import Draft
from ..report import GenerationReport
from ..targets.engine import engine_of
from . import wrapping
from .assistants import draft_of
from .generate import check_request, generate_with_draft
from .loop import raised_by_signal
from .refusal import CannotDraft

logger = logging.getLogger(__name__)

LOOP = (GenerationMixin, "_sample")
"""Where `generate` enters its loop for greedy search and sampling."""


@dataclass
class _Attachment:
    """A model's draft, and the kinds of reasons for plain generation that were logged."""

    draft: Draft
    logged: set[str] = field(default_factory=set)


_lock = threading.Lock()
_attachments: "weakref.WeakKeyDictionary[Any, _Attachment]" = weakref.WeakKeyDictionary()


def attach_draft(model: Any, draft: Draft | str | os.PathLike[str]) -> Draft:
    """Let every `generate` of a model use a draft from now on, until `detach_draft`.

    An `assistant_model` in a call has priority. `assistant_model=None` is the default of `generate`, so it counts as
    not given: libraries pass it on without meaning anything by it. A call that cannot draft (beams, `inputs_embeds`,
    a batch with a streamer, ...) runs as without a draft; the draft's report says why, and the log does once for each
    kind of reason.

    Args:
        model: the target, or a wrapper around it from PEFT or `torch.compile`.
        draft: a draft, or a directory, hub id or "lookup" for `AutoDraft`. It replaces the one that was attached.

    Returns:
        The draft, whose `report` is that of the latest call.

    Raises:
        ValueError: the model cannot be a target, the draft does not fit it, or it uses transformers' own loop.
        OSError: there is no such draft.
        RuntimeError: `unregister` was called, so no call would reach the draft.
    """
    target = _target_of(model)
    found = draft_of(target, draft)
    if found is None:
        raise TypeError(f"{type(draft).__name__} is not a draft. Pass a draft, or its directory or hub id.")
    if not wrapping.in_effect(LOOP, Draft):
        raise RuntimeError("drafts are not registered with transformers. Call dovetail_plugin.register() first.")
    engine_of(target).check()
    own_loop = type(target)._sample is not GenerationMixin._sample and not hasattr(target, "dovetail_engine")
    if own_loop:
        raise ValueError(f"{type(target).__name__} has its own generation loop. Pass assistant_model in each call.")
    if found.verification == "stock":
        raise ValueError('an attached draft runs with verification="tree". Pass a "stock" one as assistant_model.')
    found.check_target(target)
    found.ensure_attached(target)
    with _lock:
        _attachments[target] = _Attachment(found)
    return found


def detach_draft(model: Any) -> Draft | None:
    """Let a model generate as before `attach_draft`.

    Args:
        model: the target, or a wrapper around it.

    Returns:
        The draft that was attached, or None if none was.
    """
    with _lock:
        attachment = _attachments.pop(_target_of(model), None)
    return None if attachment is None else attachment.draft


def _target_of(model: Any) -> Any:
    """Return the model whose `generate` runs in the end, behind wrappers of PEFT and `torch.compile`."""
    while callable(inner := getattr(model, "get_base_model", None)):
        model = inner()
    return getattr(getattr(model, "generate", None), "__self__", model)


def has_draft(model: Any) -> bool:
    """Return whether a draft is attached to a model."""
    return model in _attachments


def sample(model: Any, plainly: Callable[[], Any], arguments: dict[str, Any]) -> Any:
    """Run the greedy or sampling loop of a call: with the draft of the model if it has one and it can be used.

    Args:
        model: that `generate` was called on.
        plainly: runs the loop as without a draft.
        arguments: of the loop, by name.
    """
    attachment = _attachments.get(model)
    if attachment is None:
        return plainly()
    draft = attachment.draft
    try:
        check_request(model, draft, arguments["generation_config"])
        if draft.verification == "stock":
            raise CannotDraft("verification", 'verification="stock" needs assistant_model in the call.')
    except (ValueError, RuntimeError) as error:
        if raised_by_signal(error):
            raise
        _note(model, attachment, getattr(error, "kind", "target"), str(error))
        return plainly()
    draws = torch.get_rng_state()
    try:
        return generate_with_draft(model, draft=draft, **arguments)
    except CannotDraft as error:
        if error.begun:
            raise
        torch.set_rng_state(draws)  # earlier sequences of a batch may have drawn
        _note(model, attachment, error.kind, str(error))
        return plainly()


def note_plain(model: Any, kind: str, reason: str) -> None:
    """Report that a call of a model goes without the draft that is attached to it, if there is one.

    Args:
        model: that `generate` was called on.
        kind: of the reason.
        reason: in words.
    """
    attachment = _attachments.get(model)
    if attachment is not None:
        _note(model, attachment, kind, reason)


def _note(model: Any, attachment: _Attachment, kind: str, reason: str) -> None:
    attachment.draft.report = GenerationReport(warnings=[f"no draft ran: {reason}"])
    with _lock:
        first = kind not in attachment.logged
        attachment.logged.add(kind)
    if first:
        logger.warning(
            "%s generates without its attached draft: %s This is logged once for each kind of reason.",
            type(model).__name__,
            reason,
        )
