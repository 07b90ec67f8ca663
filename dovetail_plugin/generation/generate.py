"""One call of `generate` with a draft: checks, the request, and the result in transformers' form.

`hf.py` passes calls of `GenerationMixin.generate` on to this module, with everything that `generate` has prepared.
`open.py` prepares the generation and `loop.py` runs it.
"""

import functools
import logging
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)

from .. import compat
from ..drafts.base import Draft
from ..report import GenerationReport, joined_report
from ..targets.base import TextCache
from ..targets.engine import engine_of
from . import wrapping
from .batch import joined, rows_of
from .loop import raised_by_signal
from .open import Request, open_generation
from .refusal import CannotDraft
from .self_check import check_transformers
from .text import Text

logger = logging.getLogger(__name__)

NOT_FOR_FORWARD = ("inputs_tensor", "tokenizer", "assistant_tokenizer")
"""Arguments that `generate` hands on although it has used them itself. All others go to the model's passes."""

FULL_CACHE = "dynamic_full"
"""Before 5.24, `generate` makes a cache of this kind for every assistant: with all rows of layers that have a window,
because transformers' own loop could not take rows back. A caller cannot name it together with a cache."""


def check_request(model: Any, draft: Draft, config: GenerationConfig) -> None:
    """Check everything that does not depend on the prompt.

    Raises:
        ValueError: the draft does not fit the target, the engine refuses the target, or an option of `generate`
            cannot be combined with drafting.
        RuntimeError: an untested version of transformers gives wrong text with drafts.
    """
    check_transformers(_door)
    engine_of(model).check()
    draft.check_target(model)
    if draft.verification == "stock" and not isinstance(model, PreTrainedModel):
        raise ValueError(
            f'verification="stock" works with transformers\' own models, not with a {type(model).__name__}. Use "tree".'
        )
    check_options(config)
    if other := compat.options_set(config, compat.OF_OTHER_DRAFTS):
        raise CannotDraft(
            other[0], f"{other[0]} asks for another way of drafting. Leave it out, or leave out the draft."
        )
    if ignored := compat.options_set(config, compat.OF_ASSISTANTS):
        _warn_of_ignored(", ".join(ignored))


@functools.cache
def _warn_of_ignored(names: str) -> None:
    """Say once that options have no effect."""
    logger.warning(
        "%s have no effect with a draft of Dovetail, whose policy chooses the number of drafted tokens. Set "
        "draft.budget = TreeBudget(...) to choose it yourself.",
        names,
    )


def _door(draft: Draft) -> dict[str, Any]:
    """Return the arguments by which `generate` uses a draft: as an assistant once `hf.py` has wrapped its methods."""
    if wrapping.in_effect((GenerationMixin, "_assisted_decoding"), Draft):
        return {"assistant_model": draft}
    return {"custom_generate": generate_with_draft, "draft": draft}


def check_options(config: GenerationConfig) -> None:
    """Refuse options of `generate` that cannot be combined with drafting.

    Raises:
        ValueError: names the option.
    """
    if config.use_cache is False:
        raise CannotDraft("use_cache", "drafting needs the key/value cache. Leave out use_cache=False.")
    if config.num_beams > 1:
        raise CannotDraft(
            "num_beams", f"drafting works with greedy search and sampling, not with num_beams={config.num_beams}."
        )
    if getattr(config, "dola_layers", None) is not None:
        raise CannotDraft(
            "dola_layers",
            "drafting gives the text of greedy search or sampling, not of DoLa. Leave out dola_layers.",
        )
    if getattr(config, "assistant_ensemble_weight", None) is not None:
        raise CannotDraft(
            "assistant_ensemble_weight",
            "assistant_ensemble_weight mixes the assistant's probabilities into the target's. Drafting gives the text "
            "of the target alone. Leave it out.",
        )
    if config.cache_implementation not in (None, "dynamic", FULL_CACHE):
        raise CannotDraft(
            "cache_implementation",
            f"drafting brings its own preallocated cache. Leave out cache_implementation="
            f"{config.cache_implementation!r}.",
        )
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        raise CannotDraft(
            "output_attentions",
            "output_attentions and output_hidden_states are not available with a draft. Generate without "
            "assistant_model, or run the finished sequence through the model once.",
        )


def generate_with_draft(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    draft: Draft | None = None,
    streamer: Any = None,
    synced_gpus: bool = False,
    **model_kwargs: Any,
) -> Any:
    """Generate with tree drafting and exact verification.

    Runs inside `generate`: through `assistant_model=draft` once the package is imported, or without any patching of
    transformers as `generate(..., custom_generate=generate_with_draft, draft=draft)`, which passes no streamer.

    Args:
        model: the target.
        input_ids: (B, T) int64. The sequences of a batch are generated one after another.
        logits_processor: as `generate` prepared it.
        stopping_criteria: as `generate` prepared it.
        generation_config: as `generate` prepared it.
        draft: proposes the tokens. Its `report` is set.
        streamer: gets every token as it is chosen.
        synced_gpus: must be False.
        model_kwargs: cache, attention mask and further arguments of the target's forward pass.

    Returns:
        What plain `generate` returns: ids (B, length) int64, or a `GenerateDecoderOnlyOutput` that also holds the
        `report` of this call.

    Raises:
        ValueError: see `check_request`; a prompt longer than the target's table of positions; a batch whose arguments
            cannot be divided among its sequences, or with a streamer.
    """
    if draft is None:
        raise ValueError("no draft given. Pass draft=DovetailDraft.from_pretrained(...).")
    check_request(model, draft, generation_config)
    _check_prompt(model, input_ids, synced_gpus, model_kwargs)
    chooser = (logits_processor, stopping_criteria, generation_config, streamer)
    return _generate(model, input_ids, chooser, draft, model_kwargs)


