"""The one seam to transformers: `assistant_model=<a draft of ours>` reaches our loop, all else passes through.

`generate` has no registry for assistants, so `register` wraps three methods of `GenerationMixin`:
`_validate_generation_mode` (to refuse with a reason before any work), `_assisted_decoding` (to run our
loop) and `_get_candidate_generator` (for `draft.verification = "stock"`). Each acts only if the assistant
is ours. `register` runs when the package is imported and may be called again; `unregister` restores.
"""

import functools
from collections.abc import Callable
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin

from .drafts.base import Assistant
from .drafts.config import DovetailConfig
from .drafts.model import DovetailDraft
from .generation.generate import check_request, generate_with_draft
from .generation.stock_loop import DovetailCandidateGenerator

_originals: dict[str, Callable[..., Any]] = {}


def register() -> None:
    """Make transformers know drafts: as `assistant_model`, and in the Auto classes. Idempotent."""
    AutoConfig.register(DovetailConfig.model_type, DovetailConfig, exist_ok=True)
    AutoModelForCausalLM.register(DovetailConfig, DovetailDraft, exist_ok=True)
    if _originals:
        return
    for name, wrap in _WRAPPERS.items():
        original = getattr(GenerationMixin, name)
        _originals[name] = original
        setattr(GenerationMixin, name, functools.wraps(original)(wrap(original)))


def unregister() -> None:
    """Give transformers its own methods back; the Auto classes keep knowing drafts. Idempotent."""
    while _originals:
        name, original = _originals.popitem()
        setattr(GenerationMixin, name, original)


def is_registered() -> bool:
    """Whether `assistant_model=draft` reaches our loop."""
    return bool(_originals)


def _validate(original: Callable[..., Any]) -> Callable[..., Any]:
    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        draft = generation_mode_kwargs.get("assistant_model")
        if isinstance(draft, Assistant):
            check_request(self, draft, generation_config)
            if not isinstance(draft, DovetailDraft):  # no model with a config, which is what follows compares
                rest = {name: value for name, value in generation_mode_kwargs.items() if name != "assistant_model"}
                return original(self, generation_mode, generation_config, rest)
        return original(self, generation_mode, generation_config, generation_mode_kwargs)

    return _validate_generation_mode


def _decode(original: Callable[..., Any]) -> Callable[..., Any]:
    def _assisted_decoding(self, input_ids, *args, assistant_model=None, **kwargs):
        if not isinstance(assistant_model, Assistant) or assistant_model.verification == "stock":
            return original(self, input_ids, *args, assistant_model=assistant_model, **kwargs)
        for unused in ("inputs_tensor", "tokenizer", "assistant_tokenizer"):
            kwargs.pop(unused, None)
        kwargs["draft"] = assistant_model
        return generate_with_draft(self, input_ids, *args, **kwargs)

    return _assisted_decoding


def _candidates(original: Callable[..., Any]) -> Callable[..., Any]:
    def _get_candidate_generator(self, *args, assistant_model=None, **kwargs):
        if not isinstance(assistant_model, DovetailDraft):
            return original(self, *args, assistant_model=assistant_model, **kwargs)
        return DovetailCandidateGenerator(
            assistant_model, self, kwargs["generation_config"], kwargs["logits_processor"]
        )

    return _get_candidate_generator


_WRAPPERS = {
    "_validate_generation_mode": _validate,
    "_assisted_decoding": _decode,
    "_get_candidate_generator": _candidates,
}
