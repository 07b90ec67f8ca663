"""Installs drafts in transformers: `assistant_model=<a draft or its name>` and attached drafts reach Dovetail's loop.

`generate` has no registry for assistants, so `register` wraps functions of transformers:

    _validate_generation_mode   refuses with a reason before any work
    _assisted_decoding          runs the loop with the assistant of a call
    _sample                     runs the loop with an attached draft
    _get_candidate_generator    for `draft.verification = "stock"`
    generate_batch              says that it uses no draft
    load_assistant_model        of pipelines: takes drafts of every kind, and their names

Each acts only if a draft is concerned. Calls pass through as they came, so arguments may be given by position and new
parameters do no harm; `generation/wrapping.py` keeps peace with wrappers of others.
"""

import copy
import logging
import os
from collections.abc import Callable
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin

from . import compat
from .drafts.base import Draft
from .drafts.config import DovetailConfig
from .drafts.model import DovetailDraft
from .drafts.small_model import SmallModelDraft
from .generation import wrapping
from .generation.assistants import draft_of, forget, loaded
from .generation.attached import LOOP, has_draft, note_plain, sample
from .generation.generate import check_request, generate_with_draft
from .generation.stock_loop import DovetailCandidateGenerator
from .targets.engine import engine_of

logger = logging.getLogger(__name__)

Function = Callable[..., Any]


def register() -> None:
    """Make `generate`, pipelines and the Auto classes of transformers accept drafts. Idempotent.

    Warns once if transformers is newer than the tested versions.
    """
    AutoConfig.register(DovetailConfig.model_type, DovetailConfig, exist_ok=True)
    AutoModelForCausalLM.register(DovetailConfig, DovetailDraft, exist_ok=True)
    if is_registered():
        return
    compat.warn_untested()
    for place, wrap in _WRAPPERS.items():
        wrapping.install(place, wrap, Draft)


def unregister() -> None:
    """Undo `register`. The Auto classes still load drafts. Idempotent.

    transformers gets its own functions back, unless another library has wrapped ours in the meantime: then that
    library's wrapper stays, and ours behind it pass all calls on.
    """
    for place in _WRAPPERS:
        wrapping.uninstall(place, Draft)
    wrapping.switch_off(Draft)


def is_registered() -> bool:
    """Return whether drafts reach Dovetail's loop: whether our wrappers are in effect, whoever wrapped them in turn."""
    return all(wrapping.in_effect(place, Draft) for place in _WRAPPERS)


