"""One call of `generate` with a draft: checks, preparation, the loop, and the result in transformers' form.

Enters: what `GenerationMixin.generate` hands to a decoding method. Leaves: token ids or a
`GenerateDecoderOnlyOutput`. `hf.py` decides when this runs; `decoding.py` holds the loop itself.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import Cache, StaticCache
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .cache import refuse_reason
from .decoding import Decoder
from .drafting import FeatureDrafter
from .modeling import DovetailDraft, check_fits
from .report import GenerationReport
from .target import TorchTarget, check_target
from .text import Text

DRAFT_ROWS = 1024
"""Rows the draft's cache makes room for beyond the prompt; it doubles when they are used up."""

OWN_ARGUMENTS = ("attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position")
"""Forward arguments that the target handles itself; all others go to the prompt's pass unchanged."""


def check_request(model: PreTrainedModel, draft: DovetailDraft, config: GenerationConfig) -> None:
    """Everything that can be refused before the prompt is looked at.

    Raises:
        ValueError: the draft does not fit the target, the target cannot be verified, or an option of
            `generate` does not go with drafting.
    """
    check_target(model)
    check_fits(draft.config, model)
    if config.use_cache is False:
        raise ValueError("drafting needs the key/value cache; leave out use_cache=False.")
    if config.num_beams > 1:
        raise ValueError(f"drafting works with greedy search and sampling, got num_beams={config.num_beams}.")
    if config.cache_implementation not in (None, "dynamic", "dynamic_full"):
        raise ValueError(
            f"drafting brings its own preallocated cache; leave out cache_implementation="
            f"{config.cache_implementation!r}."
        )
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        raise ValueError(
            "output_attentions and output_hidden_states are not available with a draft; generate without "
            "assistant_model, or run the finished sequence through the model once."
        )


def generate_with_draft(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    draft: DovetailDraft | None = None,
    streamer: Any = None,
    synced_gpus: bool = False,
    **model_kwargs: Any,
) -> GenerateDecoderOnlyOutput | Tensor:
    """Generate with tree drafting and exact verification.

    Runs inside `generate`, either through `assistant_model=draft` once the package is imported, or
    without any patching of transformers as `generate(..., custom_generate=generate_with_draft, draft=draft)`
    (which passes no streamer).

    Args:
        model: the target.
        input_ids: (1, T) int64.
        draft: the draft model; its `report` is set when generation ends.

    Raises:
        ValueError: see `check_request`; more than one sequence; a prompt longer than the target's positions.
    """
    if draft is None:
        raise ValueError("no draft given: pass draft=DovetailDraft.from_pretrained(...).")
    check_request(model, draft, generation_config)
    cache = _checked_cache(model, model_kwargs)
    _check_prompt(model, input_ids, synced_gpus, model_kwargs)
    draft.attach_once(model)

    cached, mask = _cached_tokens(input_ids, cache, model_kwargs.get("attention_mask"), generation_config)
    text = Text(
        input_ids,
        processors=logits_processor,
        criteria=stopping_criteria,
        config=generation_config,
        streamer=streamer,
    )
    report = GenerationReport()
    draft.report = report
    past = cache.get_seq_length() - cached  # rows of turns that input_ids does not repeat
    target = TorchTarget(
        model,
        cache,
        max_length=past + generation_config.max_length,
        max_nodes=draft.budget.nodes,
        prefill_chunk=generation_config.prefill_chunk_size,
        model_kwargs={k: v for k, v in model_kwargs.items() if k not in OWN_ARGUMENTS and v is not None},
    )
    drafter = _drafter_for(draft, cache, text, report)
    decoder = Decoder(
        target,
        drafter,
        text,
        draft.budget,
        report,
        cached=cached,
        attention_mask=mask,
    )
    with target, torch.no_grad():
        decoder.run()
    text.end()
    if decoder.drafter is drafter:  # it did not fail; forgotten with the cache, unless somebody holds that
        draft.turns[cache] = Turn(drafter, cache.get_seq_length())
    if not generation_config.return_dict_in_generate:
        return text.ids.clone()
    return GenerateDecoderOnlyOutput(
        sequences=text.ids.clone(), scores=text.scores, logits=text.logits, past_key_values=cache
    )


@dataclass(frozen=True)
class Turn:
    """A drafter that has seen all `tokens` rows of a cache, kept for the next turn with that cache."""

    drafter: FeatureDrafter
    tokens: int


def _drafter_for(draft: DovetailDraft, cache: Cache, text: Text, report: GenerationReport) -> FeatureDrafter:
    """The drafter of the turn before, if this draft made the cache what it is; else a new one."""
    turn = draft.turns.pop(cache, None)
    own = next(draft.parameters())
    if (
        turn is not None
        and turn.tokens == cache.get_seq_length() > 0
        and (turn.drafter.device, turn.drafter.dtype) == (own.device, own.dtype)
    ):
        turn.drafter.clock = report.clock
        return turn.drafter
    return FeatureDrafter(draft, text.length + DRAFT_ROWS, report.clock)


def _checked_cache(model: PreTrainedModel, model_kwargs: dict[str, Any]) -> Cache:
    cache = model_kwargs.get("past_key_values")
    if cache is None:
        return DynamicCache(config=model.config.get_text_config(decoder=True))
    reason = "it is a static cache" if isinstance(cache, StaticCache) else refuse_reason(cache)
    if reason:
        raise ValueError(
            f"past_key_values ({type(cache).__name__}) cannot be used with a draft: {reason}. Pass a DynamicCache."
        )
    return cache


def _check_prompt(model: PreTrainedModel, input_ids: Tensor, synced_gpus: bool, model_kwargs: dict[str, Any]) -> None:
    if input_ids.shape[0] > 1:
        raise ValueError(
            f"drafting works on one sequence at a time, got a batch of {input_ids.shape[0]} "
            "(or num_return_sequences > 1). Call generate once for each, or leave out assistant_model."
        )
    if model_kwargs.get("inputs_embeds") is not None:
        raise ValueError("drafting needs the prompt's tokens: pass input_ids, not inputs_embeds.")
    if input_ids.shape[1] == 0:
        raise ValueError("the prompt is empty; drafting needs at least one token.")
    if synced_gpus:
        raise ValueError("drafting does not support synced_gpus (DeepSpeed ZeRO-3 or FSDP over several GPUs).")
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions is not None and input_ids.shape[1] > positions:
        raise ValueError(
            f"the prompt has {input_ids.shape[1]} tokens but the target has {positions} positions; shorten it."
        )


def _cached_tokens(
    input_ids: Tensor, cache: Cache, attention_mask: Tensor | None, config: GenerationConfig
) -> tuple[int, Tensor | None]:
    """How many tokens of `input_ids` the cache already holds, and the mask over cache and prompt.

    `input_ids` is either the whole text, earlier turns included, or only what is new; transformers tells
    the two apart by the length of the attention mask (dropped, but remembered, where it is all ones).
    """
    past = cache.get_seq_length()
    length = input_ids.shape[1]
    covered = attention_mask.shape[1] if attention_mask is not None else getattr(config, "_mask_length", length)
    cached = past if covered == length else 0
    if cached >= length > 0 and past:
        raise ValueError(
            f"past_key_values holds {past} tokens and input_ids has {length}: there is no new token to start from."
        )
    return cached, attention_mask
