"""Installs drafts in transformers: `assistant_model=<a draft>` reaches Dovetail's loop, everything else passes through.

`generate` has no registry for assistants, so `register` wraps three methods of `GenerationMixin`:
`_validate_generation_mode` (to refuse with a reason before any work), `_assisted_decoding` (to run the loop) and
`_get_candidate_generator` (for `draft.verification = "stock"`). Each acts only if the assistant is a `Draft`. Arguments
are bound to the original's signature, so that callers may pass them by position and new parameters do no harm.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin

from . import compat
from .drafts.base import Draft
from .drafts.config import DovetailConfig
from .drafts.model import DovetailDraft
from .generation.generate import check_request, generate_with_draft
from .generation.stock_loop import DovetailCandidateGenerator

_originals: dict[str, Callable[..., Any]] = {}


def register() -> None:
    """Make `generate` and the Auto classes of transformers accept drafts. Idempotent.

    Warns once if transformers is newer than the tested versions.
    """
    AutoConfig.register(DovetailConfig.model_type, DovetailConfig, exist_ok=True)
    AutoModelForCausalLM.register(DovetailConfig, DovetailDraft, exist_ok=True)
    if _originals:
        return
    compat.warn_untested()
    for name, wrap in _WRAPPERS.items():
        original = getattr(GenerationMixin, name)
        _originals[name] = original
        setattr(GenerationMixin, name, functools.wraps(original)(wrap(original)))


def unregister() -> None:
    """Restore transformers' own methods. The Auto classes still load drafts. Idempotent."""
    while _originals:
        name, original = _originals.popitem()
        setattr(GenerationMixin, name, original)


def is_registered() -> bool:
    """Return whether `assistant_model=draft` reaches Dovetail's loop."""
    return bool(_originals)


def _validate(original: Callable[..., Any]) -> Callable[..., Any]:
    def _validate_generation_mode(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = compat.bound_arguments(original, (self, *args), kwargs)
        mode_kwargs = arguments.get("generation_mode_kwargs") or {}
        draft = mode_kwargs.get("assistant_model")
        if not isinstance(draft, Draft):
            return original(self, *args, **kwargs)
        check_request(self, draft, arguments["generation_config"])
        # What follows compares the config and tokenizer of an assistant that is a language model.
        arguments["generation_mode_kwargs"] = {k: v for k, v in mode_kwargs.items() if k != "assistant_model"}
        if draft.verification == "tree":  # which takes batches, in contrast to transformers' assisted loop
            arguments["generation_config"] = config = copy.copy(arguments["generation_config"])
            config.num_return_sequences = 1
        return original(**arguments)

    return _validate_generation_mode


def _decode(original: Callable[..., Any]) -> Callable[..., Any]:
    def _assisted_decoding(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = compat.bound_arguments(original, (self, *args), kwargs)
        draft = arguments.get("assistant_model")
        if not isinstance(draft, Draft):
            return original(self, *args, **kwargs)
        if draft.verification == "stock":
            cache = compat.take_cache(dict(arguments))
            if cache is not None and cache.get_seq_length():
                raise ValueError(
                    "transformers' assisted loop gives wrong text behind a cache with rows of an earlier turn. Use "
                    'draft.verification = "tree", or pass the whole text without a cache.'
                )
            return original(self, *args, **kwargs)
        del arguments["self"], arguments["assistant_model"]
        return generate_with_draft(self, draft=draft, **arguments)

    return _assisted_decoding


def _candidates(original: Callable[..., Any]) -> Callable[..., Any]:
    def _get_candidate_generator(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = compat.bound_arguments(original, (self, *args), kwargs)
        draft = arguments.get("assistant_model")
        if not isinstance(draft, Draft):
            return original(self, *args, **kwargs)
        return DovetailCandidateGenerator(draft, self, arguments["generation_config"], arguments["logits_processor"])

    return _get_candidate_generator


_WRAPPERS = {
    "_validate_generation_mode": _validate,
    "_assisted_decoding": _decode,
    "_get_candidate_generator": _candidates,
}