def generate_plainly(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: Any = None,
    synced_gpus: bool = False,
    **model_kwargs: Any,
) -> Any:
    """Generate without a draft, one token per pass, on engines without their own loop.

    Arguments, result and errors are those of `generate_with_draft`.
    """
    engine_of(model).check()
    check_options(generation_config)
    _check_prompt(model, input_ids, synced_gpus, model_kwargs)
    chooser = (logits_processor, stopping_criteria, generation_config, streamer)
    return _generate(model, input_ids, chooser, None, model_kwargs)


Chooser = tuple[LogitsProcessorList, StoppingCriteriaList, GenerationConfig, Any]
"""Logits processors, stopping criteria, config and streamer of a text; see `Text`."""


def _generate(
    model: Any, input_ids: Tensor, chooser: Chooser, draft: Draft | None, model_kwargs: dict[str, Any]
) -> Any:
    """Run one sequence, or those of a batch one after another, and return what `generate` returns."""
    processors, criteria, config, streamer = chooser
    model_kwargs = {k: v for k, v in model_kwargs.items() if k not in NOT_FOR_FORWARD}
    if input_ids.shape[0] == 1:
        text = Text(input_ids, *chooser)
        cache, report = _run(model, text, config, draft, model_kwargs)
        text.end()
        if not config.return_dict_in_generate:
            return text.ids.clone()
        return compat.output_of_generate(text.ids.clone(), text.scores, text.logits, cache, report)
    if streamer is not None:
        raise CannotDraft("streamer", f"a streamer takes one sequence, not a batch of {input_ids.shape[0]}.")
    if not compat.ends_one_by_one(criteria):
        raise CannotDraft(
            "batch",
            "without an end token, the sequences of a batch go on until all have stopped. Pass eos_token_id, or call "
            "generate once for each sequence.",
        )
    given = compat.take_cache(dict(model_kwargs))
    texts, caches, reports = [], [], []
    for row in list(rows_of(input_ids, processors, model_kwargs)):
        text = Text(row.input_ids, row.processors, criteria, config)
        cache, report = _run(model, text, config, draft, dict(row.model_kwargs))
        texts.append(text)
        caches.append(cache)
        reports.append(report)
    report = joined_report(reports)
    if draft is not None:
        draft.report = report
    return joined(texts, config, caches, given, report)


def _run(
    model: Any, text: Text, config: GenerationConfig, draft: Draft | None, model_kwargs: dict[str, Any]
) -> tuple[Any, GenerationReport]:
    """Generate one text. Return its cache and the report."""
    engine = engine_of(model)
    given = compat.take_cache(model_kwargs)
    if config.cache_implementation == FULL_CACHE:
        given = None
    cache = engine.cache(given)
    attention_mask = model_kwargs.get("attention_mask")
    request = Request(
        text,
        config,
        cache,
        cached=_cached_tokens(text.length, cache, attention_mask, config),
        attention_mask=attention_mask,
        model_kwargs={k: v for k, v in model_kwargs.items() if v is not None},
    )
    begun = False
    try:
        # Nothing else refers to what is opened: an interrupt between two lines ends it with this frame, not later.
        with torch.no_grad(), open_generation(model, engine, request, draft) as decoder:
            begun = True
            decoder.run()
    except CannotDraft as error:
        error.begun = error.begun or begun  # of a call inside of this one
        raise
    except ValueError as error:
        if begun or raised_by_signal(error):
            raise
        raise CannotDraft("target", str(error)) from error
    return cache, decoder.report


def _check_prompt(model: Any, input_ids: Tensor, synced_gpus: bool, model_kwargs: dict[str, Any]) -> None:
    if model_kwargs.get("inputs_embeds") is not None:
        raise CannotDraft(
            "inputs_embeds", "drafting needs the prompt's tokens. Pass input_ids instead of inputs_embeds."
        )
    if input_ids.shape[1] == 0:
        raise CannotDraft("prompt", "the prompt is empty. Drafting needs at least one token.")
    if synced_gpus:
        raise CannotDraft(
            "synced_gpus", "drafting does not support synced_gpus (DeepSpeed ZeRO-3 or FSDP over several GPUs)."
        )
    positions = engine_of(model).position_limit
    if positions is not None and input_ids.shape[1] > positions:
        raise CannotDraft(
            "prompt",
            f"the prompt has {input_ids.shape[1]} tokens but the target has {positions} positions. Shorten it.",
        )


def _cached_tokens(length: int, cache: TextCache, attention_mask: Tensor | None, config: GenerationConfig) -> int:
    """Return how many tokens of the prompt the cache holds already.

    The prompt is either the whole text, earlier turns included, or only what is new. transformers tells the two apart
    by the length of the attention mask, which it drops, but remembers, where it is all ones.

    Args:
        length: tokens of the prompt.
        cache: of the engine.
        attention_mask: (1, m) or None.
        config: as `generate` prepared it.
    """
    past = cache.get_seq_length()
    covered = attention_mask.shape[1] if attention_mask is not None else compat.mask_length(config, length)
    cached = past if covered == length else 0
    if cached >= length > 0 and past:
        raise CannotDraft(
            "cache",
            f"the cache holds {past} tokens and input_ids has {length}, so there is no new token to start from.",
        )
    return cached