def _validate(original: Function) -> Function:
    def _validate_generation_mode(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = compat.bound_arguments(original, (self, *args), kwargs, compat.MODE_ARGUMENTS)
        mode_kwargs = arguments.get("generation_mode_kwargs") or {}
        draft = _draft_of(self, mode_kwargs.get("assistant_model"))
        if draft is None:
            reason = compat.not_sampling(arguments["generation_mode"])
            if reason is not None and mode_kwargs.get("assistant_model") is None:
                note_plain(self, *reason)
            return original(self, *args, **kwargs)
        check_request(self, draft, arguments["generation_config"])
        # What follows compares the config and tokenizer of an assistant that is a language model.
        arguments["generation_mode_kwargs"] = {k: v for k, v in mode_kwargs.items() if k != "assistant_model"}
        if draft.verification == "tree":  # which takes batches, in contrast to transformers' assisted loop
            arguments["generation_config"] = config = copy.copy(arguments["generation_config"])
            config.num_return_sequences = 1
        return original(**arguments)

    return _validate_generation_mode


def _draft_of(model: Any, assistant: Any) -> Draft | None:
    """Return the draft that an assistant is or names, or None.

    Raises:
        ValueError: it is a draft of a copy of this package that was imported before.
    """
    draft = draft_of(model, assistant)
    if draft is None and wrapping.is_outdated(type(assistant), Draft):
        raise ValueError(
            "this draft was made before dovetail_plugin was imported again, so its class is not the one in use. "
            "Load the draft again."
        )
    return draft


def _decode(original: Function) -> Function:
    def _assisted_decoding(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = compat.bound_arguments(original, (self, *args), kwargs, compat.LOOP_ARGUMENTS)
        draft = _draft_of(self, arguments.get("assistant_model"))
        if draft is None:
            return original(self, *args, **kwargs)
        if draft.verification == "stock":
            cache = compat.take_cache(dict(arguments))
            if cache is not None and cache.get_seq_length():
                raise ValueError(
                    "transformers' assisted loop gives wrong text behind a cache with rows of an earlier turn. Use "
                    'draft.verification = "tree", or pass the whole text without a cache.'
                )
            return original(**(arguments | {"assistant_model": draft}))
        del arguments["assistant_model"]
        return generate_with_draft(self, draft=draft, **_without(self, arguments))

    return _assisted_decoding


def _sample(original: Function) -> Function:
    def _sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not has_draft(self):
            return original(self, *args, **kwargs)
        arguments = compat.bound_arguments(original, (self, *args), kwargs, compat.LOOP_ARGUMENTS)
        return sample(self, lambda: original(self, *args, **kwargs), _without(self, arguments))

    return _sample


def _without(model: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a method without the model, which wrappers of others may call other than self."""
    return {name: value for name, value in arguments.items() if value is not model}


def _candidates(original: Function) -> Function:
    def _get_candidate_generator(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = compat.bound_arguments(original, (self, *args), kwargs, compat.CANDIDATE_ARGUMENTS)
        draft = arguments.get("assistant_model")
        if not isinstance(draft, Draft):
            return original(self, *args, **kwargs)
        return DovetailCandidateGenerator(draft, self, arguments["generation_config"], arguments["logits_processor"])

    return _get_candidate_generator


def _batch(original: Function) -> Function:
    def generate_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(kwargs.get("assistant_model"), (Draft, str, os.PathLike)):
            logger.warning(
                "generate_batch uses no draft: assistant_model is ignored. Call generate, which runs the sequences of "
                "a batch one after another with the draft."
            )
        note_plain(self, "generate_batch", "generate_batch uses no draft. Call generate.")
        return original(self, *args, **kwargs)

    return generate_batch


def _assistant(original: Function) -> Function:
    def load_assistant_model(*args: Any, **kwargs: Any) -> Any:
        arguments = compat.bound_arguments(original, args, kwargs, compat.PIPELINE_ARGUMENTS)
        model, assistant = arguments["model"], arguments.get("assistant_model")
        if isinstance(assistant, Draft) and model.can_generate():
            return assistant, None  # where it is: neither moved nor compared like a language model
        if not isinstance(assistant, (str, os.PathLike)) or not _may_draft_for(model):
            return original(*args, **kwargs)
        draft = None
        try:
            draft = loaded(model, assistant)
            engine_of(model).check()
            draft.check_target(model)
        except ValueError as error:
            if draft is not None and not isinstance(draft, SmallModelDraft):
                raise
            forget(model, assistant)
            logger.warning("%s is left to transformers' own assisted generation: %s", assistant, error)
            return original(*args, **kwargs)
        return draft, None

    return load_assistant_model


def _may_draft_for(model: Any) -> bool:
    return model.can_generate() and not getattr(model.config, "is_encoder_decoder", False)


_WRAPPERS: dict[wrapping.Place, Callable[[Function], Function]] = {
    (GenerationMixin, "_validate_generation_mode"): _validate,
    (GenerationMixin, "_assisted_decoding"): _decode,
    (GenerationMixin, "_get_candidate_generator"): _candidates,
    LOOP: _sample,
}
_CONVENIENT: dict[wrapping.Place, Callable[[Function], Function]] = {
    (GenerationMixin, "generate_batch"): _batch,
    (compat.pipelines, "load_assistant_model"): _assistant,
}
_WRAPPERS |= {place: wrap for place, wrap in _CONVENIENT.items() if hasattr(*place)}  # drafts work without these
